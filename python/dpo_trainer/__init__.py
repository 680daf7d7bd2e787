"""A trainer for Direct Preference Optimization: `transformers.Trainer` with the fused loss of `dpo_kernels`."""

import os
from typing import TYPE_CHECKING

from dpo_kernels._lazy import names_of

# torch reads this variable at its first allocation. It gives large tensors on a CPU pages of 2 MB: every step maps gigabytes
# of memory, which costs time for each page. Set it to 0 to keep small pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from .batch.collator import PairCollator
    from .data.files import load_pairs
    from .errors import ConfigError, DataError, ModelError, OutputError, UsageError
    from .model.loading import load_model, load_tokenizer
    from .settings.config import DPOConfig
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

if not TYPE_CHECKING:  # with __getattr__, a type checker would accept any name
    __getattr__, __dir__ = names_of(
        __name__,
        {
            **dict.fromkeys(("ConfigError", "DataError", "ModelError", "OutputError", "UsageError"), "errors"),
            **dict.fromkeys(("load_model", "load_tokenizer"), "model.loading"),
            "DPOConfig": "settings.config",
            "DPOTrainer": "trainer",
            "PairCollator": "batch.collator",
            "load_pairs": "data.files",
        },
    )
