"""DPOConfig: the settings of a run as TrainingArguments of transformers, and their checks."""

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..errors import ConfigError
from . import objective, trl
from .checks import as_mapping, check_budget, check_together
from .diagnoses import Limits
from .fields import DPOFields
from .pace import without_pace
from .rows import settings_table
from .table import check_fields, read_words


@dataclass
class DPOConfig(DPOFields, TrainingArguments):  # type: ignore[misc] # logging_steps and save_steps may be None here
    """Settings of a DPO run: those of `transformers.TrainingArguments` and those of `DPOFields`.

    Settings that TRL has too have TRL's names. Some defaults of TrainingArguments are changed for preference training
    (see the fields). `label_smoothing` is that of DPO. `label_smoothing_factor` has no effect.

    Raises:
        ConfigError: a setting or value is unknown or out of range, or settings contradict each other.
    """

    def __new__(cls, *_: Any, **given: Any) -> "DPOConfig":
        """Raise a ConfigError that says what to use for TRL's unknown names, before the dataclass refuses them."""
        trl.check_known(given, (field.name for field in dataclasses.fields(cls)))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.loss_type is None:  # HfArgumentParser's default for lists
            self.loss_type = "sigmoid"
        read_words(self, settings_table())
        check_settings(self)
        self.diagnostics = as_mapping("diagnostics", self.diagnostics)
        self.model_init_kwargs = as_mapping("model_init_kwargs", self.model_init_kwargs)
        self.check_reading(as_mapping)
        Limits.of(self.diagnostics)
        if not torch.accelerator.is_available():
            self.use_cpu = True  # without use_cpu, transformers refuses 16-bit autocast on a CPU
        if self.deepspeed and importlib.util.find_spec("deepspeed") is None:
            raise ConfigError("deepspeed: the package deepspeed is not installed; pip install deepspeed")
        with without_pace(self):
            super().__post_init__()
        if self.device.type == "cpu" and self.fp16:
            raise ConfigError("fp16: needs an accelerator; a CPU would ignore it without a message. Use bf16 there")
        if self.device.type == "cpu" and self.fsdp:
            raise ConfigError("fsdp: needs accelerators; on CPUs accelerate would ignore it without a message")
        if self.device.type == "cpu" and self.use_liger_kernel:
            raise ConfigError(
                "use_liger_kernel: needs an accelerator. Its Triton kernels would change every model of this process. The "
                "loss is fused without it"
            )
        trl.check_accelerator(self.accelerator_config)
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is no device to copy to, and PyTorch would warn

    @property
    def padded_to(self) -> int | None:
        """`pad_to_multiple_of` as a number."""
        return self.pad_to_multiple_of if isinstance(self.pad_to_multiple_of, int) else None

    @property
    def run_folder(self) -> Path:
        """`output_dir` as a path."""
        return Path(str(self.output_dir))


def check_settings(config: DPOConfig) -> None:
    """Raise ConfigError for settings that are out of range or contradict each other."""
    trl.check_values(config)
    check_fields(config, settings_table())
    objective.check(config)
    check_together(config)
    check_budget(config)
