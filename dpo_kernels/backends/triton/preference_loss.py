"""Stage 2 in Triton: weighted sequence sums, and losses and coefficients of the sigmoid family, in float64.

Data flow, one program (4 warps) per pair, one launch in total:

    read     weights, logps and ref_logps of the pair's two sequences once
    scratch  the products w logp of the tokens with a weight, written without gaps and read back (they stay in L1 and L2)
    write    losses, sums, ref_sums and coef: a few numbers per pair

The scratch makes a sum bitwise independent of padding on the left, on the right or inside: the order of its terms follows from
a running count of the tokens with a weight, not from their positions.

Long sequences: a program processes CHUNK tokens in about 2 us, so 32,768 tokens would take 100 us. If a sequence may be longer
than LONG tokens, a first launch writes the scratch, with one program per CHUNK tokens; each program counts the weighted tokens
before its own, which are in L2. The second launch then only sums independent loads. Both ways write the same scratch and sum it
by the same code, so their results are bitwise equal.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import device_function, sigmoid_double, softplus_double
from .launch import SMALL, Launch

#: Tokens per step, and lanes of the sum. It must not change from call to call, because it fixes the order of additions.
CHUNK = 1024
#: A sequence that may be longer than this many tokens is compacted by several programs.
LONG = 8 * CHUNK


@device_function
def _bounds(cu_seqlens, sequence, tokens, total):
    """(first token, one past the last) of a sequence in the `total` flattened tokens.

    The host cannot check bounds on the device without synchronizing. They are clamped, so accesses stay inside the tensors.
    """
    if cu_seqlens is None:
        return sequence.to(tl.int64) * tokens, (sequence.to(tl.int64) + 1) * tokens
    else:
        begin = tl.maximum(tl.load(cu_seqlens + sequence), 0)
        return begin, tl.maximum(tl.minimum(tl.load(cu_seqlens + sequence + 1), total), begin)


@device_function
def _compact_chunk(weights, values, other_values, scratch, other_scratch, first, end, place, CHUNK: tl.constexpr):
    """Write w v to scratch[place ...] for the tokens with a weight among the CHUNK from `first` on; returns their number."""
    token = first + tl.arange(0, CHUNK)
    weight = tl.load(weights + token, mask=token < end, other=0.0)
    live = weight != 0
    place += tl.cumsum(live.to(tl.int32), 0) - 1
    tl.store(scratch + place, weight * tl.load(values + token, mask=live, other=0.0), mask=live)
    if other_values is not None:
        tl.store(other_scratch + place, weight * tl.load(other_values + token, mask=live, other=0.0), mask=live)
    return tl.sum(live.to(tl.int32), 0)


@triton.jit(do_not_specialize=["tokens", "total"], do_not_specialize_on_alignment=SMALL)
def compact_kernel(
    weights, values, other_values, cu_seqlens, scratch, other_scratch,
    counts,  # [S] int32: weighted tokens of each sequence
    tokens, total, CHUNK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    begin, end = _bounds(cu_seqlens, sequence, tokens, total)
    first = begin + tl.program_id(1).to(tl.int64) * CHUNK
    if (first < end) | (tl.program_id(1) == 0):
        before = tl.zeros([CHUNK], tl.int32)
        for block in range(tl.program_id(1)):
            before += (tl.load(weights + begin + block * CHUNK + tl.arange(0, CHUNK)) != 0).to(tl.int32)
        count = tl.sum(before, 0)
        count += _compact_chunk(
            weights, values, other_values, scratch, other_scratch, first, end, begin + count, CHUNK
        )  # fmt: skip
        if first + CHUNK >= end:
            tl.store(counts + sequence, count)


@device_function
def _compact(weights, values, other_values, scratch, other_scratch, begin, end, CHUNK: tl.constexpr):
    """Write w v to scratch[begin ...] without gaps, for the tokens with a weight in [begin, end); returns their number."""
    count = tl.zeros((), tl.int32)
    for block in range(tl.cdiv((end - begin).to(tl.int32), CHUNK)):
        count += _compact_chunk(
            weights, values, other_values, scratch, other_scratch, begin + block * CHUNK, end, begin + count, CHUNK
        )  # fmt: skip
    # The threads of the block read values that other threads have written.
    tl.debug_barrier()
    return count


@device_function
def _sums(
    weights, values, other_values, scratch, other_scratch, counts, cu_seqlens, sequence, tokens, total,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """(sum of w v, sum of w v') of one sequence, bitwise independent of the positions of its weighted tokens.

    Lane i adds the terms i, i + CHUNK, ..., then a tree adds the lanes. Four loads are in flight at a time.
    """
    begin, end = _bounds(cu_seqlens, sequence, tokens, total)
    if counts is None:
        count = _compact(weights, values, other_values, scratch, other_scratch, begin, end, CHUNK)
    else:
        count = tl.load(counts + sequence)
    sums = tl.zeros([CHUNK], tl.float64)
    other_sums = tl.zeros([CHUNK], tl.float64)
    for block in range(tl.cdiv(count, 4 * CHUNK)):
        for step in tl.static_range(4):
            place = (block * 4 + step) * CHUNK + tl.arange(0, CHUNK)
            sums += tl.load(scratch + begin + place, mask=place < count, other=0.0)
            if other_values is not None:
                other_sums += tl.load(other_scratch + begin + place, mask=place < count, other=0.0)
    return tl.sum(sums, 0), tl.sum(other_sums, 0)


@triton.jit(do_not_specialize=["tokens", "total"], do_not_specialize_on_alignment=SMALL)
def sequence_sums_kernel(
    values, weights, cu_seqlens, scratch, counts, sums, tokens, total, CHUNK: tl.constexpr
):  # fmt: skip
    sequence = tl.program_id(0)
    own, _ = _sums(weights, values, None, scratch, None, counts, cu_seqlens, sequence, tokens, total, CHUNK)
    tl.store(sums + sequence, own)


@triton.jit(do_not_specialize=["tokens", "total", "pairs"], do_not_specialize_on_alignment=SMALL)
def preference_loss_kernel(
    logps, ref_logps, weights, cu_seqlens, given_ref_sums, beta, label_smoothing,
    scratch, ref_scratch, counts, losses, sums, ref_sums, coef,
    tokens, total, pairs, ROBUST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    chosen, rejected = pair, pair + pairs
    s_c, r_c = _sums(
        weights, logps, ref_logps, scratch, ref_scratch, counts, cu_seqlens, chosen, tokens, total, CHUNK
    )  # fmt: skip
    s_r, r_r = _sums(
        weights, logps, ref_logps, scratch, ref_scratch, counts, cu_seqlens, rejected, tokens, total, CHUNK
    )  # fmt: skip
    if given_ref_sums is not None:
        r_c = tl.load(given_ref_sums + chosen)
        r_r = tl.load(given_ref_sums + rejected)
    b = tl.load(beta + pair)
    e = tl.load(label_smoothing + pair)
    x = b * ((s_c - r_c) - (s_r - r_r))
    right, wrong = softplus_double(-x), softplus_double(x)
    if ROBUST:
        # Robust DPO is label smoothing with a negative weight of the swapped label; the two weights still sum to 1.
        e = -e / (1.0 - 2.0 * e)
    # Terms of weight 0 are left out: they could be 0 * inf, which is NaN. At x = 0 the loss is log 2, not the rounded mix.
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


def _span_arguments(
    values: Tensor, other_values: Tensor | None, weights: Tensor, cu_seqlens: Tensor | None
) -> tuple[dict[str, Any], Tensor | None, list[Launch]]:
    """(arguments of every kernel here, scratch of `other_values` or None, the first launch if sequences may be long)."""
    other_scratch = None if other_values is None else torch.empty_like(values)
    arguments = {
        "weights": weights,
        "cu_seqlens": cu_seqlens,
        "scratch": torch.empty_like(values),
        "counts": None,
        "tokens": values.shape[1],
        "total": values.numel(),
        "CHUNK": CHUNK,
    }
    # Only the device knows the lengths of packed sequences, so each may contain all tokens.
    longest = values.shape[1]
    if longest <= LONG:
        return arguments, other_scratch, []
    sequences = _sequences(values, cu_seqlens)
    arguments["counts"] = torch.empty(sequences, dtype=torch.int32, device=values.device)
    compact = arguments | {"values": values, "other_values": other_values, "other_scratch": other_scratch}
    return arguments, other_scratch, [Launch(compact_kernel, (sequences, triton.cdiv(longest, CHUNK)), compact)]


def sequence_sums_launches(values: Tensor, weights: Tensor, cu_seqlens: Tensor | None, sums: Tensor) -> list[Launch]:
    """The kernel launches of `sequence_sums`, in order."""
    arguments, _, launches = _span_arguments(values, None, weights, cu_seqlens)
    arguments |= {"values": values, "sums": sums}
    return [*launches, Launch(sequence_sums_kernel, (sums.numel(),), arguments)]


def sequence_sums(values: Tensor, weights: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Weighted sum over the tokens of each sequence, [S] float64; tokens of weight 0 are skipped, whatever their value.

    Args:
        values: [B, T] float64.
        weights: [B, T] float64.
        cu_seqlens: [S + 1] int64, bounds in the flattened tokens, or None if each row is a sequence. They are clamped to the
            tokens that exist; sequences must not overlap (stages.rising_bounds).
    """
    sums = torch.empty(_sequences(values, cu_seqlens), dtype=torch.float64, device=values.device)
    for launch in sequence_sums_launches(values, weights, cu_seqlens, sums):
        launch.run(values)
    return sums


def preference_loss_launches(
    logps: Tensor,
    ref_logps: Tensor | None,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    given_ref_sums: Tensor | None,
    beta: Tensor,
    label_smoothing: Tensor,
    robust: bool,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> list[Launch]:
    """The kernel launches of `preference_loss`, in order."""
    losses, sums, ref_sums, coef = outputs
    pairs = losses.numel()
    arguments, ref_scratch, launches = _span_arguments(logps, ref_logps, weights, cu_seqlens)
    arguments |= {
        "logps": logps,
        "ref_logps": ref_logps,
        "given_ref_sums": given_ref_sums,
        "beta": beta,
        "label_smoothing": label_smoothing,
        "ref_scratch": ref_scratch,
        "losses": losses,
        "sums": sums,
        "ref_sums": ref_sums,
        "coef": coef,
        "pairs": pairs,
        "ROBUST": robust,
    }
    return [*launches, Launch(preference_loss_kernel, (pairs,), arguments)]


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

    Args:
        logps: [B, T] float64.
        ref_logps: [B, T] float64, or None.
        weights: [B, T] float64.
        cu_seqlens: [2P + 1] int64, or None, as in `sequence_sums`.
        ref_sums: [2P] float64. At most one of ref_logps and ref_sums is given; without both, the reference's sums are 0.
        beta: [P] float64.
        label_smoothing: [P] float64.
        robust: the robust loss instead of label smoothing.
    """
    sequences = _sequences(logps, cu_seqlens)

    def output(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float64, device=logps.device)

    outputs = (output(sequences // 2), output(sequences), output(sequences), output(sequences))
    launches = preference_loss_launches(
        logps, ref_logps, weights, cu_seqlens, ref_sums, beta, label_smoothing, robust, outputs
    )
    for launch in launches:
        launch.run(logps)
    return outputs
