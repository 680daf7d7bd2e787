"""A scalar loss of whole pairs whose gradients are computed in the forward, so that no token is projected twice.

When the logits of a whole pair are in memory, its sums, and so the loss's derivative by each sum, are known.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import objectives, ops, planner
from ..backends.eager import small_dtype
from ..objectives import Objective, Pairs
from .call import Call, KLGradients
from .chunk import HeadGradient, Projection, TokenTable, check_all_labels, main_grad, no_autocast
from .fused import FusedProjection
from .tokens import backward_tokens, take_weight

logger = logging.getLogger(__name__)


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
    table: TokenTable
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
    check_all_labels(call, vocab)
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
    table = TokenTable(call)
    losses = torch.empty(pairs, dtype=small_dtype(device), device=device)
    sums, ref_sums, coef, kl_coef = (torch.zeros(2, pairs, dtype=losses.dtype, device=device) for _ in range(4))
    gradient = HeadGradient(call, vocab, hidden_size)
    grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=device) if call.needs_hidden else None
    projection: Any
    if call.fused:
        projection = FusedProjection(call, hidden, weight, bias, plan.rows)
        projection.sort_by(order_of_tokens, [chunk for group in plan.groups for chunk in group.chunks])
    else:
        projection = Projection(call, hidden, weight, bias, plan.rows)
    filled = [group for group in plan.groups if group.bounds[-1] > group.bounds[0]]
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
                logits = projection.project(rows, chunk)
                if divergences is not None:
                    projection.project_reference(chunk)
            by_kl_part = None if divergences is None else divergences.at(local_part)
            assert rows is not None
            rows_grad = projection.pull_back(
                logits,
                chunk,
                rows,
                logps[local_part],
                lse[local_part],
                grad_logps[local_part],
                gradient,
                divergences=by_kl_part,
                last=group is filled[-1] and number == 0,
            )
            if grad_hidden is not None:
                grad_hidden.view(-1, hidden_size)[chunk] = rows_grad.to(hidden.dtype)
            if call.fused and "grad_dropped_mass" in call.statistics:
                table.put(chunk, {"grad_dropped_mass": projection.dropped})
    gradient.finish()
    sums, ref_sums, coef, kl_coef = (vector.view(-1) for vector in (sums, ref_sums, coef, kl_coef))
    return _PairResult(table, plan, losses, sums, ref_sums, coef, kl_coef, grad_hidden, gradient)


class WholePairs(torch.autograd.Function):
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
        with no_autocast(hidden.device):
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
            with no_autocast(hidden.device):
                grad_hidden, gradient = backward_tokens(
                    call, hidden, weight, bias, logps, lse, spread, divergences=divergences, into=into
                )
            bias_out = None if gradient.bias is None or bias is None else gradient.bias.to(bias.dtype)
            return grad_hidden, take_weight(gradient, weight, into), bias_out, None, None
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
