"""Computes a batch's loss from hidden states and LM head, one chunk of logits at a time, or from all logits at once."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from dpo_kernels import DPOOutput, dpo_loss, linear, linear_dpo_loss
from dpo_kernels.linear import planner

from ..errors import ConfigError
from .references import Reference
from .split import Batch, SplitModel

logger = logging.getLogger("dpo_trainer")


def choose(policy: SplitModel, reference: Reference, wanted: str) -> str:
    """Choose the loss path, "linear" or "logits".

    Args:
        wanted: "linear", "logits" or "auto". "auto" is "linear" if the models allow it; else the reason is logged.

    Raises:
        ConfigError: "linear" is wanted, but the models do not allow it.
    """
    obstacle = _obstacle_to_linear(policy, reference)
    if wanted == "linear" and obstacle:
        raise ConfigError(f"loss_path: 'linear' is not possible here: {obstacle}")
    if wanted == "auto" and obstacle:
        logger.info("loss path: logits, because %s", obstacle)
    return "logits" if obstacle or wanted == "logits" else "linear"


def _obstacle_to_linear(policy: SplitModel, reference: Reference) -> str | None:
    if reference is None or policy.obstacle_to_linear:
        return policy.obstacle_to_linear
    other = reference.split
    if obstacle := other.obstacle_to_linear:
        return f"in the reference, {obstacle}"
    if other.after_head != policy.after_head:
        return "policy and reference scale or cap their logits differently"
    return None


def memory_budget(given: int | str | None, policy: SplitModel) -> int | str:
    """The linear path's memory budget: `given`, or `planner.step_budget` for the shape of the head."""
    if given is not None:
        return given
    weight = policy.head.weight
    vocab, hidden_size = weight.shape
    return planner.step_budget(hidden_size, vocab, linear.card_memory(weight.device))


def from_hidden(policy: SplitModel, reference: Reference, batch: Batch, options: dict[str, Any]) -> DPOOutput:
    """`linear_dpo_loss` of a batch. The head is called as a module, so that its hooks run.

    Args:
        options: the other keyword arguments of `linear_dpo_loss`.
    """
    if reference is not None:
        ref_hidden, head = reference.packed_hidden(batch), reference.split.head
        options = {**options, "ref_hidden": ref_hidden, "ref_weight": head.weight, "ref_bias": head.bias}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, DPOOutput]:
        output = linear_dpo_loss(hidden, weight, batch["labels"], bias=bias, **policy.after_head, **options)
        return output.loss, output  # hooks of a module look for tensors in its return value

    return policy.through_head(loss, policy.packed_hidden(batch))[1]


def from_logits(policy: SplitModel, reference: Reference, batch: Batch, options: dict[str, Any]) -> DPOOutput:
    """`dpo_loss` of a batch. The gradient is written in place over the logits.

    Args:
        options: the other keyword arguments of `dpo_loss`.
    """
    ref_logits: Any = None if reference is None else reference.packed_logits(batch)
    logits, after_head = policy.packed_logits(batch), policy.after_head
    if reference is not None and reference.split.after_head != after_head:
        # The kernels apply the same scale and softcap to both models. These models differ, so apply their own here.
        ref_logits, logits, after_head = reference.split.finish(ref_logits), policy.finish(logits), {}
    return dpo_loss(logits, batch["labels"], ref_logits=ref_logits, inplace_backward=True, **after_head, **options)
