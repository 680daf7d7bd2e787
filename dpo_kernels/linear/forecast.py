"""The plan of a batch without running it, for example before hidden states exist."""

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
    """The plan that `linear_dpo_loss` would use for a batch: strategy, chunks, bytes and flops.

    No logits are computed and no values are read. The result depends on torch.autocast, torch.no_grad and `use_backend` like
    the call itself. Arguments of `linear_dpo_loss` that are missing here do not change the plan.

    The plan of the call (`DPOOutput.plan`) can differ in two cases. A filtered gradient becomes exact if too many entries
    exceed its threshold, which only the logits show (`flat_softmax`). On a GPU the chunks are smaller if less memory is free at
    the call than now.

    Args:
        counts: [2P], number of scored tokens of each sequence (label other than `ignore_index`, weight other than 0); the
            chosen sequences come first.
        weight: [V, H], the LM head; its device, dtype and `requires_grad` matter. The hidden states have the same device and
            dtype.
        bias: [V] or None; its `requires_grad` matters.
        needs_hidden: whether the hidden states need a gradient.
        projects_reference: whether the call gets `ref_hidden`; False for `ref_logps` or no reference.
        memory_budget: as in `linear_dpo_loss`.
        grad_filter: as in `linear_dpo_loss`.
        loss_type: as in `linear_dpo_loss`.
        statistics: as in `linear_dpo_loss`.
        kl_coef: as in `linear_dpo_loss`.
        reduction: as in `linear_dpo_loss`.
        flat_softmax: gives the plan in which a filtered gradient became exact; no effect without a filter.

    Returns:
        The plan; `describe()` gives one line of text.

    Raises:
        TypeError: as `linear_dpo_loss`.
        ValueError: as `linear_dpo_loss`, or a count is negative.
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
    # The strategy does not depend on the number of tokens, so a batch of empty sequences is enough to choose it.
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
