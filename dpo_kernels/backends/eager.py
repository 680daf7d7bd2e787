"""The eager backend: the stages in plain PyTorch, for any device and any floating dtype; slow, but easy to verify.

The logits are converted to float32 or float64 and read about eight times, with several [tokens, vocabulary] temporaries. Every
other backend computes the same values with one read in the forward pass, and one read and one write in the backward pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference import likeliest, transform_logits
from ..stages import TokenKL, Transform, check_labels, small_dtype, token_rows

#: Elements of a block of `logits_grad_with_kl`; about ten temporaries of this size exist at a time.
BLOCK = 1 << 20
#: Logits and their differences are scaled by this factor before they are summed, so that sums of the lowest finite logits, which
#: masks use, do not overflow. A power of two, so that scaling does not round.
TINY = 2.0**-40


def check_available(device_type: str) -> None:
    """Never raises, because eager PyTorch serves every device."""


def _work_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _log_softmax_parts(z: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logp of the indexed entries, maximum, log of the sum of exp(z - maximum)); [B, T] each.

    logp is computed from a sum without the label's term, which avoids cancellation where p is near 1.
    """
    small = small_dtype(z.device)
    z_label = z.gather(-1, index).squeeze(-1).to(small)
    rest = z.scatter(-1, index, float("-inf"))
    top = rest.amax(-1, keepdim=True)
    top = torch.where(top == float("-inf"), 0.0, top)
    # Maximum and log of the sum are added in float64: a float32 log-sum-exp near 16 has a rounding error of 1e-6.
    log_others = (rest - top).exp().sum(-1).to(small).log()
    top = top.squeeze(-1).to(small)
    gap = log_others + (top - z_label)  # log-odds against the label
    logp = -torch.logaddexp(torch.zeros_like(gap), gap)
    largest = z.amax(-1).to(small)
    log_sum = torch.where(z_label == largest, -logp, torch.logaddexp(log_others, z_label - top))
    return logp, largest, log_sum


def token_logps(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    transform: Transform,
    statistics: tuple[str, ...],
) -> Tensor:
    """Stage 1."""
    if logits.device.type == "cpu":
        check_labels(labels, logits.shape[-1], transform.ignore_index)
    small = small_dtype(logits.device)
    scored = labels != transform.ignore_index
    in_range = (labels >= 0) & (labels < logits.shape[-1])
    index = torch.where(scored & in_range, labels, 0).unsqueeze(-1)
    work = _work_dtype(logits, ref_logits)
    z = transform_logits(logits.to(work), transform.scale, transform.softcap)
    found: dict[str, Tensor] = {}
    found["logps"], found["max"], found["log_sum"] = _log_softmax_parts(z, index)
    # Moments with weights e = exp(z - top), divided by the sum of e, so that the rounding errors of top and log_sum cancel.
    shifted = _from_top(z)
    e = shifted.exp()
    mass = e.sum(-1).to(small)
    if ref_logits is not None:
        ref_z = transform_logits(ref_logits.to(work), transform.scale, transform.softcap)
        found["ref_logps"], found["ref_max"], found["ref_log_sum"] = _log_softmax_parts(ref_z, index)
        if "kl" in statistics:
            # Entries with e = 0 do not contribute, but their difference may be infinite.
            drift = torch.where(e == 0, 0.0, e * _scaled_gap(z, ref_z)).sum(-1).to(small) / mass
            found["kl"] = drift / TINY - found["log_sum"] + found["ref_log_sum"]
    if "entropy" in statistics:
        drop = torch.where(e == 0, 0.0, e * shifted).sum(-1).to(small) / mass
        found["entropy"] = found["log_sum"] - drop
    if "accuracy" in statistics:
        found["accuracy"] = likeliest(logits.to(work), transform.scale) == index.squeeze(-1)
    if "mean_logits" in statistics:
        found["mean_logits"] = (z * TINY).mean(-1).to(small) / TINY
    if "log_sum_sq" in statistics:
        found["log_sum_sq"] = e.square().sum(-1).to(small).log() - 2 * mass.log()
    rows = torch.stack([found[name].to(small) for name in token_rows(ref_logits is not None, statistics)])
    return torch.where(scored, torch.where(in_range, rows, float("nan")), 0.0)


def _from_top(z: Tensor) -> Tensor:
    """z minus its row's maximum; unchanged where the maximum is infinite."""
    top = z.amax(-1, keepdim=True)
    return z - torch.where(top.isinf(), 0.0, top)


def _scaled_gap(z: Tensor, ref_z: Tensor) -> Tensor:
    """TINY ((z - max) - (z' - max')); sums of it stay finite even for the lowest finite logits."""
    return _from_top(z * TINY) - _from_top(ref_z * TINY)


def sequence_sums(values: Tensor, weights: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Weighted sum over the tokens of each sequence, [2P] float64; tokens of weight 0 are skipped, whatever their value."""
    terms = torch.where(weights != 0, weights * values, 0.0)
    bounds = cu_seqlens
    if bounds is None:
        bounds = torch.arange(terms.shape[0] + 1, device=terms.device) * terms.shape[1]
    # Each sequence is summed from its first token to its last, so the bits of a sum do not depend on padding or packing.
    return torch.segment_reduce(terms.reshape(-1), "sum", offsets=bounds, axis=0, unsafe=True, initial=0.0)


def preference_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    ref_sums: Tensor | None,
    beta: Tensor,
    label_smoothing: Tensor,
    robust: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stage 2: (losses [P], sums [2P], ref_sums [2P], coef [2P]); the formulas of csrc/common/sigmoid_family.h."""
    sums = sequence_sums(logps, weights, cu_seqlens)
    if ref_logps is not None:
        ref_sums = sequence_sums(ref_logps, weights, cu_seqlens)
    elif ref_sums is None:
        ref_sums = torch.zeros_like(sums)
    else:
        ref_sums = ref_sums.clone()
    chosen, rejected = (sums - ref_sums).chunk(2)
    x = beta * (chosen - rejected)
    e = label_smoothing
    zero = torch.zeros_like(x)
    right, wrong = torch.logaddexp(zero, -x), torch.logaddexp(zero, x)
    sign = -1.0 if robust else 1.0
    # Where e is 0 the second term is left out: it could be 0 * inf, which is NaN.
    losses = (1 - e) * right + torch.where(e == 0, zero, sign * e * wrong)
    slope = -(1 - e) * torch.sigmoid(-x) + sign * e * torch.sigmoid(x)
    if robust:
        losses, slope = losses / (1 - 2 * e), slope / (1 - 2 * e)
    return losses, sums, ref_sums, torch.cat([beta * slope, -beta * slope])


def logits_grad(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    top: Tensor,
    log_sum: Tensor,
    grad_logps: Tensor,
    transform: Transform,
    out: Tensor,
    token_kl: TokenKL | None = None,
) -> None:
    """Stage 3; with `token_kl`, see `logits_grad_with_kl`."""
    if token_kl is not None:
        logits_grad_with_kl(logits, labels, logps, top, log_sum, grad_logps, transform, out, token_kl)
        return
    work = _work_dtype(logits)
    z = transform_logits(logits.to(work), transform.scale, transform.softcap)
    live = (labels != transform.ignore_index) & (grad_logps != 0)
    index = _indexable(labels, logits.shape[-1]).unsqueeze(-1)  # rows that are not live become 0 below
    origin, factor = _softmax_parts(top, log_sum, grad_logps, work)
    gradient = -(z - origin.unsqueeze(-1)).exp() * factor.unsqueeze(-1)
    at_label = (-grad_logps * torch.expm1(logps)).to(work)
    gradient.scatter_(-1, index, at_label.unsqueeze(-1))
    if transform.softcap:
        gradient = gradient * (1 - (z / transform.softcap) ** 2)
    gradient = torch.where(live.unsqueeze(-1), gradient * transform.scale, 0.0)
    out.copy_(gradient)


def _softmax_parts(top: Tensor, log_sum: Tensor, by: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """(origin, factor), [...], such that by * softmax(z) = exp(z - origin) * factor.

    log_sum is part of the factor, in float64; subtracted from the logits it would lose precision to rounding. The origin is the
    maximum. If `by` is too large for a float32 factor, the excess is moved into the exponential, so that an entry of probability
    0 gives 0 and not 0 * inf. A factor that is still too large becomes the largest finite number.
    """
    largest = torch.finfo(work).max
    excess = by.abs().log().sub(math.log(largest / 8)).clamp(0.0, 88.0)
    origin = (top - excess).to(work)
    factor = by * (origin - top - log_sum).exp()
    return origin, torch.where(factor.isfinite(), factor.clamp(-largest, largest), factor).to(work)


def _indexable(labels: Tensor, vocab: int) -> Tensor:
    """Labels with 0 for those outside the vocabulary, whose index would abort the CUDA context; log_sum makes their rows NaN."""
    return torch.where((labels >= 0) & (labels < vocab), labels, 0)


def logits_grad_with_kl(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    top: Tensor,
    log_sum: Tensor,
    grad_logps: Tensor,
    transform: Transform,
    out: Tensor,
    token_kl: TokenKL,
) -> None:
    """Stage 3 with token-level KL divergences. With d_v = z_v - z'_v and D = sum p d, per row:

        dz_v = grad_logps (1[v = label] - p_v) + grad_kl p_v (d_v - D) + grad_forward_kl (p_v - q_v)

    Rows are processed in blocks, so the temporaries stay small for any batch. Exponentials are float32; everything else is
    float64, because the gaps d_v and their factors may exceed the range of float32.
    """
    ref_logits, _, ref_max, ref_log_sum, _, grad_kl, grad_forward_kl = token_kl
    moves = grad_logps != 0
    for grad in (grad_kl, grad_forward_kl):
        moves = moves if grad is None else moves | (grad != 0)
    live = moves & (labels != transform.ignore_index)
    row, column = live.nonzero(as_tuple=True)
    work = _work_dtype(logits, ref_logits)
    for at in torch.arange(row.numel(), device=row.device).split(max(1, BLOCK // logits.shape[-1])):
        b, t = row[at], column[at]
        z = transform_logits(logits[b, t].to(work), transform.scale, transform.softcap)
        ref_z = transform_logits(ref_logits[b, t].to(work), transform.scale, transform.softcap)
        label = _indexable(labels[b, t], logits.shape[-1]).unsqueeze(-1)

        def column_of(values: Tensor) -> Tensor:
            return values.unsqueeze(-1)

        def softmax(values: Tensor, largest: Tensor, log_sum: Tensor) -> Tensor:
            return (values - column_of(largest).to(work)).exp() * column_of((-log_sum).exp())

        p = softmax(z, top[b, t], log_sum[b, t])
        by_logp = column_of(grad_logps[b, t])
        gradient = -by_logp * p
        # 1 - p is computed by expm1, because the subtraction cancels where p is near 1.
        gradient.scatter_(-1, label, -by_logp * column_of(torch.expm1(logps[b, t])))
        if grad_kl is not None:
            # d is taken relative to that of the most likely token: where its p is near 1, D is nearly equal to its d, and d - D
            # would cancel.
            gap = torch.where(p > 0, _scaled_gap(z.to(p.dtype), ref_z.to(p.dtype)), 0.0)
            gap -= gap.gather(-1, p.argmax(-1, keepdim=True))
            mean = (p * gap).sum(-1) / p.sum(-1)
            gradient += p * ((gap - column_of(mean)) * column_of(grad_kl[b, t] / TINY))
        if grad_forward_kl is not None:
            q = softmax(ref_z, ref_max[b, t], ref_log_sum[b, t])
            gradient += column_of(grad_forward_kl[b, t]) * (p - q)
        if transform.softcap:
            gradient *= 1 - (z / transform.softcap) ** 2
        out[b, t] = (gradient * transform.scale).to(out.dtype)
    out.masked_fill_(~live.unsqueeze(-1), 0.0)
