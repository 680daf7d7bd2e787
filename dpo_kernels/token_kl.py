"""Per-token KL divergences as differentiable terms, beside the log-probabilities (DESIGN stage 1 as a loss of its own).

    dpo_kernels::token_kl       logits, reference logits -> logps, lse, ref_logps, statistics, reverse_kl, forward_kl
    dpo_kernels::token_kl_grad  d loss / d logits, from the gradients of logps, reverse_kl and forward_kl at once

    reverse_kl = KL(policy || reference) = sum_v p_v (log p_v - log q_v)      the `kl_coef` term
    forward_kl = KL(reference || policy) = sum_v q_v (log q_v - log p_v)      TDPO's

Data flow: the forward is the backends' token_logps, which reads policy and reference side by side and returns reverse_kl
from that one read; forward_kl is the same kernel with the roles exchanged, a second read. The backward reads both once,
a few rows at a time, in PyTorch: its temporaries stay in cache-sized blocks, whatever the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends
from .backends.eager import small_dtype
from .ops import _library, _unit_stride
from .reference import transform_logits

#: Elements of a backward block; some ten temporaries of this size exist at a time.
BLOCK = 1 << 20

_OUTPUTS = ("logps", "lse", "ref_logps", "entropy", "kl", "accuracy", "mean_logits", "forward_kl")

_library.define(
    "token_kl(Tensor logits, Tensor labels, Tensor ref_logits, int ignore_index, float logit_scale, "
    "float logit_softcap, bool entropy, bool accuracy, bool mean_logits, bool forward_kl, str backend) "
    "-> (Tensor logps, Tensor lse, Tensor ref_logps, Tensor entropy, Tensor kl, Tensor accuracy, Tensor mean_logits, "
    "Tensor forward_kl)"
)
_library.define(
    "token_kl_grad(Tensor logits, Tensor labels, Tensor ref_logits, Tensor logps, Tensor lse, Tensor ref_logps, "
    "Tensor grad_logps, Tensor grad_kl, Tensor grad_forward_kl, int ignore_index, float logit_scale, "
    "float logit_softcap) -> Tensor"
)
_ops = torch.ops.dpo_kernels


def _token_kl(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    entropy: bool,
    accuracy: bool,
    mean_logits: bool,
    forward_kl: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    stage = backends.load(backend, logits.device.type).token_logps
    logits, ref_logits, labels = _unit_stride(logits), _unit_stride(ref_logits), labels.contiguous()
    keywords: dict[str, Any] = {
        "ignore_index": ignore_index,
        "logit_scale": logit_scale,
        "logit_softcap": logit_softcap,
    }
    keywords["kl"] = True
    found = stage(logits, labels, ref_logits, entropy=entropy, accuracy=accuracy, mean_logits=mean_logits, **keywords)
    if not forward_kl:
        return (*found, found[0].new_empty(0))
    exchanged = stage(ref_logits, labels, logits, entropy=False, accuracy=False, mean_logits=False, **keywords)
    return (*found, exchanged[4])


def _token_kl_grad(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor,
    logps: Tensor,
    lse: Tensor,
    ref_logps: Tensor,
    grad_logps: Tensor,
    grad_kl: Tensor,
    grad_forward_kl: Tensor,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
) -> Tensor:
    """With d_v = z_v - z'_v and D = sum p d, per row:

    dz_v = grad_logps (1[v = label] - p_v) + grad_kl p_v (d_v - D) + grad_forward_kl (p_v - q_v)
    """
    out = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    live = (labels != ignore_index) & ((grad_logps != 0) | (grad_kl != 0) | (grad_forward_kl != 0))
    row, column = live.nonzero(as_tuple=True)
    wide = torch.float64 in (logits.dtype, ref_logits.dtype)
    work = torch.float64 if wide else torch.float32
    for at in torch.arange(row.numel(), device=row.device).split(max(1, BLOCK // logits.shape[-1])):
        b, t = row[at], column[at]
        z = transform_logits(logits[b, t].to(work), logit_scale, logit_softcap)
        ref_z = transform_logits(ref_logits[b, t].to(work), logit_scale, logit_softcap)
        label = labels[b, t].unsqueeze(-1)
        # lse' is not an output of stage 1, but the label's logit minus its log-probability.
        ref_lse = ref_z.gather(-1, label).squeeze(-1).to(lse.dtype) - ref_logps[b, t]

        def column_of(values: Tensor) -> Tensor:
            return values.to(work).unsqueeze(-1)

        def softmax(values: Tensor, norm: Tensor) -> Tensor:
            # lse rounded to float32 would tilt the whole row; what rounding took goes into a factor.
            origin = column_of(norm)
            return (values - origin).exp() * column_of((origin.squeeze(-1) - norm).exp())

        p = softmax(z, lse[b, t])
        by_logp = column_of(grad_logps[b, t])
        gradient = -by_logp * p
        # 1 - p by cancellation is lost where p is near 1.
        gradient.scatter_(-1, label, -by_logp * column_of(torch.expm1(logps[b, t])))
        if bool((grad_kl[b, t] != 0).any()):
            # d counted from the most likely token's: where p is near 1 its d and D agree in all leading digits.
            gap = torch.where(p > 0, z - ref_z, 0.0)
            gap -= gap.gather(-1, p.argmax(-1, keepdim=True))
            mean = (p * gap).sum(-1, dtype=lse.dtype) / p.sum(-1, dtype=lse.dtype)
            gradient += column_of(grad_kl[b, t]) * p * (gap - column_of(mean))
        if bool((grad_forward_kl[b, t] != 0).any()):
            gradient += column_of(grad_forward_kl[b, t]) * (p - softmax(ref_z, ref_lse))
        if logit_softcap:
            gradient *= 1 - (z / logit_softcap) ** 2
        out[b, t] = (gradient * logit_scale).to(out.dtype)
    return out


_library.impl("token_kl", _token_kl, "CompositeExplicitAutograd")
_library.impl("token_kl_grad", _token_kl_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("dpo_kernels::token_kl", lib=_library)
def _(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    entropy: bool,
    accuracy: bool,
    mean_logits: bool,
    forward_kl: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    wanted = (True, True, True, entropy, True, accuracy, mean_logits, forward_kl)
    small = small_dtype(logits.device)
    return tuple(logits.new_empty(labels.shape if want else (0,), dtype=small) for want in wanted)


@torch.library.register_fake("dpo_kernels::token_kl_grad", lib=_library)
def _(logits: Tensor, *arguments: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, ref_logits, *ctx.transform = inputs[:6]
    logps, lse, ref_logps, entropy, _, accuracy, mean_logits, _ = output
    ctx.save_for_backward(logits, labels, ref_logits, logps, lse, ref_logps)
    ctx.mark_non_differentiable(lse, ref_logps, entropy, accuracy, mean_logits)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    by_logps, by_kl, by_forward = grads[0], grads[4], grads[7]
    if not ctx.needs_input_grad[0] or (by_logps is None and by_kl is None and by_forward is None):
        return (None,) * 11
    nothing = torch.zeros_like(saved[3])
    given = [
        nothing if grad is None or grad.dim() == 1 else grad.contiguous() for grad in (by_logps, by_kl, by_forward)
    ]
    return (_ops.token_kl_grad(*saved, *given, *ctx.transform), *(None,) * 10)


def _no_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("dpo_kernels has no double backward: the gradient kernels are not differentiable")


torch.library.register_autograd("dpo_kernels::token_kl", _backward, setup_context=_setup, lib=_library)
torch.library.register_autograd("dpo_kernels::token_kl_grad", _no_double_backward, lib=_library)


def token_logps(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor,
    *,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    statistics: tuple[str, ...],
    forward_kl: bool,
    backend: str,
) -> dict[str, Tensor]:
    """`ops.token_logps` with a differentiable "kl" and, if asked for, "forward_kl"; [B, T] each."""
    flags = {name: name in statistics for name in ("entropy", "accuracy", "mean_logits")}
    outputs = _ops.token_kl(
        logits, labels, ref_logits, ignore_index, logit_scale, logit_softcap, *flags.values(), forward_kl, backend
    )
    given = {"logps": True, "lse": True, "ref_logps": True, "kl": True, **flags, "forward_kl": forward_kl}
    return {name: value for name, value in zip(_OUTPUTS, outputs, strict=True) if given[name]}
