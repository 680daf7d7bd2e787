"""Per-token KL divergences as differentiable terms, beside the log-probabilities (DESIGN stage 1 as a loss of its own).

    dpo_kernels::token_kl       logits, reference logits -> logps, lse, ref_logps, statistics, reverse_kl, forward_kl
    dpo_kernels::token_kl_grad  d loss / d logits, from the gradients of logps, reverse_kl and forward_kl at once

    reverse_kl = KL(policy || reference) = sum_v p_v (log p_v - log q_v)      the `kl_coef` term
    forward_kl = KL(reference || policy) = sum_v q_v (log q_v - log p_v)      TDPO's

Data flow: the forward is the backends' token_logps, which reads policy and reference side by side and returns reverse_kl
from that one read; forward_kl is the same kernel with the roles exchanged, a second read. The backward is the backends'
logits_grad with a `TokenKL`: both are read once, and the gradient is written once, over the policy's logits if wished.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, ops
from .backends.eager import TokenKL, small_dtype
from .memory import fresh
from .ops import _library, _unit_stride

_OUTPUTS = ("logps", "lse", "ref_logps", "entropy", "kl", "accuracy", "mean_logits", "log_sum_sq", "forward_kl")

_library.define(
    "token_kl(Tensor logits, Tensor labels, Tensor ref_logits, int ignore_index, float logit_scale, "
    "float logit_softcap, bool entropy, bool accuracy, bool mean_logits, bool log_sum_sq, bool forward_kl, "
    "bool inplace_backward, str backend) "
    "-> (Tensor logps, Tensor lse, Tensor ref_logps, Tensor entropy, Tensor kl, Tensor accuracy, Tensor mean_logits, "
    "Tensor log_sum_sq, Tensor forward_kl)"
)
_GRAD_ARGUMENTS = (
    "Tensor labels, Tensor ref_logits, Tensor logps, Tensor lse, Tensor ref_logps, Tensor kl, Tensor grad_logps, "
    "Tensor? grad_kl, Tensor? grad_forward_kl, int ignore_index, float logit_scale, float logit_softcap, str backend"
)
_library.define(f"token_kl_grad(Tensor logits, {_GRAD_ARGUMENTS}) -> Tensor")
_library.define(f"token_kl_grad_(Tensor(a!) logits, {_GRAD_ARGUMENTS}) -> ()")
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
    log_sum_sq: bool,
    forward_kl: bool,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    stage = backends.load(backend, logits.device.type).token_logps
    logits, ref_logits, labels = _unit_stride(logits), _unit_stride(ref_logits), labels.contiguous()
    keywords: dict[str, Any] = {
        "ignore_index": ignore_index,
        "logit_scale": logit_scale,
        "logit_softcap": logit_softcap,
        "kl": True,
    }
    asked = {"entropy": entropy, "accuracy": accuracy, "mean_logits": mean_logits, "log_sum_sq": log_sum_sq}
    found = stage(logits, labels, ref_logits, **asked, **keywords)
    if not forward_kl:
        return (*found, found[0].new_empty(0))
    exchanged = stage(ref_logits, labels, logits, **dict.fromkeys(asked, False), **keywords)
    return (*found, exchanged[4])


def _run_token_kl_grad(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor,
    logps: Tensor,
    lse: Tensor,
    ref_logps: Tensor,
    kl: Tensor,
    grad_logps: Tensor,
    grad_kl: Tensor | None,
    grad_forward_kl: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    backend: str,
    *,
    out: Tensor,
) -> None:
    backends.load(backend, logits.device.type).logits_grad(
        logits,
        labels.contiguous(),
        logps.contiguous(),
        lse.contiguous(),
        grad_logps.contiguous(),
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        out=out,
        token_kl=TokenKL(
            _unit_stride(ref_logits),
            ref_logps.contiguous(),
            kl.contiguous(),
            None if grad_kl is None else grad_kl.contiguous(),
            None if grad_forward_kl is None else grad_forward_kl.contiguous(),
        ),
    )


def _token_kl_grad(logits: Tensor, *arguments: Any) -> Tensor:
    logits = _unit_stride(logits)
    out = fresh(logits.shape, logits.dtype, logits.device)
    _run_token_kl_grad(logits, *arguments, out=out)
    return out


def _token_kl_grad_(logits: Tensor, *arguments: Any) -> None:
    _run_token_kl_grad(logits, *arguments, out=logits)


_library.impl("token_kl", _token_kl, "CompositeExplicitAutograd")
_library.impl("token_kl_grad", _token_kl_grad, "CompositeExplicitAutograd")
_library.impl("token_kl_grad_", _token_kl_grad_, "CompositeExplicitAutograd")


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
    log_sum_sq: bool,
    forward_kl: bool,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    wanted = (True, True, True, entropy, True, accuracy, mean_logits, log_sum_sq, forward_kl)
    small = small_dtype(logits.device)
    return tuple(logits.new_empty(labels.shape if want else (0,), dtype=small) for want in wanted)


@torch.library.register_fake("dpo_kernels::token_kl_grad", lib=_library)
def _(logits: Tensor, *arguments: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.register_fake("dpo_kernels::token_kl_grad_", lib=_library)
def _(logits: Tensor, *arguments: Any) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, ref_logits, *ctx.transform = inputs[:6]
    ctx.inplace, ctx.backend = inputs[-2:]
    logps, lse, ref_logps, entropy, kl, accuracy, mean_logits, log_sum_sq, _ = output
    ctx.save_for_backward(logits, labels, ref_logits, logps, lse, ref_logps, kl)
    ctx.mark_non_differentiable(lse, ref_logps, entropy, accuracy, mean_logits, log_sum_sq)
    ctx.set_materialize_grads(False)
    ctx.overwritten = False


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    by_logps, by_kl, by_forward = grads[0], grads[4], grads[8]
    if not ctx.needs_input_grad[0] or (by_logps is None and by_kl is None and by_forward is None):
        return (None,) * 13
    if ctx.overwritten:
        raise RuntimeError(ops.OVERWRITTEN)
    logits, *saved = ctx.saved_tensors
    # A graph compiler may materialise the gradient of an output that is empty because nobody asked for it.
    by_kl, by_forward = (None if grad is None or grad.dim() == 1 else grad for grad in (by_kl, by_forward))
    by_logps = torch.zeros_like(saved[2]) if by_logps is None else by_logps
    arguments = (*saved, by_logps, by_kl, by_forward, *ctx.transform, ctx.backend)
    # A reference that shares the policy's memory is still being read: for other rows, or by other threads of the row.
    if ctx.inplace and ops.may_overwrite(logits) and not ops.share_memory(logits, saved[1]):
        ctx.overwritten = True
        logits = logits.detach()
        _ops.token_kl_grad_(logits, *arguments)
        # Anyone else who saved these logits for a backward of their own must notice.
        torch.autograd.graph.increment_version(logits)
        return (logits, *(None,) * 12)
    return (_ops.token_kl_grad(logits, *arguments), *(None,) * 12)


torch.library.register_autograd("dpo_kernels::token_kl", _backward, setup_context=_setup, lib=_library)
torch.library.register_autograd("dpo_kernels::token_kl_grad", ops._no_double_backward, lib=_library)


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
    inplace_backward: bool,
    backend: str,
) -> dict[str, Tensor]:
    """`ops.token_logps` with a differentiable "kl" and, if asked for, "forward_kl"; [B, T] each."""
    flags = {name: name in statistics for name in ("entropy", "accuracy", "mean_logits", "log_sum_sq")}
    outputs = _ops.token_kl(
        logits,
        labels,
        ref_logits,
        ignore_index,
        logit_scale,
        logit_softcap,
        *flags.values(),
        forward_kl,
        inplace_backward,
        backend,
    )
    given = {"logps": True, "lse": True, "ref_logps": True, "kl": True, **flags, "forward_kl": forward_kl}
    return {name: value for name, value in zip(_OUTPUTS, outputs, strict=True) if given[name]}
