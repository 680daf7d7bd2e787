"""A scalar loss of whole pairs whose gradients are computed in the forward, so that no token is projected twice.

When the logits of a whole pair are in memory, its sums, and so the loss's derivative by each sum, are known.

On a GPU, where all pairs' logits fit into the budget at once, they wait for the backward instead, as kept_logits has it. The
upstream gradient then joins the coefficients, and no pass over dW scales it: at H = 4,096 and V = 128k scaling and casting a
float32 dW would move 7.4 GB. A CPU looks whether the upstream gradient is 1; a GPU would have to wait to know.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import objectives, ops, planner
from ..backends.eager import small_dtype
from ..memory import fresh
from ..objectives import Objective, Pairs
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
)
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
        owner = torch.arange(sequences, device=labels.device).unsqueeze(-1).expand_as(labels).reshape(-1)
    else:
        ops._check_cu_seqlens(pair.cu_seqlens, labels.shape[1])
        owner = ops.owners(pair.cu_seqlens, labels.shape[1])
    return torch.where((labels.reshape(-1) != call.ignore_index) & (owner >= 0), owner, sequences)


@dataclass(frozen=True)
class _Scored:
    """The scored tokens, sequence by sequence.

    Attributes:
        tokens: [N], flat indices.
        edges: [2P + 1] where each sequence's tokens begin and the last one's end.
        bounds: the same on the host.
    """

    tokens: Tensor
    edges: Tensor
    bounds: list[int]

    @classmethod
    def of(cls, call: Call, pair: PairCall) -> _Scored:
        """Reads the number of scored tokens of each sequence: the call's one wait for a GPU's stream."""
        owner, order = _owners(call, pair).sort(stable=True)
        sequences = torch.arange(2 * pair.beta.shape[0] + 1, device=owner.device)
        edges = torch.searchsorted(owner, sequences)
        bounds = edges.tolist()
        return cls(order[: bounds[-1]], edges, bounds)

    def counts(self) -> list[int]:
        """Scored tokens of each sequence, [2P]."""
        return [end - begin for begin, end in pairwise(self.bounds)]

    def _sides(self, group: planner.Group) -> list[slice]:
        pairs = len(self.bounds) // 2
        return [slice(group.first + side, group.last + side) for side in (0, pairs)]

    def tokens_of(self, groups: Sequence[planner.Group]) -> Tensor:
        """The tokens, each group's in one run: its chosen sequences, then its rejected ones."""
        if len(groups) < 2:
            return self.tokens
        sides = [side for group in groups for side in self._sides(group)]
        return torch.cat([self.tokens[self.bounds[side.start] : self.bounds[side.stop]] for side in sides])

    def cu_seqlens_of(self, group: planner.Group) -> Tensor:
        """[2p + 1] int64, where the sequences of a group of p pairs begin in its run of tokens. Made on the device."""
        chosen, rejected = self._sides(group)
        if chosen.stop == rejected.start:
            return self.edges
        before = self.bounds[chosen.start]
        between = self.bounds[rejected.start] - self.bounds[chosen.stop]
        first = self.edges[chosen.start : chosen.stop + 1] - before
        return torch.cat([first, self.edges[rejected.start + 1 : rejected.stop + 1] - (before + between)])


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
    cu_seqlens: Tensor,
) -> _GroupLoss:
    """The loss of a group whose compacted tokens are given: `found` are stage 1's results [n] by name."""
    stages = call.stages
    mine = slice(group.first, group.last)
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
    tokens: Tensor
    logits: Tensor | None
    grad_hidden: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None


def _waits(call: Call, plan: planner.Plan) -> bool:
    """Whether the logits wait for the backward: on a GPU, all of them in one buffer."""
    chunks = sum(len(group.chunks) for group in plan.groups)
    return call.labels.device.type == "cuda" and chunks == 1 and not (call.fused or call.kl_gradient)


def _plan(call: Call, pair: PairCall, hidden: Tensor, weight: Tensor, counts: list[int]) -> planner.Plan:
    head = call.sizes(hidden.shape[-1], weight.shape[0])

    def plan_for(budget: int) -> planner.Plan:
        plan = planner.plan_pairs(head, counts, budget, call.reason)
        return replace(plan, reason=f"{plan.reason}; they wait for the backward") if _waits(call, plan) else plan

    def beside(plan: planner.Plan) -> int:
        dtype = gradient_dtype(call, weight, 1 if _waits(call, plan) else 2)
        return call.needs_weight * weight.numel() * dtype.itemsize

    return fitting(plan_for, call, head.row_bytes, beside)


def _run_pairs(call: Call, pair: PairCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> _PairResult:
    """Loss and gradients of whole pairs, a group of pairs at a time, each token projected once if its pair fits.

    Where the logits wait for the backward there are no gradients yet.
    """
    vocab, hidden_size = weight.shape
    check_all_labels(call, vocab)
    pairs = pair.beta.shape[0]
    scored = _Scored.of(call, pair)
    plan = _plan(call, pair, hidden, weight, scored.counts())
    order_of_tokens = scored.tokens_of(plan.groups)
    waits = _waits(call, plan)

    device = hidden.device
    table = TokenTable(call)
    losses = torch.empty(pairs, dtype=small_dtype(device), device=device)
    sums, ref_sums, coef, kl_coef = (torch.zeros(2, pairs, dtype=losses.dtype, device=device) for _ in range(4))
    gradient: HeadGradient | None = None
    grad_hidden: Tensor | None = None
    if not waits:
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
        cu_seqlens = scored.cu_seqlens_of(group)
        done = _group_loss(call, pair, group, found, flat_weights[mine], cu_seqlens)
        span = slice(group.first, group.last)
        losses[span] = done.losses
        for target, value in ((sums, done.sums), (ref_sums, done.ref_sums), (coef, done.coef), (kl_coef, done.kl_coef)):
            if value is not None:
                target[:, span] = value.view(2, -1)
        if begin == end or gradient is None:
            continue
        local = cu_seqlens.diff()

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
    sums, ref_sums, coef, kl_coef = (vector.view(-1) for vector in (sums, ref_sums, coef, kl_coef))
    logits = projection.buffer if waits else None
    result = _PairResult(table, plan, losses, sums, ref_sums, coef, kl_coef, order_of_tokens, logits)
    if gradient is not None:
        gradient.finish()
        result.grad_hidden, result.grad_weight, result.grad_bias = grad_hidden, gradient.weight, gradient.bias
    return result


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
            done.tokens,
            done.logits,
            done.grad_hidden,
            done.grad_weight,
            done.grad_bias,
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
        hidden, weight, bias, logps, lse, ref_logps, kl, coef, kl_coef, tokens, logits, *gradients = ctx.saved_tensors
        grad_hidden, grad_weight, grad_bias = gradients
        call: Call = ctx.call
        pair: PairCall = ctx.pair
        into = main_grad(weight) if call.needs_weight else None
        if ctx.handed_over or logits is not None:
            # The first backward gave the gradients away, or wrote dz over the logits that waited; a retained graph computes them
            # anew. `.data` keeps the version counter, so that autograd does not take this for a caller's mistake.
            kept = None if logits is None or ctx.handed_over else logits.data
            ctx.handed_over = True
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
                    call,
                    hidden,
                    weight,
                    bias,
                    logps,
                    lse,
                    spread,
                    tokens=None if hidden.device.type == "cpu" else tokens,
                    divergences=divergences,
                    kept_logits=kept,
                    into=into,
                )
            bias_out = None if gradient.bias is None or bias is None else gradient.bias.to(bias.dtype)
            return grad_hidden, take_weight(gradient, weight, into), bias_out, None, None
        ctx.handed_over = True
        # On the CPU a factor of 1, the usual one, saves a pass over dW; elsewhere looking would stall the stream.
        on_cpu = grad_loss.device.type == "cpu"
        unit = on_cpu and float(grad_loss) == 1.0

        def scaled(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if gradient is None:
                return None
            # `.data`: memory that leaves this graph gets a version counter of its own.
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
        )
