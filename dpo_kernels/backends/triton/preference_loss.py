"""Stage 2 in Triton: weighted sequence sums and the sigmoid family of pair losses with their coefficients, in float64.

Data flow, one program (4 warps) a pair, one launch for everything:
    read     weights, logps and ref_logps of the pair's two sequences once
    scratch  the products w logp of the weighted tokens, written without gaps and read back (they stay in L1 and L2)
    write    losses, sums, ref_sums and coef: a few numbers a pair

Why the scratch: a sum must not change by a bit when padding is added on the left, on the right or inside. The place of a
term in the sum is its rank among the weighted tokens, found by a running count, and never its position.
All of it is 8 bytes a token where the logits are hundreds of kilobytes: nothing here is worth a faster, looser form.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import device_function, sigmoid_double, softplus_double
from .launch import Launch

#: Tokens per step, and lanes of the sum. Fixed: the order of every addition follows from it.
CHUNK = 1024


@device_function
def _bounds(cu_seqlens, sequence, tokens):
    """(first token, one past the last) of a sequence in the flattened tokens."""
    if cu_seqlens is None:
        return sequence.to(tl.int64) * tokens, (sequence.to(tl.int64) + 1) * tokens
    else:
        return tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)


@device_function
def _compact(weights, values, other_values, scratch, other_scratch, begin, end, CHUNK: tl.constexpr):
    """Write w v of the weighted tokens of [begin, end) to scratch[begin ...] without gaps; returns how many there are."""
    count = tl.zeros((), tl.int32)
    for block in range(tl.cdiv((end - begin).to(tl.int32), CHUNK)):
        token = begin + block * CHUNK + tl.arange(0, CHUNK)
        weight = tl.load(weights + token, mask=token < end, other=0.0)
        live = weight != 0
        rank = tl.cumsum(live.to(tl.int32), 0) - 1
        place = begin + count + rank
        tl.store(scratch + place, weight * tl.load(values + token, mask=live, other=0.0), mask=live)
        if other_values is not None:
            other = tl.load(other_values + token, mask=live, other=0.0)
            tl.store(other_scratch + place, weight * other, mask=live)
        count += tl.sum(live.to(tl.int32), 0)
    return count


@device_function
def _lane_sums(scratch, begin, count, CHUNK: tl.constexpr):
    """Sum of scratch[begin : begin + count]: lane i adds the terms i, i + CHUNK, ..., then the lanes add as a tree."""
    total = tl.zeros([CHUNK], tl.float64)
    for block in range(tl.cdiv(count, CHUNK)):
        place = block * CHUNK + tl.arange(0, CHUNK)
        total += tl.load(scratch + begin + place, mask=place < count, other=0.0)
    return tl.sum(total, 0)


@device_function
def _sums(weights, values, other_values, scratch, other_scratch, cu_seqlens, sequence, tokens, CHUNK: tl.constexpr):
    """(sum of w v, sum of w v') of one sequence, bitwise independent of where its weighted tokens lie."""
    begin, end = _bounds(cu_seqlens, sequence, tokens)
    count = _compact(weights, values, other_values, scratch, other_scratch, begin, end, CHUNK)
    # What one thread of the block wrote, another reads.
    tl.debug_barrier()
    total = _lane_sums(scratch, begin, count, CHUNK)
    other_total = tl.zeros((), tl.float64)
    if other_values is not None:
        other_total = _lane_sums(other_scratch, begin, count, CHUNK)
    return total, other_total


@triton.jit(do_not_specialize=["tokens"])
def sequence_sums_kernel(values, weights, cu_seqlens, scratch, sums, tokens, CHUNK: tl.constexpr):
    sequence = tl.program_id(0)
    total, _ = _sums(weights, values, None, scratch, None, cu_seqlens, sequence, tokens, CHUNK)
    tl.store(sums + sequence, total)


@triton.jit(do_not_specialize=["tokens", "pairs"])
def preference_loss_kernel(
    logps, ref_logps, weights, cu_seqlens, given_ref_sums, beta, label_smoothing,
    scratch, ref_scratch, losses, sums, ref_sums, coef,
    tokens, pairs, ROBUST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    chosen, rejected = pair, pair + pairs
    s_c, r_c = _sums(weights, logps, ref_logps, scratch, ref_scratch, cu_seqlens, chosen, tokens, CHUNK)
    s_r, r_r = _sums(weights, logps, ref_logps, scratch, ref_scratch, cu_seqlens, rejected, tokens, CHUNK)
    if given_ref_sums is not None:
        r_c = tl.load(given_ref_sums + chosen)
        r_r = tl.load(given_ref_sums + rejected)
    b = tl.load(beta + pair)
    e = tl.load(label_smoothing + pair)
    x = b * ((s_c - r_c) - (s_r - r_r))
    right, wrong = softplus_double(-x), softplus_double(x)
    if ROBUST:
        # Robust DPO is label smoothing with a negative weight on the other side, and 1 on both together as well.
        e = -e / (1.0 - 2.0 * e)
    # A weight of 0 must not meet an infinite loss, and at x = 0 the loss is log 2 without the rounding of two products.
    mixed = tl.where(e == 1, 0.0, (1.0 - e) * right) + e * wrong
    loss = tl.where((e == 0) | (x == 0), right, mixed)
    slope = e * sigmoid_double(x) - (1.0 - e) * sigmoid_double(-x)
    tl.store(losses + pair, loss)
    tl.store(sums + chosen, s_c)
    tl.store(sums + rejected, s_r)
    tl.store(ref_sums + chosen, r_c)
    tl.store(ref_sums + rejected, r_r)
    tl.store(coef + chosen, b * slope)
    tl.store(coef + rejected, -(b * slope))


def _sequences(values: Tensor, cu_seqlens: Tensor | None) -> int:
    return values.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def sequence_sums_launch(values: Tensor, weights: Tensor, cu_seqlens: Tensor | None, sums: Tensor) -> Launch:
    """The kernel call of `sequence_sums`."""
    arguments = {
        "values": values,
        "weights": weights,
        "cu_seqlens": cu_seqlens,
        "scratch": torch.empty_like(values),
        "sums": sums,
        "tokens": values.shape[1],
        "CHUNK": CHUNK,
    }
    return Launch(sequence_sums_kernel, (sums.numel(),), arguments)


def sequence_sums(values: Tensor, weights: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Weighted sum over each sequence's tokens, [S] float64; tokens of weight 0 are skipped whatever their value.

    values, weights: [B, T] float64; cu_seqlens None (a sequence is a row) or [S + 1] int64 into the flattened tokens.
    """
    sums = torch.empty(_sequences(values, cu_seqlens), dtype=torch.float64, device=values.device)
    sequence_sums_launch(values, weights, cu_seqlens, sums).run(values)
    return sums


def preference_loss_launch(
    logps: Tensor,
    ref_logps: Tensor | None,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    given_ref_sums: Tensor | None,
    beta: Tensor,
    label_smoothing: Tensor,
    robust: bool,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Launch:
    """The kernel call of `preference_loss`."""
    losses, sums, ref_sums, coef = outputs
    pairs = losses.numel()
    arguments = {
        "logps": logps,
        "ref_logps": ref_logps,
        "weights": weights,
        "cu_seqlens": cu_seqlens,
        "given_ref_sums": given_ref_sums,
        "beta": beta,
        "label_smoothing": label_smoothing,
        "scratch": torch.empty_like(logps),
        "ref_scratch": None if ref_logps is None else torch.empty_like(logps),
        "losses": losses,
        "sums": sums,
        "ref_sums": ref_sums,
        "coef": coef,
        "tokens": logps.shape[1],
        "pairs": pairs,
        "ROBUST": robust,
        "CHUNK": CHUNK,
    }
    return Launch(preference_loss_kernel, (pairs,), arguments)


def preference_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    ref_sums: Tensor | None,
    beta: Tensor,
    label_smoothing: Tensor,
    robust: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stage 2: (losses [P], sums [2P], ref_sums [2P], coef [2P]); the formulas of csrc/common/sigmoid_family.h.

    logps, ref_logps, weights: [B, T] float64; beta, label_smoothing: [P] float64. At most one of ref_logps and ref_sums
    is given; neither means reference-free.
    """
    sequences = _sequences(logps, cu_seqlens)

    def output(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float64, device=logps.device)

    outputs = (output(sequences // 2), output(sequences), output(sequences), output(sequences))
    preference_loss_launch(
        logps, ref_logps, weights, cu_seqlens, ref_sums, beta, label_smoothing, robust, outputs
    ).run(logps)  # fmt: skip
    return outputs
