"""The self-check: compares a backend with the float64 reference on the operator table (check_table.py).

At the first use of a GPU backend, trust.py runs the case of each kernel variant that a call needs. `run_table`, which
`python -m dpo_kernels check` calls, runs the whole table. Each case computes a small call three times:

    truth     dpo_kernels/reference.py in float64, with gradients by autograd
    baseline  the eager backend in the call's dtype (for the eager backend itself: reference.py in float32)
    subject   the operators of the backend

Per-token results, sums, losses and gradients are compared with the truth. The label entries of a gradient and its other entries
are compared separately and row by row: the norm of the whole tensor is dominated by the label entries, so a gradient without
any others would pass. The allowed error is a fixed multiple of the baseline's error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import backends, linear, objectives, ops, reference
from .arguments import PairSettings
from .backends import Variant
from .check_table import IGNORE, TABLE, Case, serves
from .pair_loss import Tokens
from .stages import Transform, token_rows

#: Allowed error as a multiple of the baseline's. The faster arithmetic of GPU kernels has up to 2.5 times the error of eager.
BUDGET = 3.0
#: Largest relative error of a gradient's row, even if the baseline's is larger: an error of 5 % must be detected.
GRADIENT_CAP = 0.02
#: On the linear path a row may exceed GRADIENT_CAP up to this multiple of the baseline's error. Where tokens nearly cancel in a
#: row of dW, 16-bit rounding alone is 6 % of it, for correct kernels and for eager. Errors then show in the gradient as a whole,
#: in which nothing cancels.
LINEAR_CAP = 2.0
SCALE, SOFTCAP, KL_COEF, BETA, SMOOTHING = 0.7, 15.0, 0.3, 0.1, 0.15
HIDDEN = 64


@dataclass(frozen=True)
class Result:
    """The result of one comparison of a case.

    Attributes:
        case: the case as text.
        what: the quantity, such as "entropy" or "gradient, label entries"; if the backend raised, its error.
        error: the largest deviation from the truth; NaN if the backend raised.
        budget: the largest allowed deviation; infinite if the backend raised.
    """

    case: str
    what: str
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget

    def __str__(self) -> str:
        if math.isinf(self.budget):
            return f"case '{self.case}': {self.what}"
        return f"case '{self.case}': {self.what} off by {self.error:.2g}, allowed {self.budget:.2g}"


# --- inputs -------------------------------------------------------------------------------------------------------


@dataclass
class _Inputs:
    logits: Tensor  # [B, T, V]; on the linear path hidden states [B, T, H]
    ref_logits: Tensor | None
    labels: Tensor
    weights: Tensor
    cu_seqlens: Tensor | None
    ref_sums: Tensor | None
    upstream: Tensor  # [P] or [2P]
    head: Tensor | None = None  # [V, H]
    bias: Tensor | None = None


def vocab_of(case: Case, device: torch.device) -> int:
    """V of a case: more than two tiles of the device's kernels; tiles are smaller in Triton's interpreter."""
    if case.vocab is not None:
        return case.vocab
    if case.variant.linear is not None:
        size = 1032 if device.type == "cuda" else 136
    elif device.type == "cuda":
        size = 12328 if case.variant.few_rows else 8240
    else:
        size = 2184
    return size if case.variant.aligned else size + 3


def _inputs(case: Case, device: torch.device) -> _Inputs:
    """The inputs of a case, from a CPU generator of its own: equal on all machines, and no global random state changes."""
    variant, vocab = case.variant, vocab_of(case, device)
    g = torch.Generator().manual_seed(0)
    sequences, length = (4, 5) if variant.few_rows else (4, backends.MANY_ROWS // 4)
    lengths = torch.tensor([length, length - 2, 0 if case.empty else length - 1, length])
    position = torch.arange(length)
    scored = (position >= torch.tensor([1, 0, 0, 2])[:, None]) & (position < lengths[:, None])
    labels = torch.randint(0, vocab, (sequences, length), generator=g)
    labels[0, -1], labels[1, 0] = vocab - 1, 0
    weights = torch.ones(sequences, length, dtype=torch.float64)
    if case.weighted:
        weights = torch.rand(sequences, length, generator=g, dtype=torch.float64) + 0.5
        weights[3, -1] = 0.0
    scored &= weights != 0
    weights = torch.where(scored, weights, 0.0)
    family = variant.loss != "sums"
    upstream = torch.rand(sequences // 2 if family else sequences, generator=g, dtype=torch.float64) + 0.5
    upstream = upstream / BETA if family else upstream
    if variant.dtype == torch.float16:
        # Scaled like by a gradient scaler, because float16 loses precision below 6e-5.
        upstream *= 2.0**16 if case.confident else 2.0**10
    ref_sums = torch.randn(sequences, generator=g, dtype=torch.float64) - 20 if variant.reference == "sums" else None
    labels = torch.where(scored, labels, IGNORE)
    index = labels.clamp(min=0).unsqueeze(-1)
    cut = torch.ones(sequences, length, dtype=torch.bool)
    cu_seqlens = None
    if variant.packed:
        cut = position < lengths[:, None]
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device)

    def place(values: Tensor) -> Tensor:
        return (values[cut].unsqueeze(0) if variant.packed else values).to(device)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float32)

    small: dict[str, Any] = {"labels": place(labels), "weights": place(weights), "cu_seqlens": cu_seqlens}
    small |= {"ref_sums": None if ref_sums is None else ref_sums.to(device), "upstream": upstream.to(device)}
    if variant.linear is not None:
        head = noise(vocab, HIDDEN) * (2 / HIDDEN**0.5)
        # Every second label is made likely, as in a trained model, by adding its row of the head to the hidden state.
        hidden = noise(sequences, length, HIDDEN)
        hidden[:, ::2] += head[index.squeeze(-1)[:, ::2]]
        ref_hidden = hidden + 0.3 * noise(sequences, length, HIDDEN)
        bias = (0.5 * noise(vocab)).to(device, variant.dtype) if variant.linear.bias else None
        given = place(ref_hidden.to(variant.dtype)) if isinstance(variant.reference, torch.dtype) else None
        return _Inputs(place(hidden.to(variant.dtype)), given, head=head.to(device, variant.dtype), bias=bias, **small)
    # The label is made likely at every second position, or nearly certain everywhere: with random logits the accuracy would be
    # 0 everywhere, and the check of it could not fail.
    raised = torch.where(position % 2 == 0, math.log(vocab) + 5.0, 0.0).expand(sequences, length)
    if case.confident:
        raised = torch.full((sequences, length), math.log(vocab) + 14.0)
    sign = -1.0 if variant.negative_scale else 1.0
    logits = 2 * noise(sequences, length, vocab)
    ref_logits = logits + noise(sequences, length, vocab)
    for z in (logits, ref_logits):
        z.scatter_add_(-1, index, raised.unsqueeze(-1) * sign)
    if case.infinite:
        hole = (torch.rand(sequences, length, vocab, generator=g) < 0.1).scatter_(-1, index, False)
        logits.masked_fill_(hole, -sign * math.inf)
        ref_logits.masked_fill_(hole, -sign * math.inf)

    def rows(values: Tensor, dtype: torch.dtype) -> Tensor:
        values = values.to(dtype)
        if case.strided:
            values = torch.cat([values, values[:, :1]], dim=1).to(device)[:, :-1]
        return place(values)

    reference_rows = rows(ref_logits, variant.reference) if isinstance(variant.reference, torch.dtype) else None
    return _Inputs(rows(logits, variant.dtype), reference_rows, **small)


# --- what is computed -------------------------------------------------------------------------------------------------

_Found = dict[str, Tensor]


def _transform(variant: Variant) -> Transform:
    scale = -SCALE if variant.negative_scale else SCALE if variant.softcap else 1.0
    return Transform(IGNORE, scale, SOFTCAP if variant.softcap else 0.0)


def _sigmoid_losses(sums: Tensor, ref_sums: Tensor, robust: bool) -> Tensor:
    """Rafailov et al. 2023, equation 7, with label smoothing; "robust": Chowdhury et al. 2024, equation 12."""
    chosen, rejected = (sums - ref_sums).chunk(2)
    x = BETA * (chosen - rejected)
    right, wrong = (torch.logaddexp(torch.zeros_like(x), value) for value in (-x, x))
    if robust:
        return ((1 - SMOOTHING) * right - SMOOTHING * wrong) / (1 - 2 * SMOOTHING)
    return (1 - SMOOTHING) * right + SMOOTHING * wrong


def _definition(case: Case, inputs: _Inputs, dtype: torch.dtype) -> _Found:
    """Every quantity of a case from the formulas, with arithmetic in `dtype`."""
    variant = case.variant

    # The usual implementation projects in the call's dtype and then converts the logits to float32.
    product = variant.dtype if variant.linear is not None and dtype == torch.float32 else dtype

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(product)

    x, head, bias, ref = wide(inputs.logits), wide(inputs.head), wide(inputs.bias), wide(inputs.ref_logits)
    assert x is not None
    leaves = _leaves(variant, {"gradient": x, "dW": head, "dbias": bias})
    logits, ref_logits = x, ref
    if head is not None:
        logits = torch.nn.functional.linear(x, head, bias).to(dtype)
        if ref is not None:
            fixed = None if bias is None else bias.detach()
            ref_logits = torch.nn.functional.linear(ref, head.detach(), fixed).to(dtype)
    ignore_index, scale, softcap = _transform(variant)
    tokens = reference.token_statistics(
        logits,
        inputs.labels,
        ref_logits=ref_logits,
        ignore_index=ignore_index,
        logit_scale=scale,
        logit_softcap=softcap,
    )
    live = inputs.labels != IGNORE
    if "forward_kl" in variant.terms:
        assert ref_logits is not None
        divergence = reference._forward_kl(logits, ref_logits, scale, softcap)
        tokens["forward_kl"] = torch.where(live, divergence, 0.0)
    weights = inputs.weights.to(dtype)

    def sums_of(values: Tensor) -> Tensor:
        if inputs.cu_seqlens is None:
            return reference.sequence_sums(values, weights)
        return reference.sequence_sums(values[0], weights[0], inputs.cu_seqlens)

    found = {"sums": sums_of(tokens["logps"])}
    if variant.loss != "sums":
        ref_sums = inputs.ref_sums
        if "ref_logps" in tokens:
            ref_sums = sums_of(tokens["ref_logps"]).detach()
        elif ref_sums is None:
            ref_sums = torch.zeros_like(found["sums"])
        found["losses"] = _sigmoid_losses(found["sums"], ref_sums, variant.loss == "robust")
    return _finish(variant, inputs, tokens, found, sums_of, leaves)


def _leaves(variant: Variant, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The tensors that the variant needs gradients of, with requires_grad set, by their gradient's name."""
    wanted = {"gradient": variant.grad, "dW": False, "dbias": False}
    if variant.linear is not None:
        needs = variant.linear
        wanted = {"gradient": needs.hidden, "dW": needs.weight, "dbias": needs.weight and needs.bias}
    leaves = {name: tensor for name, tensor in tensors.items() if wanted[name] and tensor is not None}
    for tensor in leaves.values():
        tensor.requires_grad_()
    return leaves


def _finish(
    variant: Variant,
    inputs: _Inputs,
    tokens: _Found,
    found: _Found,
    sums_of: Callable[[Tensor], Tensor],
    leaves: dict[str, Tensor],
) -> _Found:
    """`found` with the per-token results and gradients that the variant needs, all detached."""
    names = ["logps", *variant.statistics, *variant.terms]
    names += ["ref_logps"] if isinstance(variant.reference, torch.dtype) else []
    scalar = (inputs.upstream * (found["sums"] if variant.loss == "sums" else found["losses"]).double()).sum()
    for name in variant.terms:
        scalar = scalar + KL_COEF * sums_of(tokens[name]).double().sum()
    if leaves:
        grads = torch.autograd.grad(scalar, list(leaves.values()))
        found |= dict(zip(leaves, grads, strict=True))
    found |= {name: tokens[name] for name in names if name in tokens}
    return {name: value.detach() for name, value in found.items()}


def _subject(case: Case, inputs: _Inputs, backend: str, inplace: bool = False) -> _Found:
    """Every quantity of a case, computed by the backend's operators."""
    variant = case.variant
    if variant.linear is not None:
        return _linear_subject(case, inputs, backend)
    logits = inputs.logits.detach()
    if inplace:
        # The gradient overwrites the logits, so they are copied. The copy has the strides of the original.
        logits = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
        logits.copy_(inputs.logits)
    leaves = _leaves(variant, {"gradient": logits})
    labels, weights, cu, ref = inputs.labels, inputs.weights, inputs.cu_seqlens, inputs.ref_logits
    transform, robust = _transform(variant), variant.loss == "robust"

    def sums_of(values: Tensor) -> Tensor:
        return ops.sequence_sums(values, weights, cu, backend)

    if variant.loss != "sums" and not variant.terms:
        rows, sequences, losses, loss = ops.preference_forward(
            logits, labels, ref, *transform, list(variant.statistics), weights, cu, None, "none",
            inputs.ref_sums, None, BETA, None, SMOOTHING, robust, inplace, backend,
        )  # fmt: skip
        names = token_rows(ref is not None, variant.statistics)
        tokens = dict(zip(names, rows.unbind(0), strict=True))
        found = {"sums": sequences[0], "losses": losses}
        if leaves:
            (found["gradient"],) = torch.autograd.grad(loss, logits, inputs.upstream.to(loss.dtype))
        return _finish(variant, inputs, tokens, found, sums_of, {})
    tokens = ops.token_logps(
        logits,
        labels,
        ref,
        transform,
        variant.statistics,
        terms=variant.terms,
        inplace_backward=inplace,
        backend=backend,
    )
    if variant.loss == "sums":
        return _finish(variant, inputs, tokens, {"sums": sums_of(tokens["logps"])}, sums_of, leaves)
    small: dict[str, Any] = {"dtype": weights.dtype, "device": logits.device}
    beta, smoothing = (torch.full((2,), value, **small) for value in (BETA, SMOOTHING))
    losses, sums, *_ = ops.preference_loss(
        tokens["logps"], tokens.get("ref_logps"), weights, cu, inputs.ref_sums, beta, smoothing, robust, backend
    )
    return _finish(variant, inputs, tokens, {"sums": sums, "losses": losses}, sums_of, leaves)


def _linear_subject(case: Case, inputs: _Inputs, backend: str) -> _Found:
    variant, need = case.variant, case.variant.linear
    assert need is not None
    assert inputs.head is not None
    hidden, head = inputs.logits.detach(), inputs.head.detach()
    bias = None if inputs.bias is None else inputs.bias.detach()
    reference = linear.NO_REFERENCE
    if inputs.ref_logits is not None:
        reference = linear.Reference(inputs.ref_logits, head.clone(), None if bias is None else bias.clone())
    fused = need.fused and backend != "eager"
    needs = linear.Needs(need.hidden, need.weight, need.weight and need.bias)
    statistics = tuple(name for name in variant.statistics if name != "grad_dropped_mass")
    sizes = linear.sizes_of(hidden, head.shape[0], reference, statistics, variant.terms, variant.dtype, needs)
    call = linear.Call(
        inputs.labels,
        reference,
        _transform(variant),
        statistics,
        variant.terms,
        variant.dtype,
        backend,
        need.strategy,
        replace(sizes, fused=fused),
        needs,
        budget=64 << 20,
        # 1e-30 is below every probability, so no block is left out and the gradient is exact.
        eps=1e-30 if fused else 0.0,
    )
    leaves = _leaves(variant, {"gradient": hidden, "dW": head, "dbias": bias})

    def sums_of(values: Tensor) -> Tensor:
        return ops.sequence_sums(values, inputs.weights, inputs.cu_seqlens, backend)

    lm_head = linear.LMHead(head, bias)
    if need.strategy != "whole_pairs":
        tokens, _ = linear.linear_logps(hidden, lm_head, call)
        return _finish(variant, inputs, tokens, {"sums": sums_of(tokens["logps"])}, sums_of, leaves)
    scored = (inputs.labels != IGNORE).to(inputs.weights.dtype)
    places = Tokens(inputs.weights, scored, inputs.cu_seqlens, backend)
    functions = objectives.resolve(variant.loss)
    settings = PairSettings(2, functions, None, BETA, SMOOTHING, inputs.upstream, inputs.ref_sums, reduction="sum")
    loss, done, tokens, _ = linear.whole_pairs(hidden, lm_head, call, places, settings)
    found = {"sums": done.sums, "losses": done.losses}
    if leaves:
        found |= dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return _finish(variant, inputs, tokens, found, sums_of, {})


# --- comparing --------------------------------------------------------------------------------------------------------


def _worst(values: Tensor) -> float:
    """The largest value; NaN if any is NaN, 0 if there is none."""
    if values.numel() == 0:
        return 0.0
    return math.nan if bool(values.isnan().any()) else float(values.max())


def _distance(found: Tensor, truth: Tensor) -> Tensor:
    """|found - truth| elementwise; 0 where both are the same infinity."""
    found, truth = found.double(), truth.double()
    return torch.where(found == truth, 0.0, (found - truth).abs())


def _label_and_others(grad: Tensor, truth: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Relative errors per row, of the label's entry and of the norm of all other entries."""
    index = labels.unsqueeze(-1)
    mine, true = grad.gather(-1, index).squeeze(-1), truth.gather(-1, index).squeeze(-1)
    tiny = torch.finfo(torch.float64).tiny
    rest, size = ((values.scatter(-1, index, 0.0)).norm(dim=-1) for values in (grad - truth, truth))
    return (mine - true).abs() / true.abs().clamp(min=tiny), rest / size.clamp(min=tiny)


def _row_errors(grad: Tensor, truth: Tensor) -> Tensor:
    """Relative error of each row's norm; if the true row is 0, 0 for a zero row and 1 for any other."""
    size = truth.norm(dim=-1)
    return torch.where(size == 0, (grad != 0).any(-1).double(), (grad - truth).norm(dim=-1) / size.clamp(min=1e-300))


def _compare(case: Case, inputs: _Inputs, found: _Found, truth: _Found, baseline: _Found) -> Iterator[Result]:
    """One result per quantity; a gradient gives several."""
    name, variant = str(case), case.variant
    largest = 32.0 if variant.linear is None else 24.0  # about the largest |z|
    for what, true in truth.items():
        ours, theirs = found[what], baseline[what]
        if ours.shape != true.shape:
            yield Result(name, f"shape of {what} {tuple(ours.shape)}, expected {tuple(true.shape)}", math.inf, 0.0)
        elif what not in ("gradient", "dW", "dbias"):
            unit = 2.0**-23 * max(largest, _worst(true[true.isfinite()].abs()))
            # A sum has one rounding error per term, a product with the head one per addend. A KL subtracts two logits.
            unit *= 8.0 if what in ("sums", "losses") else 2.0
            allowed = BUDGET * max(_worst(_distance(theirs, true)), unit)
            yield Result(name, what, _worst(_distance(ours, true)), allowed)
        else:
            yield from _compare_gradient(case, what, inputs.labels, ours, true.double(), theirs)


def _compare_gradient(
    case: Case, what: str, labels: Tensor, ours: Tensor, true: Tensor, theirs: Tensor
) -> Iterator[Result]:
    name, linear_path = str(case), case.variant.linear is not None
    if ours.dtype != case.variant.dtype:
        yield Result(name, f"{what} has dtype {ours.dtype}, expected {case.variant.dtype}", math.inf, 0.0)
        return
    rounding = torch.finfo(ours.dtype).eps
    mine, other = ours.double(), theirs.to(ours.dtype).double()
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    if what == "gradient":
        dead = (labels == IGNORE) | (true == 0).all(-1)
        # `!= 0` is also true for NaN.
        yield Result(name, "gradient of tokens without weight", float((mine[dead] != 0).any()), 0.0)
        mine, other, true, labels = mine[~dead], other[~dead], true[~dead], labels[~dead]
    if not linear_path:
        each = (_label_and_others(grad, true, labels) for grad in (mine, other))
        parts = dict(zip(("gradient, label entries", "gradient, other entries"), zip(*each, strict=True), strict=True))
    else:
        part = "dH" if what == "gradient" else what
        if what != "dbias":
            parts[part] = (_row_errors(mine, true), _row_errors(other, true))
        whole, ours_whole, other_whole = (grad.flatten()[None] for grad in (true, mine, other))
        parts[f"{part} as a whole"] = (_row_errors(ours_whole, whole), _row_errors(other_whole, whole))
    for part, (errors, allowed) in parts.items():
        least = _worst(allowed)
        budget = BUDGET * max(least, rounding * (4 if linear_path and rounding < 1e-6 else 1))
        cap = max(GRADIENT_CAP, LINEAR_CAP * least) if linear_path else GRADIENT_CAP
        yield Result(name, part, _worst(errors), min(budget, cap))


def run_case(case: Case, backend: str, device: torch.device) -> list[Result]:
    """Every comparison of a case. If the backend raises, the result is one failed comparison with its error.

    Errors of the truth or the baseline, and torch.OutOfMemoryError, are not caught, because they are no fault of the backend.
    """
    with torch.enable_grad():
        inputs = _inputs(case, device)
        truth = _definition(case, inputs, torch.float64)
        if backend == "eager":
            baseline = _definition(case, inputs, torch.float32)
        else:
            baseline = _subject(case, inputs, "eager")
        try:
            found = _subject(case, inputs, backend)
            results = list(_compare(case, inputs, found, truth, baseline))
            if "gradient" in found and case.variant.linear is None:
                again = _subject(case, inputs, backend, inplace=True)["gradient"]
                differ = float((again != found["gradient"]).any()) if results[-1].ok else 0.0
                results.append(Result(str(case), "gradient in place differs from that into new memory", differ, 0.0))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            line = next(iter(str(error).strip().splitlines()), "")
            results = [Result(str(case), f"{type(error).__name__}: {line}"[:300], math.nan, math.inf)]
        return results


def run_table(
    backend: str,
    device: torch.device | str,
    cases: Iterable[Case] = TABLE,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Result]:
    """The worst result (`worst`) of each case that the backend serves.

    Raises BackendUnavailable if the backend does not serve the device.
    """
    device = torch.device(device)
    backends.load(backend, device.type)
    fused = backends.why_not("triton", device.type) is None
    found = []
    for case in cases:
        need = case.variant.linear
        if serves(backend, case) and (need is None or fused or not need.fused):
            found.append(worst(run_case(case, backend, device)))
            progress(len(found))
    return found


def worst(results: list[Result]) -> Result:
    """The first failed result; if none failed, the one with the largest share of its budget."""
    failed = [result for result in results if not result.ok]
    return failed[0] if failed else max(results, key=lambda result: result.error / max(result.budget, 1e-300))
