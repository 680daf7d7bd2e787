"""Mixes of objectives: checks of a call's arguments, the weighted sum of the losses, and the reported rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .formulas import logratio_rewards
from .named import BoundObjective, Named, RunningObjective, check_smoothing
from .pairs import Objective, Pairs, Rewards
from .registry import OBJECTIVES
from .text import resolve


def check(
    objectives: Sequence[Objective],
    loss_weights: Sequence[float] | None,
    label_smoothing: float | Tensor,
    *,
    has_reference: bool | None = None,
) -> None:
    """Raise unless the named objectives can be computed from the call's arguments; user callables are not checked.

    Args:
        objectives: from `build` or `resolve`.
        loss_weights: one weight per objective, or None.
        label_smoothing: the call's value, a number or [P].
        has_reference: whether the call has a reference; None if that is not known yet.

    Raises:
        ValueError: loss_weights has the wrong length; label_smoothing is outside an objective's range (the message names
            the range), or no objective of the mix supports it; an objective needs a reference and there is none.
    """
    if loss_weights is not None and len(loss_weights) != len(objectives):
        raise ValueError(f"loss_weights has {len(loss_weights)} entries for {len(objectives)} objectives in loss_type")
    named = [entry.bound if isinstance(entry, RunningObjective) else entry for entry in objectives]
    bound = [entry for entry in named if isinstance(entry, BoundObjective)]
    takers = [entry for entry in bound if entry.info.smoothing_range is not None]
    for entry in takers:
        if entry.label_smoothing is None:
            check_smoothing(entry.info.name, label_smoothing)
    if bound and not takers and len(bound) == len(named):
        check_smoothing(bound[0].info.name, label_smoothing)
    if has_reference is False:
        for entry in bound:
            if entry.info.needs_reference:
                free = ", ".join(row.name for row in OBJECTIVES.values() if not row.needs_reference)
                raise ValueError(
                    f"loss_type {entry.info.name!r} compares the policy with a reference, but none was given: pass the "
                    f"reference's logits (or hidden states), or ref_logps [2P] (zeros for a uniform reference). "
                    f"Objectives that need no reference: {free}"
                )


def couples_pairs(objectives: Sequence[Objective]) -> bool:
    """Whether a pair's loss may depend on other pairs of the batch.

    A user callable counts as coupled unless it has the attribute `couples_pairs = False`. With that attribute the linear
    path can evaluate it chunk by chunk.
    """
    return any(
        entry.info.couples_pairs if isinstance(entry, Named) else getattr(entry, "couples_pairs", True)
        for entry in objectives
    )


def needs_token_kl(objectives: Sequence[Objective]) -> bool:
    """Whether any named objective reads Pairs.chosen_kl."""
    return any(isinstance(entry, Named) and entry.info.needs_token_kl for entry in objectives)


def needs_reference(objectives: Sequence[Objective]) -> bool:
    """Whether any objective compares the policy with a reference; user callables count as ones that do."""
    return any(entry.info.needs_reference if isinstance(entry, Named) else True for entry in objectives)


def mix(
    pairs: Pairs,
    loss_type: str | Objective | Sequence[str | Objective],
    loss_weights: Sequence[float] | None = None,
) -> Tensor:
    """The weighted sum of one or several objectives, [P]; each weight defaults to 1."""
    functions = resolve(loss_type)
    weights = [1.0] * len(functions) if loss_weights is None else list(loss_weights)
    losses = [
        function(pairs) if w == 1.0 else w * function(pairs) for function, w in zip(functions, weights, strict=True)
    ]
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)


def rewards(pairs: Pairs, loss_type: str | Objective | Sequence[str | Objective]) -> Rewards:
    """(chosen, rejected) rewards [P] of the first objective; for a user callable, beta times the log-ratio."""
    first = resolve(loss_type)[0]
    return first.rewards(pairs) if isinstance(first, Named) else logratio_rewards(pairs)
