"""Loss and gradient of a whole call of the sigmoid family, composed of a backend's stages.

A backend may have its own `preference_forward` and `preference_backward` (without the argument `stages`), which need fewer
kernel launches. The functions here are used for all other backends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..stages import Stages, Transform, small_dtype, spread, token_rows

#: The first rows of the results per sequence, [2P] each: sums of log-probabilities under policy and reference, rewards,
#: d loss / d sum, and the number of scored tokens. The means of the statistics follow.
SEQUENCE_ROWS = ("logps", "ref_logps", "rewards", "coef", "counts")
#: Compiled kernels take the index in this tuple.
REDUCTIONS = ("mean", "sum", "none")


class Weighting(NamedTuple):
    """The weights of tokens and pairs, the bounds of the sequences, and the reduction.

    Attributes:
        token_weights: [B, T], or None for 1; read only on scored tokens, whose weights are not 0.
        cu_seqlens: [2P + 1] int64, or None if row s is sequence s.
        pair_weights: [P], or None for 1.
        reduction: one of REDUCTIONS.
    """

    token_weights: Tensor | None
    cu_seqlens: Tensor | None
    pair_weights: Tensor | None
    reduction: str

    def pairs(self, labels: Tensor) -> int:
        """P, the number of pairs, for labels [B, T]."""
        return (labels.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1) // 2

    def of_tokens(self, labels: Tensor, ignore_index: int) -> Tensor:
        """[B, T], the weight of every token; 0 where it is not scored."""
        scored = labels != ignore_index
        if self.token_weights is None:
            return scored.to(small_dtype(labels.device))
        return torch.where(scored, self.token_weights, 0.0)


class Family(NamedTuple):
    """A loss of the sigmoid family for P pairs.

    Attributes:
        ref_sums: [2P], the reference's sums if its logits are not given; None for 0.
        betas: [P], or None if `beta` is used for all pairs.
        beta: inverse temperature of all pairs.
        label_smoothings: [P], or None if `label_smoothing` is used for all pairs.
        label_smoothing: label smoothing of all pairs.
        robust: the loss of Chowdhury et al. 2024 instead of Rafailov et al. 2023.
    """

    ref_sums: Tensor | None
    betas: Tensor | None
    beta: float
    label_smoothings: Tensor | None
    label_smoothing: float
    robust: bool


def result_dtype(logits: Tensor) -> torch.dtype:
    """dtype of a call's results: float64 for float64 logits, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """Mean or sum of losses [P], or a copy. The mean over no pairs is 0, so a rank with an empty batch can join a step."""
    if reduction == "none":
        return losses.clone()  # the returned loss must not share memory with the losses
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
    """(rows of stage 1 [R, B, T], results per sequence [K, 2P], losses [P], reduced loss in float32 or float64).

    The K results per sequence are SEQUENCE_ROWS, followed by the means of the statistics over the scored tokens (0 for a
    sequence without scored tokens).
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
    """Writes d loss / d logits to `out`, from the results of `preference_forward` and the gradient of its loss ([] or [P])."""
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
