"""Several objectives as one: what they need of a call, their weighted sum, the rewards of the first."""

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
    """Raise unless the objectives can be computed from what the call gives; user callables are not judged.

    Args:
        objectives: from `build` or `resolve`.
        has_reference: whether the call brings a reference; None if that is not known yet.

    Raises:
        ValueError: loss_weights of another length; label_smoothing out of an objective's range (the range is said), or
            given though no objective of the mix has it; an objective that needs a reference, without one.
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
                    f"loss_type {entry.info.name!r} compares the policy with a reference, and none was given: pass the "
                    f"reference's logits (or hidden states), or ref_logps [2P] (zeros stand for a uniform reference). "
                    f"Objectives without a reference: {free}"
                )


def couples_pairs(objectives: Sequence[Objective]) -> bool:
    """Whether a pair's loss may depend on the batch's other pairs; assumed of user callables that do not deny it.

    A callable may carry the attribute `couples_pairs = False`, so that the linear path can take it in chunks.
    """
    return any(
        entry.info.couples_pairs if isinstance(entry, Named) else getattr(entry, "couples_pairs", True)
        for entry in objectives
    )


def needs_token_kl(objectives: Sequence[Objective]) -> bool:
    """Whether any named objective reads Pairs.chosen_kl."""
    return any(isinstance(entry, Named) and entry.info.needs_token_kl for entry in objectives)


def needs_reference(objectives: Sequence[Objective]) -> bool:
    """Whether any objective compares with a reference; assumed of user callables."""
    return any(entry.info.needs_reference if isinstance(entry, Named) else True for entry in objectives)


def mix(
    pairs: Pairs,
    loss_type: str | Objective | Sequence[str | Objective],
    loss_weights: Sequence[float] | None = None,
) -> Tensor:
    """The weighted sum of one or several objectives, [P]. Weights default to 1 each."""
    functions = resolve(loss_type)
    weights = [1.0] * len(functions) if loss_weights is None else list(loss_weights)
    losses = [
        function(pairs) if w == 1.0 else w * function(pairs) for function, w in zip(functions, weights, strict=True)
    ]
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)


def rewards(pairs: Pairs, loss_type: str | Objective | Sequence[str | Objective]) -> Rewards:
    """(chosen, rejected) rewards [P] to report: the first objective's, beta times the log-ratio for a user callable."""
    first = resolve(loss_type)[0]
    return first.rewards(pairs) if isinstance(first, Named) else logratio_rewards(pairs)
