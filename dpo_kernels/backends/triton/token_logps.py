"""Stage 1 in Triton: log-probability of the label, log-sum-exp and statistics of every token, in one read of its logits.

Data flow, one program (4 warps) per token:

    read     labels once; nothing else if the token is ignored
             the label's logit, then the row's logits once, and for kl the reference's row once, in the same loop
    on chip  per lane (thread): maximum m, c = m log2(e), sum of 2^(x log2(e) - c), and if asked the two moments, the sum of
             squares and the sum of x. Lanes exchange nothing in the loop; they are merged after it, in a fixed order.
             Only the first warp executes the last steps, which are in float64.
    write    8 bytes per token and output

The sum does not include the label's own term: with d = log(sum of the others) - z_label, logp = -softplus(d), which keeps full
relative precision if p(label) is near 1. The tile of the label and the last, partial tile need masks and are processed first.
The main loop processes all other tiles without a mask (index + (index >= label_tile)).

In two rare cases a row is read again. First, `_careful_row` reads a row again, with every sum guarded, if it has -inf among its
logits and a moment is asked (0 * inf is NaN), logits beyond 2^31, sums beyond float32, or very different policy and reference.
Second, if accuracy is asked and the label's logit equals the largest other one, the row is searched for a logit that is larger,
or equal and earlier.

Issue slots per logit of the main loop in bfloat16; a thread processes 32 logits per iteration:

    convert 1, maximum 1/2 (packed pairs; less on sm_90 and later, 3 operands), FFMA 1, ex2 1, add 1    4.5
    per iteration 4 loads, one rescale (FMUL, FADD, ex2, FFMA), about 10 for loop and addresses, / 32   0.5
    entropy, log_sum_sq: 1 FFMA each for the product and its sum (ptxas keeps some FMUL + FADD)         1 to 1.5
    mean: add 1.  accuracy: nothing in the loop.
    kl, per pair of logits: FADD 1, FFMA 1, in addition to the same 5 for each of the two

An unaligned row needs 5 loads and 4 shifts for 8 logits instead of 1 load: 1 more slot. softcap: about 17 more, for a tanh with
float32 rounding. The compiled code is in benchmarks/results/machine_code.json and guarded by tests/test_triton_aot.py.

Each row belongs to one program, so fewer than about 8 rows per SM leave a GPU partly idle. Splitting rows would need a second
launch or counters; preference training, with thousands of tokens, does not need it.
"""

# mypy: disable-error-code="assignment"
# (mypy gives a tuple that grows a new type at each step; Triton's compiler does not.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...stages import STATISTICS, Transform, token_rows
from .device import (
    FLOOR,
    FOLDED,
    HIDDEN,
    LARGE,
    LN2,
    SOFTCAPPED,
    TARGET,
    TINY,
    columns,
    device_function,
    exp2_fast,
    first_warp,
    fragments,
    fused,
    lane_dot,
    lane_max,
    lane_sum,
    load_tile,
    log1p_double,
    raw_lane_max,
    rounded_product,
    scaled_label,
    tanh_accurate,
    to_float,
    widen,
)
from .launch import LANES, OPTIONS, SMALL, UNROLL, Launch, aligned_base, exponent_map, group_size, rows_aligned

#: The main loop needs at most 64 registers. Without this limit some versions of ptxas use 80 to 90 for the code after it, which
#: would reduce occupancy by a third. With kl the loop itself needs more.
WITHOUT_KL = OPTIONS | ({"maxnreg": 64} if TARGET == "cuda" else {})

#: Columns per step when a row is read again: SCAN for a maximum or a count, SUMS_SCAN for six float64 sums per column, which with
#: more columns would need more registers than the main loop.
SCAN = tl.constexpr(1024)
SUMS_SCAN = tl.constexpr(256)
#: kSmallGap of csrc/common/online_softmax.h.
SMALL_GAP = tl.constexpr(4.0)


@device_function
def _variable(x, inner, MAP: tl.constexpr):
    """The kernel's variable for a stored logit x (launch.exponent_map); `inner` is scale / cap, or scale without a cap."""
    if MAP == FOLDED:
        return x
    elif MAP == SOFTCAPPED:
        return tanh_accurate(x * inner)[0]
    else:
        return x * inner


@device_function
def _raise_max(m, c, top, log2_scale):
    """Raise each lane's maximum to at least `top`: (m, c, shift, rescale), with c = m * log2_scale rounded."""
    m = tl.maximum(m, top)
    c_new = rounded_product(m, log2_scale)
    shift = c - c_new
    return m, c_new, shift, exp2_fast(shift)


@device_function
def _variables(raw, inner, element: tl.constexpr, MAP: tl.constexpr):
    """The kernel's variable for every entry of a loaded tile, in parts."""
    parts = to_float(raw, element)
    x = ()
    for i in tl.static_range(len(parts)):
        x = x + (_variable(parts[i], inner, MAP),)  # noqa: RUF005 (no star in Triton)
    return x


@device_function
def _exponents(x, c, log2_scale):
    """y = x * log2_scale - c for a tile."""
    y = ()
    for i in tl.static_range(len(x)):
        y = y + (fused(x[i], log2_scale, c[:, None]),)  # noqa: RUF005
    return y


@device_function
def _exp2(y):
    e = ()
    for i in tl.static_range(len(y)):
        e = e + (exp2_fast(y[i]),)  # noqa: RUF005
    return e


@device_function
def _difference(x, other):
    gap = ()
    for i in tl.static_range(len(x)):
        gap = gap + (x[i] - other[i],)  # noqa: RUF005
    return gap


@device_function
def _counting(
    raw, x, tile, groups, label, element: tl.constexpr, MAP: tl.constexpr,
    UNROLL: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(x, lane maxima) of a tile; MASKED: x is HIDDEN at the label and after the last group."""
    if MASKED:
        counting = ()
        for i in tl.static_range(len(x)):
            column = columns(tile, i, UNROLL, LANES, GROUP)
            keep = (column < groups * GROUP) & (column != label)
            counting = counting + (tl.where(keep, x[i], HIDDEN),)  # noqa: RUF005
        return counting, lane_max(counting)
    elif MAP == FOLDED:
        return x, raw_lane_max(raw, x, element)
    else:
        return x, lane_max(x)


@device_function
def _fold(
    state, x, top, ref_state, ref_x, ref_top, log2_scale, ENTROPY: tl.constexpr, KL: tl.constexpr, SQUARES: tl.constexpr
):
    """Add a tile of logits (and of the reference's) to the running state of every lane.

    state: maximum m, c = m * log2_scale rounded, s = sum e, t = sum e y, k = sum e (x - ref_x), q = sum e^2. There is one rescale
    per tile, which is not on the critical path. A logit of -inf makes t and k NaN (0 * inf); one test per row is cheaper than a
    guard of every product.
    """
    m, c, s, t, k, q = state
    ref_m, ref_c, ref_s = ref_state
    m, c, shift, rescale = _raise_max(m, c, top, log2_scale)
    y = _exponents(x, c, log2_scale)
    e = _exp2(y)
    if ENTROPY:
        t = rescale * (t + shift * s) + lane_dot(e, y)
    if SQUARES:
        q = rescale * rescale * q + lane_dot(e, e)
    if KL:
        k = rescale * k + lane_dot(e, _difference(x, ref_x))
        ref_m, ref_c, _, ref_rescale = _raise_max(ref_m, ref_c, ref_top, log2_scale)
        ref_s = ref_rescale * ref_s + lane_sum(_exp2(_exponents(ref_x, ref_c, log2_scale)))
    s = rescale * s + lane_sum(e)
    return (m, c, s, t, k, q), (ref_m, ref_c, ref_s)


@device_function
def _fold_tile(
    state, ref_state, total, logits, ref_logits, start, ref_start, tile, groups, label, inner, log2_scale,
    MAP: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, MEAN: tl.constexpr, SQUARES: tl.constexpr,
    ALIGNED: tl.constexpr, REF_ALIGNED: tl.constexpr,
    UNROLL: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Read one tile and add it to (state, ref_state, total); total is each lane's sum of x, including the label's."""
    element: tl.constexpr = logits.dtype.element_ty
    raw = load_tile(logits, start, tile, groups, UNROLL, LANES, GROUP, ALIGNED, MASKED)
    if KL:
        ref_element: tl.constexpr = ref_logits.dtype.element_ty
        ref_raw = load_tile(ref_logits, ref_start, tile, groups, UNROLL, LANES, GROUP, REF_ALIGNED, MASKED)
    x = _variables(raw, inner, element, MAP)
    if MEAN:
        # Entries that were not loaded are 0.
        total += lane_sum(x)
    x, top = _counting(raw, x, tile, groups, label, element, MAP, UNROLL, LANES, GROUP, MASKED)
    ref_x, ref_top = x, top
    if KL:
        ref_x = _variables(ref_raw, inner, ref_element, MAP)
        ref_x, ref_top = _counting(
            ref_raw, ref_x, tile, groups, label, ref_element, MAP, UNROLL, LANES, GROUP, MASKED
        )  # fmt: skip
    state, ref_state = _fold(state, x, top, ref_state, ref_x, ref_top, log2_scale, ENTROPY, KL, SQUARES)
    return state, ref_state, total


@device_function
def _careful_row(
    logits, ref_logits, start, ref_start, vocab, label, inner, log2_scale,
    MAP: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, MEAN: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """(top, s, t, k, q, total, ref_top, ref_s) of a row with extreme values, read two more times, with every sum guarded.

    Exponents are differences from the exact maximum `top`. Gaps are differences between policy and reference, each relative to
    its maximum. total includes the label's x and is scaled by TINY.
    """
    lowest = tl.full([SCAN], float("-inf"), tl.float32)
    m = lowest
    ref_m = lowest
    for block in range(tl.cdiv(vocab, SCAN)):
        column = tl.arange(0, SCAN) + block * SCAN
        inside = (column < vocab) & (column != label)
        x = _variable(widen(tl.load(logits + start + column, mask=inside, other=0.0)), inner, MAP)
        m = tl.maximum(m, tl.where(inside, x, lowest))
        if KL:
            ref_x = widen(tl.load(ref_logits + ref_start + column, mask=inside, other=0.0))
            ref_m = tl.maximum(ref_m, tl.where(inside, _variable(ref_x, inner, MAP), lowest))
    top = tl.max(m, 0)
    ref_top = tl.max(ref_m, 0)
    # If all logits are -inf, 0 is subtracted instead of the maximum.
    origin = tl.where(top == float("-inf"), 0.0, top)
    ref_origin = tl.where(ref_top == float("-inf"), 0.0, ref_top)
    s = tl.zeros([SUMS_SCAN], tl.float64)
    t = tl.zeros([SUMS_SCAN], tl.float64)
    k = tl.zeros([SUMS_SCAN], tl.float64)
    q = tl.zeros([SUMS_SCAN], tl.float64)
    total = tl.zeros([SUMS_SCAN], tl.float64)
    ref_s = tl.zeros([SUMS_SCAN], tl.float64)
    for block in range(tl.cdiv(vocab, SUMS_SCAN)):
        column = tl.arange(0, SUMS_SCAN) + block * SUMS_SCAN
        there = column < vocab
        inside = there & (column != label)
        x = _variable(widen(tl.load(logits + start + column, mask=there, other=0.0)), inner, MAP)
        if MEAN:
            total += tl.where(there, x * TINY, 0.0)
        y = (x - origin) * log2_scale
        e = tl.where(inside, exp2_fast(y), 0.0)
        s += e
        if ENTROPY:
            t += tl.where(e > 0, e * y, 0.0)
        if SQUARES:
            q += e * e
        if KL:
            ref_x = widen(tl.load(ref_logits + ref_start + column, mask=inside, other=0.0))
            ref_x = _variable(ref_x, inner, MAP)
            ref_s += tl.where(inside, exp2_fast((ref_x - ref_origin) * log2_scale), 0.0)
            gap = (x.to(tl.float64) - origin) - (ref_x.to(tl.float64) - ref_origin)
            k += tl.where(e > 0, e * gap, 0.0)
    return (
        top, tl.sum(s, 0), tl.sum(t, 0), tl.sum(k, 0), tl.sum(q, 0), tl.sum(total, 0), ref_top, tl.sum(ref_s, 0),
    )  # fmt: skip


@device_function
def _is_wrong(s, top, unit):
    """Whether the loop's sum of exponentials s is invalid: it overflowed or is 0, or the maximum `top` is LARGE."""
    return (tl.abs(top * unit) >= LARGE) | (s == 0) | ((tl.abs(s) < float("inf")) == 0)


@device_function
def _beaten(logits, start, vocab, label, value, sign):
    """Number of logits that are larger than the label's, or equal and before it, because argmax returns the first maximum.

    The stored logits are compared, times the sign of the scale: rounding in scale and softcap can make unequal logits equal.
    """
    count = tl.zeros([SCAN], tl.int32)
    for block in range(tl.cdiv(vocab, SCAN)):
        column = tl.arange(0, SCAN) + block * SCAN
        x = widen(tl.load(logits + start + column, mask=column < vocab, other=0.0)) * sign
        wins = (x > value * sign) | ((x == value * sign) & (column < label))
        count += (wins & (column < vocab)).to(tl.int32)
    return tl.sum(count, 0)


@device_function
def _merge(m, c, log2_scale):
    """(maximum over all lanes, its c, each lane's shift and rescale to it)."""
    top = tl.max(m, 0)
    c_top = rounded_product(top, log2_scale)
    shift = c - c_top
    return top, c_top, shift, exp2_fast(shift)


@device_function
def origin_shift(top, c, log2_scale):
    """Correction, in nats, of a log-sum relative to origin c, to make it relative to the maximum `top`.

    log2_scale is log2(e) rounded to float32, so the exponentials have a temperature with an error of about 1e-8. Without the
    correction a log-sum-exp would have that relative error. Relative to the maximum, the exponent of x is the exactly known one
    of `top` plus a small difference, and the error affects only that difference.
    """
    return LN2 * (c.to(tl.float64) - top.to(tl.float64) * log2_scale)


@device_function
def finish(s, shift, top_z, z_label):
    """(logp, max, log_sum, p_others, log_mass) in float64, from the sum s over all logits except the label's.

    top_z is the maximum of these logits, and shift the `origin_shift` of s. log_mass is log(s + the label's term), relative to
    the origin of s. With the log-odds d = log(sum of the others) - z_label: logp = -softplus(d) and p_others = sigmoid(d), both
    without cancellation, even if p(label) is near 1.
    """
    log_s = tl.log(s)
    d = (log_s + shift) + (top_z - z_label)
    e = tl.exp(-tl.abs(d))
    near = log1p_double(e)
    logp = -(tl.where(d > 0, d, 0.0) + near)
    # NaN as from log_softmax, which computes inf - inf.
    logp = tl.where(z_label == float("inf"), float("nan"), logp)
    log_mass = log_s + near + tl.where(d < 0, -d, 0.0)
    p_others = tl.where(d >= 0, 1.0, e) / (1.0 + e)
    ahead = z_label > top_z
    largest = tl.where(logp == logp, tl.where(ahead, z_label, top_z), float("nan"))
    return logp, largest, tl.where(ahead, -logp, log_mass + shift), p_others, log_mass


@device_function
def _put(pointer, row, value):
    if pointer is not None:
        tl.store(pointer + row, value)


# Arguments that vary from call to call must not cause a recompilation.
@triton.jit(
    do_not_specialize=[
        "tokens", "vocab", "ignore_index", "stride_b", "stride_t", "base", "ref_stride_b", "ref_stride_t", "ref_base"
    ],
    do_not_specialize_on_alignment=SMALL,
)  # fmt: skip
def token_logps_kernel(
    logits,  # [B, T, V], V contiguous; 16-byte aligned pointer, the first logit is `base` elements after it
    ref_logits,  # like logits, or None
    labels,  # [B T] int64
    logps, max, log_sum, ref_logps, ref_max, ref_log_sum,  # [B T] float64, or None if not asked; so are the next five
    entropy, kl, accuracy, mean_logits, log_sum_sq,
    tokens, vocab, ignore_index: tl.int64,
    stride_b: tl.int64, stride_t: tl.int64, base,
    ref_stride_b: tl.int64, ref_stride_t: tl.int64, ref_base,
    scale: tl.float64, cap: tl.float64, unit: tl.float64, log2_scale: tl.float32,
    MAP: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, ACCURACY: tl.constexpr, MEAN: tl.constexpr,
    SQUARES: tl.constexpr,
    ALIGNED: tl.constexpr, REF_ALIGNED: tl.constexpr, TAIL: tl.constexpr,
    UNROLL: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    scale = tl.full((), scale, tl.float64)
    cap = tl.full((), cap, tl.float64)
    unit = tl.full((), unit, tl.float64)
    if MAP == SOFTCAPPED:
        inner = (scale / cap).to(tl.float32)
    else:
        inner = scale.to(tl.float32)
    row = tl.program_id(0).to(tl.int64)
    label64 = tl.load(labels + row)
    if (label64 >= 0) & (label64 < vocab) & (label64 != ignore_index):
        label = label64.to(tl.int32)
        b, t_index = row // tokens, row % tokens
        start = b * stride_b + t_index * stride_t + base
        groups = vocab // GROUP
        x_raw = widen(tl.load(logits + start + label))
        x_label = _variable(x_raw, inner, MAP)
        ref_start = start
        if KL:
            ref_start = b * ref_stride_b + t_index * ref_stride_t + ref_base
            ref_raw_label = widen(tl.load(ref_logits + ref_start + label))

        m = tl.full([LANES], FLOOR, tl.float32)
        zero = tl.zeros([LANES], tl.float32)
        c = rounded_product(m, log2_scale)
        state = (m, c, zero, zero, zero, zero)
        ref_state = (m, c, zero)
        total = zero

        if TAIL:
            ends, valid = fragments(0, groups, vocab, LANES, GROUP)
            keep = valid & (ends != label)
            loaded = _variable(widen(tl.load(logits + start + ends, mask=valid, other=0)), inner, MAP)
            if MEAN:
                total = lane_sum((loaded,))
            x = (tl.where(keep, loaded, HIDDEN),)
            ref_x = x
            if KL:
                ref_loaded = widen(tl.load(ref_logits + ref_start + ends, mask=valid, other=0))
                ref_x = (tl.where(keep, _variable(ref_loaded, inner, MAP), HIDDEN),)
            state, ref_state = _fold(
                state, x, lane_max(x), ref_state, ref_x, lane_max(ref_x), log2_scale, ENTROPY, KL, SQUARES
            )

        # First the label's tile and the last, partial one, with masks; then the main loop over all other tiles.
        full = groups // (UNROLL * LANES)
        tiles = tl.cdiv(groups, UNROLL * LANES)
        label_tile = tl.minimum(label // (UNROLL * LANES * GROUP), tiles - 1)
        partial = ((tiles > full) & (label_tile != full)).to(tl.int32)
        for special in range(tl.minimum(tiles, 1 + partial)):
            tile = tl.where(special == 0, label_tile, full)
            state, ref_state, total = _fold_tile(
                state, ref_state, total, logits, ref_logits, start, ref_start, tile, groups, label, inner, log2_scale,
                MAP, ENTROPY, KL, MEAN, SQUARES, ALIGNED, REF_ALIGNED, UNROLL, LANES, GROUP, True,
            )  # fmt: skip
        for index in range(full - (label_tile < full).to(tl.int32)):
            tile = index + (index >= label_tile).to(tl.int32)
            state, ref_state, total = _fold_tile(
                state, ref_state, total, logits, ref_logits, start, ref_start, tile, groups, label, inner, log2_scale,
                MAP, ENTROPY, KL, MEAN, SQUARES, ALIGNED, REF_ALIGNED, UNROLL, LANES, GROUP, False,
            )  # fmt: skip

        m, c, s, t, k, q = state
        top, c_top, shift, rescale = _merge(m, c, log2_scale)
        s_row = tl.sum((rescale * s).to(tl.float64), 0)
        shift_row = origin_shift(top, c_top, log2_scale)
        t_row, k_row, q_row, total_row = s_row, s_row, s_row, s_row
        ref_top, ref_s_row, ref_shift_row = top, s_row, shift_row
        if ENTROPY:
            t_row = tl.sum((rescale * (t + shift * s)).to(tl.float64), 0)
        if SQUARES:
            q_row = tl.sum((rescale * rescale * q).to(tl.float64), 0)
        if MEAN:
            total_row = tl.sum(total.to(tl.float64), 0)
        hostile = _is_wrong(s_row, top, unit)
        if KL:
            k_row = tl.sum((rescale * k).to(tl.float64), 0)
            ref_m, ref_c, ref_s = ref_state
            ref_top, ref_c_top, _ref_shift, ref_rescale = _merge(ref_m, ref_c, log2_scale)
            ref_s_row = tl.sum((ref_rescale * ref_s).to(tl.float64), 0)
            ref_shift_row = origin_shift(ref_top, ref_c_top, log2_scale)
            # If the maxima are far apart, float32 sums of the gaps are too inaccurate.
            hostile = hostile | _is_wrong(ref_s_row, ref_top, unit) | (tl.abs((top - ref_top) * unit) > 256)
            # From here on gaps are relative to both maxima.
            k_row -= s_row * (top.to(tl.float64) - ref_top.to(tl.float64))
            # Stage 3 subtracts the mean gap from single gaps. Where p is near 1 the difference is mostly rounding error.
            hostile = hostile | (tl.abs(k_row * unit) >= SMALL_GAP * s_row)
        # False if a lane's sum is infinite, or NaN by 0 * inf. (A NaN logit gives NaN in `_careful_row`, too.)
        sound = (tl.abs(t_row) < float("inf")) & (tl.abs(k_row) < float("inf")) & (tl.abs(total_row) < float("inf"))
        hostile = hostile | (sound == 0)
        if hostile:
            exact_top, exact_s, t_row, k_row, q_row, total_row, exact_ref_top, exact_ref_s = _careful_row(
                logits, ref_logits, start, ref_start, vocab, label, inner, log2_scale, MAP, ENTROPY, KL, MEAN, SQUARES
            )
            # A valid sum of the loop is kept, so the bits of a log-probability do not depend on the requested statistics.
            if _is_wrong(s_row, top, unit):
                top, s_row = exact_top, exact_s
                shift_row = tl.full((), 0.0, tl.float64)
            if KL:  # noqa: SIM102 (the first is the compiler's)
                if _is_wrong(ref_s_row, ref_top, unit):
                    ref_top, ref_s_row = exact_ref_top, exact_ref_s
                    ref_shift_row = tl.full((), 0.0, tl.float64)
            # The moments are converted to the origin and scale of s_row, as those of the loop are.
            ratio = tl.where(exact_s > 0, s_row / tl.where(exact_s > 0, exact_s, 1.0), 1.0)
            t_row = ratio * (t_row - tl.where(exact_s > 0, shift_row / LN2, 0.0) * exact_s)
            k_row = ratio * k_row
            q_row = ratio * ratio * q_row
            total_row = total_row / TINY
        if ACCURACY:
            hit = x_label > top
            near = x_label == top
            sign = 1.0
            if MAP != FOLDED:
                # Rounding makes the transform non-monotone in the last place.
                near = tl.abs(x_label - top) <= tl.abs(top) * 2.0**-20
                sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0)).to(tl.float32)
            if near:
                hit = _beaten(logits, start, vocab, label, x_raw, sign) == 0

        if first_warp():
            z_label = scaled_label(x_raw, scale, cap, MAP)[0]
            top_z = top.to(tl.float64) * unit
            logp, max_z, log_sum_row, p_others, log_mass = finish(s_row, shift_row, top_z, z_label)
            tl.store(logps + row, logp)
            tl.store(max + row, max_z)
            tl.store(log_sum + row, log_sum_row)
            p_label = tl.exp(logp)
            # A sum over the other logits has to be multiplied by p_others / s.
            share = p_others / tl.where(s_row > 0, s_row, 1.0)
            if ENTROPY:
                others = tl.where(s_row == 0, 0.0, p_others * log_mass - LN2 * (share * t_row))
                tl.store(entropy + row, others - tl.where(p_label > 0, p_label * logp, 0.0 * p_label))
            if KL:
                ref_z_label = scaled_label(ref_raw_label, scale, cap, MAP)[0]
                ref_top_z = ref_top.to(tl.float64) * unit
                ref_logp, ref_max_z, ref_log_sum_row, _ref_p_others, _ref_mass = finish(
                    ref_s_row, ref_shift_row, ref_top_z, ref_z_label
                )
                tl.store(ref_logps + row, ref_logp)
                tl.store(ref_max + row, ref_max_z)
                tl.store(ref_log_sum + row, ref_log_sum_row)
                others = tl.where(s_row == 0, 0.0, unit * (share * k_row))
                # If all other logits are -inf, gaps are relative to the label's logit.
                origin = tl.where(top_z > float("-inf"), top_z, z_label)
                ref_origin = tl.where(ref_top_z > float("-inf"), ref_top_z, ref_z_label)
                # The two parts are made relative to the maxima separately: if the label's logit is 1e20, a common correction of
                # their sum would lose the other part to rounding.
                moved = (max_z - origin) - (ref_max_z - ref_origin)
                others -= tl.where(p_others > 0, p_others * moved, 0.0 * p_others)
                gap = (z_label - max_z) - (ref_z_label - ref_max_z)
                at_label = tl.where(p_label > 0, p_label * gap, 0.0 * p_label)
                tl.store(kl + row, (others + at_label) - (log_sum_row - ref_log_sum_row))
            if SQUARES:
                # sum p^2 is p_label^2 plus (p_others / s)^2 times the sum of squares of the others.
                tl.store(log_sum_sq + row, tl.log(p_label * p_label + share * share * q_row))
            if ACCURACY:
                tl.store(accuracy + row, tl.where(logp == logp, hit.to(tl.float64), float("nan")))
            if MEAN:
                tl.store(mean_logits + row, unit * (total_row / vocab))
    else:
        # All results are 0 for an ignored token and NaN for a label outside the vocabulary; logits are not read.
        fill = tl.where(label64 == ignore_index, 0.0, float("nan")).to(tl.float64)
        _put(logps, row, fill)
        _put(max, row, fill)
        _put(log_sum, row, fill)
        _put(ref_logps, row, fill)
        _put(ref_max, row, fill)
        _put(ref_log_sum, row, fill)
        _put(entropy, row, fill)
        _put(kl, row, fill)
        _put(accuracy, row, fill)
        _put(mean_logits, row, fill)
        _put(log_sum_sq, row, fill)


def token_logps_launch(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    rows: dict[str, Tensor],
    transform: Transform,
) -> Launch:
    """The kernel launch that computes `rows`, the requested ones of `token_rows` by name.

    logits and ref_logits are [B, T, V], labels [B, T] int64. ref_logits is given if and only if kl is asked.
    """
    group = group_size(logits, ref_logits)
    pointer, base = aligned_base(logits)
    ref_pointer, ref_base = (None, 0) if ref_logits is None else aligned_base(ref_logits)
    mapping, unit, log2_scale = exponent_map(transform.scale, transform.softcap)
    arguments = {
        "logits": pointer,
        "ref_logits": ref_pointer,
        "labels": labels,
        **{name: rows.get(name) for name in token_rows(True, STATISTICS)},
        "tokens": logits.shape[1],
        "vocab": logits.shape[2],
        "ignore_index": transform.ignore_index,
        "stride_b": logits.stride(0),
        "stride_t": logits.stride(1),
        "base": base,
        "ref_stride_b": 0 if ref_logits is None else ref_logits.stride(0),
        "ref_stride_t": 0 if ref_logits is None else ref_logits.stride(1),
        "ref_base": ref_base,
        "scale": transform.scale,
        "cap": transform.softcap,
        "unit": unit,
        "log2_scale": log2_scale,
        "MAP": mapping,
        "ENTROPY": "entropy" in rows,
        "KL": "kl" in rows,
        "ACCURACY": "accuracy" in rows,
        "MEAN": "mean_logits" in rows,
        "SQUARES": "log_sum_sq" in rows,
        "ALIGNED": rows_aligned(logits, group),
        "REF_ALIGNED": ref_logits is None or rows_aligned(ref_logits, group),
        "TAIL": logits.shape[2] % group != 0,
        "UNROLL": UNROLL,
        "LANES": LANES,
        "GROUP": group,
    }
    return Launch(token_logps_kernel, (labels.numel(),), arguments, OPTIONS if "kl" in rows else WITHOUT_KL)


def token_logps(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    transform: Transform,
    statistics: tuple[str, ...],
) -> Tensor:
    """Stage 1.

    logits and ref_logits are float32, bfloat16 or float16. With kl the reference is read in the same launch; without, a separate
    launch computes its log-probabilities.
    """
    names = token_rows(ref_logits is not None, statistics)
    tokens = torch.empty(len(names), *labels.shape, dtype=torch.float64, device=logits.device)
    rows = dict(zip(names, tokens.unbind(0), strict=True))
    if ref_logits is not None and "kl" not in rows:
        alone = dict(
            zip(("logps", "max", "log_sum"), (rows.pop("ref_logps"), *torch.empty_like(tokens[:2])), strict=True)
        )
        token_logps_launch(ref_logits, labels, None, alone, transform).run(logits)
    token_logps_launch(logits, labels, ref_logits if "kl" in rows else None, rows, transform).run(logits)
    return tokens
