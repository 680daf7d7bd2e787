"""The whole_pairs strategy: a scalar loss whose gradients are computed in the forward pass, so tokens are projected once.

When the logits of all tokens of a pair are in memory, the pair's sums are known, and so is the derivative of the loss with
respect to each sum.

On a GPU there is an exception: if the logits of all pairs fit in the budget at once, they are kept for the backward pass, as in
kept_logits. The upstream gradient then multiplies the coefficients instead of dW: at H = 4,096 and V = 128k, scaling and casting
a float32 dW would move 7.4 GB. On a CPU dW is scaled only if the upstream gradient is not 1; a GPU would have to synchronize
to read it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..arguments import PairSettings
from ..backends.whole_call import reduce
from ..memory import fresh
from ..ops import check_cu_seqlens, without_graph
from ..pair_loss import PairLosses, Tokens, token_gradients
from ..stages import owners
from . import planner
from .call import Call, KLGradients
from .chunk import (
    HeadGradient,
    Projection,
    TokenTable,
    check_all_labels,
    fitting,
    gradient_dtype,
    main_grad,
    no_autocast,
    softmax_of,
)
from .fused import FusedProjection
from .tokens import backward_tokens, take_weight

logger = logging.getLogger(__name__)


def _owners(call: Call, cu_seqlens: Tensor | None, sequences: int) -> Tensor:
    """The sequence of each token, [B * T]; 2P for tokens that are not scored or belong to no sequence."""
    labels = call.labels
    if cu_seqlens is None:
        owner = torch.arange(sequences, device=labels.device).unsqueeze(-1).expand_as(labels).reshape(-1)
    else:
        check_cu_seqlens(cu_seqlens, labels.shape[1])
        owner = owners(cu_seqlens, labels.shape[1])
    return torch.where((labels.reshape(-1) != call.transform.ignore_index) & (owner >= 0), owner, sequences)


@dataclass(frozen=True)
class _Scored:
    """The scored tokens, sequence by sequence.

    Attributes:
        tokens: [N], flat indices.
        edges: [2P + 1], bounds of the sequences in `tokens`, on the device.
        bounds: the same on the host.
    """

    tokens: Tensor
    edges: Tensor
    bounds: list[int]

    @classmethod
    def of(cls, call: Call, cu_seqlens: Tensor | None, sequences: int) -> _Scored:
        """The scored tokens of a call. Synchronizes with the device, once per call, to read their number per sequence."""
        owner, order = _owners(call, cu_seqlens, sequences).sort(stable=True)
        edges = torch.searchsorted(owner, torch.arange(sequences + 1, device=owner.device))
        bounds = edges.tolist()
        return cls(order[: bounds[-1]], edges, bounds)

    def counts(self) -> list[int]:
        """Number of scored tokens of each sequence, [2P]."""
        return [end - begin for begin, end in pairwise(self.bounds)]

    def _sides(self, group: planner.Group) -> list[slice]:
        pairs = len(self.bounds) // 2
        return [slice(group.first + side, group.last + side) for side in (0, pairs)]

    def tokens_of(self, groups: Sequence[planner.Group]) -> Tensor:
        """The tokens ordered by group, and within a group its chosen sequences before its rejected ones."""
        if len(groups) < 2:
            return self.tokens
        sides = [side for group in groups for side in self._sides(group)]
        return torch.cat([self.tokens[self.bounds[side.start] : self.bounds[side.stop]] for side in sides])

    def cu_seqlens_of(self, group: planner.Group) -> Tensor:
        """[2p + 1] int64, bounds of the sequences of a group of p pairs within its tokens; computed on the device."""
        chosen, rejected = self._sides(group)
        if chosen.stop == rejected.start:
            return self.edges
        before = self.bounds[chosen.start]
        between = self.bounds[rejected.start] - self.bounds[chosen.stop]
        first = self.edges[chosen.start : chosen.stop + 1] - before
        return torch.cat([first, self.edges[rejected.start + 1 : rejected.stop + 1] - (before + between)])


@dataclass
class PairResult:
    """The result of `run_pairs`: gradients for d loss = 1, or logits that are kept for the backward pass."""

    table: TokenTable
    plan: planner.Plan
    losses: PairLosses
    token_grads: TokenTable
    tokens: Tensor
    logits: Tensor | None
    grad_hidden: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None


def _waits(call: Call, plan: planner.Plan, may_wait: bool) -> bool:
    """Whether the logits are kept for the backward pass: on a GPU, if one chunk holds them all."""
    chunks = sum(len(group.chunks) for group in plan.groups)
    return may_wait and call.labels.device.type == "cuda" and chunks == 1 and not (call.fused or call.terms)


def plan_of(call: Call, weight: Tensor, counts: Sequence[int], may_wait: bool = True) -> planner.Plan:
    """The plan for `counts` [2P] scored tokens per sequence and the memory that is available now."""

    def plan_for(budget: int) -> planner.Plan:
        plan = planner.plan_pairs(call.sizes, counts, budget, call.reason)
        return (
            replace(plan, reason=f"{plan.reason}; kept for the backward pass") if _waits(call, plan, may_wait) else plan
        )

    def beside(plan: planner.Plan) -> int:
        dtype = gradient_dtype(call, weight, 1 if _waits(call, plan, may_wait) else 2)
        return call.needs.weight * weight.numel() * dtype.itemsize

    return fitting(plan_for, call, call.sizes.row_bytes, beside)


def run_pairs(
    call: Call,
    tokens: Tokens,
    settings: PairSettings,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    may_wait: bool = True,
) -> PairResult:
    """Loss and gradients, one group of pairs at a time. A token is projected once if its pair fits in the budget.

    If the logits are kept for the backward pass (only with `may_wait`), the result has no gradients.
    """
    vocab, hidden_size = weight.shape
    check_all_labels(call, vocab)
    pairs = settings.pairs
    scored = _Scored.of(call, tokens.cu_seqlens, 2 * pairs)
    plan = plan_of(call, weight, scored.counts(), may_wait)
    order_of_tokens = scored.tokens_of(plan.groups)
    share = pairs / max(order_of_tokens.shape[0], 1)
    scale = 1 / max(pairs, 1) if settings.reduction == "mean" else 1.0
    waits = _waits(call, plan, may_wait)

    device = hidden.device
    table = TokenTable(call.rows, call.labels)
    token_grads = TokenTable(("logps", *call.terms), call.labels)
    gradient: HeadGradient | None = None
    grad_hidden: Tensor | None = None
    if not waits:
        gradient = HeadGradient(call, vocab, hidden_size)
        grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=device) if call.needs.hidden else None
    projection: Any
    if call.fused:
        projection = FusedProjection(call, hidden, weight, bias, plan.rows)
        projection.sort_by(order_of_tokens, [chunk for group in plan.groups for chunk in group.chunks])
    else:
        projection = Projection(call, hidden, weight, bias, plan.rows)
    filled = [group for group in plan.groups if group.bounds[-1] > group.bounds[0]]
    all_losses: list[PairLosses] = []

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
            parts = [{name: value.new_zeros(0) for name, value in table.rows.items()}]
        found = parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        weights = tokens.weights.reshape(-1)[mine].unsqueeze(0)
        own = Tokens(weights, torch.ones_like(weights), scored.cu_seqlens_of(group), tokens.backend, share)
        rows_of_group = {name: value.unsqueeze(0) for name, value in found.items()}
        part = settings.part(group.first, group.last)
        done, token_grads_of_group = token_gradients(rows_of_group, own, part, scale)
        grads = {name: grad[0] for name, grad in token_grads_of_group.items()}
        all_losses.append(done)
        token_grads.put(mine, grads)
        if begin == end or gradient is None:
            continue
        divergences = None
        if call.terms:
            divergences = KLGradients.of(found, grads, call.sizes.vocab)
        # The buffer still holds the logits of the last chunk. If a pair exceeds the budget, earlier chunks are projected again.
        for number, (a, b) in reversed(list(enumerate(group.chunks))):
            chunk, local = order_of_tokens[a:b], slice(a - begin, b - begin)
            if number != len(group.chunks) - 1:
                rows = projection.rows(chunk)
                logits = projection.project(rows, chunk)
                if divergences is not None:
                    projection.project_reference(chunk)
            assert rows is not None
            rows_grad = projection.pull_back(
                logits,
                chunk,
                rows,
                [row[local] for row in softmax_of(found)],
                grads["logps"][local],
                gradient,
                divergences=None if divergences is None else divergences.at(local),
                last=group is filled[-1] and number == 0,
            )
            if grad_hidden is not None:
                grad_hidden.view(-1, hidden_size)[chunk] = rows_grad.to(hidden.dtype)
            if call.fused and "grad_dropped_mass" in call.statistics:
                table.put(chunk, {"grad_dropped_mass": projection.dropped})
    logits = projection.buffer if waits else None
    result = PairResult(table, plan, PairLosses.join(all_losses, table.all), token_grads, order_of_tokens, logits)
    if gradient is not None:
        gradient.finish()
        result.grad_hidden, result.grad_weight, result.grad_bias = grad_hidden, gradient.weight, gradient.bias
    return result


def loss_of(done: PairResult, settings: PairSettings) -> Tensor:
    """The scalar loss."""
    return reduce(done.losses.weighted, settings.reduction)


class WholePairs(torch.autograd.Function):
    """A scalar preference loss whose gradients for d loss = 1 are computed in the forward pass; eager mode only.

    Returns (loss, the fields of PairLosses, the results of all tokens [R, B, T], plan); only the loss is differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: Call,
        tokens: Tokens,
        settings: PairSettings,
    ) -> tuple[Any, ...]:
        with no_autocast(hidden.device):
            done = run_pairs(call, tokens, settings, hidden, weight, bias)
        logger.debug("%s", done.plan.describe())
        loss = loss_of(done, settings)
        ctx.call, ctx.handed_over = call, False
        ctx.save_for_backward(
            hidden,
            weight,
            bias,
            # Saved so that autograd raises if they are modified before the backward pass.
            call.labels,
            *call.reference,
            done.table.all,
            done.token_grads.all,
            done.tokens,
            done.logits,
            done.grad_hidden,
            done.grad_weight,
            done.grad_bias,
        )
        vectors = done.losses.tuple()
        ctx.mark_non_differentiable(*vectors, done.table.all)
        ctx.set_materialize_grads(False)
        return loss, *vectors, done.table.all, done.plan

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 6
        saved = ctx.saved_tensors  # read once, because activation checkpointing allows only one read
        return without_graph(lambda: WholePairs._gradients(ctx, grad_loss, *saved), *saved[:3], grad_loss)

    @staticmethod
    def _gradients(ctx: Any, grad_loss: Tensor, *given: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, _, _, _, _, found, token_grads, tokens, logits, *gradients = given
        grad_hidden, grad_weight, grad_bias = gradients
        call: Call = ctx.call
        into = main_grad(weight) if call.needs.weight else None
        if ctx.handed_over or logits is not None:
            # The first backward pass returned the gradients, or overwrites the kept logits with dz; a second one (retain_graph)
            # computes them again. Writing through `.data` does not raise the version counter, so autograd accepts a second read.
            kept = None if logits is None or ctx.handed_over else logits.data
            ctx.handed_over = True
            grads = dict(zip(("logps", *call.terms), (token_grads * grad_loss).unbind(0), strict=True))
            divergences = None
            if call.terms:
                rows = dict(zip(call.rows, found.unbind(0), strict=True))
                divergences = KLGradients.of(rows, grads, call.sizes.vocab)
            with no_autocast(hidden.device):
                grad_hidden, gradient = backward_tokens(
                    call,
                    hidden,
                    weight,
                    bias,
                    found,
                    grads["logps"],
                    tokens=None if hidden.device.type == "cpu" else tokens,
                    divergences=divergences,
                    kept_logits=kept,
                    into=into,
                )
            bias_out = None if gradient.bias is None or bias is None else gradient.bias.to(bias.dtype)
            return grad_hidden, take_weight(gradient, weight, into), bias_out, None, None, None
        ctx.handed_over = True
        # On a CPU the usual factor of 1 is detected, which saves a pass over dW. Elsewhere reading it would synchronize.
        on_cpu = grad_loss.device.type == "cpu"
        unit = on_cpu and float(grad_loss) == 1.0

        def scaled(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if gradient is None:
                return None
            # `.data` gives the returned tensor a version counter of its own, so modifying it does not invalidate this graph.
            gradient = gradient.data
            if on_cpu or gradient.dtype == dtype:
                return (gradient if unit else gradient.mul_(grad_loss)).to(dtype)
            # One pass scales and casts.
            return torch.mul(gradient, grad_loss, out=fresh(gradient.shape, dtype, gradient.device))

        if into is not None and grad_weight is not None:
            if on_cpu:
                into.add_(scaled(grad_weight, grad_weight.dtype))  # type: ignore[arg-type]
            else:
                into.addcmul_(grad_weight.data, grad_loss.to(into.dtype))
            grad_weight = None
        return (
            scaled(grad_hidden, hidden.dtype),
            scaled(grad_weight, weight.dtype),
            None if bias is None else scaled(grad_bias, bias.dtype),
            None,
            None,
            None,
        )
