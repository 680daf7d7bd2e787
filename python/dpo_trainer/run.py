"""The interface of a training run for callbacks, report and model card."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from transformers import TrainerState

from .data.account import Account
from .model.references import Reference
from .model.split import SplitModel
from .settings.config import DPOConfig


class Run(Protocol):
    """The attributes and methods of a trainer that callbacks, report and model card may use.

    Attributes:
        accounts: for every dataset, what was read and what was left out.
        evaluated: single pairs of the last evaluations (`watch.evaluated.EvaluatedPairs`), by the prefix of their metrics.
        reference: None if no reference is in memory.
        reference_kind: the reference in words.
    """

    args: DPOConfig
    state: TrainerState
    accelerator: Accelerator
    is_in_train: bool
    policy: SplitModel
    reference: Reference
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any
    accounts: list[Account]
    evaluated: dict[str, Any]

    @property
    def reference_kind(self) -> str: ...

    def pause(self) -> AbstractContextManager[None]:
        """A context whose duration does not count in tokens_per_second."""

    def reference_logps(self, rows: Any, *, batch_size: int) -> tuple[list[float], list[float]]:
        """Summed log-probabilities, in nats, of tokenised rows' chosen and rejected answers under the reference."""

    def write_report(self, *, finished: bool) -> Path | None:
        """Write the report, and the summary too if the run is finished."""

    def save_model(self) -> None:
        """Save the model and its card into `output_dir`."""
