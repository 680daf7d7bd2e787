"""TRL's DPOTrainer, from 0.12 on: its own tokenising, collator, data loader and loss."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..compare import Size
from ..material import model_of, pairs_of, step_of_trainer, tokenizer_of


def step_of(size: Size) -> Callable[[], tuple[float, dict[str, Tensor]]]:
    from trl import DPOConfig, DPOTrainer

    return step_with(DPOTrainer, DPOConfig, size)


def step_with(trainer_class: Any, config: Any, size: Size) -> Callable[[], tuple[float, dict[str, Tensor]]]:
    """The step of a trainer with the arguments of TRL's."""
    from datasets import Dataset

    folder = tempfile.TemporaryDirectory()
    trainer = trainer_class(
        model=model_of(size, seed=0),
        ref_model=model_of(size, seed=1),
        args=config(
            output_dir=folder.name,
            per_device_train_batch_size=size.pairs,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            max_length=2048,
        ),
        train_dataset=Dataset.from_list(pairs_of(size)),
        processing_class=tokenizer_of(size),
    )
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))

    def step() -> tuple[float, dict[str, Tensor]]:
        assert folder  # the folder lives as long as the step
        return step_of_trainer(trainer, batch)

    return step


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("trl", "transformers")}
