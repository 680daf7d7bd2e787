"""DPOConfig: the settings of a run as transformers takes them, and the checks across rows."""

import dataclasses
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

    Names are TRL's where TRL has the setting. Some defaults of TrainingArguments are changed to what preference
    training wants (see the fields); `label_smoothing` here is DPO's, `label_smoothing_factor` has no effect.

    Raises:
        ConfigError: a value is out of range or unknown; the message lists what is known.
    """

    def __new__(cls, *_: Any, **given: Any) -> "DPOConfig":
        """Before dataclasses refuse a name that they do not know: for TRL's names, a ConfigError says what to use."""
        trl.check_known(given, (field.name for field in dataclasses.fields(cls)))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.loss_type is None:  # HfArgumentParser's default of a list
            self.loss_type = "sigmoid"
        read_words(self, settings_table())
        check_settings(self)
        self.diagnostics = as_mapping("diagnostics", self.diagnostics)
        self.model_init_kwargs = as_mapping("model_init_kwargs", self.model_init_kwargs)
        self.check_reading(as_mapping)
        Limits.of(self.diagnostics)
        if not torch.accelerator.is_available():
            self.use_cpu = True  # transformers refuses 16-bit autocast on a CPU that was not asked for
        with without_pace(self):
            super().__post_init__()
        if self.device.type == "cpu" and self.fp16:
            raise ConfigError("fp16: needs an accelerator; on a CPU it would be ignored without a word. Use bf16 there")
        if self.device.type == "cpu" and self.use_liger_kernel:
            raise ConfigError(
                "use_liger_kernel: needs an accelerator: its Triton kernels would stay in every model of this process. The "
                "loss is fused without it"
            )
        trl.check_accelerator(self.accelerator_config)
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # nothing to copy to; PyTorch would warn at every loader

    @property
    def padded_to(self) -> int | None:
        """`pad_to_multiple_of` as a number."""
        return self.pad_to_multiple_of if isinstance(self.pad_to_multiple_of, int) else None

    @property
    def run_folder(self) -> Path:
        """`output_dir` as a path."""
        return Path(str(self.output_dir))


def check_settings(config: DPOConfig) -> None:
    """Raise ConfigError for a setting out of its range, or one that contradicts another."""
    trl.check_values(config)
    check_fields(config, settings_table())
    objective.check(config)
    check_together(config)
    check_budget(config)
