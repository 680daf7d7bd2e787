"""The operators: `torch.library` schemas, fake kernels and autograd rules around the backends' stages.

    dpo_kernels::token_logps       logits [B, T, V] -> logps, lse and statistics, [B, T] each     (differentiable: logps)
    dpo_kernels::sequence_sums     [B, T] values    -> weighted sums per sequence, [S]            (differentiable)
    dpo_kernels::preference_loss   [B, T] logps     -> losses [P], sums, reference sums, coef [2P] (differentiable)
    dpo_kernels::fused_forward     token_logps and preference_loss at once: one launch where the backend has it
    dpo_kernels::logits_grad       d loss / d logits, into a new tensor; logits_grad_ over the logits themselves

Everything of size [tokens] or less is float64 (float32 where a device has none): it costs nothing beside the logits and
keeps sums, losses and coefficients free of rounding. The backend's name travels with each call, so a backward runs where
its forward ran.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from . import backends
from .backends.eager import small_dtype
from .memory import fresh

_library = torch.library.Library("dpo_kernels", "DEF")

_library.define(
    "token_logps(Tensor logits, Tensor labels, Tensor? ref_logits, int ignore_index, float logit_scale, "
    "float logit_softcap, bool entropy, bool kl, bool accuracy, bool mean_logits, bool log_sum_sq, "
    "bool inplace_backward, str backend) "
    "-> (Tensor logps, Tensor lse, Tensor ref_logps, Tensor entropy, Tensor kl, Tensor accuracy, Tensor mean_logits, "
    "Tensor log_sum_sq)"
)
_library.define("sequence_sums(Tensor values, Tensor weights, Tensor? cu_seqlens, str backend) -> Tensor")
_library.define(
    "preference_loss(Tensor logps, Tensor? ref_logps, Tensor weights, Tensor? cu_seqlens, Tensor? ref_sums, "
    "Tensor beta, Tensor label_smoothing, bool robust, str backend) "
    "-> (Tensor losses, Tensor sums, Tensor ref_sums, Tensor coef)"
)
_library.define(
    "fused_forward(Tensor logits, Tensor labels, Tensor? ref_logits, Tensor weights, Tensor? cu_seqlens, Tensor? ref_sums, "
    "Tensor beta, Tensor label_smoothing, bool robust, int ignore_index, float logit_scale, float logit_softcap, "
    "bool entropy, bool kl, bool accuracy, bool mean_logits, bool log_sum_sq, bool inplace_backward, str backend) "
    "-> (Tensor logps, Tensor lse, Tensor ref_logps, Tensor entropy, Tensor kl, Tensor accuracy, Tensor mean_logits, "
    "Tensor log_sum_sq, Tensor losses, Tensor sums, Tensor ref_sums, Tensor coef)"
)
_library.define(
    "logits_grad(Tensor logits, Tensor labels, Tensor logps, Tensor lse, Tensor grad_logps, int ignore_index, "
    "float logit_scale, float logit_softcap, str backend) -> Tensor"
)
_library.define(
    "logits_grad_(Tensor(a!) logits, Tensor labels, Tensor logps, Tensor lse, Tensor grad_logps, int ignore_index, "
    "float logit_scale, float logit_softcap, str backend) -> ()"
)

_ops = torch.ops.dpo_kernels


def _unit_stride(logits: Tensor) -> Tensor:
    """Kernels read rows of unit stride; views such as logits[:, :-1] pass through, a transposed vocabulary is copied."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] <= 1 else logits.contiguous()


# --- implementations ---------------------------------------------------------------------------------------------


def _token_logps(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    entropy: bool,
    kl: bool,
    accuracy: bool,
    mean_logits: bool,
    log_sum_sq: bool,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    stages = backends.load(backend, logits.device.type)
    return stages.token_logps(
        _unit_stride(logits),
        labels.contiguous(),
        None if ref_logits is None else _unit_stride(ref_logits),
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        entropy=entropy,
        kl=kl,
        accuracy=accuracy,
        mean_logits=mean_logits,
        log_sum_sq=log_sum_sq,
    )


def check_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise ValueError unless cu_seqlens rises from 0 to at most `tokens`. Waits for the device."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > tokens or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to at most {tokens} (the number of tokens); got {bounds}")


def _check_cu_seqlens(cu_seqlens: Tensor | None, tokens: int) -> None:
    # On an accelerator the check would wait for the device; `rising_bounds` stands in for it.
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        check_bounds(cu_seqlens, tokens)


def rising_bounds(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """cu_seqlens with every bound moved into [0, tokens], and up to the largest bound before it.

    Bounds that were right stay as they are. Wrong ones then name sequences that exist and do not overlap, so no kernel
    reads or writes elsewhere, and each token's gradient goes through the one sequence that its log-probability was added to.
    """
    return cu_seqlens.clamp(0, tokens).cummax(0).values


def owners(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The sequence of each of `tokens` packed tokens, [tokens] int64; -1 or S for a token of none of the S sequences."""
    return torch.bucketize(torch.arange(tokens, device=cu_seqlens.device), cu_seqlens, right=True) - 1


def _sequence_sums(values: Tensor, weights: Tensor, cu_seqlens: Tensor | None, backend: str) -> Tensor:
    _check_cu_seqlens(cu_seqlens, values.shape[1])
    return backends.load(backend, values.device.type).sequence_sums(
        values.contiguous(), weights.contiguous(), cu_seqlens
    )


def _preference_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    ref_sums: Tensor | None,
    beta: Tensor,
    label_smoothing: Tensor,
    robust: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    _check_cu_seqlens(cu_seqlens, logps.shape[1])
    return backends.load(backend, logps.device.type).preference_loss(
        logps.contiguous(),
        None if ref_logps is None else ref_logps.contiguous(),
        weights.contiguous(),
        cu_seqlens,
        None if ref_sums is None else ref_sums.contiguous(),
        beta.contiguous(),
        label_smoothing.contiguous(),
        robust,
    )


def _fused_forward(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    ref_sums: Tensor | None,
    beta: Tensor,
    label_smoothing: Tensor,
    robust: bool,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    entropy: bool,
    kl: bool,
    accuracy: bool,
    mean_logits: bool,
    log_sum_sq: bool,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    settings = (ignore_index, logit_scale, logit_softcap, entropy, kl, accuracy, mean_logits, log_sum_sq)
    fused = getattr(backends.load(backend, logits.device.type), "fused_forward", None)
    if fused is None:
        tokens = _token_logps(logits, labels, ref_logits, *settings, inplace_backward, backend)
        ref_logps = None if ref_logits is None else tokens[2]
        family = (weights, cu_seqlens, ref_sums, beta, label_smoothing, robust)
        return (*tokens, *_preference_loss(tokens[0], ref_logps, *family, backend))
    _check_cu_seqlens(cu_seqlens, labels.shape[1])
    tokens, pairs = fused(
        _unit_stride(logits),
        labels.contiguous(),
        None if ref_logits is None else _unit_stride(ref_logits),
        weights.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        None if ref_sums is None else ref_sums.contiguous(),
        beta.contiguous(),
        label_smoothing.contiguous(),
        robust,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        entropy=entropy,
        kl=kl,
        accuracy=accuracy,
        mean_logits=mean_logits,
        log_sum_sq=log_sum_sq,
    )
    return (*tokens, *pairs)


def _logits_grad(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    lse: Tensor,
    grad_logps: Tensor,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    backend: str,
) -> Tensor:
    logits = _unit_stride(logits)
    out = fresh(logits.shape, logits.dtype, logits.device)
    _run_logits_grad(logits, labels, logps, lse, grad_logps, ignore_index, logit_scale, logit_softcap, backend, out)
    return out


def _logits_grad_(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    lse: Tensor,
    grad_logps: Tensor,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    backend: str,
) -> None:
    _run_logits_grad(logits, labels, logps, lse, grad_logps, ignore_index, logit_scale, logit_softcap, backend, logits)


def _run_logits_grad(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    lse: Tensor,
    grad_logps: Tensor,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    backend: str,
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
    )


for _name, _function in (
    ("token_logps", _token_logps),
    ("sequence_sums", _sequence_sums),
    ("preference_loss", _preference_loss),
    ("fused_forward", _fused_forward),
    ("logits_grad", _logits_grad),
    ("logits_grad_", _logits_grad_),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


# --- fake kernels: shapes and dtypes only, for torch.compile ------------------------------------------------------


@torch.library.register_fake("dpo_kernels::token_logps", lib=_library)
def _(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    entropy: bool,
    kl: bool,
    accuracy: bool,
    mean_logits: bool,
    log_sum_sq: bool,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    wanted = (True, True, ref_logits is not None, entropy, kl, accuracy, mean_logits, log_sum_sq)
    small = small_dtype(logits.device)
    return tuple(logits.new_empty(labels.shape if want else (0,), dtype=small) for want in wanted)


@torch.library.register_fake("dpo_kernels::sequence_sums", lib=_library)
def _(values: Tensor, weights: Tensor, cu_seqlens: Tensor | None, backend: str) -> Tensor:
    return values.new_empty(values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)


@torch.library.register_fake("dpo_kernels::preference_loss", lib=_library)
def _(
    logps: Tensor,
    ref_logps: Tensor | None,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    ref_sums: Tensor | None,
    beta: Tensor,
    label_smoothing: Tensor,
    robust: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    pairs = beta.shape[0]
    return (logps.new_empty(pairs), *(logps.new_empty(2 * pairs) for _ in range(3)))


@torch.library.register_fake("dpo_kernels::fused_forward", lib=_library)
def _(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    ref_sums: Tensor | None,
    beta: Tensor,
    label_smoothing: Tensor,
    robust: bool,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    entropy: bool,
    kl: bool,
    accuracy: bool,
    mean_logits: bool,
    log_sum_sq: bool,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    wanted = (True, True, ref_logits is not None, entropy, kl, accuracy, mean_logits, log_sum_sq)
    small = small_dtype(logits.device)
    pairs = beta.shape[0]
    return (
        *(logits.new_empty(labels.shape if want else (0,), dtype=small) for want in wanted),
        *(logits.new_empty(count, dtype=small) for count in (pairs, 2 * pairs, 2 * pairs, 2 * pairs)),
    )


@torch.library.register_fake("dpo_kernels::logits_grad", lib=_library)
def _(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    lse: Tensor,
    grad_logps: Tensor,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    backend: str,
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.register_fake("dpo_kernels::logits_grad_", lib=_library)
def _(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    lse: Tensor,
    grad_logps: Tensor,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    backend: str,
) -> None:
    return None


# --- autograd rules -----------------------------------------------------------------------------------------------

#: What a second backward of a graph that overwrote its logits says.
OVERWRITTEN = (
    "the logits were overwritten by the first backward (inplace_backward=True), so this graph cannot be run backward "
    "again; call with inplace_backward=False to use retain_graph"
)


def _token_logps_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, _, ctx.ignore_index, ctx.scale, ctx.softcap, *_, ctx.inplace, ctx.backend = inputs
    ctx.save_for_backward(logits, labels, output[0], output[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.overwritten = False


def may_overwrite(logits: Tensor) -> bool:
    """Whether the gradient can take the logits' memory: eager tensors of unit stride whose elements do not overlap."""
    overlapping = any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True))
    plain = type(logits) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    # With create_graph the logits are still needed (the double backward then raises its own error).
    return plain and not overlapping and logits.stride(-1) == 1 and not torch.is_grad_enabled()


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the first to the last element of a and those of b lie in common memory: views of one buffer, say."""

    def span(x: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()

    (a_start, a_end), (b_start, b_end) = span(a), span(b)
    return a.device == b.device and a.numel() > 0 and b.numel() > 0 and a_start < b_end and b_start < a_end


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    """The saved tensors, or an error that says why they are gone (autograd's own would not)."""
    if ctx.overwritten:
        raise RuntimeError(OVERWRITTEN)
    return ctx.saved_tensors


def _through_logits(ctx: Any, saved: tuple[Tensor, ...], grad_logps: Tensor) -> Tensor:
    """Stage 3, over the logits' own memory where the caller allowed it."""
    logits, *rest = saved
    arguments = (*rest, grad_logps, ctx.ignore_index, ctx.scale, ctx.softcap, ctx.backend)
    if ctx.inplace and may_overwrite(logits):
        ctx.overwritten = True
        logits = logits.detach()
        _ops.logits_grad_(logits, *arguments)
        # Anyone else who saved these logits for a backward of their own must notice.
        torch.autograd.graph.increment_version(logits)
        return logits
    return _ops.logits_grad(logits, *arguments)


def _token_logps_backward(ctx: Any, grad_logps: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_logps is None or not ctx.needs_input_grad[0]:
        return (None,) * 13
    return (_through_logits(ctx, _saved(ctx), grad_logps), *(None,) * 12)


torch.library.register_autograd(
    "dpo_kernels::token_logps", _token_logps_backward, setup_context=_token_logps_setup, lib=_library
)


def _spread(per_sequence: Tensor, weights: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Each token's weight times its sequence's number, [B, T]; exactly 0 on unweighted tokens."""
    if cu_seqlens is None:
        spread = per_sequence.unsqueeze(-1)
    else:
        # Both -1 and S find the appended 0: tokens before the first and behind the last sequence belong to nobody.
        by_owner = torch.cat([per_sequence, per_sequence.new_zeros(1)])
        spread = by_owner[owners(cu_seqlens, weights.shape[1])].unsqueeze(0)
    return torch.where(weights != 0, weights * spread, 0.0)


def _sequence_sums_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _sequence_sums_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, cu_seqlens = ctx.saved_tensors
    return _spread(grad, weights, cu_seqlens), None, None, None


torch.library.register_autograd(
    "dpo_kernels::sequence_sums", _sequence_sums_backward, setup_context=_sequence_sums_setup, lib=_library
)


def _preference_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[2], inputs[3], output[3])
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.set_materialize_grads(False)


def _through_sums(
    coef: Tensor, grad_losses: Tensor | None, grad_sums: Tensor | None, weights: Tensor, cu_seqlens: Tensor | None
) -> Tensor | None:
    """Gradient of the tokens' log-probabilities, from those of the losses and of the sequence sums."""
    total = grad_sums
    if grad_losses is not None:
        through_loss = coef * grad_losses.repeat(2)
        total = through_loss if total is None else total + through_loss
    return None if total is None else _spread(total, weights, cu_seqlens)


def _preference_loss_backward(
    ctx: Any, grad_losses: Tensor | None, grad_sums: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    weights, cu_seqlens, coef = ctx.saved_tensors
    return (_through_sums(coef, grad_losses, grad_sums, weights, cu_seqlens), *(None,) * 8)


torch.library.register_autograd(
    "dpo_kernels::preference_loss", _preference_loss_backward, setup_context=_preference_loss_setup, lib=_library
)


def _fused_forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, _, weights, cu_seqlens = inputs[:5]
    ctx.ignore_index, ctx.scale, ctx.softcap = inputs[9:12]
    ctx.inplace, ctx.backend = inputs[-2:]
    logps, lse, *statistics, _, _, ref_sums, coef = output
    ctx.save_for_backward(logits, labels, logps, lse, weights, cu_seqlens, coef)
    ctx.mark_non_differentiable(lse, *statistics, ref_sums, coef)
    ctx.set_materialize_grads(False)
    ctx.overwritten = False


def _fused_forward_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    by_logps, by_losses, by_sums = grads[0], grads[8], grads[9]
    if not ctx.needs_input_grad[0]:
        return (None,) * 19
    *saved, weights, cu_seqlens, coef = _saved(ctx)
    total = _through_sums(coef, by_losses, by_sums, weights, cu_seqlens)
    if by_logps is not None:
        total = by_logps if total is None else total + by_logps
    return (None if total is None else _through_logits(ctx, tuple(saved), total), *(None,) * 18)


torch.library.register_autograd(
    "dpo_kernels::fused_forward", _fused_forward_backward, setup_context=_fused_forward_setup, lib=_library
)


def _no_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("dpo_kernels has no double backward: the gradient kernels are not differentiable")


torch.library.register_autograd("dpo_kernels::logits_grad", _no_double_backward, lib=_library)


# --- typed doors for functional.py --------------------------------------------------------------------------------


def token_logps(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    *,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    statistics: tuple[str, ...],
    inplace_backward: bool,
    backend: str,
) -> dict[str, Tensor]:
    """Stage 1 as a dict: "logps", "lse", and "ref_logps" and the statistics where asked for; [B, T] each."""
    outputs = _ops.token_logps(
        logits,
        labels,
        ref_logits,
        ignore_index,
        logit_scale,
        logit_softcap,
        *(name in statistics for name in _STATISTICS),
        inplace_backward,
        backend,
    )
    return _named(outputs, ref_logits is not None, statistics)


_STATISTICS = ("entropy", "kl", "accuracy", "mean_logits", "log_sum_sq")


def _named(outputs: tuple[Tensor, ...], has_reference: bool, statistics: tuple[str, ...]) -> dict[str, Tensor]:
    """Stage 1's outputs by name, without those that nobody asked for."""
    names = ("logps", "lse", "ref_logps", *_STATISTICS)
    given = {"logps", "lse", *(["ref_logps"] if has_reference else []), *statistics}
    return {name: value for name, value in zip(names, outputs, strict=True) if name in given}


def fused_forward(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    ref_sums: Tensor | None,
    beta: Tensor,
    label_smoothing: Tensor,
    robust: bool,
    *,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    statistics: tuple[str, ...],
    inplace_backward: bool,
    backend: str,
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Stages 1 and 2 of the sigmoid family: (the dict of `token_logps`, losses [P], sums [2P], ref_sums [2P])."""
    *tokens, losses, sums, ref_sums_out, _ = _ops.fused_forward(
        logits,
        labels,
        ref_logits,
        weights,
        cu_seqlens,
        ref_sums,
        beta,
        label_smoothing,
        robust,
        ignore_index,
        logit_scale,
        logit_softcap,
        *(name in statistics for name in _STATISTICS),
        inplace_backward,
        backend,
    )
    return _named(tuple(tokens), ref_logits is not None, statistics), losses, sums, ref_sums_out


def sequence_sums(values: Tensor, weights: Tensor, cu_seqlens: Tensor | None, backend: str) -> Tensor:
    """Weighted sum over each sequence, [S] float64."""
    return _ops.sequence_sums(values, weights, cu_seqlens, backend)


def preference_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    ref_sums: Tensor | None,
    beta: Tensor,
    label_smoothing: Tensor,
    robust: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage 2: (losses [P], sums [2P], ref_sums [2P])."""
    losses, sums, ref_sums_out, _ = _ops.preference_loss(
        logps, ref_logps, weights, cu_seqlens, ref_sums, beta, label_smoothing, robust, backend
    )
    return losses, sums, ref_sums_out
