"""The LM-head strategies: loss and log-probabilities from hidden states, with the logits in memory one chunk at a time.

Data flow of a chunk of c scored tokens (planner.py chooses c, and the strategy):

    rows [c, H] --GEMM with the head--> logits [c, V]   one buffer, reused by every chunk: fresh pages cost more than the
                                                        arithmetic on them
    logits --token_logps--> logps, lse, statistics      the backend's stage 1: one read
    logits --logits_grad--> dz, over the logits         the backend's stage 3, when the coefficients are known
    dz --GEMM--> dH rows [c, H];  dz, rows --GEMM--> dW [V, H], accumulated in float32

Unscored tokens are never gathered, so prompts and padding cost nothing. `whole_pairs` knows the coefficients while a
pair's logits are in memory and projects once; the others are described at their functions. Eager calls run in the
autograd.Functions at the end; under torch.compile the operators `linear_logps` and `linear_logps_grad` do (two passes).

On an accelerator the number of scored tokens per sequence is read once per call, which waits for the stream once.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import backends, filtered, objectives, ops, planner
from .backends.eager import TokenKL, check_labels, small_dtype
from .objectives import Objective, Pairs

logger = logging.getLogger(__name__)

#: Names of a stage-1 result, in its order, and of what this module adds.
STAGE_OUTPUTS = ("logps", "lse", "ref_logps", "entropy", "kl", "accuracy", "mean_logits")
TOKEN_OUTPUTS = (*STAGE_OUTPUTS, "grad_dropped_mass", "forward_kl", "log_sum_sq")
#: Those that a loss may be differentiated by: KL(policy || reference) and KL(reference || policy) where a term, and these.
KL_TERMS = ("kl", "forward_kl")

#: What `grad_filter="auto"` means: the threshold whose error in dH stays below the dtype's own rounding (docs/linear.md).
AUTO_FILTER = {torch.bfloat16: 2.0**-16, torch.float16: 2.0**-20}


@dataclass(frozen=True)
class Call:
    """Everything about a call but the tensors that may need a gradient; labels and weights are [B, T].

    Attributes:
        ref_hidden: [B, T, Hr] or None; with ref_weight [V, Hr] and ref_bias [V] or None.
        statistics: names of stage 1's statistics.
        terms: what the loss reads of each token beside its log-probability: "kl" and "forward_kl", differentiable, and
            "log_sum_sq" (log sum p^2).
        compute_dtype: what the products and logits are in.
        eps: filter threshold on probabilities, 0 for exact gradients.
    """

    labels: Tensor
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    ignore_index: int
    logit_scale: float
    logit_softcap: float
    statistics: tuple[str, ...]
    compute_dtype: torch.dtype
    budget: int
    backend: str
    strategy: str
    terms: tuple[str, ...] = ()
    reason: str = ""
    eps: float = 0.0
    needs_hidden: bool = False
    needs_weight: bool = False
    needs_bias: bool = False

    @property
    def stages(self) -> ModuleType:
        """The backend's stage functions."""
        return backends.load(self.backend, self.labels.device.type)

    @property
    def given(self) -> frozenset[str]:
        """Names of everything that is found per token beside logps, lse and ref_logps."""
        return frozenset((*self.statistics, *self.terms))

    @property
    def kl_gradient(self) -> bool:
        """Whether a token-level KL is differentiated."""
        return any(name in KL_TERMS for name in self.terms)

    def without_reference(self) -> Call:
        """The call for a backward of log-probabilities alone: the reference needs no second projection."""
        return replace(self, ref_hidden=None, ref_weight=None, ref_bias=None, statistics=(), terms=())

    def sizes(self, hidden_size: int, vocab: int) -> planner.Head:
        """What the planner needs to know."""
        return planner.Head(
            hidden_size,
            vocab,
            self.compute_dtype.itemsize,
            self.needs_hidden,
            self.needs_weight or self.needs_bias,
            self.ref_hidden is not None,
            not self.given.isdisjoint(KL_TERMS),
            self.labels.device.type == "cpu" and self.compute_dtype.itemsize == 2,
            self.kl_gradient,
        )


@dataclass(frozen=True)
class KLGradients:
    """What a backward needs to differentiate token-level KL divergences as well; shapes as the log-probabilities'.

    Attributes:
        ref_logps, kl: of stage 1.
        grad_kl, grad_forward_kl: gradients of the loss by KL(policy || reference) and KL(reference || policy), or None.
    """

    ref_logps: Tensor
    kl: Tensor
    grad_kl: Tensor | None
    grad_forward_kl: Tensor | None

    def at(self, tokens: Tensor | slice) -> KLGradients:
        """Those of the tokens."""

        def part(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.reshape(-1)[tokens]

        return KLGradients(*map(part, (self.ref_logps, self.kl, self.grad_kl, self.grad_forward_kl)))  # type: ignore

    def moves(self) -> Tensor:
        """Where one of the gradients is not 0."""
        grads = [grad != 0 for grad in (self.grad_kl, self.grad_forward_kl) if grad is not None]
        return grads[0] if len(grads) == 1 else grads[0] | grads[1]


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    # The dtypes of the products are chosen once, in functional.py; autocast must not choose again inside.
    return torch.autocast(device.type, enabled=False)


def _gather(values: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a [B, T, H] tensor by flat token index, without copying a strided view first; [c, H] contiguous."""
    width = values.shape[1]
    rows = values[0, tokens] if values.shape[0] == 1 else values[tokens // width, tokens % width]
    return rows.to(dtype)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What dW and dbias are summed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class HeadGradient:
    """dW [V, H] and dbias [V], accumulated over chunks and cast once by whoever takes them.

    `into` is a float32 buffer to add to (Megatron's `main_grad`); otherwise the first chunk's product initialises fresh
    memory, so that no page is written twice.
    """

    def __init__(self, call: Call, vocab: int, hidden_size: int, into: Tensor | None = None) -> None:
        device = call.labels.device
        self.dtype = accumulator_dtype(call.compute_dtype)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.started = into is not None
        if call.needs_weight:
            self.weight = torch.empty(vocab, hidden_size, dtype=self.dtype, device=device) if into is None else into
        if call.needs_bias:
            self.bias = torch.zeros(vocab, dtype=self.dtype, device=device)

    def add(self, dz: Tensor, rows: Tensor) -> None:
        """Add dz^T rows, and the column sums of dz."""
        if self.bias is not None:
            self.bias += dz.sum(0, dtype=self.dtype)
        if self.weight is None:
            return
        if dz.dtype == self.weight.dtype:
            self._add_block(self.weight, dz, rows)
        elif dz.device.type == "cuda":
            torch.addmm(
                self.weight,
                dz.t(),
                rows,
                out_dtype=self.weight.dtype,
                beta=1 if self.started else 0,
                out=self.weight,
            )
        else:
            # CPU products of 16-bit matrices round their result to 16 bits; widened, the sum over chunks stays float32.
            rows = rows.to(self.dtype)
            for begin in range(0, dz.shape[1], planner.WIDENED_COLUMNS):
                part = slice(begin, begin + planner.WIDENED_COLUMNS)
                self._add_block(self.weight[part], dz[:, part].to(self.dtype), rows)
        self.started = True

    def _add_block(self, target: Tensor, dz: Tensor, rows: Tensor) -> None:
        if self.started:
            target.addmm_(dz.t(), rows)
        else:
            torch.mm(dz.t(), rows, out=target)

    def finish(self) -> None:
        """Make the gradient valid even if no chunk came."""
        if self.weight is not None and not self.started:
            self.weight.zero_()


class Projection:
    """The logits buffer, the heads in the compute dtype, and a chunk's way through stages 1 and 3."""

    def __init__(self, call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self.call = call
        self.hidden = hidden
        self.weight = weight.to(call.compute_dtype)
        self.bias = None if bias is None else bias.to(call.compute_dtype)
        self.ref_weight = None if call.ref_weight is None else call.ref_weight.to(call.compute_dtype)
        self.ref_bias = None if call.ref_bias is None else call.ref_bias.to(call.compute_dtype)
        self.side_by_side = call.ref_hidden is not None and not call.given.isdisjoint(KL_TERMS)
        vocab = weight.shape[0]
        self.buffer = torch.empty(rows, vocab, dtype=call.compute_dtype, device=hidden.device)
        self.ref_buffer = torch.empty_like(self.buffer) if self.side_by_side else self.buffer
        self.labels = call.labels.reshape(-1)

    def rows(self, tokens: Tensor) -> Tensor:
        """The tokens' hidden states, [c, H] in the compute dtype."""
        return _gather(self.hidden, tokens, self.call.compute_dtype)

    def project(self, rows: Tensor) -> Tensor:
        """The policy's logits [c, V], in the buffer."""
        return _project(rows, self.weight, self.bias, self.buffer)

    def project_reference(self, tokens: Tensor) -> Tensor:
        """The reference's logits [c, V], in its buffer."""
        assert self.call.ref_hidden is not None
        assert self.ref_weight is not None
        ref_rows = _gather(self.call.ref_hidden, tokens, self.call.compute_dtype)
        return _project(ref_rows, self.ref_weight, self.ref_bias, self.ref_buffer)

    def measure(self, tokens: Tensor, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(logits [c, V] of the policy, stage 1's results [c] by name) of a chunk."""
        call = self.call
        ref_logits, ref_logps = None, None
        if call.ref_hidden is not None:
            ref_logits = self.project_reference(tokens)
            if not self.side_by_side:
                # Without a KL the two need not meet: one buffer serves both in turn.
                ref_logps = self._stage_1(ref_logits, tokens, None)["logps"]
                ref_logits = None
        logits = self.project(rows)
        found = self._stage_1(logits, tokens, ref_logits, call.given, kl=self.side_by_side)
        if ref_logps is not None:
            found["ref_logps"] = ref_logps
        if "forward_kl" in call.terms:
            assert ref_logits is not None
            found["forward_kl"] = self._stage_1(ref_logits, tokens, logits, kl=True)["kl"]
        if "log_sum_sq" in call.terms:
            # sum p^2 = sum exp(2 z) / (sum exp(z))^2, and 2 z is z at twice the scale and the cap.
            found["log_sum_sq"] = self._stage_1(logits, tokens, None, stretch=2.0)["lse"] - 2 * found["lse"]
        return logits, found

    def _stage_1(
        self,
        logits: Tensor,
        tokens: Tensor,
        ref_logits: Tensor | None,
        names: Collection[str] = (),
        *,
        kl: bool = False,
        stretch: float = 1.0,
    ) -> dict[str, Tensor]:
        call = self.call
        outputs = call.stages.token_logps(
            logits.unsqueeze(0),
            self.labels[tokens].unsqueeze(0),
            None if ref_logits is None else ref_logits.unsqueeze(0),
            ignore_index=call.ignore_index,
            logit_scale=stretch * call.logit_scale,
            logit_softcap=stretch * call.logit_softcap,
            entropy="entropy" in names,
            kl=kl,
            accuracy="accuracy" in names,
            mean_logits="mean_logits" in names,
        )
        found = zip(STAGE_OUTPUTS, outputs, strict=True)
        return {name: value[0] for name, value in found if value.dim() > 1}

    def differentiate(
        self,
        logits: Tensor,
        tokens: Tensor,
        logps: Tensor,
        lse: Tensor,
        grad_logps: Tensor,
        divergences: KLGradients | None = None,
    ) -> Tensor:
        """dz [c, V] over `logits`; all else [c]. With `divergences` the reference's logits are in their buffer."""
        call = self.call

        def row(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.unsqueeze(0).contiguous()

        token_kl = None
        if divergences is not None:
            token_kl = TokenKL(
                self.ref_buffer[: logits.shape[0]].unsqueeze(0),
                row(divergences.ref_logps),  # type: ignore[arg-type]
                row(divergences.kl),  # type: ignore[arg-type]
                row(divergences.grad_kl),
                row(divergences.grad_forward_kl),
            )
        call.stages.logits_grad(
            logits.unsqueeze(0),
            self.labels[tokens].unsqueeze(0),
            row(logps),
            row(lse),
            row(grad_logps),
            ignore_index=call.ignore_index,
            logit_scale=call.logit_scale,
            logit_softcap=call.logit_softcap,
            out=logits.unsqueeze(0),
            token_kl=token_kl,
        )
        return logits

    def keep(self, logits: Tensor, tokens: Tensor, found: dict[str, Tensor]) -> filtered.Kept | None:
        """The entries of a chunk that `eps` keeps, its dropped mass joining `found`; None if they are too many."""
        call = self.call
        result = filtered.keep(
            logits,
            self.labels[tokens],
            found["logps"].contiguous(),
            found["lse"].contiguous(),
            eps=call.eps,
            logit_scale=call.logit_scale,
            logit_softcap=call.logit_softcap,
        )
        if result is None:
            return None
        kept, dropped = result
        if "grad_dropped_mass" in call.statistics:
            found["grad_dropped_mass"] = dropped
        return kept

    def hidden_gradient(self, dz: Tensor) -> Tensor:
        """dH rows [c, H] of a chunk, in the compute dtype."""
        return torch.mm(dz, self.weight)


def _project(rows: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    out = buffer[: rows.shape[0]]
    if bias is None:
        return torch.mm(rows, weight.t(), out=out)
    return torch.addmm(bias, rows, weight.t(), out=out)


def _scatter(like: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """A [B, T, H] tensor that is `rows` at the tokens and exactly 0 elsewhere."""
    full = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    full.view(-1, like.shape[-1])[tokens] = rows.to(like.dtype)
    return full


class _TokenTable:
    """Stage 1's results of all tokens, [B, T], filled chunk by chunk; 0 on unscored tokens."""

    def __init__(self, call: Call) -> None:
        given = {"logps", "lse", *call.given}
        given |= {"ref_logps"} if call.ref_hidden is not None else set()
        # The gradient of either divergence starts from this one's value.
        given |= {"kl"} if call.kl_gradient else set()
        device = call.labels.device
        shape, dtype = call.labels.shape, small_dtype(device)
        self.values = {
            name: torch.zeros(shape if name in given else 0, dtype=dtype, device=device) for name in TOKEN_OUTPUTS
        }

    def put(self, tokens: Tensor, found: dict[str, Tensor]) -> None:
        """Store a chunk's results."""
        for name, value in found.items():
            if self.values[name].dim() > 1:
                self.values[name].view(-1)[tokens] = value

    def tuple(self) -> tuple[Tensor, ...]:
        """In stage 1's order."""
        return tuple(self.values[name] for name in TOKEN_OUTPUTS)


def _scored(call: Call) -> Tensor:
    """Flat indices of the scored tokens, [N]."""
    return (call.labels.reshape(-1) != call.ignore_index).nonzero().squeeze(-1)


def _check_labels(call: Call, vocab: int) -> None:
    # Chunks are compacted, so only here can an error name the caller's row and position. Accelerators write NaN instead.
    if call.labels.device.type == "cpu":
        check_labels(call.labels, vocab, call.ignore_index)


# --- log-probabilities per token, for any upstream gradient -------------------------------------------------------


@dataclass
class _TokenRun:
    """What a forward leaves behind.

    Attributes:
        tokens: [N], flat indices of the scored tokens.
        saved: frozen_head: d logp_t / d hidden_t [N, H]; kept_logits: the logits [N, V]; filtered: index, value, row_ptr
            and tail of `filtered.Kept`; otherwise nothing.
    """

    table: _TokenTable
    plan: planner.Plan
    tokens: Tensor
    saved: tuple[Tensor, ...]


def _forward_tokens(call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> _TokenRun:
    """Stage 1 over all scored tokens, chunk by chunk, and what the strategy saves for the backward."""
    _check_labels(call, weight.shape[0])
    tokens = _scored(call)
    head = call.sizes(hidden.shape[-1], weight.shape[0])
    may_keep = not torch.compiler.is_compiling()
    plan = planner.plan_tokens(head, call.strategy, tokens.shape[0], call.budget, call.reason, may_keep=may_keep)
    table = _TokenTable(call)
    projection = Projection(call, hidden, weight, bias, plan.rows)
    units: list[Tensor] = []
    lists: list[filtered.Kept] = []
    for begin, end in plan.groups[0].chunks:
        chunk = tokens[begin:end]
        if chunk.shape[0] == 0:
            continue
        logits, found = projection.measure(chunk, projection.rows(chunk))
        if plan.strategy == "filtered":
            kept = projection.keep(logits, chunk, found)
            if kept is None:
                # The softmax is too flat for lists to pay: the whole call turns exact, and projects again.
                reason = f"more than {filtered.DENSEST:g} of the entries exceed {call.eps:g}, so the gradient is exact"
                plan, lists = replace(plan, strategy="two_pass", reason=reason), []
                table.values["grad_dropped_mass"].zero_()
            else:
                lists.append(kept)
        table.put(chunk, found)
        if plan.strategy == "frozen_head":
            # d logp / dh = W[y] - E_p[W], whatever the loss is: its coefficient multiplies this row in the backward.
            ones = torch.ones_like(found["logps"])
            kept = projection.keep(logits, chunk, found) if call.eps else None
            if kept is not None:
                units.append(filtered.grad_hidden(kept, ones, projection.weight))
                table.put(chunk, found)
            else:
                dz = projection.differentiate(logits, chunk, found["logps"], found["lse"], ones)
                units.append(projection.hidden_gradient(dz))
    saved: tuple[Tensor, ...] = ()
    if plan.strategy == "frozen_head":
        saved = (torch.cat(units) if units else hidden.new_zeros(0, hidden.shape[-1]),)
    elif plan.strategy == "kept_logits":
        saved = (projection.buffer,)
    elif plan.strategy == "filtered":
        all_kept = filtered.Kept.join(lists, projection.buffer)
        saved = (all_kept.index, all_kept.value, all_kept.row_ptr, all_kept.tail)
    return _TokenRun(table, plan, tokens, saved)


def _backward_filtered(
    call: Call,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    kept: filtered.Kept,
    grad_logps: Tensor,
    into: Tensor | None,
) -> tuple[Tensor | None, HeadGradient]:
    """(dH [B, T, H], head gradient) from the kept entries."""
    grad = grad_logps.reshape(-1)[tokens].double()
    gradient = HeadGradient(call, weight.shape[0], hidden.shape[-1], into)
    grad_hidden = None
    if call.needs_hidden:
        grad_hidden = _scatter(hidden, tokens, filtered.grad_hidden(kept, grad, weight.to(call.compute_dtype)))
    if gradient.weight is not None:
        rows = _gather(hidden, tokens, call.compute_dtype)
        filtered.grad_weight(kept, grad, rows, gradient.weight, accumulate=into is not None)
    if gradient.bias is not None:
        gradient.bias += filtered.grad_bias(kept, grad, weight.shape[0])
    return grad_hidden, gradient


def _backward_tokens(
    call: Call,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logps: Tensor,
    lse: Tensor,
    grad_logps: Tensor,
    *,
    divergences: KLGradients | None = None,
    kept_logits: Tensor | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor | None, HeadGradient]:
    """(dH [B, T, H], head gradient) of sum grad_logps * logps, from `kept_logits` (overwritten) or by projecting again.

    `divergences` add theirs, and the reference is projected again as well.
    """
    call = call.without_reference() if divergences is None else call
    small = grad_logps.reshape(-1)
    moves = small != 0 if divergences is None else (small != 0) | divergences.moves().reshape(-1)
    live = call.labels.reshape(-1) != call.ignore_index
    # Kept logits are there for every scored token; otherwise tokens without gradient need no second projection.
    tokens = (live if kept_logits is not None else live & moves).nonzero().squeeze(-1)
    head = call.sizes(hidden.shape[-1], weight.shape[0])
    plan = planner.plan_tokens(head, "two_pass", tokens.shape[0], call.budget, may_keep=False)
    gradient = HeadGradient(call, weight.shape[0], hidden.shape[-1], into)
    grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device) if call.needs_hidden else None
    projection = Projection(call, hidden, weight, bias, 0 if kept_logits is not None else plan.rows)
    logps, lse = logps.reshape(-1), lse.reshape(-1)
    for begin, end in plan.groups[0].chunks:
        chunk = tokens[begin:end]
        if chunk.shape[0] == 0:
            continue
        rows = projection.rows(chunk)
        logits = projection.project(rows) if kept_logits is None else kept_logits[begin:end]
        if divergences is not None:
            projection.project_reference(chunk)
        by_kl = None if divergences is None else divergences.at(chunk)
        dz = projection.differentiate(logits, chunk, logps[chunk], lse[chunk], small[chunk], by_kl)
        if grad_hidden is not None:
            grad_hidden.view(-1, hidden.shape[-1])[chunk] = projection.hidden_gradient(dz).to(hidden.dtype)
        gradient.add(dz, rows)
    gradient.finish()
    return grad_hidden, gradient


def _take_weight(gradient: HeadGradient, weight: Tensor, into: Tensor | None) -> Tensor | None:
    """The gradient to return for the weight: none when it went straight into the caller's buffer."""
    if gradient.weight is None or into is not None:
        return None
    return gradient.weight.to(weight.dtype)


def main_grad(weight: Tensor) -> Tensor | None:
    """The float32 buffer `weight.main_grad`, where there is one of the weight's shape (Megatron's convention)."""
    buffer = getattr(weight, "main_grad", None)
    fits = (
        isinstance(buffer, Tensor)
        and buffer.dtype == torch.float32
        and buffer.shape == weight.shape
        and buffer.is_contiguous()
    )
    return buffer if fits and weight.dtype != torch.float64 else None


def _constants(terms: Sequence[str], outputs: Sequence[Tensor]) -> list[Tensor]:
    """Those of TOKEN_OUTPUTS that carry no gradient."""
    moving = {"logps", *(name for name in terms if name in KL_TERMS)}
    return [value for name, value in zip(TOKEN_OUTPUTS, outputs, strict=True) if name not in moving]


def _upstream(
    grads: Sequence[Tensor | None], logps: Tensor, ref_logps: Tensor, kl: Tensor
) -> tuple[Tensor | None, KLGradients | None]:
    """(gradient by the log-probabilities, by the divergences) from those of TOKEN_OUTPUTS; (None, None) if there is none."""
    by_name = dict(zip(TOKEN_OUTPUTS, grads, strict=True))
    # A graph compiler may materialise the gradient of an output that is empty because nobody asked for it.
    by_kl, by_forward = (None if (g := by_name[name]) is None or g.dim() == 1 else g for name in KL_TERMS)
    if by_kl is None and by_forward is None:
        return by_name["logps"], None
    by_logps = torch.zeros_like(logps) if by_name["logps"] is None else by_name["logps"]
    return by_logps, KLGradients(ref_logps, kl, by_kl, by_forward)


class _LinearLogps(torch.autograd.Function):
    """Token log-probabilities from hidden states (eager): every strategy but whole_pairs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, ...]:
        with _no_autocast(hidden.device):
            run = _forward_tokens(call, hidden, weight, bias)
        logger.debug("%s", run.plan.describe())
        outputs = run.table.tuple()
        ctx.call, ctx.strategy, ctx.used = call, run.plan.strategy, False
        ctx.save_for_backward(hidden, weight, bias, *outputs[:3], outputs[4], run.tokens, *run.saved)
        ctx.mark_non_differentiable(*_constants(call.terms, outputs))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, logps, lse, ref_logps, kl, tokens, *saved = ctx.saved_tensors
        grad_logps, divergences = _upstream(grads, logps, ref_logps, kl)
        if grad_logps is None:
            return (None,) * 4
        call: Call = ctx.call
        with _no_autocast(hidden.device):
            if ctx.strategy == "frozen_head":
                scale = grad_logps.reshape(-1)[tokens].unsqueeze(-1)
                rows = saved[0] * scale.to(accumulator_dtype(saved[0].dtype))
                # 0 * inf: a token without gradient gets an exact 0 whatever its log-probability's slope.
                rows = torch.where(scale == 0, torch.zeros_like(rows), rows)
                return _scatter(hidden, tokens, rows), None, None, None
            into = main_grad(weight) if call.needs_weight else None
            kept = None
            if ctx.strategy == "kept_logits" and not ctx.used:
                # dz goes over the kept logits; a second backward of the same graph projects again. `.data` keeps the
                # version counter, so that autograd does not take this for a caller's mistake.
                kept, ctx.used = saved[0].data, True
            if ctx.strategy == "filtered":
                lists = filtered.Kept(*saved)
                grad_hidden, gradient = _backward_filtered(call, hidden, weight, tokens, lists, grad_logps, into)
            else:
                grad_hidden, gradient = _backward_tokens(
                    call,
                    hidden,
                    weight,
                    bias,
                    logps,
                    lse,
                    grad_logps,
                    divergences=divergences,
                    kept_logits=kept,
                    into=into,
                )
        grad_bias = None if gradient.bias is None or bias is None else gradient.bias.to(bias.dtype)
        return grad_hidden, _take_weight(gradient, weight, into), grad_bias, None


# --- a scalar loss of whole pairs, gradients in the forward -------------------------------------------------------


@dataclass(frozen=True)
class PairCall:
    """The pair side of a call.

    Attributes:
        weights: [B, T], 0 on unscored tokens.
        cu_seqlens: [2P + 1] or None.
        ref_sums: [2P] or None (used when no reference is projected).
        beta, label_smoothing: [P].
        scale: [P], d loss / d (pair's loss): pair weights and the reduction.
        functions: the objectives.
        kernel: (robust,) if stage 2 computes the loss itself.
        use_weighting: multiply each pair's loss by its WPO weight (`wpo_weights`).
        kl_scale: d loss / d KL(policy || reference) of every scored token, a scalar, or None.
    """

    weights: Tensor
    cu_seqlens: Tensor | None
    ref_sums: Tensor | None
    beta: Tensor
    label_smoothing: Tensor
    scale: Tensor
    functions: list[Objective]
    loss_weights: Sequence[float] | None
    kernel: tuple[bool] | None
    use_weighting: bool = False
    kl_scale: Tensor | None = None


def wpo_weights(aligned: Tensor, counts: Tensor) -> Tensor:
    """WPO's weight of each pair [P] (Zhou et al. 2024, equation 2), from sums of log p(label) - log sum p^2 and counts [2P]."""
    chosen, rejected = (aligned / counts.clamp(min=1)).chunk(2)
    return (chosen + rejected).exp()


def _owners(call: Call, pair: PairCall) -> Tensor:
    """The sequence of each token, [B * T]; 2P for tokens that are not scored or belong to none."""
    sequences = 2 * pair.beta.shape[0]
    labels = call.labels
    if pair.cu_seqlens is None:
        owner = torch.arange(sequences, device=labels.device).repeat_interleave(labels.shape[1])
    else:
        ops._check_cu_seqlens(pair.cu_seqlens, labels.shape[1])
        position = torch.arange(labels.shape[1], device=labels.device)
        owner = torch.bucketize(position, pair.cu_seqlens[1:], right=True)
    return torch.where(labels.reshape(-1) != call.ignore_index, owner, sequences)


@dataclass
class _GroupLoss:
    """Of a group of p pairs: losses [p]; sums, reference sums, and the loss's derivative by sums and KL sums, [2p] each."""

    losses: Tensor
    sums: Tensor
    ref_sums: Tensor
    coef: Tensor
    kl_coef: Tensor | None


def _group_loss(
    call: Call,
    pair: PairCall,
    group: planner.Group,
    found: dict[str, Tensor],
    weights: Tensor,
    counts: Sequence[int],
) -> _GroupLoss:
    """The loss of a group whose compacted tokens are given: `found` are stage 1's results [n] by name."""
    stages = call.stages
    pairs = pair.beta.shape[0]
    mine = slice(group.first, group.last)
    bounds = [0]
    for offset in (0, pairs):
        for s in range(group.first + offset, group.last + offset):
            bounds.append(bounds[-1] + counts[s])
    cu_seqlens = torch.tensor(bounds, dtype=torch.int64, device=weights.device)
    weights = weights.unsqueeze(0)

    def sums_of(values: Tensor, by: Tensor = weights) -> Tensor:
        return stages.sequence_sums(values.view(1, -1), by, cu_seqlens)

    beta, smoothing = pair.beta[mine].contiguous(), pair.label_smoothing[mine].contiguous()
    ref_sums = None
    if "ref_logps" not in found and pair.ref_sums is not None:
        ref_sums = torch.cat([side[mine] for side in pair.ref_sums.chunk(2)])
    kl_coef = None
    if pair.kernel is not None:
        ref_logps = found["ref_logps"].unsqueeze(0) if "ref_logps" in found else None
        losses, sums, ref_sums, coef = stages.preference_loss(
            found["logps"].unsqueeze(0), ref_logps, weights, cu_seqlens, ref_sums, beta, smoothing, pair.kernel[0]
        )
    else:
        sums = sums_of(found["logps"])
        if "ref_logps" in found:
            ref_sums = sums_of(found["ref_logps"])
        elif ref_sums is None:
            ref_sums = torch.zeros_like(sums)
        lengths = sums_of(torch.ones_like(weights))
        with torch.enable_grad():
            leaves = [sums.detach().requires_grad_()]
            if "forward_kl" in found:
                leaves.append(sums_of(found["forward_kl"]).requires_grad_())
            own = Pairs.from_sums(leaves[0], ref_sums, lengths, beta, smoothing, *leaves[1:])
            losses = objectives.mix(own, pair.functions, pair.loss_weights)
            if losses.shape != beta.shape:
                raise ValueError(
                    f"an objective must return one loss per pair, [{beta.shape[0]}]; got {list(losses.shape)}"
                )
            coef, *rest = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
        kl_coef = rest[0] if rest else None
        losses = losses.detach()
    scale = pair.scale[mine]
    if pair.use_weighting:
        ones = torch.ones_like(weights)
        likely = wpo_weights(sums_of(found["logps"] - found["log_sum_sq"], ones), sums_of(ones, ones))
        losses, scale = losses * likely, scale * likely
    scale = scale.repeat(2)
    return _GroupLoss(losses, sums, ref_sums, coef * scale, None if kl_coef is None else kl_coef * scale)


@dataclass
class _PairResult:
    table: _TokenTable
    plan: planner.Plan
    losses: Tensor
    sums: Tensor
    ref_sums: Tensor
    coef: Tensor
    kl_coef: Tensor
    grad_hidden: Tensor | None
    gradient: HeadGradient


def _run_pairs(call: Call, pair: PairCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> _PairResult:
    """Loss and gradients of whole pairs, a group of pairs at a time, each token projected once if its pair fits."""
    vocab, hidden_size = weight.shape
    _check_labels(call, vocab)
    pairs = pair.beta.shape[0]
    owner = _owners(call, pair)
    counts = torch.bincount(owner, minlength=2 * pairs + 1)[: 2 * pairs].tolist()
    plan = planner.plan_pairs(call.sizes(hidden_size, vocab), counts, call.budget, call.reason)
    # A group's tokens in one run: its chosen sequences, then its rejected ones.
    rank = torch.full((2 * pairs + 1,), 2 * pairs, dtype=torch.int64)
    order = [s + side for group in plan.groups for side in (0, pairs) for s in range(group.first, group.last)]
    rank[torch.tensor(order, dtype=torch.int64)] = torch.arange(2 * pairs)
    order_of_tokens = rank.to(owner.device)[owner].argsort(stable=True)[: plan.tokens]

    device = hidden.device
    table = _TokenTable(call)
    losses = torch.empty(pairs, dtype=small_dtype(device), device=device)
    sums, ref_sums, coef, kl_coef = (torch.zeros(2, pairs, dtype=losses.dtype, device=device) for _ in range(4))
    gradient = HeadGradient(call, vocab, hidden_size)
    grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=device) if call.needs_hidden else None
    projection = Projection(call, hidden, weight, bias, plan.rows)
    flat_weights = pair.weights.reshape(-1)

    for group in plan.groups:
        parts: list[dict[str, Tensor]] = []
        logits, rows = projection.buffer[:0], None
        for begin, end in group.chunks:
            chunk = order_of_tokens[begin:end]
            rows = projection.rows(chunk)
            if end > begin:
                logits, found = projection.measure(chunk, rows)
                table.put(chunk, found)
                parts.append(found)
        begin, end = group.bounds[0], group.bounds[-1]
        mine = order_of_tokens[begin:end]

        if not parts:
            parts = [{name: losses.new_zeros(0) for name, value in table.values.items() if value.dim() > 1}]
        found = parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        done = _group_loss(call, pair, group, found, flat_weights[mine], counts)
        span = slice(group.first, group.last)
        losses[span] = done.losses
        for target, value in ((sums, done.sums), (ref_sums, done.ref_sums), (coef, done.coef), (kl_coef, done.kl_coef)):
            if value is not None:
                target[:, span] = value.view(2, -1)
        if begin == end:
            continue
        local = torch.tensor([counts[s + side] for side in (0, pairs) for s in range(group.first, group.last)]).to(
            device
        )

        def spread(values: Tensor, local: Tensor = local, mine: Tensor = mine, size: int = end - begin) -> Tensor:
            return flat_weights[mine] * values.repeat_interleave(local, output_size=size)

        grad_logps = spread(done.coef)
        logps, lse = found["logps"], found["lse"]
        divergences = None
        if call.kl_gradient:
            by_kl = None if pair.kl_scale is None else pair.kl_scale.expand(end - begin)
            by_forward = None if done.kl_coef is None else spread(done.kl_coef)
            divergences = KLGradients(found["ref_logps"], found["kl"], by_kl, by_forward)
        # The last chunk's logits are still in the buffer; earlier ones of a pair beyond the budget come back.
        for number, (a, b) in reversed(list(enumerate(group.chunks))):
            chunk, local_part = order_of_tokens[a:b], slice(a - begin, b - begin)
            if number != len(group.chunks) - 1:
                rows = projection.rows(chunk)
                logits = projection.project(rows)
                if divergences is not None:
                    projection.project_reference(chunk)
            by_kl_part = None if divergences is None else divergences.at(local_part)
            dz = projection.differentiate(
                logits, chunk, logps[local_part], lse[local_part], grad_logps[local_part], by_kl_part
            )
            if grad_hidden is not None:
                grad_hidden.view(-1, hidden_size)[chunk] = projection.hidden_gradient(dz).to(hidden.dtype)
            assert rows is not None
            gradient.add(dz, rows)
    gradient.finish()
    sums, ref_sums, coef, kl_coef = (vector.view(-1) for vector in (sums, ref_sums, coef, kl_coef))
    return _PairResult(table, plan, losses, sums, ref_sums, coef, kl_coef, grad_hidden, gradient)


class _WholePairs(torch.autograd.Function):
    """A scalar preference loss whose gradients are computed in the forward, for d loss = 1 (eager)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: Call,
        pair: PairCall,
    ) -> tuple[Tensor, ...]:
        with _no_autocast(hidden.device):
            done = _run_pairs(call, pair, hidden, weight, bias)
        logger.debug("%s", done.plan.describe())
        outputs = done.table.tuple()
        loss = (done.losses * pair.scale).sum()
        if pair.kl_scale is not None:
            # The table is 0 on tokens that are not scored.
            loss = loss + pair.kl_scale * done.table.values["kl"].sum()
        ctx.call, ctx.pair, ctx.handed_over = call, pair, False
        ctx.save_for_backward(
            hidden,
            weight,
            bias,
            *outputs[:3],
            outputs[4],
            done.coef,
            done.kl_coef,
            done.grad_hidden,
            done.gradient.weight,
            done.gradient.bias,
        )
        result = (loss, done.losses, done.sums, done.ref_sums, *outputs)
        ctx.mark_non_differentiable(*result[1:])
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 5
        hidden, weight, bias, logps, lse, ref_logps, kl, coef, kl_coef, *gradients = ctx.saved_tensors
        grad_hidden, grad_weight, grad_bias = gradients
        call: Call = ctx.call
        pair: PairCall = ctx.pair
        into = main_grad(weight) if call.needs_weight else None
        if ctx.handed_over:
            # The first backward scaled the gradients in place and gave them away; a retained graph computes them anew.
            spread = ops._spread(coef * grad_loss, pair.weights, pair.cu_seqlens)
            divergences = None
            if call.kl_gradient:
                by_kl = None
                if pair.kl_scale is not None:
                    every = torch.ones_like(coef)
                    by_kl = ops._spread(every, (pair.weights != 0).to(coef.dtype), pair.cu_seqlens) * (
                        pair.kl_scale * grad_loss
                    )
                by_forward = ops._spread(kl_coef * grad_loss, pair.weights, pair.cu_seqlens)
                divergences = KLGradients(ref_logps, kl, by_kl, by_forward if "forward_kl" in call.terms else None)
            with _no_autocast(hidden.device):
                grad_hidden, gradient = _backward_tokens(
                    call, hidden, weight, bias, logps, lse, spread, divergences=divergences, into=into
                )
            bias_out = None if gradient.bias is None or bias is None else gradient.bias.to(bias.dtype)
            return grad_hidden, _take_weight(gradient, weight, into), bias_out, None, None
        ctx.handed_over = True
        # On the CPU a factor of 1, the usual one, saves a pass over dW; elsewhere looking would stall the stream.
        unit = grad_loss.device.type == "cpu" and float(grad_loss) == 1.0

        def scaled(gradient: Tensor | None) -> Tensor | None:
            if gradient is None:
                return None
            # `.data`: memory that leaves this graph gets a version counter of its own.
            return gradient.data if unit else gradient.data.mul_(grad_loss)

        grad_hidden, grad_weight, grad_bias = scaled(grad_hidden), scaled(grad_weight), scaled(grad_bias)
        if into is not None and grad_weight is not None:
            into.add_(grad_weight)
            grad_weight = None
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


# --- the same two passes as operators, for torch.compile ----------------------------------------------------------

_library = torch.library.Library("dpo_kernels", "FRAGMENT")
_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? ref_hidden, Tensor? ref_weight, "
    "Tensor? ref_bias, int ignore_index, float logit_scale, float logit_softcap, str[] statistics, str[] terms, "
    "ScalarType compute_dtype, int budget, str backend"
)
_library.define(
    f"linear_logps({_ARGUMENTS}) -> (Tensor logps, Tensor lse, Tensor ref_logps, Tensor entropy, Tensor kl, "
    "Tensor accuracy, Tensor mean_logits, Tensor grad_dropped_mass, Tensor forward_kl, Tensor log_sum_sq)"
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
    with _no_autocast(hidden.device):
        run = _forward_tokens(call, hidden, weight, bias)
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
    with _no_autocast(hidden.device):
        grad_hidden, gradient = _backward_tokens(
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
    given |= {"kl"} if any(name in KL_TERMS for name in terms) else set()
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
    ctx.mark_non_differentiable(*_constants(inputs[11], output))
    ctx.set_materialize_grads(False)


def _op_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, logps, lse, ref_logps, kl = ctx.saved_tensors
    grad_logps, divergences = _upstream(grads, logps, ref_logps, kl)
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


# --- doors for functional.py --------------------------------------------------------------------------------------


def linear_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> dict[str, Tensor]:
    """Stage 1's results by name, [B, T]; "logps" and the divergences among the terms are differentiable."""
    if torch.compiler.is_compiling():
        outputs = _ops.linear_logps(
            hidden,
            weight,
            bias,
            call.labels,
            call.ref_hidden,
            call.ref_weight,
            call.ref_bias,
            call.ignore_index,
            call.logit_scale,
            call.logit_softcap,
            list(call.statistics),
            list(call.terms),
            call.compute_dtype,
            call.budget,
            call.backend,
        )
    else:
        outputs = _LinearLogps.apply(hidden, weight, bias, call)
    return {name: value for name, value in zip(TOKEN_OUTPUTS, outputs, strict=True) if value.dim() > 1}


def whole_pairs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: Call,
    pair: PairCall,
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """(loss, losses [P], sums, reference sums [2P], token results by name); only `loss` is differentiable."""
    loss, losses, sums, ref_sums, *tokens = _WholePairs.apply(hidden, weight, bias, call, pair)
    found = {name: value for name, value in zip(TOKEN_OUTPUTS, tokens, strict=True) if value.dim() > 1}
    return loss, losses, sums, ref_sums, found
