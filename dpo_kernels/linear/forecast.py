"""The plan that a call would take, without the call: for those who want to know before there are hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import objectives
from ..arguments import LINEAR_STATISTICS, PairSettings, batch_of, check_settings, check_statistics, count_pairs
from ..objectives import Objective
from ..stages import Transform
from . import pairs, tokens
from .call import NO_REFERENCE, LMHead, Reference
from .door import loss_call
from .planner import Plan


def plan_linear_dpo_loss(
    counts: Sequence[int],
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    needs_hidden: bool = True,
    projects_reference: bool = False,
    memory_budget: int | str | None = None,
    grad_filter: float | str | None = "auto",
    loss_type: str | Objective | Sequence[str | Objective] = "sigmoid",
    statistics: Sequence[str] = (),
    kl_coef: float = 0.0,
    reduction: str = "mean",
    flat_softmax: bool = False,
) -> Plan:
    """The plan that `linear_dpo_loss` takes for a batch (`DPOOutput.plan`): its strategy, chunks, bytes and flops.

    Nothing is projected and no value is read. Call it where the loss would be called: torch.autocast, torch.no_grad and
    `use_backend` count as they do there. Arguments of `linear_dpo_loss` that are missing here do not change the plan.

    Two facts are known only at the call. A filtered gradient turns exact where the softmax is flat, which the logits show
    (`flat_softmax`). And a GPU is asked for the memory that is free now; where it has less at the call, the chunks are smaller.

    Args:
        counts: scored tokens of each sequence [2P], chosen ones first: those with a label and a weight other than 0.
        weight: [V, H], the head; its device, dtype and `requires_grad` count. The hidden states have the same device and dtype.
        bias: [V] or None; its `requires_grad` counts.
        needs_hidden: whether the hidden states need a gradient.
        projects_reference: whether the reference comes as `ref_hidden`; False where it comes as `ref_logps` or not at all.
        memory_budget, grad_filter, loss_type, statistics, kl_coef, reduction: as in `linear_dpo_loss`.
        flat_softmax: whether a filtered gradient turns exact; without a filter it changes nothing.

    Returns:
        The plan, with bytes and flops as numbers; `describe()` is a line of text.

    Raises:
        ValueError, TypeError: as `linear_dpo_loss`; also for a negative count.
    """
    if any(count < 0 for count in counts):
        raise ValueError(f"counts must not be negative; got {min(counts)}")
    head = LMHead(weight, bias)
    functions = objectives.resolve(loss_type)
    check_settings(
        functions,
        loss_weights=None,
        label_smoothing=0.0,
        logit_softcap=None,
        kl_coef=kl_coef,
        reduction=reduction,
        has_reference=True if projects_reference else None,
    )
    reported = check_statistics(statistics, LINEAR_STATISTICS)
    # What a call decides does not depend on how many tokens there are, so sequences without tokens stand for the batch.
    device = weight.device
    hidden = torch.empty(0, weight.shape[-1], dtype=weight.dtype, device=device, requires_grad=needs_hidden)
    head.check(hidden)
    labels = torch.empty(0, dtype=torch.int64, device=device)
    bounds = torch.zeros(len(counts) + 1, dtype=torch.int64, device=device)
    batch = batch_of(hidden, labels, bounds, None, -100, name="hidden", axis="H", vocab=head.vocab)
    settings = PairSettings(count_pairs(batch), functions, None, 0.1, 0.0, kl_coef=kl_coef, reduction=reduction)
    reference = Reference(batch.rows.detach(), weight.detach(), None) if projects_reference else NO_REFERENCE
    call = loss_call(batch, head, reference, Transform(-100), settings, reported, memory_budget, grad_filter)
    if call.strategy == "whole_pairs":
        return pairs.plan_of(call, weight, counts)
    plan = tokens.plan_of(call, sum(counts))
    return tokens.exact_plan(call, plan) if flat_softmax and plan.strategy == "filtered" else plan
