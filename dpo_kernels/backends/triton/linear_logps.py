"""The LM head and stage 1 in one Triton kernel: log-probabilities and statistics from hidden states, logits only in registers.

Data flow, one program (8 warps) per block of 128 tokens and segment of 2,048 vocabulary entries, in tiles of [128, 256]:

    read     per tile, the hidden states of the tokens and the head's rows of the tile, through shared memory; the bias
    on chip  the tile of logits in float32; per token the running maximum m, the sum of 2^((x - m) log2(e)), the label's logit,
             and if asked the moment, the sum of squares, the sum, and two maxima: of all logits except the label's, and of
             those before the label
    write    3 to 8 numbers of 4 bytes per token and segment, 1% of the size of 16-bit logits

A second kernel merges the segments of a token in a fixed order, in float64, and computes the results like token_logps.py.

Segments depend only on the vocabulary, so the bits of a token's results depend neither on the batch nor on chunks.

Work: 2 N H V flops. Hidden states and head are read from L2, (1/256 + 1/128) H elements per logit. Programs that run at the same
time have different tokens first, so the head is read from memory once per wave of programs. Compared with a library product and
token_logps, the kernel saves writing and reading the logits, 4 bytes per 16-bit logit, but Triton's products are slower than the
library's (benchmarks/head_rates.py measures by how much). float32 products have full precision and run on CUDA cores, on an H100
at a fifteenth of the tensor cores' 16-bit rate; with TF32, whose mantissa has 10 bits, errors would be a thousand times larger.

Issue slots per logit in addition to the products: bounds and label 4, maximum 1, FADD 1, FMUL 1, ex2 1, add 1; entropy 3, mean 3,
squares 1, accuracy 5. On the tensor cores of an H100 a product with H = 1,024 takes as long as 60 slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import (
    FLOOR,
    FOLDED,
    HIDDEN,
    INTERPRETED,
    LN2,
    PTX,
    TINY,
    device_function,
    exp2_fast,
    rounded,
    scaled_label,
)
from .launch import SMALL, Launch, arch_of, exponent_map, tile_of
from .token_logps import _put, _variable, finish

#: Vocabulary entries per program: 1,024 tokens with V = 128,256 give 504 programs, and with V = 32,000 still 128.
SEGMENT = 64 if INTERPRETED.value else 2048

#: Index of the numbers that a segment stores for a token.
MAXIMUM, MASS, LABEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@device_function
def at_label_of(x, place, label):
    """x where place == label, else 0.

    This function and the next two use inline PTX, because otherwise compilers keep the mask of a whole tile for reuse, which
    takes 128 registers.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.eq.s32 p, $2, $3; selp.f32 $0, $1, 0f00000000, p; }", "=f,f,r,r", [x, place, label],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.where(place == label, x, 0.0)


@device_function
def others_of(x, place, label, vocab, other: tl.constexpr):
    """x with `other` (0 or HIDDEN) at the label and after the end of the vocabulary."""
    if PTX:
        asm: tl.constexpr = (
            "{ .reg .pred p, q; setp.ge.s32 q, $2, $4; setp.eq.or.s32 p, $2, $3, q; selp.f32 $0, $5, $1, p; }"
        )
        return tl.inline_asm_elementwise(
            asm, "=f,f,r,r,r,f", [x, place, label, vocab, tl.full((), other, tl.float32)],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.where((place == label) | (place >= vocab), other, x)


@device_function
def below(x, entry, limit, other: tl.constexpr):
    """x where entry < limit, else `other` (0 or HIDDEN)."""
    if PTX:
        asm: tl.constexpr = "{ .reg .pred p; setp.lt.s32 p, $2, $3; selp.f32 $0, $1, $4, p; }"
        return tl.inline_asm_elementwise(
            asm, "=f,f,r,r,f", [x, entry, limit, tl.full((), other, tl.float32)], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.where(entry < limit, x, other)


@device_function
def project_tile(
    hidden, weight, order, first_row, rows, first_place, vocab, hidden_size,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """float32 products [BLOCK_N, BLOCK_V] of hidden states from `first_row` on and head rows from `first_place` on.

    After the end, the last row or entry is used again, so loads need no mask; these results are not used.
    """
    k = tl.arange(0, BLOCK_H)
    row = tl.minimum(tl.arange(0, BLOCK_N), rows - 1 - first_row)
    place = tl.minimum(tl.arange(0, BLOCK_V), vocab - 1 - first_place)
    # Offsets within a tile fit in 32 bits; with an `order`, offsets in the whole head need 64.
    pitch = tl.full((), hidden_size, tl.int64)
    left = hidden + first_row * pitch
    left_place = row[:, None] * hidden_size + k[None, :]
    if order is None:
        right = weight + first_place * pitch
        right_place = place[:, None] * hidden_size + k[None, :]
    else:
        right = weight
        right_place = tl.load(order + first_place + place)[:, None] * pitch + k[None, :]
    logits = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for step in range(tl.cdiv(hidden_size, BLOCK_H)):
        if EVEN:
            h = tl.load(left + left_place)
            w = tl.load(right + right_place)
        else:
            inside = (k < hidden_size - step * BLOCK_H)[None, :]
            h = tl.load(left + left_place, mask=inside, other=0.0)
            w = tl.load(right + right_place, mask=inside, other=0.0)
        logits = multiply(h, tl.trans(w), logits)
        left += BLOCK_H
        right += BLOCK_H
    return logits


@device_function
def multiply(a, b, total):
    """total + a b, accumulated in float32; products of float32 matrices have full precision (no TF32)."""
    if INTERPRETED:
        # numpy has no bfloat16.
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@device_function
def _put_part(parts, part, row, segment, rows, segments, value, mask):
    tl.store(parts + (row.to(tl.int64) + part * rows) * segments + segment, value, mask=mask)


@device_function
def label_entry(labels, row, vocab):
    """int32 labels of these rows; -1 for labels outside the vocabulary."""
    label = tl.load(labels + row)
    return tl.where((label >= 0) & (label < vocab), label, -1).to(tl.int32)


# Arguments that vary from call to call must not cause a recompilation.
@triton.jit(do_not_specialize=["rows", "vocab", "segments", "blocks"], do_not_specialize_on_alignment=SMALL)
def linear_logps_kernel(
    hidden,  # [N, H] contiguous
    weight,  # [V, H] contiguous, of the same dtype
    bias,  # [V], or None
    order, places,  # [V] int32, the entries in processing order, and the place of each entry in that order; or None
    labels,  # [N] int64
    logits,  # [N, pitch], dtype of the hidden states: output for the logits, with columns in that order; or None
    parts,  # [parts, N, segments] float32
    rows, vocab, hidden_size, segments, blocks,
    inner: tl.float32, log2_scale: tl.float32,
    MAP: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, ACCURACY: tl.constexpr, MEAN: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(1)
    first_row = tl.program_id(0) * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_N)
    inside = row < rows
    row = tl.minimum(row, rows - 1)
    label = label_entry(labels, row, vocab)
    if order is not None:
        own = label
        label = tl.where(label >= 0, tl.load(places + tl.maximum(label, 0)), -1)

    m = tl.full([BLOCK_N], FLOOR, tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    at_label = tl.zeros([BLOCK_N], tl.float32)
    t = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    before = tl.full([BLOCK_N], HIDDEN, tl.float32)
    best = before
    sign = tl.where(inner > 0, 1.0, tl.where(inner < 0, -1.0, 0.0))
    begin = segment * SEGMENT
    for first in range(begin, tl.minimum(begin + SEGMENT, vocab), BLOCK_V):
        place = first + tl.arange(0, BLOCK_V)
        entry = tl.minimum(place, vocab - 1)
        if order is not None:
            entry = tl.load(order + entry)
        x = project_tile(
            hidden, weight, order, first_row, rows, first, vocab, hidden_size, BLOCK_N, BLOCK_V, BLOCK_H, EVEN
        )
        if bias is not None:
            x += tl.load(bias + entry).to(tl.float32)[None, :]
        if logits is not None:
            # The results are computed from the rounded, stored logits, so the probabilities in the gradient sum to 1.
            stored = rounded(x, logits.dtype.element_ty)
            pitch = blocks * BLOCK_V
            target = logits + first_row * tl.full((), pitch, tl.int64) + first
            near = (row - first_row)[:, None] * pitch + tl.arange(0, BLOCK_V)[None, :]
            tl.store(target + near, stored, mask=inside[:, None])
            x = stored.to(tl.float32)
        at_label += tl.sum(at_label_of(x, place[None, :], label[:, None]), 1)
        if ACCURACY:
            # Logits are compared before scale and softcap, whose rounding can make unequal logits equal.
            key = x if MAP == FOLDED else x * sign
            key = others_of(key, place[None, :], label[:, None], vocab, HIDDEN)
            best = tl.maximum(best, tl.max(key, 1))
            if order is None:
                before = tl.maximum(before, tl.max(below(key, place[None, :], label[:, None], HIDDEN), 1))
            else:
                before = tl.maximum(before, tl.max(below(key, entry[None, :], own[:, None], HIDDEN), 1))
        x = _variable(x, inner, MAP)
        if MEAN:
            total += tl.sum(below(x * TINY, place[None, :], vocab, 0.0), 1)
        x = others_of(x, place[None, :], label[:, None], vocab, HIDDEN)
        raised = tl.maximum(m, tl.max(x, 1))
        shift = (m - raised) * log2_scale
        rescale = exp2_fast(shift)
        m = raised
        y = (x - m[:, None]) * log2_scale
        e = exp2_fast(y)
        if ENTROPY:
            # Guarded, because a logit of -inf would give 0 * inf.
            t = rescale * (t + shift * s) + tl.sum(tl.where(e > 0, e * y, e), 1)
        if SQUARES:
            squares = rescale * rescale * squares + tl.sum(e * e, 1)
        s = rescale * s + tl.sum(e, 1)

    _put_part(parts, MAXIMUM, row, segment, rows, segments, m, inside)
    _put_part(parts, MASS, row, segment, rows, segments, s, inside)
    _put_part(parts, LABEL, row, segment, rows, segments, at_label, inside)
    part: tl.constexpr = LABEL + 1
    if ENTROPY:
        _put_part(parts, part, row, segment, rows, segments, t, inside)
    if SQUARES:
        _put_part(parts, part + ENTROPY, row, segment, rows, segments, squares, inside)
    if ACCURACY:
        _put_part(parts, part + ENTROPY + SQUARES, row, segment, rows, segments, before, inside)
        _put_part(parts, part + ENTROPY + SQUARES + 1, row, segment, rows, segments, best, inside)
    if MEAN:
        _put_part(parts, part + ENTROPY + SQUARES + 2 * ACCURACY, row, segment, rows, segments, total, inside)


@device_function
def _part(parts, part, row, rows, segments, segment, other):
    place = (row.to(tl.int64) + part * rows) * segments + segment
    return tl.load(parts + place, mask=segment < segments, other=other)


@triton.jit(do_not_specialize=["rows", "vocab", "segments"], do_not_specialize_on_alignment=SMALL)
def merge_kernel(
    parts,  # [parts, N, segments] float32
    labels,  # [N] int64
    logps, max, log_sum, entropy, log_sum_sq, accuracy, mean_logits,  # [N] float64, or None if not asked
    rows, vocab, segments,
    scale: tl.float64, cap: tl.float64, unit: tl.float64, inner: tl.float32, log2_scale: tl.float32,
    MAP: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, ACCURACY: tl.constexpr, MEAN: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    scale = tl.full((), scale, tl.float64)
    cap = tl.full((), cap, tl.float64)
    unit = tl.full((), unit, tl.float64)
    row = tl.program_id(0)
    label = tl.load(labels + row)
    if (label >= 0) & (label < vocab):
        segment = tl.arange(0, LANES)
        m = _part(parts, MAXIMUM, row, rows, segments, segment, FLOOR)
        s = _part(parts, MASS, row, rows, segments, segment, 0.0)
        # Only the segment of the label has its logit; all other segments have 0.
        raw = tl.sum(_part(parts, LABEL, row, rows, segments, segment, 0.0), 0)
        top = tl.max(m, 0)
        shift = (m - top) * log2_scale
        rescale = exp2_fast(shift)
        s_row = tl.sum(rescale.to(tl.float64) * s, 0)
        z_label = scaled_label(raw, scale, cap, MAP)[0]
        nothing = tl.full((), 0.0, tl.float64)
        logp, max_z, log_sum_row, p_others, log_mass = finish(s_row, nothing, top.to(tl.float64) * unit, z_label)
        tl.store(logps + row, logp)
        tl.store(max + row, max_z)
        tl.store(log_sum + row, log_sum_row)
        p_label = tl.exp(logp)
        part: tl.constexpr = LABEL + 1
        if ENTROPY:
            t = _part(parts, part, row, rows, segments, segment, 0.0)
            t_row = tl.sum(rescale.to(tl.float64) * (t + shift * s), 0)
            mean_y = t_row / tl.where(s_row > 0, s_row, 1.0)
            others = tl.where(s_row == 0, 0.0, p_others * (log_mass - LN2 * mean_y))
            tl.store(entropy + row, others - tl.where(p_label > 0, p_label * logp, 0.0 * p_label))
        if SQUARES:
            # sum p^2 is p_label^2 plus (p_others / s)^2 times the sum of squares of the others.
            q = _part(parts, part + ENTROPY, row, rows, segments, segment, 0.0)
            q_row = tl.sum(rescale.to(tl.float64) * rescale * q, 0)
            share = p_others / tl.where(s_row > 0, s_row, 1.0)
            tl.store(log_sum_sq + row, tl.log(p_label * p_label + share * share * q_row))
        if ACCURACY:
            # argmax returns the first maximum: logits before the label must be smaller, logits after it not larger.
            sign = tl.where(inner > 0, 1.0, tl.where(inner < 0, -1.0, 0.0))
            key = raw if MAP == FOLDED else raw * sign
            before = tl.max(_part(parts, part + ENTROPY + SQUARES, row, rows, segments, segment, HIDDEN), 0)
            best = tl.max(_part(parts, part + ENTROPY + SQUARES + 1, row, rows, segments, segment, HIDDEN), 0)
            hit = (key > before) & (key >= best)
            tl.store(accuracy + row, tl.where(logp == logp, hit.to(tl.float64), float("nan")))
        if MEAN:
            total = _part(parts, part + ENTROPY + SQUARES + 2 * ACCURACY, row, rows, segments, segment, 0.0)
            tl.store(mean_logits + row, unit * (tl.sum(total.to(tl.float64), 0) / vocab / TINY))
    else:
        # A label outside the vocabulary gives NaN, because raising an error would need a synchronization.
        nothing = tl.full((), float("nan"), tl.float64)
        _put(logps, row, nothing)
        _put(max, row, nothing)
        _put(log_sum, row, nothing)
        _put(entropy, row, nothing)
        _put(log_sum_sq, row, nothing)
        _put(accuracy, row, nothing)
        _put(mean_logits, row, nothing)


@dataclass(frozen=True)
class Order:
    """A permutation of the vocabulary.

    Attributes:
        entries: [V] int32, the entries in processing order.
        places: [V] int32, the place of each entry in that order.
    """

    entries: Tensor
    places: Tensor

    @classmethod
    def descending(cls, keys: Tensor) -> Order:
        """The order of descending keys [V]; the sort is stable."""
        entries = keys.argsort(descending=True, stable=True)
        places = torch.empty_like(entries)
        places[entries] = torch.arange(keys.shape[0], device=keys.device)
        return cls(entries.to(torch.int32), places.to(torch.int32))


def segments_of(vocab: int) -> int:
    """Number of segments of a vocabulary."""
    return -(-vocab // SEGMENT)


def inner_of(logit_scale: float, logit_softcap: float) -> float:
    """The factor of a stored logit before the softcap's tanh, or in the map SCALED."""
    return logit_scale / logit_softcap if logit_softcap else logit_scale


def linear_logps_launches(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    outputs: dict[str, Tensor],
    parts: Tensor,
    *,
    order: Order | None,
    logits: Tensor | None,
    logit_scale: float,
    logit_softcap: float,
    wide: bool,
    arch: int,
) -> tuple[Launch, Launch]:
    """The two kernel launches that compute `outputs` (by name, [N] float64 each); arguments as in `linear_logps`."""
    rows, hidden_size = hidden.shape
    vocab = weight.shape[0]
    segments = segments_of(vocab)
    tile = tile_of(hidden.dtype, wide=arch // 10 == 9 and wide)
    mapping, unit, log2_scale = exponent_map(logit_scale, logit_softcap)
    names = ("entropy", "log_sum_sq", "accuracy", "mean_logits")
    entropy, squares, accuracy, mean = (name in outputs for name in names)
    shared = {
        "parts": parts,
        "labels": labels,
        "rows": rows,
        "vocab": vocab,
        "segments": segments,
        "inner": inner_of(logit_scale, logit_softcap),
        "log2_scale": log2_scale,
        "MAP": mapping,
        "ENTROPY": entropy,
        "SQUARES": squares,
        "ACCURACY": accuracy,
        "MEAN": mean,
    }
    project = {
        **shared,
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "order": None if order is None else order.entries,
        "places": None if order is None else order.places,
        "logits": logits,
        "hidden_size": hidden_size,
        "blocks": 0 if logits is None else logits.shape[1] // tile.v,
        "SEGMENT": SEGMENT,
        "EVEN": hidden_size % tile.h == 0,
        **tile.blocks(),
    }
    merge = {
        **shared,
        **{name: outputs.get(name) for name in ("logps", "max", "log_sum", *names)},
        "scale": logit_scale,
        "cap": logit_softcap,
        "unit": unit,
        "LANES": triton.next_power_of_2(max(segments, 2)),
    }
    return (
        Launch(linear_logps_kernel, (-(-rows // tile.n), segments), project, tile.options),
        Launch(merge_kernel, (rows,), merge, {"num_warps": 1}),
    )


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    names: frozenset[str],
    *,
    logit_scale: float,
    logit_softcap: float,
    order: Order | None = None,
    logits: Tensor | None = None,
    wide: bool = False,
) -> dict[str, Tensor]:
    """Stage 1 from hidden states: "logps", "max", "log_sum" and `names`, [N] float64 each, by name.

    Args:
        hidden: [N, H] contiguous, float32, bfloat16 or float16.
        weight: [V, H] contiguous, of the same dtype.
        bias: [V] of the same dtype, or None.
        labels: [N] int64; for a label outside the vocabulary, results are NaN.
        names: any of "entropy", "log_sum_sq", "accuracy", "mean_logits".
        logit_scale: scale of z = cap * tanh(scale * x / cap).
        logit_softcap: cap of the same formula; 0 for z = scale * x.
        order: the order of the columns of `logits`. It affects results only by rounding.
        logits: [N, V rounded up to a tile] of hidden's dtype, output for the logits, or None.
        wide: use a larger tile on GPUs with enough registers; not together with statistics or `logits`. Two models whose
            results must be bitwise comparable need the same value.
    """
    rows = hidden.shape[0]
    outputs = {
        name: torch.empty(rows, dtype=torch.float64, device=hidden.device)
        for name in ("logps", "max", "log_sum", *sorted(names))
    }
    count = 3 + len(names) + ("accuracy" in names)
    parts = torch.empty(count, rows, segments_of(weight.shape[0]), dtype=torch.float32, device=hidden.device)
    launches = linear_logps_launches(
        hidden, weight, bias, labels, outputs, parts,
        order=order, logits=logits, logit_scale=logit_scale, logit_softcap=logit_softcap, wide=wide, arch=arch_of(hidden.device),
    )  # fmt: skip
    for launch in launches:
        launch.run(hidden)
    return outputs
