"""Chunks on the fused Triton kernels: logits stay on chip, and blocks of negligible probability are skipped in the gradient.

`FusedProjection` has the interface of `chunk.Projection`, which uses the library's products. The whole_pairs strategy stores a
chunk's logits, rounded to the compute dtype, because their gradient follows at once (`stores`); the others compute the logits
again. Policy and reference always use the same kernels, so equal models give bitwise equal log-probabilities.
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
    """The heads of a call in the compute dtype, the order of the vocabulary, and forward and backward pass of a chunk."""

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
        """The hidden states of the tokens, [c, H] contiguous in the compute dtype."""
        return gather(self.hidden, tokens, self.call.compute_dtype).contiguous()

    def sort(self, total: Tensor, count: int) -> None:
        """Order the vocabulary by the mean logit of `count` tokens; `total` [H] float32 is the sum of their hidden states."""
        order = self.grad.order_by_mean_logit(
            self.head.weight, self.head.bias, total / max(count, 1), self.call.transform.scale
        )
        self.head = replace(self.head, order=order)

    def sort_by(self, tokens: Tensor, chunks: list[tuple[int, int]]) -> None:
        """Order the vocabulary by the mean logit of these tokens."""
        total = torch.zeros(self.hidden.shape[-1], dtype=torch.float32, device=self.hidden.device)
        for begin, end in chunks:
            total += self.rows(tokens[begin:end]).sum(0, dtype=torch.float32)
        self.sort(total, tokens.shape[0])

    def take_order(self, order: Sequence[Tensor], tokens: Tensor, chunks: list[tuple[int, int]]) -> None:
        """Use the order saved by the forward pass; if none was saved (second backward of whole pairs), compute it again."""
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
        """(the policy's logits or None if they are not stored, results of stage 1 by name, [c] each) of a chunk."""
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
        """The logits of a chunk, computed again; None if logits are not stored, because the gradient kernel computes them."""
        if not self.stores:
            return None
        self._logps(rows, self.head.weight, self.head.bias, tokens, frozenset())
        return self.buffer[: rows.shape[0]]

    def dropped_mass(self, tokens: Tensor, rows: Tensor, softmax: Sequence[Tensor]) -> Tensor:
        """Probability mass [c] of the blocks that the backward pass will skip. Costs a projection."""
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
        """As `chunk.Projection.pull_back`; `last` marks the last chunk, with which the dropped mass is added to dW."""
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
