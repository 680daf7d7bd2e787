"""Reference implementation: DPO from its formulas in plain differentiable PyTorch, without kernels.

In float64 it is the ground truth that every backend is tested against. It is slow and needs much memory: it materializes
all intermediates, reads the [tokens, vocabulary] tensors many times, and uses autograd.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .objectives import Pairs, mix


def transform_logits(logits: Tensor, logit_scale: float, logit_softcap: float) -> Tensor:
    """z = cap * tanh(scale * x / cap) of logits x, or z = scale * x if the cap is 0; same shape and dtype."""
    if logit_scale != 1.0:
        logits = logits * logit_scale
    return torch.tanh(logits / logit_softcap) * logit_softcap if logit_softcap else logits


def likeliest(logits: Tensor, logit_scale: float) -> Tensor:
    """Index of the most likely entry, [..., T] int64; the first one if several are equal.

    The softcap is not applied: it keeps the order, but its rounding can make unequal logits equal.
    """
    return (logits if logit_scale > 0 else logits * logit_scale).argmax(-1)


def token_statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    ref_logits: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> dict[str, Tensor]:
    """Every per-token quantity that the kernels compute, from `log_softmax`.

    Args:
        logits: [..., T, V], any floating dtype, which is also the dtype of the arithmetic and of the results.
        labels: [..., T] int64.
        ref_logits: the reference's logits, shaped like `logits`; adds the quantities of the reference.
        ignore_index: label of the tokens that do not count.
        logit_scale: scale of z = cap * tanh(scale * x / cap).
        logit_softcap: cap of the same formula; None for z = scale * x.

    Returns:
        Tensors [..., T] by name, 0 on ignored tokens: "logps", "max" (of z), "log_sum" (log sum_v exp(z_v - max)),
            "entropy", "accuracy" (0 or 1), "mean_logits" and "log_sum_sq" (log sum_v p_v^2). With a reference also
            "ref_logps", "ref_max", "ref_log_sum" and "kl", KL(policy || reference). Log-probabilities, entropy and KL are
            in nats.
    """
    scored = labels != ignore_index
    index = torch.where(scored, labels, 0).unsqueeze(-1)
    z = transform_logits(logits, logit_scale, logit_softcap or 0.0)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    found = {
        "logps": log_p.gather(-1, index).squeeze(-1),
        "max": z.amax(-1),
        "log_sum": (z - z.amax(-1, keepdim=True)).logsumexp(-1),
        "entropy": -torch.where(p > 0, p * log_p, 0.0 * p).sum(-1),
        "accuracy": (likeliest(logits, logit_scale) == index.squeeze(-1)).to(z.dtype),
        "mean_logits": z.mean(-1),
        "log_sum_sq": (2 * log_p).logsumexp(-1),
    }
    if ref_logits is not None:
        ref_z = transform_logits(ref_logits.to(z.dtype), logit_scale, logit_softcap or 0.0)
        ref_log_p = ref_z.log_softmax(-1)
        found["ref_max"] = ref_z.amax(-1)
        found["ref_log_sum"] = (ref_z - ref_z.amax(-1, keepdim=True)).logsumexp(-1)
        found["ref_logps"] = ref_log_p.gather(-1, index).squeeze(-1)
        found["kl"] = torch.where(p > 0, p * (log_p - ref_log_p), 0.0 * p).sum(-1)
    return {name: torch.where(scored, values, 0.0) for name, values in found.items()}


def sequence_sums(values: Tensor, weights: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Weighted sum of `values` over each sequence, [S]; tokens of weight 0 are skipped.

    Args:
        values: [S, T], or packed [N] with `cu_seqlens`.
        weights: like `values`.
        cu_seqlens: [S + 1] int, cumulative sequence lengths; None if each row is a sequence.
    """
    terms = torch.where(weights != 0, weights * values, 0.0)
    if cu_seqlens is None:
        return terms.sum(-1)
    bounds = cu_seqlens.tolist()
    return torch.stack([terms[a:b].sum() for a, b in itertools.pairwise(bounds)])


def _forward_kl(logits: Tensor, ref_logits: Tensor, logit_scale: float, logit_softcap: float) -> Tensor:
    """KL(reference || policy) of the next-token distributions at each position, [..., T] in nats."""
    log_p = transform_logits(logits, logit_scale, logit_softcap).log_softmax(-1)
    log_q = transform_logits(ref_logits.to(logits.dtype), logit_scale, logit_softcap).log_softmax(-1)
    q = log_q.exp()
    return torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1)


def dpo_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ref_logits: Tensor | None = None,
    ref_logps: Tensor | None = None,
    beta: float | Tensor = 0.1,
    loss_type: str | Callable[[Pairs], Tensor] | Sequence[str | Callable[[Pairs], Tensor]] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float | Tensor = 0.0,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    pair_weights: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    kl_coef: float = 0.0,
    use_weighting: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """The loss of `dpo_kernels.dpo_loss` from the same arguments, differentiable by autograd.

    Source: Rafailov et al. 2023, Direct Preference Optimization, equation 7, for the default objective.

    Returns:
        The loss in the dtype of `logits`: a scalar, or [P] with reduction="none".
    """
    tokens = token_statistics(
        logits,
        labels,
        ref_logits=ref_logits,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
    )
    weights = (labels != ignore_index).to(logits.dtype)
    if token_weights is not None:
        weights = torch.where(weights != 0, token_weights.to(logits.dtype), 0.0)
    sums = sequence_sums(tokens["logps"], weights, cu_seqlens)
    if ref_logits is not None:
        ref_sums = sequence_sums(tokens["ref_logps"], weights, cu_seqlens).detach()
    else:
        ref_sums = torch.zeros_like(sums) if ref_logps is None else ref_logps.to(sums.dtype)
    ones = torch.ones((), dtype=logits.dtype, device=logits.device)
    kl_sums = None
    if ref_logits is not None:
        forward_kl = _forward_kl(logits, ref_logits, logit_scale, logit_softcap or 0.0)
        kl_sums = sequence_sums(forward_kl, weights, cu_seqlens)
    pairs = Pairs.from_sums(
        sums,
        ref_sums,
        sequence_sums(weights, torch.ones_like(weights), cu_seqlens),
        beta=torch.as_tensor(beta, dtype=logits.dtype, device=logits.device) * ones,
        label_smoothing=torch.as_tensor(label_smoothing, dtype=logits.dtype, device=logits.device) * ones,
        kl_sums=kl_sums,
    )
    losses = mix(pairs, loss_type, loss_weights)
    if use_weighting:
        scored = (weights != 0).to(weights.dtype)
        aligned = (tokens["logps"] - tokens["log_sum_sq"]).detach()
        counts = sequence_sums(scored, torch.ones_like(scored), cu_seqlens).clamp(min=1)
        chosen, rejected = (sequence_sums(aligned, scored, cu_seqlens) / counts).chunk(2)
        losses = losses * (chosen + rejected).exp()
    if pair_weights is not None:
        losses = losses * pair_weights.to(losses.dtype)
    if kl_coef:
        scored = (weights != 0).to(weights.dtype)
        chosen, rejected = sequence_sums(tokens["kl"], scored, cu_seqlens).chunk(2)
        count = sequence_sums(scored, torch.ones_like(scored), cu_seqlens).sum()
        losses = losses + kl_coef * (chosen + rejected) * len(losses) / count.clamp(min=1)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / max(len(losses), 1)


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    **keywords: Any,
) -> Tensor:
    """The loss of `dpo_kernels.linear_dpo_loss`: computes all logits and calls `dpo_loss` of this module.

    Args:
        hidden: [2P, T, H], or packed [N, H].
        weight: [V, H], the LM head.
        labels: [2P, T] or [N] int64.
        bias: [V] or None.
        ref_hidden: the reference's hidden states, [2P, T, Hr] or [N, Hr], or None.
        ref_weight: the reference's LM head [V, Hr]; None for `weight`.
        ref_bias: the reference's bias [V]; without `ref_weight`, None means `bias`.
        keywords: the other arguments of `dpo_loss`.

    Returns:
        The loss in the dtype of `hidden`: a scalar, or [P] with reduction="none".
    """
    if ref_hidden is not None:
        head, head_bias = (weight, bias) if ref_weight is None else (ref_weight, ref_bias)
        ref_logits = F.linear(ref_hidden, head, head_bias if ref_bias is None else ref_bias)
        keywords["ref_logits"] = ref_logits.detach()
    return dpo_loss(F.linear(hidden, weight, bias), labels, **keywords)
