"""Stage 3 in Triton: the gradient with respect to the logits, with one read and one write of each, in place or not.

Data flow, one program (4 warps) per token:

    read     labels, logps, max, log_sum and grad_logps once; the row's logits once, or not at all if its gradient is 0
    on chip  the current tile and two numbers per row: with lse = max + log_sum, c = float32(lse log2(e)), and the factor
             -grad_logps 2^(c - lse log2(e)), from float64. Every thread computes them in about 50 float64 instructions,
             without division or log: the host computes quotients that are equal for the whole call.
    write    the row's gradient once, in aligned 128-bit stores; in place, a thread overwrites what it has just read

The label's entry is grad_logps (1 - p), with 1 - p = -expm1(logp) in float64. As in the forward pass, the tile of the label and
the last, partial one are processed first, and the main loop has no mask.

Issue slots per logit of the main loop in bfloat16; a thread processes 32 logits per iteration:

    convert 1, FFMA 1, ex2 1, FMUL 1, pack 1/2                                     4.5
    per iteration 4 loads, 4 stores and about 20 for loop and addresses, / 32      0.9

It moves 4 bytes per logit, twice as many as the forward pass. softcap: 8 more slots for 16-bit gradients, 20 for float32 ones.

With token-level KL divergences (REVERSE, FORWARD) the reference's tile is read together with the policy's, which makes 6 bytes
per logit:

    dz += g_kl p (d - D) + g_forward (p - q),    d = (z - max) - (z' - max'), D = sum p d, q = softmax(z')

D is subtracted in two parts, for the reason given in csrc/cpu/logits_grad.cpp. REVERSE costs convert 1, subtractions 3, FFMA 1,
and 2 for the guard against -inf logits; FORWARD costs convert 1 (shared), FFMA 2, ex2 1. The compiled code is in
benchmarks/results/machine_code.json and guarded by tests/test_triton_aot.py.
"""

# mypy: disable-error-code="assignment"
# (mypy gives a tuple that grows a new type at each step; Triton's compiler does not.)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...stages import TokenKL, Transform
from .device import (
    FOLDED,
    LARGE,
    LARGEST,
    LN2,
    LOG2E,
    SOFTCAPPED,
    columns,
    device_function,
    exp2_fast,
    exp_expm1,
    fragments,
    fused,
    load_tile,
    reciprocal,
    rounded,
    store_tile,
    tanh_accurate,
    to_float,
)
from .launch import (
    LANES,
    SMALL,
    UNROLL,
    Launch,
    aligned_base,
    group_size,
    round_to_float32,
    rows_aligned,
    shifted_alike,
)

#: Factors of p up to 2^MOST cannot overflow float32 in a sum of two products. The limit for the factor of a gap is smaller,
#: because a gap may be as large as the largest float32.
MOST, MOST_OF_GAP = tl.constexpr(125), tl.constexpr(-2)


@device_function
def _tanh(x, inner, SHORT: tl.constexpr):
    """(tanh, its derivative) at inner * x.

    SHORT: computed as 1 - 2 / (1 + exp(2u)) with an absolute error of 1e-7, which is enough for 16-bit gradients.
    """
    if SHORT:
        r = reciprocal(1.0 + exp2_fast(x * (inner * (2.0 * 1.4426950408889634))))
        return 1.0 - 2.0 * r, 4.0 * (r - r * r)
    else:
        return tanh_accurate(x * inner)


@device_function
def _exponent(x):
    """The biased exponent of a float32."""
    return (x.to(tl.int32, bitcast=True) >> 23) & 0xFF


@device_function
def _excess(by, most):
    """The n >= 0 by which the exponent of `by` exceeds `most`; the factor 2^n is moved from the factor of p into the exponential.

    A factor of p may exceed float32, for example IPO's coefficient, or a loss scale times a large gap. An entry with p = 0 would
    then be 0 * inf.
    """
    return tl.maximum(_exponent(by.to(tl.float32)) - 126 - most, 0)


@device_function
def _saturated(x):
    """A float64 as float32; finite numbers beyond its range become the largest finite number."""
    y = x.to(tl.float32)
    beyond = (tl.abs(y) > LARGEST) & (tl.abs(x) < float("inf"))
    return tl.where(beyond, tl.where(x > 0, LARGEST, -LARGEST), y)


@device_function
def _origin(row_max, row_log_sum, excess, per_unit, log2_per_nat, log2_scale):
    """(c, factor, scale) such that a logit x has p = 2^(x scale - c) factor; row_max and row_log_sum are float64, in nats.

    c is a float32; the factor, in float64, contains the rounding error of c. max and log_sum are converted by the rounded
    log2_scale, which makes the largest p the most accurate. From LARGE on, the rounding error of c exceeds the range of an
    exponent. There only logits equal to the maximum have nonzero probability. The scale is then a power of two, so that products
    are exact and tell them from the others; it is at most half of log2_scale, and so small that no logit overflows.
    """
    large = tl.abs(row_max) >= LARGE
    exact = (row_max + row_log_sum) * log2_per_nat
    c = (exact - excess).to(tl.float32)
    # The two cases share one exponential; only its argument differs.
    dropped = tl.where(large, -row_log_sum, (c.to(tl.float64) - exact) * LN2)
    top = (row_max * per_unit).to(tl.float32)
    bits = log2_scale.to(tl.int32, bitcast=True)
    coarse = tl.minimum(_exponent(log2_scale) - 1, 379 - _exponent(top)) << 23
    coarse_scale = (coarse | (bits & -0x80000000)).to(tl.float32, bitcast=True)
    return tl.where(large, top * coarse_scale, c), exp_expm1(dropped)[0], tl.where(large, coarse_scale, log2_scale)


@device_function
def _entries(
    x,
    ref_x,
    row,
    inner,
    MAP: tl.constexpr,
    SHORT: tl.constexpr,
    REVERSE: tl.constexpr,
    FORWARD: tl.constexpr,
):
    """Gradient of logits x other than the label: (p (factor + by_gap gap) - by_q q) dz/dx / scale, with gap = d - D.

    gap = (x - top) - (ref_x - ref_center), with ref_center = ref_top - D. `row` has the values that are equal for the whole row.
    """
    c, factor, ref_c, by_gap, top, ref_center, gap_limit, by_q, log2_scale, ref_log2_scale = row
    if MAP == SOFTCAPPED:
        x, slope = _tanh(x, inner, SHORT)
        if REVERSE or FORWARD:
            ref_x, _ = _tanh(ref_x, inner, SHORT)
    e = exp2_fast(fused(x, log2_scale, c))
    if REVERSE:
        # The gap is infinite if one of the two logits is -inf. It is limited, so that its product with e = 0 or by_gap = 0 is 0.
        gap = tl.minimum(tl.maximum((x - top) - (ref_x - ref_center), -gap_limit), gap_limit)
        values = e * (gap * by_gap + factor)
    else:
        values = e * factor
    if FORWARD:
        values -= exp2_fast(fused(ref_x, ref_log2_scale, ref_c)) * by_q
    if MAP == SOFTCAPPED:
        values *= slope
    return values


@device_function
def _write_tile(
    logits, ref_logits, out, start, ref_start, out_start, tile, groups, label, at_label, row, inner,
    MAP: tl.constexpr, REVERSE: tl.constexpr, FORWARD: tl.constexpr, ALIGNED: tl.constexpr, REF_ALIGNED: tl.constexpr,
    UNROLL: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Read one tile and write its gradient; MASKED: handles the label's entry, and writes nothing after the last group."""
    element: tl.constexpr = logits.dtype.element_ty
    SHORT: tl.constexpr = element.primitive_bitwidth == 16
    raw = load_tile(logits, start, tile, groups, UNROLL, LANES, GROUP, ALIGNED, MASKED)
    if REVERSE or FORWARD:
        ref_element: tl.constexpr = ref_logits.dtype.element_ty
        ref_raw = load_tile(ref_logits, ref_start, tile, groups, UNROLL, LANES, GROUP, REF_ALIGNED, MASKED)
    x = to_float(raw, element)
    ref_x = x
    if REVERSE or FORWARD:
        ref_x = to_float(ref_raw, ref_element)
    parts = ()
    for i in tl.static_range(len(x)):
        values = _entries(x[i], ref_x[i], row, inner, MAP, SHORT, REVERSE, FORWARD)
        if MASKED:
            values = tl.where(columns(tile, i, UNROLL, LANES, GROUP) == label, at_label, values)
        parts = parts + (values,)  # noqa: RUF005 (no star in Triton)
    store_tile(out, out_start, tile, groups, parts, UNROLL, LANES, GROUP, MASKED)


# Arguments that vary from call to call must not cause a recompilation.
@triton.jit(
    do_not_specialize=[
        "tokens", "vocab", "ignore_index", "stride_b", "stride_t", "base", "out_stride_b", "out_stride_t", "out_base",
        "ref_stride_b", "ref_stride_t", "ref_base",
    ],
    do_not_specialize_on_alignment=SMALL,
)  # fmt: skip
def logits_grad_kernel(
    logits,  # [B, T, V], V contiguous; 16-byte aligned pointer, the first logit is `base` elements after it
    out,  # like logits; may be the same memory
    labels,  # [B T] int64
    logps, max, log_sum, grad_logps,  # [B T] float64
    ref_logits,  # like logits, or None
    ref_logps, ref_max, ref_log_sum, kl, grad_kl, grad_forward_kl,  # [B T] float64, or None
    tokens, vocab, ignore_index: tl.int64,
    stride_b: tl.int64, stride_t: tl.int64, base,
    out_stride_b: tl.int64, out_stride_t: tl.int64, out_base,
    ref_stride_b: tl.int64, ref_stride_t: tl.int64, ref_base,
    scale: tl.float64, cap: tl.float64, unit: tl.float64, per_unit: tl.float64, log2_per_nat: tl.float64,
    log2_scale: tl.float32,
    MAP: tl.constexpr, REVERSE: tl.constexpr, FORWARD: tl.constexpr,
    ALIGNED: tl.constexpr, IN_ALIGNED: tl.constexpr, REF_ALIGNED: tl.constexpr, FRAGMENTS: tl.constexpr,
    UNROLL: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    element: tl.constexpr = logits.dtype.element_ty
    scale = tl.full((), scale, tl.float64)
    cap = tl.full((), cap, tl.float64)
    unit = tl.full((), unit, tl.float64)
    per_unit = tl.full((), per_unit, tl.float64)
    log2_per_nat = tl.full((), log2_per_nat, tl.float64)
    log2_scale = tl.full((), log2_scale, tl.float32)
    inner = (scale / cap).to(tl.float32)
    SHORT: tl.constexpr = element.primitive_bitwidth == 16
    row = tl.program_id(0).to(tl.int64)
    b, t = row // tokens, row % tokens
    # Groups are counted from an address at which stores are aligned; loads that are not aligned there go element by element.
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
    moves = grad != 0
    if REVERSE:
        by_kl = tl.load(grad_kl + row)
        moves = moves | (by_kl != 0)
    if FORWARD:
        by_forward = tl.load(grad_forward_kl + row)
        moves = moves | (by_forward != 0)
    if (label64 == ignore_index) | (moves == 0):
        # Ignored, or without gradient: exact zeros, and no logit is read.
        zero = tl.zeros([LANES, 4], tl.float32)
        zeros = ()
        for _ in tl.static_range(UNROLL * GROUP // 4):
            zeros = zeros + (zero,)  # noqa: RUF005 (no star in Triton)
        if FRAGMENTS:
            edge, valid = fragments(head, groups, vocab, LANES, GROUP)
            tl.store(out + out_start + edge, tl.zeros([LANES, 1], element), mask=valid)
        for tile in range(full):
            store_tile(out, out_start + head, tile, groups, zeros, UNROLL, LANES, GROUP, False)
        if tiles > full:
            store_tile(out, out_start + head, full, groups, zeros, UNROLL, LANES, GROUP, True)
    else:
        in_range = (label64 >= 0) & (label64 < vocab)
        # For a label outside the vocabulary the whole row is NaN.
        label = tl.where(in_range, label64, 0).to(tl.int32)
        grad = tl.where(in_range, grad, float("nan"))
        start = b * stride_b + t * stride_t + base
        row_max, row_log_sum = tl.load(max + row), tl.load(log_sum + row)
        # The label's logit is not read here, because in place another warp may already have overwritten it with its gradient.
        # The values that depend on it are computed from its log-probability.
        logp = tl.load(logps + row)
        label_slope = scale
        if MAP == SOFTCAPPED:
            tanh = (row_max + (row_log_sum + logp)) / cap
            label_slope = scale * ((1.0 - tanh) * (1.0 + tanh))
        # 1 - p(label) without cancellation.
        p_label, less_one = exp_expm1(logp)
        others = -less_one
        by_p = -grad
        label_terms = grad * others
        ref_start = start
        ref_c, by_gap, top, ref_center, gap_limit, by_q, ref_scale = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, log2_scale
        if REVERSE or FORWARD:
            ref_start = b * ref_stride_b + t * ref_stride_t + ref_base
            ref_logp = tl.load(ref_logps + row)
            ref_row_max, ref_row_log_sum = tl.load(ref_max + row), tl.load(ref_log_sum + row)
        if REVERSE:
            # Replaced by 0 where it has no gradient, because it may be infinite there.
            divergence = tl.where(by_kl != 0, tl.load(kl + row), 0.0)
            label_terms -= tl.where(p_label > 0, by_kl * p_label * (divergence - logp + ref_logp), 0.0)
            # D = (ref_top - ref_center) unit + a rounding error, which is added to by_p.
            mean = divergence + row_log_sum - ref_row_log_sum
            top = (row_max * per_unit).to(tl.float32)
            ref_exact = (ref_row_max - mean) * per_unit
            ref_center = ref_exact.to(tl.float32)
            by_p -= by_kl * unit * (ref_center.to(tl.float64) - ref_exact)
        if FORWARD:
            by_p += by_forward
            label_terms += by_forward * (less_one - exp_expm1(ref_logp)[1])
            of_q = by_forward * scale
            ref_c, ref_rounding, ref_scale = _origin(
                ref_row_max,
                ref_row_log_sum,
                _excess(of_q, MOST),
                per_unit,
                log2_per_nat,
                log2_scale,
            )
            by_q = _saturated(of_q * ref_rounding)
        by_p *= scale
        excess = _excess(by_p, MOST)
        if REVERSE:
            of_gap = by_kl * (scale * unit)
            excess = tl.maximum(excess, _excess(of_gap, MOST_OF_GAP))
        c, c_rounding, own_scale = _origin(row_max, row_log_sum, excess, per_unit, log2_per_nat, log2_scale)
        factor = _saturated(by_p * c_rounding)
        if REVERSE:
            by_gap = (of_gap * c_rounding).to(tl.float32)
            # by_gap can still be large, if the excess could not be moved completely or the rounding error of c is large.
            size = tl.abs(by_gap)
            gap_limit = tl.where(size < 0.5, LARGEST, 0.5 * LARGEST / size)
        at_label = (label_terms * label_slope).to(tl.float32)
        whole_row = (c, factor, ref_c, by_gap, top, ref_center, gap_limit, by_q, own_scale, ref_scale)

        if FRAGMENTS:
            edge, valid = fragments(head, groups, vocab, LANES, GROUP)
            x = tl.load(logits + start + edge, mask=valid, other=0).to(tl.float32)
            ref_x = x
            if REVERSE or FORWARD:
                ref_x = tl.load(ref_logits + ref_start + edge, mask=valid, other=0).to(tl.float32)
            ends = _entries(x, ref_x, whole_row, inner, MAP, SHORT, REVERSE, FORWARD)
            tl.store(out + out_start + edge, rounded(tl.where(edge == label, at_label, ends), element), mask=valid)

        # First the label's tile and the last, partial one, with masks; then the main loop over all other tiles.
        place = label - head
        label_tile = tl.minimum(tl.maximum(place, 0) // (UNROLL * LANES * GROUP), tiles - 1)
        partial = ((tiles > full) & (label_tile != full)).to(tl.int32)
        for special in range(tl.minimum(tiles, 1 + partial)):
            _write_tile(
                logits, ref_logits, out, start + head, ref_start + head, out_start + head,
                tl.where(special == 0, label_tile, full), groups, place, at_label, whole_row, inner,
                MAP, REVERSE, FORWARD, IN_ALIGNED, REF_ALIGNED, UNROLL, LANES, GROUP, True,
            )  # fmt: skip
        for index in range(full - (label_tile < full).to(tl.int32)):
            _write_tile(
                logits, ref_logits, out, start + head, ref_start + head, out_start + head,
                index + (index >= label_tile).to(tl.int32), groups, place, at_label, whole_row, inner,
                MAP, REVERSE, FORWARD, IN_ALIGNED, REF_ALIGNED, UNROLL, LANES, GROUP, False,
            )  # fmt: skip


def logits_grad_launch(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    top: Tensor,
    log_sum: Tensor,
    grad_logps: Tensor,
    transform: Transform,
    out: Tensor,
    token_kl: TokenKL | None = None,
) -> Launch:
    """The kernel launch of `logits_grad`."""
    reference = dict.fromkeys(TokenKL._fields) if token_kl is None else token_kl._asdict()
    ref_logits = reference["ref_logits"]
    group = group_size(logits, ref_logits)
    pointer, base = aligned_base(logits)
    ref_pointer, ref_base = (None, 0) if ref_logits is None else aligned_base(ref_logits)
    out_pointer, out_base = aligned_base(out)
    # No maximum is taken here, so a negative scale can be folded into the exponential's FFMA, too.
    mapping, unit = (SOFTCAPPED, transform.softcap) if transform.softcap else (FOLDED, transform.scale)
    log2_scale = round_to_float32(unit * LOG2E.value)
    arguments = {
        "logits": pointer,
        "out": out_pointer,
        "labels": labels,
        "logps": logps,
        "max": top,
        "log_sum": log_sum,
        "grad_logps": grad_logps,
        **reference,
        "ref_logits": ref_pointer,
        "tokens": logits.shape[1],
        "vocab": logits.shape[2],
        "ignore_index": transform.ignore_index,
        "stride_b": logits.stride(0),
        "stride_t": logits.stride(1),
        "base": base,
        "out_stride_b": out.stride(0),
        "out_stride_t": out.stride(1),
        "out_base": out_base,
        "ref_stride_b": 0 if ref_logits is None else ref_logits.stride(0),
        "ref_stride_t": 0 if ref_logits is None else ref_logits.stride(1),
        "ref_base": ref_base,
        "scale": transform.scale,
        "cap": transform.softcap,
        "unit": unit,
        "per_unit": 1.0 / unit if unit else 0.0,
        "log2_per_nat": log2_scale / unit if unit else LOG2E.value,
        "log2_scale": log2_scale,
        "MAP": mapping.value,
        "REVERSE": reference["grad_kl"] is not None,
        "FORWARD": reference["grad_forward_kl"] is not None,
        "ALIGNED": rows_aligned(out, group),
        "IN_ALIGNED": shifted_alike(logits, out, group),
        "REF_ALIGNED": ref_logits is None or shifted_alike(ref_logits, out, group),
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
    top: Tensor,
    log_sum: Tensor,
    grad_logps: Tensor,
    transform: Transform,
    out: Tensor,
    token_kl: TokenKL | None = None,
) -> None:
    """Stage 3; the logits of `token_kl` are float32, bfloat16 or float16."""
    logits_grad_launch(logits, labels, logps, top, log_sum, grad_logps, transform, out, token_kl).run(logits)
