"""Stage 3 in Triton: the gradient with respect to the logits, one read and one write of each, in place or not.

Data flow, one program (4 warps) a token:
    read     labels, logps, lse and grad_logps once; the row's logits once, or not at all if its gradient is zero
    on chip  nothing but the tile in hand: c = float32(lse log2(e)) and the factor -grad_logps 2^(c - lse log2(e)) are two
             numbers a row, from float64
    write    the row's gradient once, as aligned 128-bit stores; in place, every thread writes what it has just read
The label's entry is grad_logps (1 - p) with 1 - p = -expm1(logp) in float64. As in the forward its tile and the last,
partial one come first, and the main loop has no mask.

Issue slots per logit of the main loop, bfloat16, of which one thread handles 32 per iteration:
    convert 1, FFMA 1, ex2 1, FMUL 1, pack 1/2                                     4.5
    per iteration 4 loads, 4 stores and about 20 of loop and addresses, / 32       0.9
For 4 bytes moved a logit, twice the forward's. softcap: 8 more for 16-bit gradients, 20 for float32 ones.
What the compiler makes of it: benchmarks/results/machine_code.json, held by tests/test_triton_aot.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device import (
    FOLDED,
    LOG2E,
    SOFTCAPPED,
    columns,
    device_function,
    exp2_fast,
    expm1_double,
    fragments,
    fused,
    load_fragments,
    load_groups,
    reciprocal,
    rounded,
    scaled_label,
    store_groups,
    tanh_accurate,
    to_float,
)
from .launch import (
    LANES,
    UNROLL,
    Launch,
    aligned_base,
    group_size,
    round_to_float32,
    rows_aligned,
    shifted_alike,
)


@device_function
def _entries(x, c, factor, inner, log2_scale, MAP: tl.constexpr, SHORT: tl.constexpr):
    """-grad_logps p dz/dx of a tile of logits x. factor holds everything that is the same for the whole row.

    SHORT: the softcap's tanh by 1 - 2 / (1 + exp(2u)), with an absolute error of 1e-7: enough for 16-bit gradients.
    """
    if MAP == SOFTCAPPED:
        if SHORT:
            r = reciprocal(1.0 + exp2_fast(x * (inner * (2.0 * 1.4426950408889634))))
            tanh = 1.0 - 2.0 * r
            slope = 4.0 * (r - r * r)
        else:
            tanh, slope = tanh_accurate(x * inner)
        return exp2_fast(fused(tanh, log2_scale, c)) * slope * factor
    else:
        return exp2_fast(fused(x, log2_scale, c)) * factor


# Nothing that varies from call to call may cause a new compilation.
@triton.jit(
    do_not_specialize=[
        "tokens", "vocab", "ignore_index", "stride_b", "stride_t", "base", "out_stride_b", "out_stride_t", "out_base"
    ]
)  # fmt: skip
def logits_grad_kernel(
    logits,  # [B, T, V], V contiguous; 16-byte aligned pointer, first logit `base` elements on
    out,  # like logits; may be the same memory
    labels,  # [B T] int64
    logps, lse, grad_logps,  # [B T] float64
    tokens, vocab, ignore_index: tl.int64,
    stride_b: tl.int64, stride_t: tl.int64, base,
    out_stride_b: tl.int64, out_stride_t: tl.int64, out_base,
    scale: tl.float64, cap: tl.float64, unit: tl.float64, log2_scale: tl.float32,
    MAP: tl.constexpr, ALIGNED: tl.constexpr, IN_ALIGNED: tl.constexpr, FRAGMENTS: tl.constexpr,
    UNROLL: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    element: tl.constexpr = logits.dtype.element_ty
    scale = tl.full((), scale, tl.float64)
    cap = tl.full((), cap, tl.float64)
    unit = tl.full((), unit, tl.float64)
    inner = (scale / cap).to(tl.float32)
    SHORT: tl.constexpr = element.primitive_bitwidth == 16
    row = tl.program_id(0).to(tl.int64)
    b, t = row // tokens, row % tokens
    # The row is cut where the stores are aligned; loads that are not aligned there go element by element.
    out_start = b * out_stride_b + t * out_stride_t + out_base
    if ALIGNED:
        head = 0
    else:
        head = tl.minimum((GROUP - out_start % GROUP) % GROUP, vocab).to(tl.int32)
    groups = (vocab - head) // GROUP
    tiles = tl.cdiv(groups, UNROLL * LANES)
    full = groups // (UNROLL * LANES)
    label64 = tl.load(labels + row)
    grad = tl.load(grad_logps + row)
    if (label64 == ignore_index) | (grad == 0):
        # No mass: exact zeros, and not one logit is read.
        zeros = tl.zeros([UNROLL, LANES, GROUP], tl.float32)
        if FRAGMENTS:
            begin, limit, edge, valid = fragments(head, groups, vocab, LANES, GROUP)
            tl.store(out + out_start + edge, tl.zeros([1, LANES, GROUP], tl.float32).to(element), mask=valid)
        for tile in range(full):
            store_groups(out, out_start + head, tile, groups, zeros, UNROLL, LANES, GROUP, False)
        if tiles > full:
            store_groups(out, out_start + head, full, groups, zeros, UNROLL, LANES, GROUP, True)
    else:
        in_range = (label64 >= 0) & (label64 < vocab)
        # A label outside the vocabulary: nothing is read at it, and the whole row is NaN.
        label = tl.where(in_range, label64, 0).to(tl.int32)
        grad = tl.where(in_range, grad, float("nan"))
        start = b * stride_b + t * stride_t + base
        # p = 2^(x log2_scale - c) 2^(c - lse log2): c is a float32, and what its rounding drops goes into the factor of
        # the row, in float64. lse counts in units of the rounded log2_scale, so that the largest p are the most exact.
        step = tl.full((), log2_scale, tl.float32).to(tl.float64)
        exact = tl.load(lse + row) * tl.where(unit == 0, LOG2E, step / unit)
        c = exact.to(tl.float32)
        factor = (-grad * scale * tl.exp2(c.to(tl.float64) - exact)).to(tl.float32)
        label_slope = scaled_label(tl.load(logits + start + label).to(tl.float32), scale, cap, MAP)[1]
        # 1 - p(label) without cancellation.
        at_label = (grad * -expm1_double(tl.load(logps + row)) * label_slope).to(tl.float32)

        if FRAGMENTS:
            begin, limit, edge, valid = fragments(head, groups, vocab, LANES, GROUP)
            ends = _entries(
                load_fragments(logits, start, begin, limit, GROUP), c, factor, inner, log2_scale, MAP, SHORT
            )
            tl.store(out + out_start + edge, rounded(tl.where(edge == label, at_label, ends), element), mask=valid)

        # As in token_logps: first the label's tile and the last, partial one, then all the others without a mask.
        label_tile = tl.minimum(tl.maximum(label - head, 0) // (UNROLL * LANES * GROUP), tiles - 1)
        partial = ((tiles > full) & (label_tile != full)).to(tl.int32)
        for special in range(tl.where(tiles > 0, 1 + partial, 0)):
            tile = tl.where(special == 0, label_tile, full)
            raw = load_groups(logits, start + head, tile, groups, UNROLL, LANES, GROUP, IN_ALIGNED, True)
            values = _entries(to_float(raw, element), c, factor, inner, log2_scale, MAP, SHORT)
            values = tl.where(columns(tile, head, UNROLL, LANES, GROUP) == label, at_label, values)
            store_groups(out, out_start + head, tile, groups, values, UNROLL, LANES, GROUP, True)
        for index in range(full - (label_tile < full).to(tl.int32)):
            tile = index + (index >= label_tile).to(tl.int32)
            raw = load_groups(logits, start + head, tile, groups, UNROLL, LANES, GROUP, IN_ALIGNED, False)
            values = _entries(to_float(raw, element), c, factor, inner, log2_scale, MAP, SHORT)
            store_groups(out, out_start + head, tile, groups, values, UNROLL, LANES, GROUP, False)


def logits_grad_launch(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    lse: Tensor,
    grad_logps: Tensor,
    out: Tensor,
    *,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
) -> Launch:
    """The kernel call of `logits_grad`."""
    group = group_size(logits)
    pointer, base = aligned_base(logits)
    out_pointer, out_base = aligned_base(out)
    # No maximum is taken here, so a negative scale folds into the exponential's FFMA as well.
    mapping, unit = (SOFTCAPPED, logit_softcap) if logit_softcap else (FOLDED, logit_scale)
    arguments = {
        "logits": pointer,
        "out": out_pointer,
        "labels": labels,
        "logps": logps,
        "lse": lse,
        "grad_logps": grad_logps,
        "tokens": logits.shape[1],
        "vocab": logits.shape[2],
        "ignore_index": ignore_index,
        "stride_b": logits.stride(0),
        "stride_t": logits.stride(1),
        "base": base,
        "out_stride_b": out.stride(0),
        "out_stride_t": out.stride(1),
        "out_base": out_base,
        "scale": logit_scale,
        "cap": logit_softcap,
        "unit": unit,
        "log2_scale": round_to_float32(unit * LOG2E.value),
        "MAP": mapping.value,
        "ALIGNED": rows_aligned(out, group),
        "IN_ALIGNED": shifted_alike(logits, out, group),
        "FRAGMENTS": not rows_aligned(out, group) or out.shape[2] % group != 0,
        "UNROLL": UNROLL,
        "LANES": LANES,
        "GROUP": group,
    }
    return Launch(logits_grad_kernel, (labels.numel(),), arguments)


def logits_grad(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    lse: Tensor,
    grad_logps: Tensor,
    *,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    out: Tensor,
) -> None:
    """Stage 3: writes grad_logps (onehot(label) - softmax) dz/dx into `out` [B, T, V], which may be `logits` itself."""
    logits_grad_launch(
        logits,
        labels,
        logps,
        lse,
        grad_logps,
        out,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
    ).run(logits)
