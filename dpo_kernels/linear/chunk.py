"""A chunk of tokens: its logits from the hidden states, stages 1 and 3, and its part of the gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import filtered
from ..memory import available, fresh
from ..stages import STATISTICS, TokenKL, check_labels, small_dtype, token_rows
from . import planner
from .call import Call, KLGradients
from .gpu import row_stride
from .products import multiply


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    # door.py has chosen the dtype of the products, and autocast must not change it.
    return torch.autocast(device.type, enabled=False)


def gather(values: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [c, H] of a [B, T, H] tensor by flat token index, contiguous; a strided view is not copied as a whole."""
    width = values.shape[1]
    if values.is_contiguous():
        rows = values.view(-1, values.shape[-1])[tokens]
    else:
        rows = values[0, tokens] if values.shape[0] == 1 else values[tokens // width, tokens % width]
    return rows.to(dtype)


def fitting(
    plan_for: Callable[[int], planner.Plan],
    call: Call,
    row_bytes: int,
    beside: Callable[[planner.Plan], int] = lambda _: 0,
) -> planner.Plan:
    """The plan for the call's budget, or for a smaller one if the device has too little memory available.

    Args:
        plan_for: returns the plan for a budget in bytes.
        call: the call.
        row_bytes: bytes per token of a chunk. A plan below two rows is not reduced; its allocation then raises.
        beside: returns the bytes of the head's gradient, which is allocated as well.
    """
    plan = plan_for(call.budget)
    while plan.bytes >= 2 * row_bytes and not available(call.labels.device, plan.bytes, beside(plan)):
        plan = plan_for(plan.bytes // 2)
        said = "the device has no room for the budget"
        plan = plan if said in plan.reason else replace(plan, reason=f"{plan.reason}; {said}")
    return plan


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype in which dW and dbias are accumulated: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_dtype(call: Call, weight: Tensor, chunks: int) -> torch.dtype:
    """dtype in which dW is computed if it is not added to an existing buffer.

    On a GPU a product of 16-bit matrices is accumulated in float32 and rounded once. If there is only one chunk, dW is computed
    in the weight's 16-bit dtype, which saves writing and reading a float32 gradient of twice the size.
    """
    direct = chunks == 1 and weight.dtype == call.compute_dtype and weight.device.type == "cuda" and not call.fused
    return weight.dtype if direct else accumulator_dtype(call.compute_dtype)


class HeadGradient:
    """dW [V, H] and dbias [V], accumulated over chunks; the caller casts them once.

    `into` is a float32 buffer to which dW is added (Megatron's `main_grad`). Without it the first chunk's product initializes
    new memory, so no page is written twice. `dtype` is that of dW, by default that of the accumulation.
    """

    def __init__(
        self,
        call: Call,
        vocab: int,
        hidden_size: int,
        into: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        device = call.labels.device
        self.backend = call.backend
        self.dtype = accumulator_dtype(call.compute_dtype)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.started = into is not None
        if call.needs.weight:
            self.weight = fresh((vocab, hidden_size), dtype or self.dtype, device) if into is None else into
        if call.needs.bias:
            self.bias = torch.zeros(vocab, dtype=self.dtype, device=device)

    def add(self, dz: Tensor, rows: Tensor) -> None:
        """Add dz^T rows to dW, and the column sums of dz to dbias."""
        if self.bias is not None:
            self.bias += dz.sum(0, dtype=self.dtype)
        if self.weight is None:
            return
        multiply(self.backend, dz.t(), rows, self.weight, add=self.started)
        self.started = True

    def finish(self) -> None:
        """Set dW to 0 if there was no chunk."""
        if self.weight is not None and not self.started:
            self.weight.zero_()


class Projection:
    """The logits buffer, the heads in the compute dtype, and stages 1 and 3 of a chunk."""

    def __init__(self, call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self.call = call
        # The backend is loaded here, because `multiply` queries it and a call without scored tokens runs no stage that loads it.
        self.stages = call.stages
        self.hidden = hidden
        self.weight = weight.to(call.compute_dtype)
        self.bias = None if bias is None else bias.to(call.compute_dtype)
        _, ref_weight, ref_bias = call.reference
        self.ref_weight = None if ref_weight is None else ref_weight.to(call.compute_dtype)
        self.ref_bias = None if ref_bias is None else ref_bias.to(call.compute_dtype)
        self.side_by_side = call.sizes.projects_reference and call.sizes.kl
        vocab = weight.shape[0]
        self.buffer = logits_buffer(rows, vocab, call.compute_dtype, hidden.device)
        self.ref_buffer = self.buffer
        if self.side_by_side:
            self.ref_buffer = logits_buffer(rows, vocab, call.compute_dtype, hidden.device)
        self.labels = call.labels.reshape(-1)

    def rows(self, tokens: Tensor) -> Tensor:
        """The hidden states of the tokens, [c, H] in the compute dtype."""
        return gather(self.hidden, tokens, self.call.compute_dtype)

    def project(self, rows: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Compute the policy's logits [c, V] into the buffer."""
        return self._project(rows, self.weight, self.bias, self.buffer)

    def project_reference(self, tokens: Tensor) -> Tensor:
        """Compute the reference's logits [c, V] into its buffer."""
        assert self.call.reference.hidden is not None
        assert self.ref_weight is not None
        ref_rows = gather(self.call.reference.hidden, tokens, self.call.compute_dtype)
        return self._project(ref_rows, self.ref_weight, self.ref_bias, self.ref_buffer)

    def _project(self, rows: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
        return multiply(self.call.backend, rows, weight.t(), buffer[: rows.shape[0]], bias=bias)

    def measure(self, tokens: Tensor, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(the policy's logits [c, V], results of stage 1 by name, [c] each) of a chunk."""
        call = self.call
        ref_logits, ref_logps = None, None
        if call.reference.hidden is not None:
            ref_logits = self.project_reference(tokens)
            if not self.side_by_side:
                # Only a KL needs both models' logits at once. Without it, one buffer is used for both, one after the other.
                ref_logps = self._stage_1(ref_logits, tokens, None)["logps"]
                ref_logits = None
        logits = self.project(rows)
        names = tuple(name for name in STATISTICS if name in call.rows)
        found = self._stage_1(logits, tokens, ref_logits, names)
        if ref_logps is not None:
            found["ref_logps"] = ref_logps
        if "forward_kl" in call.terms:
            assert ref_logits is not None
            found["forward_kl"] = self._stage_1(ref_logits, tokens, logits, ("kl",))["kl"]
        return logits, found

    def _stage_1(
        self, logits: Tensor, tokens: Tensor, ref_logits: Tensor | None, statistics: tuple[str, ...] = ()
    ) -> dict[str, Tensor]:
        ref_logits = None if ref_logits is None else ref_logits.unsqueeze(0)
        labels = self.labels[tokens].unsqueeze(0)
        found = self.stages.token_logps(logits.unsqueeze(0), labels, ref_logits, self.call.transform, statistics)
        return dict(zip(token_rows(ref_logits is not None, statistics), found[:, 0].unbind(0), strict=True))

    def differentiate(
        self,
        logits: Tensor,
        tokens: Tensor,
        softmax: Sequence[Tensor],
        grad_logps: Tensor,
        divergences: KLGradients | None = None,
    ) -> Tensor:
        """Overwrite `logits` with dz [c, V].

        `softmax` is the result of `softmax_of`; the other tensors are [c]. With `divergences`, the buffer of the reference, if
        there is one, must hold its logits.
        """
        call = self.call

        token_kl = None
        if divergences is not None:
            ref_logits = self.ref_buffer[: logits.shape[0]]
            if call.reference.hidden is None:  # the divergence from a uniform distribution
                ref_logits = logits.new_zeros(logits.shape[1]).expand(logits.shape)
            ref_logits = ref_logits.unsqueeze(0)
            small = (None if values is None else _row(values) for values in divergences)
            token_kl = TokenKL(ref_logits, *small)  # type: ignore[arg-type]
        labels, every = self.labels[tokens].unsqueeze(0), logits.unsqueeze(0)
        logps, top, log_sum = map(_row, softmax)
        grad = _row(grad_logps)
        self.stages.logits_grad(every, labels, logps, top, log_sum, grad, call.transform, every, token_kl)
        return logits

    def keep(self, logits: Tensor, tokens: Tensor, found: dict[str, Tensor]) -> filtered.Kept | None:
        """The entries of a chunk above `eps`; None if they are too many. Adds the dropped mass to `found` if it is needed."""
        call = self.call
        result = filtered.keep(
            logits,
            self.labels[tokens],
            *(row.contiguous() for row in softmax_of(found)),
            eps=call.eps,
            logit_scale=call.transform.scale,
            logit_softcap=call.transform.softcap,
        )
        if result is None:
            return None
        kept, dropped = result
        if "grad_dropped_mass" in call.statistics:
            found["grad_dropped_mass"] = dropped
        return kept

    def hidden_gradient(self, dz: Tensor) -> Tensor:
        """Rows of dH [c, H] of a chunk, in the compute dtype."""
        out = torch.empty(dz.shape[0], self.weight.shape[1], dtype=dz.dtype, device=dz.device)
        return multiply(self.call.backend, dz, self.weight, out)

    def pull_back(
        self,
        logits: Tensor,
        tokens: Tensor,
        rows: Tensor,
        softmax: Sequence[Tensor],
        grad_logps: Tensor,
        gradient: HeadGradient,
        *,
        divergences: KLGradients | None = None,
        last: bool = False,
    ) -> Tensor | None:
        """Rows of dH [c, H] of a chunk, or None if not needed; adds the chunk's part of the head's gradient to `gradient`."""
        dz = self.differentiate(logits, tokens, softmax, grad_logps, divergences)
        grad_hidden = self.hidden_gradient(dz) if self.call.needs.hidden else None
        gradient.add(dz, rows)
        return grad_hidden


def softmax_of(found: dict[str, Tensor]) -> list[Tensor]:
    """The rows of stage 1 from which stage 3 computes the probabilities."""
    return [found[name] for name in ("logps", "max", "log_sum")]


def _row(values: Tensor) -> Tensor:
    """[c] as a batch [1, c] of one row."""
    return values.unsqueeze(0).contiguous()


def logits_buffer(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized [rows, V] logits with the stride `row_stride`."""
    stride = row_stride(vocab, dtype.itemsize, device.type)
    return fresh((rows, stride), dtype, device)[:, :vocab]


def scatter(like: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """A tensor [B, T, H] with `rows` at the tokens and 0 elsewhere."""
    full = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    full.view(-1, like.shape[-1])[tokens] = rows.to(like.dtype)
    return full


class TokenTable:
    """Per-token results, filled chunk by chunk: `all` [R, B, T], and its rows by name in `rows`; 0 on unscored tokens."""

    def __init__(self, names: tuple[str, ...], labels: Tensor) -> None:
        shape = (len(names), *labels.shape)
        self.all = torch.zeros(shape, dtype=small_dtype(labels.device), device=labels.device)
        self.rows = dict(zip(names, self.all.unbind(0), strict=True))

    def put(self, tokens: Tensor, found: dict[str, Tensor]) -> None:
        """Store the results of a chunk. If it has all rows, one assignment stores them, which is one kernel launch on a GPU."""
        if self.rows.keys() <= found.keys():
            self.all.flatten(1)[:, tokens] = torch.stack([found[name] for name in self.rows])
            return
        for name in self.rows.keys() & found.keys():
            self.rows[name].view(-1)[tokens] = found[name]


def scored(call: Call) -> Tensor:
    """Flat indices of the scored tokens, [N]."""
    return (call.labels.reshape(-1) != call.transform.ignore_index).nonzero().squeeze(-1)


def check_all_labels(call: Call, vocab: int) -> None:
    # Labels are checked before they are cut into chunks, because the error names the caller's row and position. On accelerators
    # they are not checked here; their results become NaN.
    if call.labels.device.type == "cpu":
        check_labels(call.labels, vocab, call.transform.ignore_index)


def main_grad(weight: Tensor) -> Tensor | None:
    """The float32 buffer `weight.main_grad` (Megatron's convention) if it has the weight's shape, else None."""
    buffer = getattr(weight, "main_grad", None)
    fits = (
        isinstance(buffer, Tensor)
        and buffer.dtype == torch.float32
        and buffer.shape == weight.shape
        and buffer.is_contiguous()
    )
    return buffer if fits and weight.dtype != torch.float64 else None
