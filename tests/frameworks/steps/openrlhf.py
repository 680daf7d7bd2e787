"""OpenRLHF's DPO step: `DPOTrainer.fit` on one batch of its `RewardDataset`, with `Actor` as policy and reference.

OpenRLHF imports deepspeed and flash-attn when it is imported. Both need a GPU and are stubs here: no function of deepspeed is
called, because a strategy object in this file does what OpenRLHF's DeepSpeed strategy does (backward, then the optimizer's step,
which only reads the gradients here). flash-attn's cross entropy does not exist, so OpenRLHF takes its PyTorch branch.
"""

from __future__ import annotations

from importlib import metadata
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

from ..compare import Size, Step
from ..material import gradients, model_of, pairs_of, tokenizer_of
from . import stubs

stubs.stub("deepspeed")
stubs.flash_attn()
# The older versions move the batch to the current GPU.
torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]

from openrlhf.datasets import RewardDataset  # noqa: E402
from openrlhf.models import Actor  # noqa: E402
from openrlhf.trainer.dpo_trainer import DPOTrainer  # noqa: E402

_LOSS = {"label_smoothing": 0.1, "aux_loss_coef": 0.0, "nll_loss_coef": 0.2}


class _Strategy:
    """OpenRLHF's strategy on one CPU; keeps the loss and the gradients of the last step."""

    ring_attn_group = None
    accumulated_gradient = 1

    def __init__(self, packed: bool) -> None:
        never = 10**9
        self.args = SimpleNamespace(
            # up to 0.9 all settings are in one namespace, later in one for each topic
            **_LOSS,
            ipo=False,
            packing_samples=packed,
            use_wandb=None,
            use_tensorboard=None,
            train_batch_size=1,
            eval_steps=never,
            save_steps=never,
            logging_steps=never,
            prompt_key="prompt",
            chosen_key="chosen",
            rejected_key="rejected",
            model=SimpleNamespace(**_LOSS, ipo_enable=False),
            ds=SimpleNamespace(packing_samples=packed),
            logger=SimpleNamespace(wandb=SimpleNamespace(key=None), tensorboard_dir=None, logging_steps=never),
            train=SimpleNamespace(batch_size=1),
            eval=SimpleNamespace(steps=never),
            ckpt=SimpleNamespace(save_steps=never),
            data=SimpleNamespace(prompt_key="prompt", chosen_key="chosen", rejected_key="rejected"),
        )

    def is_rank_0(self) -> bool:
        return False

    def backward(self, loss: Tensor, model: torch.nn.Module, optimizer: Any) -> None:
        loss.backward()
        self.loss, self.gradients = loss.item(), gradients(model)

    def optimizer_step(self, optimizer: Any, model: torch.nn.Module, scheduler: Any) -> None:
        model.zero_grad()

    def get_grad_norm(self, model: torch.nn.Module) -> float:
        return 0.0

    def all_reduce(self, logs: dict[str, float]) -> dict[str, float]:
        return logs


def _actor(model: torch.nn.Module, packed: bool) -> Actor:
    actor = Actor(model)
    actor.packing_samples = packed  # the constructor sets it only for a model that it loads
    return actor


def step_of(size: Size, packed: bool = False) -> Step:
    """See compare.py. With `packed` the batch is one row without padding, as with --packing_samples."""
    strategy, tokenizer = _Strategy(packed), tokenizer_of(size)
    rows = Dataset.from_list(pairs_of(size))
    dataset = RewardDataset(rows, tokenizer, 2048, strategy, is_dpo=True, num_processors=None)
    policy = _actor(model_of(size, seed=0), packed)
    trainer = DPOTrainer(
        model=policy,
        ref_model=_actor(model_of(size, seed=1), packed).requires_grad_(False),
        strategy=strategy,
        tokenizer=tokenizer,
        optim=None,
        train_dataloader=DataLoader(dataset, batch_size=size.pairs, collate_fn=dataset.collate_fn),
        eval_dataloader=None,
        scheduler=SimpleNamespace(get_last_lr=lambda: [0.0]),
        beta=0.1,
        max_epochs=1,
    )

    def step() -> tuple[float, dict[str, Tensor]]:
        trainer.fit(strategy.args, num_update_steps_per_epoch=1)
        return strategy.loss, strategy.gradients

    return step


def versions() -> dict[str, str]:
    return {"openrlhf": metadata.version("openrlhf"), "transformers": transformers.__version__}
