"""Chunks whose products are the fused Triton kernels': logits only on chip, and gradients without the softmax's empty blocks.

What `chunk.Projection` is for the library's products. Whole pairs store a chunk's logits, rounded to the compute dtype, since
their gradient follows at once (`stores`); everything else projects again. Policy and reference always take the same kernels,
so that equal models give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import backends
from ..stages import STATISTICS
from .call import Call, KLGradients
from .chunk import HeadGradient, gather


class FusedProjection:
    """A call's heads in the compute dtype, the order of the vocabulary, and a chunk's way there and back."""

    def __init__(self, call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        def narrow(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(call.compute_dtype).contiguous()

        kernels = backends.load("triton", hidden.device.type)
        self.logps, self.grad = kernels.linear_logps, kernels.linear_grad
        self.call = call
        self.hidden = hidden
        self.labels = call.labels.reshape(-1)
        weight = weight.to(call.compute_dtype).contiguous()
        self.head = self.grad.HeadCall(
            weight, narrow(bias), None, call.transform.scale, call.transform.softcap, call.eps
        )
        self.ref_weight, self.ref_bias = narrow(call.reference.weight), narrow(call.reference.bias)
        self.stores = call.strategy == "whole_pairs"
        self.names = frozenset(STATISTICS) & frozenset(call.rows) - {"kl"}
        shape = (rows, self.grad.padded(weight.shape[0], call.compute_dtype))
        self.buffer = torch.empty(shape, dtype=call.compute_dtype, device=hidden.device)
        self.dropped = torch.empty(0)
        self._mean_row: Tensor | None = None
        self._tail: Tensor | None = None

    def rows(self, tokens: Tensor) -> Tensor:
        """The tokens' hidden states, [c, H] contiguous in the compute dtype."""
        return gather(self.hidden, tokens, self.call.compute_dtype).contiguous()

    def sort(self, total: Tensor, count: int) -> None:
        """Order the vocabulary by the mean logit of `count` tokens whose hidden states add up to `total` [H] float32."""
        order = self.grad.order_by_mean_logit(
            self.head.weight, self.head.bias, total / max(count, 1), self.call.transform.scale
        )
        self.head = replace(self.head, order=order)

    def sort_by(self, tokens: Tensor, chunks: list[tuple[int, int]]) -> None:
        """`sort` by these tokens."""
        total = torch.zeros(self.hidden.shape[-1], dtype=torch.float32, device=self.hidden.device)
        for begin, end in chunks:
            total += self.rows(tokens[begin:end]).sum(0, dtype=torch.float32)
        self.sort(total, tokens.shape[0])

    def take_order(self, order: Sequence[Tensor], tokens: Tensor, chunks: list[tuple[int, int]]) -> None:
        """The forward's order, as it was saved; found again where it was not (a second backward of whole pairs)."""
        if order:
            self.head = replace(self.head, order=self.grad.Order(*order))
        else:
            self.sort_by(tokens, chunks)

    def _logps(self, rows: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, names: frozenset[str]) -> dict:
        stored = self.buffer[: rows.shape[0]] if self.stores else None
        return self.logps(
            rows,
            weight,
            bias,
            self.labels[tokens],
            names,
            logit_scale=self.call.transform.scale,
            logit_softcap=self.call.transform.softcap,
            order=self.head.order if self.stores else None,
            logits=stored,
            wide=not (self.names or self.stores),
        )

    def measure(self, tokens: Tensor, rows: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """(logits of the policy where they are stored, stage 1's results [c] by name) of a chunk."""
        ref_logps = None
        if self.call.reference.hidden is not None:
            assert self.ref_weight is not None
            ref_rows = gather(self.call.reference.hidden, tokens, self.call.compute_dtype).contiguous()
            ref_logps = self._logps(ref_rows, self.ref_weight, self.ref_bias, tokens, frozenset())["logps"]
        found = self._logps(rows, self.head.weight, self.head.bias, tokens, self.names)
        if ref_logps is not None:
            found["ref_logps"] = ref_logps
        return (self.buffer[: rows.shape[0]] if self.stores else None), found

    def project(self, rows: Tensor, tokens: Tensor) -> Tensor | None:
        """A chunk's logits again, where they are stored; the gradient's kernel projects by itself where they are not."""
        if not self.stores:
            return None
        self._logps(rows, self.head.weight, self.head.bias, tokens, frozenset())
        return self.buffer[: rows.shape[0]]

    def dropped_mass(self, tokens: Tensor, rows: Tensor, softmax: Sequence[Tensor]) -> Tensor:
        """Probability [c] in the blocks that the backward will leave out. Costs a projection."""
        return self.grad.logits_block_grad(self.head, rows, self.labels[tokens], *softmax, None).dropped

    def pull_back(
        self,
        logits: Tensor | None,
        tokens: Tensor,
        rows: Tensor,
        softmax: Sequence[Tensor],
        grad_logps: Tensor,
        gradient: HeadGradient,
        *,
        divergences: KLGradients | None = None,
        last: bool,
    ) -> Tensor | None:
        """As `chunk.Projection.pull_back`; `last` says that no other chunk follows, so that the dropped mass joins dW."""
        assert divergences is None
        grad = grad_logps.double()
        found = self.grad.logits_block_grad(
            self.head, rows, self.labels[tokens], *softmax, grad, logits=logits, out=self.buffer[: rows.shape[0]]
        )
        self.dropped = found.dropped
        if gradient.weight is not None:
            tail = self.grad.tail_of(self.head, found, grad, rows)
            self._tail = tail if self._tail is None else self._tail + tail
            self.grad.weight_grad(
                self.head,
                found,
                rows,
                gradient.weight,
                accumulate=gradient.started,
                tail_row=self._tail if last else None,
            )
        if gradient.bias is not None:
            back = torch.where(grad == 0, 0.0, grad * found.tail).sum() / gradient.bias.shape[0]
            gradient.bias += self.grad.bias_grad(self.head, found) - back.float()
        gradient.started = True
        if not self.call.needs.hidden:
            return None
        if self._mean_row is None:
            self._mean_row = self.head.weight.mean(0, dtype=torch.float32)
        return self.grad.hidden_grad(self.head, found, grad, self._mean_row)
