"""TRL's DPOTrainer with Liger's loss: TRL builds the loss object and calls it with hidden states and the LM head."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Callable
from dataclasses import fields
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..compare import TINY, Size
from ..material import model_of, pairs_of, step_of_trainer, tokenizer_of


def trainer_of(size: Size, folder: str) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    settings = {field.name for field in fields(DPOConfig)}
    arguments = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=size.pairs,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        max_length=2048,
        **({"use_liger_loss": True} if "use_liger_loss" in settings else {"use_liger_kernel": True}),
    )
    # The later setting also exchanges the model's layers, for which Liger needs a GPU.
    with mock.patch("transformers.trainer.apply_liger_kernel", create=True):
        return DPOTrainer(
            model=model_of(size, seed=0),
            ref_model=model_of(size, seed=1),
            args=arguments,
            train_dataset=Dataset.from_list(pairs_of(size)),
            processing_class=tokenizer_of(size),
        )


def step_of(size: Size) -> Callable[[], tuple[float, dict[str, Tensor]]]:
    import trl.trainer.dpo_trainer as theirs

    if size == TINY:
        # TRL has the loss compiled. That takes half a minute, too long for a check of the results; measurements include it.
        torch.compiler.set_stance("force_eager")
    folder = tempfile.TemporaryDirectory()
    built: dict[str, Any] = {}
    batch = None

    def step() -> tuple[float, dict[str, Tensor]]:
        nonlocal batch
        assert folder  # the folder lives as long as the step
        # The trainer's constructor builds the loss object, of the class that is there now. Each call of apply makes a class.
        package = theirs.LigerFusedLinearDPOLoss.__module__.partition(".")[0]
        if package not in built:
            built[package] = trainer_of(size, folder.name)
        trainer = built[package]
        trainer.model.train()
        if batch is None:
            batch = next(iter(trainer.get_train_dataloader()))
        return step_of_trainer(trainer, batch)

    return step


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("liger-kernel", "trl", "transformers")}
