"""A training run as its observers see it."""

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
    """What callbacks, report and model card may use of a trainer.

    Attributes:
        accounts: of every dataset, what was read and what was left out.
        evaluated: single pairs of the last evaluations (`watch.evaluated.EvaluatedPairs`), by the prefix of their metrics.
        reference: None where no reference is in memory.
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
        """A context whose time does not count in tokens_per_second."""

    def reference_logps(self, rows: Any, *, batch_size: int) -> tuple[list[float], list[float]]:
        """Summed log-probabilities, in nats, of tokenised rows' answers, chosen and rejected, under the reference."""

    def write_report(self, *, finished: bool) -> Path | None:
        """Write the report and, once the run is finished, the summary."""

    def save_model(self) -> None:
        """Save the model and its card into `output_dir`."""
