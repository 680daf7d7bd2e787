"""The filtered gradient: matrix products over the softmax entries that exceed eps, instead of over all entries.

In a trained model most entries of a softmax row are nearly 0. Only entries with p > eps are saved, which takes a few KB per
token and replaces the logits in the backward pass. The dropped probability mass r_t is replaced by a uniform tail, so the
gradient of each row still sums to 0:

    dH_t = g_t (sum_kept d_tv W_v - r_t mean(W))        dW_v = sum_t g_t d_tv h_t - (1 / V) sum_t g_t r_t h_t

    |dH_t - exact| <= |g_t| r_t max_v |W_v - mean(W)|

The CPU kernels are in csrc/cpu/filtered_grad.cpp. Source of the filtering: Wijmans et al. 2024, Cut Your Losses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._build import NAMESPACE

_kernels = getattr(torch.ops, f"{NAMESPACE}_cpu")

#: Largest share of kept entries. Above it the dense products are faster, and the lists would take V bytes per token.
DENSEST = 1 / 8
_ROWS = 4096


@dataclass(frozen=True)
class Kept:
    """The kept entries of n tokens. Those of token t are [row_ptr[t] : row_ptr[t + 1]] of index and value.

    Attributes:
        index: int32, vocabulary indices, ascending within a token.
        value: (onehot - p) dz/dx of each entry.
        row_ptr: [n + 1] int64.
        tail: [n] float64, the sum of p dz/dx over the dropped entries.
    """

    index: Tensor
    value: Tensor
    row_ptr: Tensor
    tail: Tensor

    @classmethod
    def join(cls, parts: list[Kept], like: Tensor) -> Kept:
        """The entries of consecutive chunks, concatenated; `like` gives the dtype of the logits if there is no chunk."""
        if len(parts) == 1:
            return parts[0]
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        pointers = [torch.zeros(1, dtype=torch.int64)]
        for part in parts:
            pointers.append(part.row_ptr[1:] + pointers[-1][-1])
        return cls(
            torch.cat([torch.empty(0, dtype=torch.int32), *(part.index for part in parts)]),
            torch.cat([torch.empty(0, dtype=wide), *(part.value for part in parts)]),
            torch.cat(pointers),
            torch.cat([torch.empty(0, dtype=torch.float64), *(part.tail for part in parts)]),
        )


def keep(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    top: Tensor,
    log_sum: Tensor,
    *,
    eps: float,
    logit_scale: float,
    logit_softcap: float,
) -> tuple[Kept, Tensor] | None:
    """(kept entries, dropped mass [n]) of a chunk's logits [n, V]; None if too many entries exceed eps."""
    rows, vocab = logits.shape
    row_ptr = torch.zeros(rows + 1, dtype=torch.int64)
    _kernels.filter_count(logits, labels, top, log_sum, eps, logit_scale, logit_softcap, row_ptr[1:])
    torch.cumsum(row_ptr[1:], 0, out=row_ptr[1:])
    total = int(row_ptr[-1])
    # Two entries per token are always allowed: otherwise tiny vocabularies would never be filtered.
    if total > max(DENSEST * vocab, 2.0) * rows:
        return None
    index = torch.empty(total, dtype=torch.int32)
    value = torch.empty(total, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    tail, dropped = torch.empty(2, rows, dtype=torch.float64)
    softmax = (logps, top, log_sum)
    _kernels.filter_fill(
        logits, labels, *softmax, eps, logit_scale, logit_softcap, row_ptr, index, value, tail, dropped
    )
    return Kept(index, value, row_ptr, tail), dropped


def _mean_row(weight: Tensor) -> Tensor:
    """Mean of the head's rows [H], float64. It goes block by block: a reduction to another dtype copies its whole input."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    for begin in range(0, weight.shape[0], _ROWS):
        total += weight[begin : begin + _ROWS].sum(0, dtype=wide)
    return total / weight.shape[0]


def grad_hidden(kept: Kept, grad: Tensor, weight: Tensor) -> Tensor:
    """Rows of dH [n, H] in float32 (float64 for float64 heads); grad [n] float64 is d loss / d log-probability."""
    weight = weight.contiguous()
    out = torch.empty(grad.shape[0], weight.shape[1], dtype=kept.value.dtype)
    _kernels.filtered_grad_hidden(
        kept.index, kept.value, kept.row_ptr, kept.tail, grad.contiguous(), weight, _mean_row(weight), out
    )
    return out


def grad_weight(kept: Kept, grad: Tensor, rows: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """Writes dW to out [V, H], or adds it; out has the dtype of kept.value, and rows [n, H] are the hidden states."""
    weighted = torch.where(grad == 0, 0.0, grad * kept.tail)
    tail_row = -(rows.to(kept.value.dtype).t() @ weighted.to(kept.value.dtype)).double() / out.shape[0]
    _kernels.filtered_grad_weight(
        kept.index, kept.value, kept.row_ptr, grad.contiguous(), rows.contiguous(), tail_row, accumulate, out
    )


def grad_bias(kept: Kept, grad: Tensor, vocab: int) -> Tensor:
    """dbias [V], float64."""
    each = grad.repeat_interleave(kept.row_ptr.diff(), output_size=kept.index.shape[0])
    found = torch.bincount(kept.index, weights=each * kept.value, minlength=vocab)
    return found - (grad * kept.tail).sum() / vocab
