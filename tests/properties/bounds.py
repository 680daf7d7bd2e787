"""Error bounds of results: they allow for rounding in the given dtypes and nothing else.

Every bound is relative to the number, or to the terms of which it is a difference. In float32, a result that is wrong by 1 %
exceeds every bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .truth import OBJECTIVES, Settings, Truth

#: Number of float32 (or float64) roundings of a number, each with the largest possible error.
ROUNDINGS = 4.0
#: A 16-bit gradient is the true one rounded once. This is the small additional error of the exponential.
HAIR = 1.5e-4
#: The largest error that an entry may have because it is too small for its dtype.
TINY = {torch.float16: 3.1e-8}


@dataclass
class Bounds:
    """Largest errors: sums, ref_sums, divergences [2P]; losses [P]; statistics [2P] by name; by_logits [n, V] of scored rows."""

    sums: Tensor
    ref_sums: Tensor
    divergences: Tensor
    losses: Tensor
    loss: Tensor
    logps: Tensor
    statistics: dict[str, Tensor]
    by_logits: Tensor | None = None


def epsilon(dtype: torch.dtype) -> float:
    """Machine epsilon of the arithmetic, which is float32 for 16-bit logits."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest error of storing numbers in a dtype."""
    info = torch.finfo(dtype)
    tiny = TINY.get(dtype, 2 * info.smallest_normal)
    return (0.51 * info.eps + (HAIR if dtype.itemsize == 2 else 0.0)) * values.abs() + tiny


def _tied(truth: Truth, near: Tensor) -> bool:
    """Whether two pairs have almost equal values by which `aot` or `aot_unpaired` sorts."""
    chosen, rejected = truth.sums.view(2, -1)
    keys = torch.stack([chosen - rejected, chosen - truth.ref_sums.view(2, -1)[0]])
    return bool((keys.sort(-1).values.diff() <= near).any())


def _over(values: Tensor, truth: Truth) -> Tensor:
    return torch.zeros_like(truth.counts).index_add(0, truth.owner, values)


def _row(z: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(p [n, V], largest distance from the row's maximum [n], largest absolute logit [n]); the last two where p > 1e-12."""
    top = z.max(-1, keepdim=True).values
    p = (z - top).exp()
    p = p / p.sum(-1, keepdim=True)
    live = p > 1e-12
    span = torch.where(live, top - z, 0.0).amax(-1)
    level = torch.where(live, z.abs(), 0.0).amax(-1)
    return p, span, level


def bounds_of(
    truth: Truth,
    settings: Settings,
    dtype: torch.dtype,
    factor: Tensor,
    *,
    error: Tensor | float = 0.0,
    ref_error: Tensor | float = 0.0,
) -> Bounds:
    """The bounds of a call.

    Args:
        dtype: dtype of the logits.
        factor: [P], by which d loss / d weighted loss of each pair was multiplied in the gradient.
        error, ref_error: [n], largest errors of the logits (on the linear path they are rounded sums).
    """
    eps, n = epsilon(dtype), len(truth.rows)
    out_eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    z, pairs = truth.z.detach(), len(truth.losses)
    changed = settings.scale != 1.0 or settings.cap is not None
    # The loss of exo_pair is a KL, a small difference of terms of size 1.
    terms = 8 * torch.finfo(torch.float64).eps * ("exo_pair" in settings.names)
    weights = torch.ones(pairs).double() if settings.pair_weights is None else settings.pair_weights.abs()

    def reduced(losses: Tensor) -> Tensor:
        loss = losses * weights.clamp(min=1.0)
        if settings.reduction != "none":
            loss = loss.sum() / (max(pairs, 1) if settings.reduction == "mean" else 1)
        return loss + 4 * out_eps * truth.loss.detach().abs()

    if n == 0:
        nothing = torch.zeros_like(truth.counts)
        rest = 4 * out_eps * truth.losses.abs() + terms
        statistics = dict.fromkeys(truth.statistics, nothing)
        loss = reduced(rest)
        ref_sums = 4 * out_eps * truth.ref_sums.abs()
        return Bounds(nothing, ref_sums, nothing, rest, loss, torch.zeros(0).double(), statistics)
    p, span, level = _row(z, truth.labels)
    q, ref_level = p, level
    # Values of each token are float64 and may be differences of logits, but not of huge logits.
    small = 8 * torch.finfo(torch.float64).eps
    relative = ROUNDINGS * eps * (4 + span + level * changed) + 2 * error + small * level.clamp(max=1e6)
    ref_relative, ref_logp = torch.zeros(n).double(), torch.zeros(n).double()
    logps = truth.logps.detach()

    def of_logps(relative: Tensor, values: Tensor) -> Tensor:
        return relative * values.abs().clamp(max=1.0) + 2 * eps * values.abs()

    logp = of_logps(relative, logps)
    gap, mean = torch.zeros_like(z), torch.zeros(n).double()
    kl = forward_kl = torch.zeros(n).double()
    if truth.ref_z is not None:
        q, ref_span, ref_level = _row(truth.ref_z, truth.labels)
        ref_relative = ROUNDINGS * eps * (4 + ref_span + ref_level * changed) + 2 * ref_error
        ref_relative = ref_relative + small * ref_level.clamp(max=1e6)
        ref_logp = of_logps(ref_relative, truth.ref_logps)
        gap = torch.where(p > 0, z - truth.ref_z, 0.0)
        mean = (p * gap).sum(-1)
        spread = (p * (gap - mean[:, None]).abs()).sum(-1)
        levels = torch.maximum(level, ref_level)
        base = ROUNDINGS * eps * levels + 2 * (error + ref_error) + small
        kl = base + relative * (truth.kl.detach().abs() + spread) + 2 * eps * (p * gap.abs()).sum(-1)
        back = torch.where(q > 0, truth.ref_z - z, 0.0)
        forward = (q * (back - (q * back).sum(-1, keepdim=True)).abs()).sum(-1)
        forward_kl = (
            base + ref_relative * (truth.forward_kl.detach().abs() + forward) + 2 * eps * (q * back.abs()).sum(-1)
        )

    weight = truth.weights.abs()
    exact_sums, exact_refs = _over(weight * logp, truth), _over(weight * ref_logp, truth)
    sums, ref_sums = exact_sums + out_eps * truth.sums.abs(), exact_refs + out_eps * truth.ref_sums.abs()
    counts = truth.counts.clamp(min=1)

    # Find how rounding of the sums changes losses and coefficients, by computing them at both ends of the error interval.
    side = torch.cat([torch.ones(pairs), -torch.ones(pairs)]).double()
    needs_divergence = any(OBJECTIVES[name].divergence for name in settings.names)
    divergences = _over(weight * forward_kl, truth) if needs_divergence else 0.0
    move = (exact_sums + exact_refs + divergences + 1e-15 * truth.sums.abs()) * side
    middle_losses, middle = truth.at(truth.sums)
    losses, slack = 4 * out_eps * truth.losses.abs(), 1e-14 * middle.abs()
    for direction in (move, -move):
        moved_losses, moved = truth.at(truth.sums + direction)
        losses = torch.maximum(losses, 2 * (moved_losses - middle_losses).abs() + 4 * out_eps * truth.losses.abs())
        slack = torch.maximum(slack, 2 * (moved - middle).abs() + 1e-14 * middle.abs())
    if any(name.startswith("aot") for name in settings.names) and _tied(truth, 4 * move.abs().sum()):
        # Rounding decides the order of two pairs, and so the quantile with which each is compared.
        losses, slack = losses + float("inf"), slack + float("inf")
    # A coefficient may be a small difference of slopes of size beta.
    beta = torch.ones(pairs).double() if settings.beta is None else settings.beta.abs()
    slack = slack + 2e-15 * (beta * (1.0 if settings.pair_weights is None else settings.pair_weights.abs())).repeat(2)
    if settings.weighting:
        likely = (_over(2 * logp + 2 * relative, truth) / counts).view(2, -1).sum(0)
        losses, slack = losses + likely * truth.losses.abs(), slack + likely.repeat(2) * middle.abs()
    if settings.kl_coef:
        losses = losses + settings.kl_coef * _over(kl, truth).view(2, -1).sum(0) * pairs / n
    losses = losses + terms
    least = torch.finfo(torch.float32).smallest_normal
    losses, loss = losses + least, reduced(losses) + least

    entropy = relative * (1 + _entropy_of(p)) + 2 * error
    means = {
        "entropy": entropy,
        "kl": kl,
        "accuracy": torch.zeros(n).double(),
        "mean_logits": ROUNDINGS * eps * (1 + z.shape[1] / 128) * z.abs().mean(-1)
        + error
        + 2 * torch.finfo(torch.float32).smallest_normal,
    }
    statistics = {
        name: _over(value, truth) / counts + 2 * out_eps * truth.statistics[name].abs() for name, value in means.items()
    }
    divergences = divergences + torch.zeros_like(sums)
    found = Bounds(sums, ref_sums, divergences, losses, loss, logp, statistics)
    if truth.z.grad is None:
        return found

    def grad_of(tokens: Tensor) -> Tensor:
        return torch.zeros(n).double() if tokens.grad is None else tokens.grad.abs()

    by_logp, by_kl, by_forward = grad_of(truth.logps), grad_of(truth.kl), grad_of(truth.forward_kl)
    grad_error = weight * (slack * factor.abs().repeat(2))[truth.owner] + 1e-14 * by_logp
    by_forward_error = torch.where(by_logp > 0, grad_error / by_logp.clamp(min=1e-300), 0.0).clamp(max=1.0) * by_forward
    gap_error = (gap - mean[:, None]).abs() * relative[:, None] + (kl + ref_logp + logp)[:, None]
    gap_error = gap_error + ROUNDINGS * eps * torch.where(p > 0, gap.abs(), 0.0)
    others = p * (by_logp * relative + grad_error)[:, None]
    gap_error = torch.where(by_kl[:, None] > 0, by_kl[:, None] * p * gap_error, 0.0)  # a divergence may be infinite
    others = others + gap_error
    others = others + p * (by_forward * relative + by_forward_error)[:, None]
    others = others + q * (by_forward * ref_relative + by_forward_error)[:, None] * (truth.ref_z is not None)
    at = truth.labels[:, None]
    label = -torch.expm1(logps) * (by_logp * relative + grad_error)
    label = label + gap_error.gather(-1, at).squeeze(-1)
    if truth.ref_z is not None:
        label = label - torch.expm1(logps) * (by_forward * relative + by_forward_error)
        label = label - torch.expm1(truth.ref_logps) * (by_forward * ref_relative + by_forward_error)
    by_z = others.scatter(-1, at, label[:, None])
    slope = torch.ones_like(z) if settings.cap is None else (1 - (z / settings.cap) ** 2).abs()
    undamped = truth.z.grad.abs() * ROUNDINGS * eps
    size = 1 + by_logp + by_kl + by_forward
    # In the truth, p - q may be a difference of numbers near 1.
    own = 4 * torch.finfo(torch.float64).eps * (by_kl + by_forward)
    found.by_logits = abs(settings.scale) * ((by_z + own[:, None]) * slope + undamped) + 1e-36 * size[:, None]
    return found


def _entropy_of(p: Tensor) -> Tensor:
    """Entropies [n] of distributions [n, V]."""
    return -torch.where(p > 0, p * p.clamp(min=1e-300).log(), 0.0).sum(-1)


def check_close(name: str, found: Tensor, wanted: Tensor, bound: Tensor) -> None:
    """Assert that every number is within its bound.

    If a finite true value exceeds the dtype's range, the result must be infinite or the dtype's largest number. If the true
    value is infinite, the result must be infinite. A result is not checked if the true value is NaN, or if the bound is
    infinite or reaches beyond the dtype's range.
    """
    assert found.shape == wanted.shape, f"{name}: shape {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    found, wanted, largest = found.detach(), wanted.detach(), torch.finfo(found.dtype).max
    stored, bound = wanted.to(found.dtype), bound.expand_as(wanted)
    infinite = wanted.isinf() | (wanted.abs() - bound > 1.01 * largest)
    right = (found == stored) | (wanted.isfinite() & (found == stored.clamp(-largest, largest)))
    assert bool(right[infinite].all()), f"{name}: {found} should be {stored}"
    says = ~infinite & bound.isfinite() & (wanted.abs() + bound < largest)
    found, wanted, bound = found.double()[says], wanted[says], bound[says]
    wrong = ~((found - wanted).abs() <= bound)
    if bool(wrong.any()):
        worst = int(wrong.nonzero()[0])
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} numbers are wrong, such as {found[worst]:.9g}, "
            f"which should be {wanted[worst]:.9g} within {bound[worst]:.3g}"
        )
