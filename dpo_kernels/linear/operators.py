"""The linear path as operators for torch.compile.

A compiler needs all shapes in advance, so no strategy that saves tensors of data-dependent size is used.

    linear_logps          log-probabilities of tokens, for any upstream gradient; its backward projects again
    linear_whole_pairs    a scalar loss of the sigmoid family; it also returns the gradients for d loss = 1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import objectives, ops
from .._ops import add_op_namespace_prefix
from .._ops import ops as _ops
from ..arguments import PairSettings
from ..pair_loss import PairLosses, Tokens
from ..stages import Transform, small_dtype
from .call import Call, KLGradients, LMHead, Needs, Reference, sizes_of
from .chunk import no_autocast
from .pairs import loss_of, run_pairs
from .tokens import backward_tokens, forward_tokens, upstream

_library = torch.library.Library(_ops.name, "FRAGMENT")
_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? ref_hidden, Tensor? ref_weight, "
    "Tensor? ref_bias, int ignore_index, float logit_scale, float logit_softcap, str[] statistics, str[] terms, "
    "ScalarType compute_dtype, int budget, str backend"
)
_library.define(f"linear_logps({_ARGUMENTS}) -> Tensor")
_library.define(
    f"linear_logps_grad({_ARGUMENTS}, Tensor found, Tensor grad_logps, Tensor? grad_kl, Tensor? grad_forward_kl, "
    "bool needs_hidden, bool needs_weight, bool needs_bias) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)
_COUNT = 15  # tensors and options of _ARGUMENTS


def _flat(hidden: Tensor, head: LMHead, call: Call) -> tuple[Any, ...]:
    """The arguments of a call in the order of _ARGUMENTS."""
    options = (list(call.statistics), list(call.terms), call.compute_dtype, call.budget, call.backend)
    return hidden, *head, call.labels, *call.reference, *call.transform, *options


def linear_logps(hidden: Tensor, head: LMHead, call: Call) -> Tensor:
    """`LinearLogps` for torch.compile: the results of all tokens, [R, B, T]."""
    return _ops.linear_logps(*_flat(hidden, head, call))


def _call_of(
    arguments: Sequence[Any], needs: Needs, strategy: str = "forward"
) -> tuple[Call, Tensor, Tensor, Tensor | None]:
    hidden, weight, bias, labels, *rest = arguments
    reference, transform = Reference(*rest[:3]), Transform(*rest[3:6])
    statistics, terms, dtype, budget, backend = rest[6:]
    statistics, terms = tuple(statistics), tuple(terms)
    sizes = sizes_of(hidden, weight.shape[0], reference, statistics, terms, dtype, needs)
    call = Call(labels, reference, transform, statistics, terms, dtype, backend, strategy, sizes, needs, budget)
    return call, hidden, weight, bias


def _linear_logps(*arguments: Any) -> Tensor:
    call, hidden, weight, bias = _call_of(arguments, Needs())
    with no_autocast(hidden.device):
        return forward_tokens(call, hidden, weight, bias).table.all


def _linear_logps_grad(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    found, grad_logps, grad_kl, grad_forward_kl, *needs = arguments[_COUNT:]
    call, hidden, weight, bias = _call_of(arguments[:_COUNT], Needs(*needs))
    divergences = None
    if call.terms:
        rows = dict(zip(call.rows, found.unbind(0), strict=True))
        grads = {"kl": grad_kl, "forward_kl": grad_forward_kl}
        divergences = KLGradients.of(rows, grads, call.sizes.vocab)
    with no_autocast(hidden.device):
        grad_hidden, gradient = backward_tokens(call, hidden, weight, bias, found, grad_logps, divergences=divergences)
    nothing = hidden.new_empty(0)
    return (
        nothing if grad_hidden is None else grad_hidden,
        weight.new_empty(0) if gradient.weight is None else gradient.weight.to(weight.dtype),
        nothing.clone() if gradient.bias is None or bias is None else gradient.bias.to(bias.dtype),
    )


_library.impl("linear_logps", _linear_logps, "CompositeExplicitAutograd")
_library.impl("linear_logps_grad", _linear_logps_grad, "CompositeExplicitAutograd")


@torch.library.register_fake(add_op_namespace_prefix("linear_logps"), lib=_library)
def _(*arguments: Any) -> Tensor:
    call, hidden, *_ = _call_of(arguments, Needs())
    return hidden.new_empty((len(call.rows), *call.labels.shape), dtype=small_dtype(hidden.device))


@torch.library.register_fake(add_op_namespace_prefix("linear_logps_grad"), lib=_library)
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = arguments[:3]
    needs_hidden, needs_weight, needs_bias = arguments[_COUNT + 4 :]
    return (
        torch.empty(hidden.shape if needs_hidden else (0,), dtype=hidden.dtype, device=hidden.device),
        torch.empty(weight.shape if needs_weight else (0,), dtype=weight.dtype, device=weight.device),
        torch.empty(
            bias.shape if needs_bias else (0,), dtype=(bias if needs_bias else hidden).dtype, device=hidden.device
        ),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7], output)
    ctx.options = inputs[7:]
    ctx.set_materialize_grads(False)


def _op_backward(ctx: Any, grad_tokens: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_tokens is None:
        return (None,) * _COUNT
    *tensors, found = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    call, *_ = _call_of((*tensors, *ctx.options), Needs(*needs))
    grad_logps, divergences = upstream(call, grad_tokens, found)
    options = list(ctx.options)
    by_terms: tuple[Tensor | None, ...] = (None, None)
    if divergences is None:
        # Without KL terms the backward pass does not need the reference.
        tensors, options[3:5] = [*tensors[:4], None, None, None], [[], []]
    else:
        by_terms = (divergences.grad_kl, divergences.grad_forward_kl)
    gradients = _ops.linear_logps_grad(*tensors, *options, found, grad_logps, *by_terms, *needs)
    wanted = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return (*wanted, *(None,) * (_COUNT - 3))


torch.library.register_autograd(
    add_op_namespace_prefix("linear_logps"), _op_backward, setup_context=_setup, lib=_library
)
torch.library.register_autograd(add_op_namespace_prefix("linear_logps_grad"), ops.no_double_backward, lib=_library)

# --- whole pairs -----------------------------------------------------------------------------------------------------

_PAIR_SIDE = (
    "Tensor weights, Tensor scored, Tensor? cu_seqlens, Tensor beta, Tensor label_smoothing, Tensor? pair_weights, "
    "Tensor? ref_sums, str family, float kl_coef, bool use_weighting, str reduction, bool needs_hidden, bool needs_weight, "
    "bool needs_bias"
)
_library.define(
    f"linear_whole_pairs({_ARGUMENTS}, {_PAIR_SIDE}) -> (Tensor loss, Tensor weighted, Tensor losses, Tensor sums, "
    "Tensor ref_sums_out, Tensor rewards, Tensor found, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)


def linear_whole_pairs(
    hidden: Tensor, head: LMHead, call: Call, tokens: Tokens, settings: PairSettings
) -> tuple[Tensor, PairLosses, Tensor]:
    """`WholePairs` for torch.compile: (loss, the pairs' losses, the results of all tokens [R, B, T])."""
    assert settings.family is not None
    loss, *vectors, found, _, _, _ = _ops.linear_whole_pairs(
        *_flat(hidden, head, call),
        tokens.weights,
        tokens.scored,
        tokens.cu_seqlens,
        settings.each(settings.beta, tokens.weights),
        settings.each(settings.label_smoothing, tokens.weights),
        settings.pair_weights,
        settings.ref_sums,
        settings.family,
        settings.kl_coef,
        settings.use_weighting,
        settings.reduction,
        *call.needs,
    )
    return loss, PairLosses(*vectors), found


def _linear_whole_pairs(*arguments: Any) -> tuple[Tensor, ...]:
    weights, scored, cu_seqlens, beta, smoothing, pair_weights, ref_sums, family, *rest = arguments[_COUNT:-3]
    call, hidden, weight, bias = _call_of(arguments[:_COUNT], Needs(*arguments[-3:]), "whole_pairs")
    functions = objectives.resolve(family)
    settings = PairSettings(beta.shape[0], functions, None, beta, smoothing, pair_weights, ref_sums, *rest)
    tokens = Tokens(weights, scored, cu_seqlens, call.backend)
    with no_autocast(hidden.device):
        done = run_pairs(call, tokens, settings, hidden, weight, bias, may_wait=False)
    loss = loss_of(done, settings)
    gradients = (
        hidden.new_empty(0) if gradient is None or like is None else gradient.to(like.dtype)
        for gradient, like in ((done.grad_hidden, hidden), (done.grad_weight, weight), (done.grad_bias, bias))
    )
    return loss, *done.losses.tuple(), done.table.all, *gradients


_library.impl("linear_whole_pairs", _linear_whole_pairs, "CompositeExplicitAutograd")


@torch.library.register_fake(add_op_namespace_prefix("linear_whole_pairs"), lib=_library)
def _(*arguments: Any) -> tuple[Tensor, ...]:
    needs = arguments[-3:]
    call, hidden, weight, bias = _call_of(arguments[:_COUNT], Needs(*needs), "whole_pairs")
    beta = arguments[_COUNT + 3]
    pairs, small = beta.shape[0], small_dtype(hidden.device)
    gradients = (
        hidden.new_empty(0)
        if like is None or not need
        else torch.empty(like.shape, dtype=like.dtype, device=like.device)
        for like, need in zip((hidden, weight, bias), needs, strict=True)
    )
    return (
        beta.new_empty(()),
        *(beta.new_empty(n) for n in (pairs, pairs, 2 * pairs, 2 * pairs, 2 * pairs)),
        hidden.new_empty((len(call.rows), *call.labels.shape), dtype=small),
        *gradients,
    )


def _pairs_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs, ctx.count = inputs[-3:], len(inputs)
    ctx.save_for_backward(*output[-3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _pairs_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * ctx.count
    scaled = (
        (gradient * grad_loss).to(gradient.dtype) if need else None
        for gradient, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return (*scaled, *(None,) * (ctx.count - 3))


torch.library.register_autograd(
    add_op_namespace_prefix("linear_whole_pairs"), _pairs_backward, setup_context=_pairs_setup, lib=_library
)
