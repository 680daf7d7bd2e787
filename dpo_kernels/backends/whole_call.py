"""The loss of a whole call, from logits to a number and back, put together from a backend's stages.

A backend may have functions of these names of its own, which do the same with fewer launches (`preference_forward`,
`preference_backward`; without the argument `stages`). These serve all others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..stages import Stages, Transform, small_dtype, spread, token_rows

#: Rows of a call's results per sequence, [2P] each, before the means of the statistics: sums of log-probabilities under
#: policy and reference, rewards, d loss / d sum, and the number of scored tokens.
SEQUENCE_ROWS = ("logps", "ref_logps", "rewards", "coef", "counts")
#: Compiled kernels know them by their numbers.
REDUCTIONS = ("mean", "sum", "none")


class Weighting(NamedTuple):
    """How tokens join sequences, and the losses of P pairs one number.

    Attributes:
        token_weights: [B, T] or None for 1; read on scored tokens only, where none is 0.
        cu_seqlens: [2P + 1] int64, or None where row s is sequence s.
        pair_weights: [P] or None for 1.
        reduction: one of REDUCTIONS.
    """

    token_weights: Tensor | None
    cu_seqlens: Tensor | None
    pair_weights: Tensor | None
    reduction: str

    def pairs(self, labels: Tensor) -> int:
        """P, for labels [B, T]."""
        return (labels.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1) // 2

    def of_tokens(self, labels: Tensor, ignore_index: int) -> Tensor:
        """The weight of every token, [B, T]; 0 where it is not scored."""
        scored = labels != ignore_index
        if self.token_weights is None:
            return scored.to(small_dtype(labels.device))
        return torch.where(scored, self.token_weights, 0.0)


class Family(NamedTuple):
    """A loss of the sigmoid family for P pairs.

    Attributes:
        ref_sums: [2P] or None; counts where no reference logits are given.
        betas, label_smoothings: [P], or None where `beta` and `label_smoothing` hold for every pair.
        robust: the loss of Chowdhury et al. 2024 instead of Rafailov et al. 2023.
    """

    ref_sums: Tensor | None
    betas: Tensor | None
    beta: float
    label_smoothings: Tensor | None
    label_smoothing: float
    robust: bool


def result_dtype(logits: Tensor) -> torch.dtype:
    """dtype of what a call returns: float64 for float64 logits, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """Mean, sum, or each of losses [P]. The mean over no pairs is 0: a rank with an empty batch still takes part in the step."""
    if reduction == "none":
        return losses.clone()  # the loss is nobody else's memory
    total = losses.sum()
    return total if reduction == "sum" else total / max(losses.shape[0], 1)


def preference_forward(
    stages: Stages,
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    transform: Transform,
    statistics: tuple[str, ...],
    weighting: Weighting,
    family: Family,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(stage 1's rows [R, B, T], results per sequence [K, 2P], losses [P], the reduced loss in float32 or float64).

    K counts SEQUENCE_ROWS and the statistics, whose means over scored tokens follow (0 for a sequence without any).
    """
    pairs, cu_seqlens, small = weighting.pairs(labels), weighting.cu_seqlens, small_dtype(labels.device)

    def each(values: Tensor | None, value: float) -> Tensor:
        return torch.full((pairs,), value, dtype=small, device=labels.device) if values is None else values

    beta = each(family.betas, family.beta)
    smoothing = each(family.label_smoothings, family.label_smoothing)
    weights = weighting.of_tokens(labels, transform.ignore_index)
    tokens = stages.token_logps(logits, labels, ref_logits, transform, statistics)
    names = token_rows(ref_logits is not None, statistics)
    rows = dict(zip(names, tokens.unbind(0), strict=True))
    losses, sums, ref_sums, coef = stages.preference_loss(
        rows["logps"], rows.get("ref_logps"), weights, cu_seqlens, family.ref_sums, beta, smoothing, family.robust
    )
    scored = weights if weighting.token_weights is None else (labels != transform.ignore_index).to(small)
    counts = stages.sequence_sums(scored, scored, cu_seqlens)
    means = [
        stages.sequence_sums(rows[name], scored, cu_seqlens) / counts.clamp(min=1)
        for name in names
        if name in statistics
    ]
    rewards = beta.repeat(2) * (sums - ref_sums)
    sequences = torch.stack([sums, ref_sums, rewards, coef, counts, *means])
    weighted = losses if weighting.pair_weights is None else losses * weighting.pair_weights
    loss = reduce(weighted, weighting.reduction).to(result_dtype(logits))
    return tokens, sequences, losses, loss


def preference_backward(
    stages: Stages,
    logits: Tensor,
    labels: Tensor,
    tokens: Tensor,
    sequences: Tensor,
    grad_loss: Tensor,
    transform: Transform,
    weighting: Weighting,
    out: Tensor,
) -> None:
    """d loss / d logits into `out`, from what `preference_forward` gave and the gradient of its loss ([] or [P])."""
    pairs = weighting.pairs(labels)
    grad = grad_loss.to(sequences.dtype)
    if weighting.reduction == "mean":
        grad = grad / max(pairs, 1)
    grad = grad.expand(pairs)
    if weighting.pair_weights is not None:
        grad = grad * weighting.pair_weights
    coef = sequences[SEQUENCE_ROWS.index("coef")]
    weights = weighting.of_tokens(labels, transform.ignore_index)
    grad_logps = spread(coef * grad.repeat(2), weights, weighting.cu_seqlens)
    logps, top, log_sum = tokens[0], tokens[1], tokens[2]
    stages.logits_grad(logits, labels, logps, top, log_sum, grad_logps, transform, out)
