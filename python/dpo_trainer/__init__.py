"""A thin trainer for Direct Preference Optimization: `transformers.Trainer` with the fused loss of `dpo_kernels`."""

from .collator import PairCollator
from .config import DPOConfig
from .data import load_pairs
from .errors import ConfigError, DataError, ModelError, OutputError, UsageError
from .model import load_model, load_tokenizer
from .trainer import DPOTrainer

__all__ = [
    "ConfigError",
    "DPOConfig",
    "DPOTrainer",
    "DataError",
    "ModelError",
    "OutputError",
    "PairCollator",
    "UsageError",
    "load_model",
    "load_pairs",
    "load_tokenizer",
]
