"""LLaMA-Factory's DPO step: its CustomDPOTrainer with a reference model (stage dpo, finetuning_type full)."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tempfile
import types

import torch
from torch import Tensor
from transformers import TrainingArguments

from ..compare import Size, Step
from ..material import model_of, pairs_of, step_of_trainer, tokenizer_of

# LLaMA-Factory 0.9.1 to 0.9.3 accept only older versions of datasets, two of which need aiohttp. The step uses no data set.
os.environ["DISABLE_VERSION_CHECK"] = "1"
# LLaMA-Factory 0.9.4 and later import torchaudio at the top, and use it only to read sound files.
sys.modules.setdefault("torchaudio", types.ModuleType("torchaudio"))

from llamafactory.hparams import FinetuningArguments  # noqa: E402
from llamafactory.train.dpo.trainer import CustomDPOTrainer  # noqa: E402


def batch_of(size: Size) -> dict[str, Tensor]:
    """A batch as LLaMA-Factory's collator makes it: the chosen sequences, then the rejected, with -100 labels at prompts."""
    tokenizer = tokenizer_of(size)
    rows = pairs_of(size)
    ids, labels = [], []
    for answer in ("chosen", "rejected"):
        for row in rows:
            prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
            completion = tokenizer(row[answer], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            ids.append(torch.tensor(prompt + completion))
            labels.append(torch.tensor([-100] * len(prompt) + completion))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def step_of(size: Size) -> Step:
    """The step of the trainer: `CustomDPOTrainer.compute_loss`, which runs policy and reference."""
    model, folder = model_of(size), tempfile.TemporaryDirectory()
    trainer = CustomDPOTrainer(
        model=model,
        ref_model=model_of(size, seed=1),
        finetuning_args=FinetuningArguments(stage="dpo", finetuning_type="full", pref_beta=0.1),
        processor=None,
        args=TrainingArguments(
            folder.name,
            use_cpu=True,
            report_to=[],
            remove_unused_columns=False,
            per_device_train_batch_size=size.pairs,
        ),
        tokenizer=tokenizer_of(size),
    )
    batch = batch_of(size)

    def step() -> tuple[float, dict[str, Tensor]]:
        assert folder  # lives as long as the step
        return step_of_trainer(trainer, batch)

    return step


def versions() -> dict[str, str]:
    """Of LLaMA-Factory and of what it stands on."""
    return {name: importlib.metadata.version(name) for name in ("llamafactory", "transformers", "trl", "peft")}
