"""The gradient of the LM head in Triton; softmax blocks of negligible probability are left out of the products.

Data flow of a chunk of n tokens (T = 128 tokens, E = 128 vocabulary entries, a block is [T, E]):

    logits_block_grad   recomputes the logits of a block on chip, from hidden states and head as in linear_logps, or reads the
                        logits that linear_logps has stored. A block is live if some p > eps or a label lies in it. Its dz
                        is then written once, rounded to the dtype of the hidden states. For other blocks only the dropped
                        probability mass is written, 4 bytes per token
    lists               the live blocks of each block row and of each block column, in order: small tensors [n / T, V / E]
    hidden_grad         dH [T, 128] += dz W over the live blocks of a block row
    weight_grad         dW [E, 128] += dz^T H over the live blocks of a block column, in float32; each entry is read and
                        written once, by one program

No two programs add to the same sum, so there are no atomic operations, and the order of additions is fixed.

Work: 2 N H V flops to recompute logits (0 if they were stored), and 4 N H V times the share of live blocks. The rows of the head
are processed in an `order` of descending mean logit, which concentrates likely entries in few block columns (measured in
docs/linear.md). The head is not copied: its rows are read through the permutation, which costs one read of the head and a sort of
V numbers per call.

The probability mass r_t of the blocks that are left out is replaced by a uniform tail over the vocabulary (filtered.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import FOLDED, INTERPRETED, LOG2E, SOFTCAPPED, exp2_fast, fused, rounded, tanh_accurate
from .launch import SMALL, Launch, round_to_float32, tile_of
from .linear_logps import Order, at_label_of, inner_of, label_entry, multiply, others_of, project_tile

#: Columns of H per program in the two products.
WIDTH = 32 if INTERPRETED.value else 128
#: dH is split into at most MOST_SPLITS partial sums if there are too few blocks for a GPU with about MULTIPROCESSORS.
MOST_SPLITS, MULTIPROCESSORS = 4, 132


@triton.jit(do_not_specialize=["rows", "vocab", "blocks"], do_not_specialize_on_alignment=SMALL)
def logits_block_grad_kernel(
    hidden,  # [N, H] contiguous
    weight,  # [V, H] contiguous
    bias,  # [V], or None
    order, places,  # [V] int32, or None
    labels,  # [N] int64
    origin, factor, at_label,  # [N] float32: the exponential's origin, -grad_logps dz/dx and grad_logps (1 - p) dz/dx
    logits,  # [N, pitch] stored logits, or None to recompute them; may be the same memory as dz
    dz,  # [N, pitch], or None to compute only the dropped mass
    live,  # [N / BLOCK_N, blocks] int8
    dropped, tail,  # [N, blocks] float32: sums of p and of p dz/dx / scale if not live; tail is None without a softcap
    rows, vocab, hidden_size, blocks,
    inner: tl.float32, log2_scale: tl.float32, eps: tl.float32,
    MAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    block_row = tl.program_id(0)
    block = tl.program_id(1)
    # A multiple of the block size, so rows of dz are 16-byte aligned.
    pitch = blocks * BLOCK_V
    first_row = block_row * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_N)
    inside = row < rows
    row = tl.minimum(row, rows - 1)
    first = block * BLOCK_V
    place = first + tl.arange(0, BLOCK_V)
    label = label_entry(labels, row, vocab)
    if order is not None:
        label = tl.where(label >= 0, tl.load(places + tl.maximum(label, 0)), -1)
    label = tl.where(inside, label, -1)
    cell = row.to(tl.int64)[:, None] * pitch + place[None, :]
    if logits is None:
        x = project_tile(
            hidden, weight, order, first_row, rows, first, vocab, hidden_size, BLOCK_N, BLOCK_V, BLOCK_H, EVEN
        )
        if bias is not None:
            entry = tl.minimum(place, vocab - 1)
            if order is not None:
                entry = tl.load(order + entry)
            x += tl.load(bias + entry).to(tl.float32)[None, :]
    else:
        x = tl.load(logits + cell).to(tl.float32)
    top = tl.load(origin + row, mask=inside, other=float("inf"))
    log2_sum = tl.load(origin + rows + row, mask=inside, other=0.0)
    if MAP == SOFTCAPPED:
        x, slope = tanh_accurate(x * inner)
    # After the last row `top` is infinite, so probabilities are 0.
    e = exp2_fast(fused(x - top[:, None], log2_scale, log2_sum[:, None]))
    others = others_of(e, place[None, :], label[:, None], vocab, 0.0)
    mass = tl.sum(others, 1)
    has_label = (label >= first) & (label < first + BLOCK_V)
    # A block with NaN must be live, so that NaN reaches the gradient; NaN > eps is false.
    row_alive = (tl.max(others, 1) > eps) | has_label | (mass != mass)
    # Counted by a histogram: for sm_100, Triton 3.6 and 3.7 do not compile a reduction over rows in the layout of a product in
    # tensor memory.
    counts = tl.histogram(row_alive.to(tl.int32), 32)
    alive = tl.sum(tl.where(tl.arange(0, 32) == 1, counts, 0), 0) > 0
    tl.store(live + block_row * blocks + block, alive.to(tl.int8))
    mark = row.to(tl.int64) * blocks + block
    tl.store(dropped + mark, tl.where(alive, 0.0, mass), mask=inside)
    if tail is not None:
        tl.store(tail + mark, tl.where(alive, 0.0, tl.sum(others * slope, 1)), mask=inside)
    if dz is not None:  # noqa: SIM102 (the first is the compiler's, the second the program's)
        if alive:
            by_p = tl.load(factor + row, mask=inside, other=0.0)
            own = tl.load(at_label + row, mask=inside, other=0.0)
            own_values = at_label_of(tl.broadcast_to(own[:, None], e.shape), place[None, :], label[:, None])
            values = others * by_p[:, None] + own_values
            if MAP == SOFTCAPPED:
                values *= slope
            values = tl.where(((by_p != 0) | (own != 0))[:, None], values, 0.0)
            tl.store(dz + cell, rounded(values, dz.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["rows", "vocab", "blocks"], do_not_specialize_on_alignment=SMALL)
def hidden_grad_kernel(
    dz,  # [N, pitch]
    weight,  # [V, H] contiguous
    order,  # [V] int32, or None
    lists, counts,  # [N / BLOCK_N, blocks] int32, [N / BLOCK_N] int32: the live blocks of each block row
    tail,  # [N] float32: grad_logps times the dropped mass
    mean_row,  # [H] float32, the mean of the head's rows
    out,  # [splits, N, H] float32
    rows, vocab, hidden_size, blocks,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    pitch = blocks * BLOCK_V
    block_row = tl.program_id(0)
    split = tl.program_id(2)
    row = block_row * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    k = tl.arange(0, STEP)
    STEPS: tl.constexpr = BLOCK_V // STEP
    steps = tl.load(counts + block_row) * STEPS
    each = tl.cdiv(steps, tl.num_programs(2))
    left = dz + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * pitch + k[None, :]
    width = tl.full((), hidden_size, tl.int64)
    total = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for step in range(split * each, tl.minimum((split + 1) * each, steps)):
        block = tl.load(lists + block_row * blocks + step // STEPS)
        first = block * BLOCK_V + step % STEPS * STEP
        a = tl.load(left + first)
        entry = tl.minimum(first + k, vocab - 1)
        if order is not None:
            entry = tl.load(order + entry)
        right = weight + entry[:, None] * width + column[None, :]
        if EVEN:
            b = tl.load(right)
        else:
            b = tl.load(right, mask=(column < hidden_size)[None, :], other=0.0)
        total = multiply(a, b, total)
    exists = column < hidden_size
    if split == 0:
        share = tl.load(tail + row, mask=inside, other=0.0)
        total -= share[:, None] * tl.load(mean_row + column, mask=exists, other=0.0)[None, :]
    target = out + (row + split * rows).to(tl.int64)[:, None] * hidden_size + column[None, :]
    tl.store(target, total, mask=inside[:, None] & exists[None, :])


@triton.jit(do_not_specialize=["rows", "vocab", "blocks", "block_rows"], do_not_specialize_on_alignment=SMALL)
def weight_grad_kernel(
    dz,  # [N, pitch]
    hidden,  # [N, H] contiguous
    order,  # [V] int32, or None
    lists, counts,  # [blocks, N / BLOCK_N] int32, [blocks] int32: the live blocks of each block column
    tail_row,  # [H] float32, to be added to every row of the head's gradient, or None
    out,  # [V, H] contiguous, float32
    rows, vocab, hidden_size, blocks, block_rows,
    ACCUMULATE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    pitch = blocks * BLOCK_V
    block = tl.program_id(1)
    place = block * BLOCK_V + tl.arange(0, BLOCK_V)
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    k = tl.arange(0, STEP)
    STEPS: tl.constexpr = BLOCK_N // STEP
    steps = tl.load(counts + block) * STEPS
    width = tl.full((), hidden_size, tl.int64)
    total = tl.zeros([BLOCK_V, WIDTH], tl.float32)
    for step in range(steps):
        row = tl.load(lists + block * block_rows + step // STEPS) * BLOCK_N + step % STEPS * STEP + k
        near = tl.minimum(row, rows - 1).to(tl.int64)[:, None]
        # Rows after the end are masked, because they were never written.
        a = tl.load(dz + near * pitch + place[None, :], mask=(row < rows)[:, None], other=0.0)
        right = hidden + near * width + column[None, :]
        if EVEN:
            b = tl.load(right)
        else:
            b = tl.load(right, mask=(column < hidden_size)[None, :], other=0.0)
        total = multiply(tl.trans(a), b, total)
    entry = tl.minimum(place, vocab - 1)
    if order is not None:
        entry = tl.load(order + entry)
    target = out + entry[:, None] * width + column[None, :]
    mask = (place < vocab)[:, None] & (column < hidden_size)[None, :]
    if tail_row is not None:
        total += tl.load(tail_row + column, mask=column < hidden_size, other=0.0)[None, :]
        steps += 1
    if ACCUMULATE:
        if steps > 0:
            tl.store(target, tl.load(target, mask=mask, other=0.0) + total, mask=mask)
    else:
        tl.store(target, total, mask=mask)


@triton.jit(do_not_specialize=["rows", "vocab", "blocks", "block_rows"], do_not_specialize_on_alignment=SMALL)
def bias_grad_kernel(
    dz,  # [N, pitch]
    order,  # [V] int32, or None
    lists, counts,  # as in weight_grad_kernel
    out,  # [V] float32
    rows, vocab, blocks, block_rows,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    pitch = blocks * BLOCK_V
    block = tl.program_id(0)
    place = block * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros([BLOCK_V], tl.float32)
    for step in range(tl.load(counts + block)):
        row = tl.load(lists + block * block_rows + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        cell = row.to(tl.int64)[:, None] * pitch + place[None, :]
        total += tl.sum(tl.load(dz + cell, mask=(row < rows)[:, None], other=0.0).to(tl.float32), 0)
    entry = tl.minimum(place, vocab - 1)
    if order is not None:
        entry = tl.load(order + entry)
    tl.store(out + entry, total, mask=place < vocab)


@dataclass(frozen=True)
class HeadCall:
    """The arguments that all chunks of a call share.

    Attributes:
        weight: [V, H] contiguous, of the hidden states' dtype.
        bias: [V] of the same dtype, or None.
        order: the processing order of the head's rows; None for their own order.
        logit_scale: scale of z = cap * tanh(scale * x / cap).
        logit_softcap: cap of the same formula; 0 for z = scale * x.
        eps: a block is left out if no probability in it exceeds eps and it contains no label.
    """

    weight: Tensor
    bias: Tensor | None
    order: Order | None
    logit_scale: float
    logit_softcap: float
    eps: float

    @property
    def mapping(self) -> tuple[int, float]:
        """(MAP, unit). No maximum is taken here, so a negative scale can be folded into the exponential's FFMA, too."""
        return (SOFTCAPPED.value, self.logit_softcap) if self.logit_softcap else (FOLDED.value, self.logit_scale)

    @property
    def permutation(self) -> tuple[Tensor | None, Tensor | None]:
        """(entries, places), or two None."""
        return (None, None) if self.order is None else (self.order.entries, self.order.places)


def order_by_mean_logit(weight: Tensor, bias: Tensor | None, mean_hidden: Tensor, scale: float) -> Order:
    """The order of descending mean logit; mean_hidden [H] float32 is the mean hidden state of the tokens."""
    keys = torch.mv(weight, mean_hidden.to(weight.dtype)).float()
    if bias is not None:
        keys = keys + bias.float()
    return Order.descending(keys if scale >= 0 else -keys)


def padded(vocab: int, dtype: torch.dtype) -> int:
    """Columns of dz: V rounded up to a multiple of the block size."""
    return triton.cdiv(vocab, tile_of(dtype).v) * tile_of(dtype).v


@dataclass(frozen=True)
class BlockGrad:
    """dz of a chunk's live blocks, and the mass of the blocks that are left out.

    Attributes:
        dz: [N, pitch] with columns in the call's order; only live blocks are initialized. None if only the mass was asked.
        live: [N / T, blocks] int8, 1 for live blocks.
        dropped: [N] float64, probability mass of the other blocks.
        tail: [N] float64, sum of p dz/dx over the other blocks.
    """

    dz: Tensor | None
    live: Tensor
    dropped: Tensor
    tail: Tensor

    def lists(self, axis: int) -> tuple[Tensor, Tensor]:
        """(block indices with the live ones first, number of live blocks), int32, per block row (axis 1) or column (axis 0)."""
        live = self.live if axis == 1 else self.live.t().contiguous()
        return live.argsort(dim=1, descending=True, stable=True).to(torch.int32), live.sum(1, dtype=torch.int32)


def logits_block_grad_launch(
    call: HeadCall,
    hidden: Tensor,
    labels: Tensor,
    rows_of: tuple[Tensor, Tensor, Tensor],
    logits: Tensor | None,
    dz: Tensor | None,
    live: Tensor,
    sums: tuple[Tensor, Tensor | None],
) -> Launch:
    """The kernel launch of `logits_block_grad`; rows_of is (origin, factor, at_label), sums is (dropped, tail)."""
    rows, hidden_size = hidden.shape
    tile = tile_of(hidden.dtype)
    mapping, unit = call.mapping
    entries, places = call.permutation
    dropped, tail = sums
    arguments = {
        "hidden": hidden,
        "weight": call.weight,
        "bias": call.bias,
        "order": entries,
        "places": places,
        "labels": labels,
        **dict(zip(("origin", "factor", "at_label"), rows_of, strict=True)),
        "logits": logits,
        "dz": dz,
        "live": live,
        "dropped": dropped,
        "tail": tail,
        "rows": rows,
        "vocab": call.weight.shape[0],
        "hidden_size": hidden_size,
        "blocks": live.shape[1],
        "inner": inner_of(call.logit_scale, call.logit_softcap),
        "log2_scale": round_to_float32(unit * LOG2E.value),
        "eps": call.eps,
        "MAP": mapping,
        "EVEN": hidden_size % tile.h == 0,
        **tile.blocks(),
    }
    return Launch(logits_block_grad_kernel, tuple(live.shape), arguments, tile.options)


def logits_block_grad(
    call: HeadCall,
    hidden: Tensor,
    labels: Tensor,
    logps: Tensor,
    top: Tensor,
    log_sum: Tensor,
    grad_logps: Tensor | None,
    *,
    logits: Tensor | None = None,
    out: Tensor | None = None,
) -> BlockGrad:
    """dz of the live blocks of a chunk.

    Args:
        call: the arguments that all chunks share.
        hidden: [N, H] contiguous.
        labels: [N] int64.
        logps: [N] float64, "logps" of `linear_logps`.
        top: [N] float64, "max" of `linear_logps`.
        log_sum: [N] float64, "log_sum" of `linear_logps`.
        grad_logps: [N] float64; None to compute only the dropped mass.
        logits: [N, pitch], the logits that `linear_logps` stored, overwritten by dz; None to recompute them.
        out: [N, pitch], memory for dz if there are no stored logits.
    """
    rows = hidden.shape[0]
    device = hidden.device
    pitch = padded(call.weight.shape[0], hidden.dtype)
    tile = tile_of(hidden.dtype)
    shape = (-(-rows // tile.n), pitch // tile.v)
    grad = torch.ones_like(logps) if grad_logps is None else grad_logps
    _, unit = call.mapping
    origin = torch.stack([top * (1 / unit if unit else 0.0), log_sum * LOG2E.value]).float()
    by_p = -grad * call.logit_scale
    # A token without gradient gets exact zeros, whatever its logits are.
    still = by_p == 0
    factor = torch.where(still, 0.0, by_p).float()
    at_label = torch.where(still, 0.0, by_p * torch.expm1(logps)).float()
    live = torch.empty(shape, dtype=torch.int8, device=device)
    dropped = torch.empty(rows, shape[1], dtype=torch.float32, device=device)
    tail = torch.empty_like(dropped) if call.logit_softcap else None
    dz = None
    if grad_logps is not None:
        dz = logits if logits is not None else out
    rows_of = (origin, factor, at_label)
    launch = logits_block_grad_launch(call, hidden, labels, rows_of, logits, dz, live, (dropped, tail))
    launch.run(hidden)
    mass = dropped.sum(1, dtype=torch.float64)
    slopes = mass if tail is None else tail.sum(1, dtype=torch.float64)
    return BlockGrad(dz, live, mass, call.logit_scale * slopes)


def hidden_grad_launch(
    call: HeadCall, dz: Tensor, lists: tuple[Tensor, Tensor], tail: Tensor, mean_row: Tensor, out: Tensor
) -> Launch:
    """The kernel launch of `hidden_grad`; out is [splits, N, H] float32."""
    splits, rows, hidden_size = out.shape
    tile = tile_of(dz.dtype)
    arguments = {
        "dz": dz,
        "weight": call.weight,
        "order": call.permutation[0],
        "lists": lists[0],
        "counts": lists[1],
        "tail": tail,
        "mean_row": mean_row,
        "out": out,
        "rows": rows,
        "vocab": call.weight.shape[0],
        "hidden_size": hidden_size,
        "blocks": lists[0].shape[1],
        "BLOCK_N": tile.n,
        "BLOCK_V": tile.v,
        "STEP": tile.h,
        "WIDTH": WIDTH,
        "EVEN": hidden_size % WIDTH == 0,
    }
    grid = (-(-rows // tile.n), -(-hidden_size // WIDTH), splits)
    return Launch(hidden_grad_kernel, grid, arguments, tile.options)


def hidden_grad(call: HeadCall, found: BlockGrad, grad_logps: Tensor, mean_row: Tensor) -> Tensor:
    """dH [N, H] float32 of a chunk; mean_row [H] float32 is the mean of the head's rows."""
    dz = found.dz
    assert dz is not None
    rows, hidden_size = dz.shape[0], call.weight.shape[1]
    programs = -(-rows // tile_of(dz.dtype).n) * -(-hidden_size // WIDTH)
    splits = max(1, min(MOST_SPLITS, 2 * MULTIPROCESSORS // max(programs, 1)))
    tail = torch.where(grad_logps == 0, 0.0, grad_logps * found.tail).float()
    out = torch.empty(splits, rows, hidden_size, dtype=torch.float32, device=dz.device)
    hidden_grad_launch(call, dz, found.lists(1), tail, mean_row, out).run(dz)
    return out[0] if splits == 1 else out.sum(0)


def weight_grad_launch(
    call: HeadCall,
    dz: Tensor,
    hidden: Tensor,
    lists: tuple[Tensor, Tensor],
    tail_row: Tensor | None,
    out: Tensor,
    accumulate: bool,
) -> Launch:
    """The kernel launch of `weight_grad`."""
    vocab, hidden_size = call.weight.shape
    tile = tile_of(dz.dtype)
    arguments = {
        "dz": dz,
        "hidden": hidden,
        "order": call.permutation[0],
        "lists": lists[0],
        "counts": lists[1],
        "tail_row": tail_row,
        "out": out,
        "rows": dz.shape[0],
        "vocab": vocab,
        "hidden_size": hidden_size,
        "blocks": lists[0].shape[0],
        "block_rows": lists[0].shape[1],
        "ACCUMULATE": accumulate,
        "BLOCK_N": tile.n,
        "BLOCK_V": tile.v,
        "STEP": tile.h,
        "WIDTH": WIDTH,
        "EVEN": hidden_size % WIDTH == 0,
    }
    return Launch(weight_grad_kernel, (-(-hidden_size // WIDTH), -(-vocab // tile.v)), arguments, tile.options)


def weight_grad(
    call: HeadCall, found: BlockGrad, hidden: Tensor, out: Tensor, *, accumulate: bool, tail_row: Tensor | None = None
) -> None:
    """Writes dW of a chunk's live blocks to out [V, H] float32, or adds it.

    tail_row [H] is the contribution of the dropped mass of all chunks to every row (`tail_of`). It is passed with the last chunk,
    which writes all rows in any case.
    """
    assert found.dz is not None
    weight_grad_launch(call, found.dz, hidden, found.lists(0), tail_row, out, accumulate).run(hidden)


def bias_grad(call: HeadCall, found: BlockGrad) -> Tensor:
    """dbias [V] float32 of a chunk's live blocks. It reads them again, which is acceptable because few heads have a bias."""
    dz, (lists, counts), vocab = found.dz, found.lists(0), call.weight.shape[0]
    assert dz is not None
    tile = tile_of(dz.dtype)
    out = torch.empty(vocab, dtype=torch.float32, device=dz.device)
    arguments = {
        "dz": dz,
        "order": call.permutation[0],
        "lists": lists,
        "counts": counts,
        "out": out,
        "rows": dz.shape[0],
        "vocab": vocab,
        "blocks": lists.shape[0],
        "block_rows": lists.shape[1],
        "BLOCK_N": tile.n,
        "BLOCK_V": tile.v,
    }
    Launch(bias_grad_kernel, (lists.shape[0],), arguments, tile.options).run(dz)
    return out


def tail_of(call: HeadCall, found: BlockGrad, grad_logps: Tensor, hidden: Tensor) -> Tensor:
    """[H] float32, the contribution of the dropped mass to every row of dW."""
    weighted = torch.where(grad_logps == 0, 0.0, grad_logps * found.tail).float()
    return torch.mv(hidden.t().float(), weighted) / -call.weight.shape[0]
