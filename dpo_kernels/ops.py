"""The operators: autograd around the backends' stages (interface: stages.py), in eager mode and under torch.compile.

Their namespace is torch.ops.dpo_kernels, or that of another copy of the package (_ops.py):

    token_logps           stage 1: results of the tokens, [R, B, T]        (differentiable: logps, divergences)
    logits_grad           stage 3, into a new tensor
    sequence_sums         weighted sums of sequences, [S]                  (differentiable)
    preference_loss       the sigmoid family from tokens                   (differentiable: losses, sums)
    preference_forward    a whole call of the sigmoid family               (differentiable: loss)
    preference_backward   the gradient of such a call, into a new tensor

Each operator is declared once and has two entry points (`_Operator`). Eager code calls a plain autograd function, which has a
fraction of the dispatch overhead of a PyTorch operator written in Python. Compilers, tensor subclasses and double backward use
the registered operator. The backend's name is an argument, so the backward pass uses the backend of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends
from ._ops import add_op_namespace_prefix
from ._ops import ops as _ops
from .backends import whole_call
from .backends.whole_call import SEQUENCE_ROWS, Family, Weighting
from .memory import fresh
from .stages import (
    KL_TERMS,
    TokenKL,
    Transform,
    all_rows,
    check_bounds,
    from_uniform,
    share_memory,
    small_dtype,
    spread,
    token_rows,
)

_library = torch.library.Library(_ops.name, "DEF")

#: The error of a second backward pass after the first one overwrote the logits.
OVERWRITTEN = (
    "the logits were overwritten by the first backward pass (inplace_backward=True), so this graph has no second one; "
    "call with inplace_backward=False to use retain_graph"
)


#: All operators, in order of definition.
OPERATORS: list[_Operator] = []


class _Operator:
    """An operator as a registered PyTorch operator and as an autograd function.

    Args:
        schema: name, arguments and results, in the syntax of torch.library.
        forward: the implementation, on plain tensors.
        fake: returns empty results with the right shapes and dtypes.
        setup, backward: `setup_context` and `backward` of a torch.autograd.Function. Without them the operator is not
            differentiable, and a double backward raises.
    """

    def __init__(
        self,
        schema: str,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        setup: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        name = self.name = schema.partition("(")[0]
        OPERATORS.append(self)
        _library.define(schema)
        _library.impl(name, forward, "CompositeExplicitAutograd")
        qualified = add_op_namespace_prefix(name)
        torch.library.register_fake(qualified, fake, lib=_library)
        torch.library.register_autograd(qualified, backward or no_double_backward, setup_context=setup, lib=_library)
        self.forward, self.registered = forward, getattr(_ops, name)
        if setup is not None and backward is not None:
            self.function = _function(name, forward, setup, backward)

    def __call__(self, tensor: Tensor, *arguments: Any) -> Any:
        """Calls the operator; only its first argument can be differentiable."""
        if not is_plain(tensor):
            return self.registered(tensor, *arguments)
        if torch.is_grad_enabled() and tensor.requires_grad:
            return self.function.apply(tensor, arguments)
        return self.forward(tensor, *arguments)


def _function(
    name: str, forward: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The operator as an autograd function of its first argument and a tuple of the others, which autograd need not process."""

    def run(ctx: Any, tensor: Tensor, arguments: tuple[Any, ...]) -> Any:
        output = forward(tensor, *arguments)
        setup(ctx, (tensor, *arguments), output)
        return output

    # The function has no `setup_context`: with one, PyTorch would bind arguments by name at every call, which takes 80 us.
    rules = {"forward": staticmethod(run), "backward": staticmethod(lambda ctx, *g: (backward(ctx, *g)[0], None))}
    return type(name, (torch.autograd.Function,), rules)


def no_double_backward(ctx: Any, *grads: Any) -> None:
    """The autograd rule of operators that compute gradients: raises RuntimeError."""
    raise RuntimeError("dpo_kernels has no double backward: the gradient kernels are not differentiable")


class _Gradients(torch.autograd.Function):
    """Identity on gradients. Its backward raises, where detached gradients would silently drop their dependence on the inputs."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    backward = staticmethod(no_double_backward)


def without_graph(compute: Callable[[], tuple[Tensor | None, ...]], *inputs: Tensor | None) -> tuple[Any, ...]:
    """The gradients that `compute` returns, computed without a graph; a double backward through them raises.

    Args:
        compute: returns the gradients.
        inputs: the tensors that the gradients depend on.
    """
    with torch.no_grad():
        gradients = compute()
    if not torch.is_grad_enabled():
        return gradients
    # An autograd function must not return its inputs, because the caller may modify the returned gradients.
    copies = (None if gradient is None else gradient.detach().clone() for gradient in gradients)
    return _Gradients.apply(len(gradients), *copies, *inputs)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a plain eager tensor: not a subclass, and not being compiled."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _unit_stride(logits: Tensor) -> Tensor:
    """The logits with unit stride along the vocabulary: views such as logits[:, :-1] as they are, others as a copy."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] <= 1 else logits.contiguous()


def _optional(tensor: Tensor | None, ready: Callable[[Tensor], Tensor] = Tensor.contiguous) -> Tensor | None:
    return None if tensor is None else ready(tensor)


def check_cu_seqlens(cu_seqlens: Tensor | None, tokens: int) -> None:
    """Raise ValueError for bounds on a CPU that do not rise from 0 to at most `tokens`."""
    # On an accelerator the check would synchronize; there `stages.rising_bounds` has made the bounds valid.
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        check_bounds(cu_seqlens, tokens)


# --- the gradient of the logits --------------------------------------------------------------------------------------


def may_overwrite(logits: Tensor) -> bool:
    """Whether the gradient can be written over the logits: a plain eager tensor of unit stride without overlapping elements."""
    # Elements do not overlap if each stride exceeds the extent of all dimensions with smaller strides.
    reach, overlapping = 0, False
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        overlapping |= size > 1 and stride <= reach
        reach += (size - 1) * stride
    # Grad mode is on under create_graph. Then the logits are still needed, and the double backward raises its own error.
    return is_plain(logits) and not overlapping and logits.stride(-1) == 1 and not torch.is_grad_enabled()


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    """The saved tensors. Raises RuntimeError with the reason if they were overwritten; autograd's error would not give it."""
    if ctx.overwritten:
        raise RuntimeError(OVERWRITTEN)
    return ctx.saved_tensors


def _differentiate(
    ctx: Any, logits: Tensor, reference: Tensor | None, write: Callable[[Tensor, Tensor], None], operator: Any
) -> Tensor:
    """The gradient of the logits, in place if the caller allowed it.

    Args:
        reference: logits that the kernel reads while it writes the gradient, or None.
        write: writes the gradient: (logits, out) -> None.
        operator: calls the registered operator; used for all but plain eager tensors.
    """
    if torch.is_grad_enabled() or not is_plain(logits):
        return operator()
    shared = reference is not None and share_memory(logits, reference)
    if ctx.inplace and may_overwrite(logits) and not shared:
        ctx.overwritten = True
        logits = logits.detach()
        write(logits, logits)
        # Autograd then raises if another function saved these logits for its own backward pass.
        torch.autograd.graph.increment_version(logits)
        return logits
    logits = _unit_stride(logits.detach())
    out = fresh(logits.shape, logits.dtype, logits.device)
    write(logits, out)
    return out


def _like_logits(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


# --- stages 1 and 3 --------------------------------------------------------------------------------------------------


def _token_logps(logits: Tensor, labels: Tensor, ref_logits: Tensor | None, *rest: Any) -> Tensor:
    transform, (statistics, terms, _, backend) = Transform(*rest[:3]), rest[3:]
    stage = backends.load(backend, logits.device.type).token_logps
    logits, labels, ref_logits = _unit_stride(logits), labels.contiguous(), _optional(ref_logits, _unit_stride)
    asked = ("kl",) if set(terms) & set(KL_TERMS) else ()
    tokens = stage(logits, labels, ref_logits, transform, (*statistics, *asked))
    if "forward_kl" not in terms:
        return tokens
    # KL(reference || policy) is the same kernel with policy and reference exchanged, so the logits are read a second time.
    return torch.cat([tokens, stage(ref_logits, labels, logits, transform, ("kl",))[-1:]])


def _token_logps_fake(logits: Tensor, labels: Tensor, ref_logits: Tensor | None, *rest: Any) -> Tensor:
    rows = all_rows(ref_logits is not None, *rest[3:5])
    return logits.new_empty((len(rows), *labels.shape), dtype=small_dtype(logits.device))


def _token_logps_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, labels, ref_logits, *ctx.transform, statistics, ctx.terms, ctx.inplace, ctx.backend = inputs
    ctx.names = all_rows(ref_logits is not None, statistics, ctx.terms)
    ctx.save_for_backward(logits, labels, ref_logits if ctx.terms else None, output)
    ctx.set_materialize_grads(False)
    ctx.overwritten = False


def _token_logps_backward(ctx: Any, grad_tokens: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_tokens is None or not ctx.needs_input_grad[0]:
        return (None,) * 10
    logits, labels, ref_logits, tokens = _saved(ctx)
    rows = dict(zip(ctx.names, tokens.unbind(0), strict=True))
    grads = dict(zip(ctx.names, grad_tokens.contiguous().unbind(0), strict=True))
    divergence: tuple[Tensor | None, ...] = (None,) * len(TokenKL._fields)
    if "entropy" in ctx.terms:
        vocab = logits.shape[-1]  # one row of zeros as logits of the reference
        divergence = (logits.new_zeros(vocab), *from_uniform(rows["entropy"], vocab), -grads["entropy"], None)
    elif ctx.terms:
        by_terms = (grads[name] if name in ctx.terms else None for name in KL_TERMS)
        divergence = (ref_logits, *(rows[name] for name in TokenKL._fields[1:5]), *by_terms)
    small = (rows["logps"], rows["max"], rows["log_sum"], grads["logps"])
    arguments = (labels, *small, *ctx.transform, *divergence, ctx.backend)
    return (
        _differentiate(
            ctx,
            logits,
            ref_logits,
            lambda logits, out: _write_logits_grad(logits, *arguments, out=out),
            lambda: _ops.logits_grad(logits, *arguments),
        ),
        *(None,) * 9,
    )


def _write_logits_grad(logits: Tensor, *arguments: Any, out: Tensor) -> None:
    small, transform, divergence, backend = arguments[:5], Transform(*arguments[5:8]), arguments[8:-1], arguments[-1]
    token_kl = None
    if divergence[0] is not None:
        ref_logits, *values = divergence
        if ref_logits.dim() == 1:  # one row for all tokens, read in place
            ref_logits = ref_logits.expand(logits.shape)
        token_kl = TokenKL(_unit_stride(ref_logits), *(_optional(value) for value in values))  # type: ignore[arg-type]
    stages = backends.load(backend, logits.device.type)
    stages.logits_grad(logits, *(values.contiguous() for values in small), transform, out, token_kl)


def _logits_grad(logits: Tensor, *arguments: Any) -> Tensor:
    logits = _unit_stride(logits)
    out = fresh(logits.shape, logits.dtype, logits.device)
    _write_logits_grad(logits, *arguments, out=out)
    return out


_TRANSFORM = "int ignore_index, float logit_scale, float logit_softcap"
_LOGITS = f"Tensor logits, Tensor labels, Tensor? ref_logits, {_TRANSFORM}, str[] statistics"

token_logps_op = _Operator(
    f"token_logps({_LOGITS}, str[] terms, bool inplace_backward, str backend) -> Tensor",
    _token_logps,
    _token_logps_fake,
    _token_logps_setup,
    _token_logps_backward,
)
_Operator(
    f"logits_grad(Tensor logits, Tensor labels, Tensor logps, Tensor top, Tensor log_sum, Tensor grad_logps, {_TRANSFORM}, "
    f"{', '.join(f'Tensor? {name}' for name in TokenKL._fields)}, str backend) -> Tensor",
    _logits_grad,
    _like_logits,
)


def token_logps(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    transform: Transform,
    statistics: tuple[str, ...] = (),
    *,
    terms: tuple[str, ...] = (),
    inplace_backward: bool = False,
    backend: str,
) -> dict[str, Tensor]:
    """The rows of stage 1 by name, [B, T] each. "logps" and the names in `terms` are differentiable.

    `terms` is a subset of KL_TERMS, or ("entropy",) for a call without reference whose statistics have the entropy.
    """
    tokens = token_logps_op(
        logits, labels, ref_logits, *transform, list(statistics), list(terms), inplace_backward, backend
    )
    names = all_rows(ref_logits is not None, statistics, terms)
    return dict(zip(names, tokens.unbind(0), strict=True))


# --- stage 2 ---------------------------------------------------------------------------------------------------------


def _sequence_sums(values: Tensor, weights: Tensor, cu_seqlens: Tensor | None, backend: str) -> Tensor:
    check_cu_seqlens(cu_seqlens, values.shape[1])
    stages = backends.load(backend, values.device.type)
    return stages.sequence_sums(values.contiguous(), weights.contiguous(), cu_seqlens)


def _sequence_sums_fake(values: Tensor, weights: Tensor, cu_seqlens: Tensor | None, backend: str) -> Tensor:
    return values.new_empty(values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)


def _sequence_sums_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _sequence_sums_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return spread(grad, *ctx.saved_tensors), None, None, None


sequence_sums = _Operator(
    "sequence_sums(Tensor values, Tensor weights, Tensor? cu_seqlens, str backend) -> Tensor",
    _sequence_sums,
    _sequence_sums_fake,
    _sequence_sums_setup,
    _sequence_sums_backward,
)


def _preference_loss(logps: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, robust, backend = arguments
    check_cu_seqlens(tensors[2], logps.shape[1])
    stage = backends.load(backend, logps.device.type).preference_loss
    return stage(logps.contiguous(), *(_optional(tensor) for tensor in tensors), robust)


def _preference_loss_fake(logps: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    pairs = arguments[4].shape[0]
    return (logps.new_empty(pairs), *(logps.new_empty(2 * pairs) for _ in range(3)))


def _preference_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[2], inputs[3], output[3])
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.set_materialize_grads(False)


def _preference_loss_backward(
    ctx: Any, grad_losses: Tensor | None, grad_sums: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    weights, cu_seqlens, coef = ctx.saved_tensors
    total = grad_sums
    if grad_losses is not None:
        through_loss = coef * grad_losses.repeat(2)
        total = through_loss if total is None else total + through_loss
    return (None if total is None else spread(total, weights, cu_seqlens), *(None,) * 8)


#: `Stages.preference_loss` with the backend's name as last argument: (losses [P], sums [2P], reference sums [2P], coef [2P]).
preference_loss = _Operator(
    "preference_loss(Tensor logps, Tensor? ref_logps, Tensor weights, Tensor? cu_seqlens, Tensor? ref_sums, "
    "Tensor beta, Tensor label_smoothing, bool robust, str backend) "
    "-> (Tensor losses, Tensor sums, Tensor ref_sums, Tensor coef)",
    _preference_loss,
    _preference_loss_fake,
    _preference_loss_setup,
    _preference_loss_backward,
)

# --- a whole call ----------------------------------------------------------------------------------------------------


def _preference_forward(
    logits: Tensor, labels: Tensor, ref_logits: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weighting, backend = Weighting(*rest[4:8]), rest[-1]
    check_cu_seqlens(weighting.cu_seqlens, labels.shape[1])
    stages = backends.load(backend, logits.device.type)
    tensors = (_unit_stride(logits), labels.contiguous(), _optional(ref_logits, _unit_stride))
    arguments = (*tensors, Transform(*rest[:3]), tuple(rest[3]), weighting, Family(*rest[8:14]))
    own = getattr(stages, "preference_forward", None)
    return whole_call.preference_forward(stages, *arguments) if own is None else own(*arguments)


def _preference_forward_fake(
    logits: Tensor, labels: Tensor, ref_logits: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    statistics, weighting = tuple(rest[3]), Weighting(*rest[4:8])
    pairs, small = weighting.pairs(labels), small_dtype(logits.device)
    rows = len(token_rows(ref_logits is not None, statistics))
    return (
        logits.new_empty((rows, *labels.shape), dtype=small),
        logits.new_empty((len(SEQUENCE_ROWS) + len(statistics), 2 * pairs), dtype=small),
        logits.new_empty(pairs, dtype=small),
        logits.new_empty((pairs,) if weighting.reduction == "none" else (), dtype=whole_call.result_dtype(logits)),
    )


def _preference_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, _, *ctx.transform, _, token_weights, cu_seqlens, pair_weights, ctx.reduction = inputs[:11]
    ctx.inplace, ctx.backend = inputs[-2:]
    # Callers get views of `sequences` and may write to them, which must not raise in the backward pass: it reads only the row
    # "coef", of which they get no view. `.data` has a version counter of its own.
    sequences = output[1].data if is_plain(output[1]) else output[1]
    ctx.save_for_backward(logits, labels, output[0], sequences, token_weights, cu_seqlens, pair_weights)
    ctx.mark_non_differentiable(*output[:3])
    ctx.set_materialize_grads(False)
    ctx.overwritten = False


def _preference_rule(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_loss = grads[-1]
    if grad_loss is None or not ctx.needs_input_grad[0]:
        return (None,) * 19
    logits, labels, tokens, sequences, *weighting = _saved(ctx)
    arguments = (labels, tokens, sequences, grad_loss, *ctx.transform, *weighting, ctx.reduction, ctx.backend)
    gradient = _differentiate(
        ctx,
        logits,
        None,
        lambda logits, out: _write_preference_backward(logits, *arguments, out=out),
        lambda: _ops.preference_backward(logits, *arguments),
    )
    return (gradient, *(None,) * 18)


def _write_preference_backward(
    logits: Tensor, labels: Tensor, tokens: Tensor, sequences: Tensor, grad_loss: Tensor, *rest: Any, out: Tensor
) -> None:
    stages = backends.load(rest[-1], logits.device.type)
    results = (labels.contiguous(), tokens, sequences, grad_loss)
    arguments = (logits, *results, Transform(*rest[:3]), Weighting(*rest[3:7]), out)
    own = getattr(stages, "preference_backward", None)
    if own is None:
        whole_call.preference_backward(stages, *arguments)
    else:
        own(*arguments)


def _preference_backward(logits: Tensor, *arguments: Any) -> Tensor:
    logits = _unit_stride(logits)
    out = fresh(logits.shape, logits.dtype, logits.device)
    _write_preference_backward(logits, *arguments, out=out)
    return out


_WEIGHTING = "Tensor? token_weights, Tensor? cu_seqlens, Tensor? pair_weights, str reduction"
_FAMILY = "Tensor? ref_sums, Tensor? betas, float beta, Tensor? label_smoothings, float label_smoothing, bool robust"
#: `whole_call.preference_forward` without its first argument, with the fields of its tuples as separate arguments, followed by
#: inplace_backward and the backend's name.
preference_forward = _Operator(
    f"preference_forward({_LOGITS}, {_WEIGHTING}, {_FAMILY}, bool inplace_backward, str backend) "
    "-> (Tensor tokens, Tensor sequences, Tensor losses, Tensor loss)",
    _preference_forward,
    _preference_forward_fake,
    _preference_setup,
    _preference_rule,
)
_Operator(
    "preference_backward(Tensor logits, Tensor labels, Tensor tokens, Tensor sequences, Tensor grad_loss, "
    f"{_TRANSFORM}, {_WEIGHTING}, str backend) -> Tensor",
    _preference_backward,
    _like_logits,
)
