"""The two passes as operators, for torch.compile: shapes known before anything runs, no strategy that saves what it found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends.eager import small_dtype
from .call import TOKEN_OUTPUTS, Call, KLGradients
from .chunk import no_autocast
from .tokens import backward_tokens, constants, forward_tokens, upstream

_library = torch.library.Library("dpo_kernels", "FRAGMENT")
_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? ref_hidden, Tensor? ref_weight, "
    "Tensor? ref_bias, int ignore_index, float logit_scale, float logit_softcap, str[] statistics, str[] terms, "
    "ScalarType compute_dtype, int budget, str backend"
)
_library.define(
    f"linear_logps({_ARGUMENTS}) -> (Tensor logps, Tensor lse, Tensor ref_logps, Tensor entropy, Tensor kl, "
    "Tensor accuracy, Tensor mean_logits, Tensor log_sum_sq, Tensor grad_dropped_mass, Tensor forward_kl)"
)
_library.define(
    f"linear_logps_grad({_ARGUMENTS}, Tensor logps, Tensor lse, Tensor ref_logps, Tensor kl, Tensor grad_logps, "
    "Tensor? grad_kl, Tensor? grad_forward_kl, bool needs_hidden, bool needs_weight, bool needs_bias) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)
_ops = torch.ops.dpo_kernels
_COUNT = 15  # tensors and options of _ARGUMENTS


def _call_of(
    arguments: Sequence[Any], needs_hidden: bool = False, needs_weight: bool = False, needs_bias: bool = False
) -> tuple[Call, Tensor, Tensor, Tensor | None]:
    (
        hidden,
        weight,
        bias,
        labels,
        ref_hidden,
        ref_weight,
        ref_bias,
        ignore,
        scale,
        cap,
        names,
        terms,
        dtype,
        budget,
        backend,
    ) = arguments
    call = Call(
        labels,
        ref_hidden,
        ref_weight,
        ref_bias,
        ignore,
        scale,
        cap,
        tuple(names),
        dtype,
        budget,
        backend,
        "forward",
        tuple(terms),
        needs_hidden=needs_hidden,
        needs_weight=needs_weight,
        needs_bias=needs_bias,
    )
    return call, hidden, weight, bias


def _linear_logps(*arguments: Any) -> tuple[Tensor, ...]:
    call, hidden, weight, bias = _call_of(arguments)
    with no_autocast(hidden.device):
        run = forward_tokens(call, hidden, weight, bias)
    return run.table.tuple()


def _linear_logps_grad(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    logps, lse, ref_logps, kl, grad_logps, grad_kl, grad_forward_kl, *needs = arguments[_COUNT:]
    needs_hidden, needs_weight, needs_bias = needs
    divergences = None
    if grad_kl is not None or grad_forward_kl is not None:
        divergences = KLGradients(ref_logps, kl, grad_kl, grad_forward_kl)
    call, hidden, weight, bias = _call_of(
        arguments[:_COUNT], needs_hidden=needs_hidden, needs_weight=needs_weight, needs_bias=needs_bias
    )
    with no_autocast(hidden.device):
        grad_hidden, gradient = backward_tokens(
            call, hidden, weight, bias, logps, lse, grad_logps, divergences=divergences
        )
    nothing = hidden.new_empty(0)
    return (
        nothing if grad_hidden is None else grad_hidden,
        weight.new_empty(0) if gradient.weight is None else gradient.weight.to(weight.dtype),
        nothing.clone() if gradient.bias is None or bias is None else gradient.bias.to(bias.dtype),
    )


_library.impl("linear_logps", _linear_logps, "CompositeExplicitAutograd")
_library.impl("linear_logps_grad", _linear_logps_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("dpo_kernels::linear_logps", lib=_library)
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, labels, ref_hidden, statistics, terms = (arguments[i] for i in (0, 3, 4, 10, 11))
    given = {"logps", "lse", *statistics, *terms, *(["ref_logps"] if ref_hidden is not None else [])}
    given |= {"kl"} if terms else set()
    small = small_dtype(hidden.device)
    return tuple(hidden.new_empty(labels.shape if name in given else (0,), dtype=small) for name in TOKEN_OUTPUTS)


@torch.library.register_fake("dpo_kernels::linear_logps_grad", lib=_library)
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = arguments[:3]
    needs_hidden, needs_weight, needs_bias = arguments[_COUNT + 7 :]
    return (
        torch.empty(hidden.shape if needs_hidden else (0,), dtype=hidden.dtype, device=hidden.device),
        torch.empty(weight.shape if needs_weight else (0,), dtype=weight.dtype, device=weight.device),
        torch.empty(
            bias.shape if needs_bias else (0,), dtype=(bias if needs_bias else hidden).dtype, device=hidden.device
        ),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], *output[:3], output[4])
    ctx.options = inputs[7:]
    ctx.mark_non_differentiable(*constants(inputs[11], output))
    ctx.set_materialize_grads(False)


def _op_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, logps, lse, ref_logps, kl = ctx.saved_tensors
    grad_logps, divergences = upstream(grads, logps, ref_logps, kl)
    if grad_logps is None:
        return (None,) * _COUNT
    needs = list(ctx.needs_input_grad[:3])
    by_kl = by_forward = None
    ignore_index, scale, cap, _, terms, *rest = ctx.options
    if divergences is None:
        # The reference needs no second projection.
        tensors, terms = [*tensors[:4], None, None, None], []
    else:
        by_kl, by_forward = divergences.grad_kl, divergences.grad_forward_kl
    options = [ignore_index, scale, cap, [], terms, *rest]
    saved = (logps, lse, ref_logps, kl)
    gradients = _ops.linear_logps_grad(*tensors, *options, *saved, grad_logps, by_kl, by_forward, *needs)
    found = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return (*found, *(None,) * (_COUNT - 3))


torch.library.register_autograd("dpo_kernels::linear_logps", _op_backward, setup_context=_setup, lib=_library)
torch.library.register_autograd("dpo_kernels::linear_logps_grad", ops._no_double_backward, lib=_library)
