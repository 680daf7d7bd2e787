"""Log-probabilities per token, for any upstream gradient: every strategy except whole_pairs.

The forward pass projects all scored tokens, chunk by chunk. Depending on the strategy, it saves for the backward pass: rows of
dH without their coefficient (frozen_head), the kept entries (filtered), the logits (kept_logits), or nothing (two_pass, whose
backward pass projects again).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import filtered
from ..ops import without_graph
from . import planner
from .call import Call, KLGradients
from .chunk import (
    HeadGradient,
    Projection,
    TokenTable,
    accumulator_dtype,
    check_all_labels,
    fitting,
    gather,
    gradient_dtype,
    main_grad,
    no_autocast,
    scatter,
    scored,
    softmax_of,
)
from .fused import FusedProjection

logger = logging.getLogger(__name__)


@dataclass
class TokenRun:
    """The result of a forward pass.

    Attributes:
        table: the results of all tokens.
        plan: the executed plan.
        tokens: [N], flat indices of the scored tokens.
        saved: frozen_head: d logp_t / d hidden_t [N, H]; kept_logits: the logits [N, V]; filtered: index, value, row_ptr
            and tail of `filtered.Kept`; fused kernels: the order of the vocabulary; otherwise empty.
    """

    table: TokenTable
    plan: planner.Plan
    tokens: Tensor
    saved: tuple[Tensor, ...]


def plan_of(call: Call, count: int) -> planner.Plan:
    """The plan of a call with `count` scored tokens, for the memory that is available now."""
    may_keep = not torch.compiler.is_compiling()

    def plan_for(budget: int) -> planner.Plan:
        return planner.plan_tokens(call.sizes, call.strategy, count, budget, call.reason, may_keep=may_keep)

    return fitting(plan_for, call, call.sizes.row_bytes)


def exact_plan(call: Call, plan: planner.Plan) -> planner.Plan:
    """The plan after a filtered call found too many entries above eps: the same chunks, projected again in the backward pass."""
    reason = f"more than {filtered.DENSEST:g} of the entries exceed {call.eps:g}, so the gradient is exact"
    flops = planner.token_flops(call.sizes, "two_pass", plan.tokens)
    return replace(plan, strategy="two_pass", flops=flops, reason=reason)


def forward_tokens(call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> TokenRun:
    """Stage 1 of all scored tokens, chunk by chunk, and the tensors that the strategy saves for the backward pass."""
    check_all_labels(call, weight.shape[0])
    tokens = scored(call)
    plan = plan_of(call, tokens.shape[0])
    table = TokenTable(call.rows, call.labels)
    kind: Any = FusedProjection if call.fused else Projection
    projection = kind(call, hidden, weight, bias, plan.rows)
    total = torch.zeros(hidden.shape[-1], dtype=torch.float32, device=hidden.device) if call.fused else None
    units: list[Tensor] = []
    lists: list[filtered.Kept] = []
    for begin, end in plan.groups[0].chunks:
        chunk = tokens[begin:end]
        if chunk.shape[0] == 0:
            continue
        rows = projection.rows(chunk)
        logits, found = projection.measure(chunk, rows)
        if total is not None:
            total += rows.sum(0, dtype=torch.float32)
        if plan.strategy == "filtered":
            kept = projection.keep(logits, chunk, found)
            if kept is None:
                plan, lists = exact_plan(call, plan), []
                if "grad_dropped_mass" in table.rows:
                    table.rows["grad_dropped_mass"].zero_()
            else:
                lists.append(kept)
        table.put(chunk, found)
        if plan.strategy == "frozen_head":
            # d logp / dh = W[y] - E_p[W] does not depend on the loss, whose coefficient multiplies the row in the backward pass.
            ones = torch.ones_like(found["logps"])
            kept = projection.keep(logits, chunk, found) if call.eps else None
            if kept is not None:
                units.append(filtered.grad_hidden(kept, ones, projection.weight))
                table.put(chunk, found)
            else:
                dz = projection.differentiate(logits, chunk, softmax_of(found), ones)
                units.append(projection.hidden_gradient(dz))
    saved: tuple[Tensor, ...] = ()
    if total is not None:
        projection.sort(total, tokens.shape[0])
        saved = (projection.head.order.entries, projection.head.order.places)
        if "grad_dropped_mass" in call.statistics:
            _put_dropped_mass(projection, table, tokens, plan)
    if plan.strategy == "frozen_head":
        saved = (torch.cat(units) if units else hidden.new_zeros(0, hidden.shape[-1]),)
    elif plan.strategy == "kept_logits":
        saved = (projection.buffer,)
    elif plan.strategy == "filtered":
        all_kept = filtered.Kept.join(lists, projection.buffer)
        saved = (all_kept.index, all_kept.value, all_kept.row_ptr, all_kept.tail)
    return TokenRun(table, plan, tokens, saved)


def _put_dropped_mass(projection: FusedProjection, table: TokenTable, tokens: Tensor, plan: planner.Plan) -> None:
    # The blocks that will be skipped depend on the probabilities of all tokens, so this statistic costs one more projection.
    softmax = softmax_of(table.rows)
    for begin, end in plan.groups[0].chunks:
        chunk = tokens[begin:end]
        if chunk.shape[0] > 0:
            mass = projection.dropped_mass(chunk, projection.rows(chunk), [row.view(-1)[chunk] for row in softmax])
            table.put(chunk, {"grad_dropped_mass": mass})


def _backward_filtered(
    call: Call,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    kept: filtered.Kept,
    grad_logps: Tensor,
    into: Tensor | None,
) -> tuple[Tensor | None, HeadGradient]:
    """(dH [B, T, H] or None, the head's gradient) from the kept entries."""
    grad = grad_logps.reshape(-1)[tokens].double()
    gradient = HeadGradient(call, weight.shape[0], hidden.shape[-1], into)
    grad_hidden = None
    if call.needs.hidden:
        grad_hidden = scatter(hidden, tokens, filtered.grad_hidden(kept, grad, weight.to(call.compute_dtype)))
    if gradient.weight is not None:
        rows = gather(hidden, tokens, call.compute_dtype)
        filtered.grad_weight(kept, grad, rows, gradient.weight, accumulate=into is not None)
    if gradient.bias is not None:
        gradient.bias += filtered.grad_bias(kept, grad, weight.shape[0])
    return grad_hidden, gradient


def backward_tokens(
    call: Call,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    found: Tensor,
    grad_logps: Tensor,
    *,
    tokens: Tensor | None = None,
    divergences: KLGradients | None = None,
    kept_logits: Tensor | None = None,
    order: Sequence[Tensor] = (),
    into: Tensor | None = None,
) -> tuple[Tensor | None, HeadGradient]:
    """(dH [B, T, H] or None, the head's gradient) of sum(grad_logps * logps).

    Args:
        call: the call.
        hidden: [B, T, H].
        weight: [V, H].
        bias: [V] or None.
        found: [R, B, T], the rows of the forward pass.
        grad_logps: [B, T].
        tokens: [N], the scored tokens of the forward pass, in the order of `kept_logits`; None to select them here.
        divergences: adds the gradients of token-level KLs; a reference is then projected again, too.
        kept_logits: [N, V], overwritten with their gradient; None to project again.
        order: the order of the vocabulary that the fused kernels saved.
        into: a float32 buffer to which dW is added, or None.
    """
    call = call.without_reference() if divergences is None else call
    small = grad_logps.reshape(-1)
    # Tokens without gradient need no second projection, with two exceptions: kept logits exist for all scored tokens, and the
    # fused kernels must skip the blocks that the forward pass reported. On a GPU they are projected all the same, because
    # selecting tokens would synchronize a second time.
    if tokens is None or not (kept_logits is not None or call.fused or hidden.device.type != "cpu"):
        live = call.labels.reshape(-1) != call.transform.ignore_index
        if kept_logits is None and not call.fused:
            live &= small != 0 if divergences is None else (small != 0) | divergences.moves().reshape(-1)
        tokens = live.nonzero().squeeze(-1)
    head = call.sizes
    count = tokens.shape[0]

    def plan_for(budget: int) -> planner.Plan:
        return planner.plan_tokens(head, "two_pass", count, budget, may_keep=False)

    def beside(plan: planner.Plan) -> int:
        held = call.needs.weight and into is None
        return held * weight.numel() * gradient_dtype(call, weight, len(plan.groups[0].chunks)).itemsize

    rows, chunks = 0, [(0, count)]
    if kept_logits is None:
        plan = fitting(plan_for, call, head.row_bytes, beside)
        rows, chunks = plan.rows, plan.groups[0].chunks
    dtype = gradient_dtype(call, weight, len(chunks))
    gradient = HeadGradient(call, weight.shape[0], hidden.shape[-1], into, dtype)
    grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device) if call.needs.hidden else None
    projection: Any
    if call.fused:
        projection = FusedProjection(call, hidden, weight, bias, rows)
        projection.take_order(order, tokens, chunks)
    else:
        projection = Projection(call, hidden, weight, bias, rows)
    softmax = found[:3].reshape(3, -1)  # the rows that `softmax_of` names
    for begin, end in chunks:
        chunk = tokens[begin:end]
        if chunk.shape[0] == 0:
            continue
        rows = projection.rows(chunk)
        logits = projection.project(rows, chunk) if kept_logits is None else kept_logits[begin:end]
        if divergences is not None and call.reference.hidden is not None:
            projection.project_reference(chunk)
        rows_grad = projection.pull_back(
            logits,
            chunk,
            rows,
            softmax[:, chunk].unbind(0),
            small[chunk],
            gradient,
            divergences=None if divergences is None else divergences.at(chunk),
            last=end == count,
        )
        if grad_hidden is not None:
            grad_hidden.view(-1, hidden.shape[-1])[chunk] = rows_grad.to(hidden.dtype)
    gradient.finish()
    return grad_hidden, gradient


def take_weight(gradient: HeadGradient, weight: Tensor, into: Tensor | None) -> Tensor | None:
    """The weight's gradient for autograd; None if it was added to the caller's buffer."""
    if gradient.weight is None or into is not None:
        return None
    return gradient.weight.to(weight.dtype)


def upstream(call: Call, grad_tokens: Tensor, tokens: Tensor) -> tuple[Tensor, KLGradients | None]:
    """(d loss / d logps [B, T], gradients of the divergences among the terms or None) from the gradient of all rows [R, B, T]."""
    grads = dict(zip(call.rows, grad_tokens.unbind(0), strict=True))
    if not call.terms:
        return grads["logps"], None
    rows = dict(zip(call.rows, tokens.unbind(0), strict=True))
    by_terms = {name: grads[name] for name in call.terms}
    if "entropy" in call.terms:
        by_terms = {"kl": -grads["entropy"]}
    return grads["logps"], KLGradients.of(rows, by_terms, call.sizes.vocab)


class LinearLogps(torch.autograd.Function):
    """(results of all tokens [R, B, T], plan) from hidden states, in eager mode: every strategy except whole_pairs."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call
    ) -> tuple[Tensor, planner.Plan]:
        with no_autocast(hidden.device):
            run = forward_tokens(call, hidden, weight, bias)
        logger.debug("%s", run.plan.describe())
        ctx.call, ctx.strategy, ctx.used = call, run.plan.strategy, False
        # Labels and reference are saved so that autograd raises if they are modified before the backward pass.
        ctx.save_for_backward(hidden, weight, bias, call.labels, *call.reference, run.table.all, run.tokens, *run.saved)
        ctx.set_materialize_grads(False)
        return run.table.all, run.plan

    @staticmethod
    def backward(ctx: Any, grad_tokens: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_tokens is None:
            return (None,) * 4
        saved = ctx.saved_tensors  # read once, because activation checkpointing allows only one read
        return without_graph(lambda: LinearLogps._gradients(ctx, grad_tokens, *saved), *saved[:3], grad_tokens)

    @staticmethod
    def _gradients(ctx: Any, grad_tokens: Tensor, *given: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, _, _, _, _, found, tokens, *saved = given
        call: Call = ctx.call
        grad_logps, divergences = upstream(call, grad_tokens, found)
        with no_autocast(hidden.device):
            if ctx.strategy == "frozen_head":
                scale = grad_logps.reshape(-1)[tokens].unsqueeze(-1)
                rows = saved[0] * scale.to(accumulator_dtype(saved[0].dtype))
                # A token with gradient 0 gets exactly 0, even if its row is infinite (0 * inf is NaN).
                rows = torch.where(scale == 0, torch.zeros_like(rows), rows)
                return scatter(hidden, tokens, rows), None, None, None
            into = main_grad(weight) if call.needs.weight else None
            kept = None
            if ctx.strategy == "kept_logits" and not ctx.used:
                # dz overwrites the kept logits, so a second backward pass of the same graph projects again. Writing through
                # `.data` does not raise the version counter, so autograd accepts the second read of the saved tensors.
                kept, ctx.used = saved[0].data, True
            if ctx.strategy == "filtered":
                lists = filtered.Kept(*saved)
                grad_hidden, gradient = _backward_filtered(call, hidden, weight, tokens, lists, grad_logps, into)
            else:
                grad_hidden, gradient = backward_tokens(
                    call,
                    hidden,
                    weight,
                    bias,
                    found,
                    grad_logps,
                    tokens=tokens,
                    divergences=divergences,
                    kept_logits=kept,
                    order=saved if call.fused else (),
                    into=into,
                )
        grad_bias = None if gradient.bias is None or bias is None else gradient.bias.to(bias.dtype)
        return grad_hidden, take_weight(gradient, weight, into), grad_bias, None
