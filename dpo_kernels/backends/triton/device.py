"""Device functions shared by the Triton kernels: reading a row in 16-byte groups, base-2 exponentials, float64 finish.

How a row is cut. Row bases need not be 16-byte aligned (V = 50,257 in bfloat16 shifts every row by two bytes), so a row is
    head   the at most GROUP - 1 logits before the first aligned address
    body   whole groups of GROUP consecutive logits, each one 128-bit load of one thread
    tail   the at most GROUP - 1 logits left over
Head and tail together are the "fragments": one small masked load. The body is cut in tiles of UNROLL x LANES groups.
A tile is a tensor [UNROLL, LANES, GROUP] whose lane axis is spread over the threads and whose other two axes live in
one thread: reductions over them are plain register arithmetic, and all UNROLL loads of a tile are issued before the
first value is used.

16-bit logits are read as int32 pairs. The maximum of a tile is then taken on packed pairs (half an instruction a
logit), and the conversion to float32 is a shift or a mask.
"""

import triton
import triton.language as tl

#: True where Triton's CPU interpreter runs the kernels; it has neither inline PTX nor fused multiply-add.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: Start of a running maximum: below every logit that can carry mass, and finite, so that no -inf meets a -inf.
FLOOR = tl.constexpr(-1.0e30)

#: How a logit x becomes z: folded into the exponential's FFMA, multiplied first (scale <= 0), or softcapped.
FOLDED, SCALED, SOFTCAPPED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def exp2_fast(x):
    """2^x by one MUFU. `ex2.approx.ftz` skips the denormal range's rescue, which costs three instructions more."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def fused(x, factor, offset):
    """x * factor - offset with a single rounding, so that `offset` is subtracted exactly as stored."""
    if INTERPRETED:
        return (x.to(tl.float64) * factor - offset).to(tl.float32)
    else:
        return tl.fma(x, factor, -offset)


@triton.jit
def _max_pair_bf16(a, b):
    return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _max_pair_fp16(a, b):
    return tl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _unpack(pairs, element: tl.constexpr):
    if element == tl.bfloat16:
        low = (pairs << 16).to(tl.float32, bitcast=True)
        high = (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        low = pairs.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def to_float(raw, element: tl.constexpr):
    """float32 values [UNROLL, LANES, GROUP] of a tile as load_groups returned it."""
    if raw.dtype == tl.int32:
        low, high = _unpack(raw, element)
        return tl.reshape(tl.join(low, high), [raw.shape[0], raw.shape[1], raw.shape[2] * 2])
    else:
        return raw.to(tl.float32)


@triton.jit
def lane_max(raw, values, element: tl.constexpr):
    """[LANES] float32: each lane's maximum of the tile, NaN ignored. Exact: no arithmetic happens to a logit."""
    if raw.dtype == tl.int32 and not INTERPRETED:
        if element == tl.bfloat16:
            top = tl.reduce(tl.reduce(raw, 2, _max_pair_bf16), 0, _max_pair_bf16)
        else:
            top = tl.reduce(tl.reduce(raw, 2, _max_pair_fp16), 0, _max_pair_fp16)
        low, high = _unpack(top, element)
        return tl.maximum(low, high)
    else:
        return tl.max(tl.max(values, 2), 0)


@triton.jit
def lane_sum(values):
    """[LANES]: each lane's sum over the tile, added in a fixed order inside one thread."""
    return tl.sum(tl.sum(values, 2), 0)


@triton.jit
def row_groups(row_start, vocab, GROUP: tl.constexpr, ALIGNED: tl.constexpr):
    """(first, head, groups) of the row that starts at element `row_start`.

    first: int64 index of its first aligned group; head: logits before it; groups: whole groups of the body.
    """
    if ALIGNED:
        return row_start // GROUP, 0, vocab // GROUP
    else:
        first = (row_start + (GROUP - 1)) // GROUP
        head = tl.minimum(first * GROUP - row_start, vocab).to(tl.int32)
        return first, head, (vocab - head) // GROUP


@triton.jit
def load_groups(
    pointer, first, tile, groups, UNROLL: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Tile number `tile` of a row: int32 pairs [UNROLL, LANES, GROUP / 2], or values [UNROLL, LANES, GROUP].

    VECTOR: `first` counts aligned groups, and each group is one vector load. Otherwise `first` is the element index at
    which group 0 starts, and elements are loaded one by one (for the second tensor of a kernel, where its rows are
    shifted against the first's). MASKED: groups from `groups` on are not read.
    """
    lane = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    if VECTOR:
        if pointer.dtype.element_ty.primitive_bitwidth == 16:
            typed = pointer.to(tl.pointer_type(tl.int32))
            WIDTH: tl.constexpr = GROUP // 2
        else:
            typed = pointer
            WIDTH: tl.constexpr = GROUP
        # 64-bit arithmetic stays outside the loop: within a row, offsets fit in 32 bits.
        pointers = typed + first * WIDTH
        offsets = tile * (UNROLL * LANES * WIDTH) + (lane[:, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :])
        if MASKED:
            return tl.load(pointers + offsets, mask=(tile * (UNROLL * LANES) + lane < groups)[:, :, None], other=0)
        else:
            return tl.load(pointers + offsets)
    else:
        return _load_elements(pointer + first, (tile * (UNROLL * LANES) + lane) * GROUP, groups * GROUP, GROUP, MASKED)


@triton.jit
def _load_elements(pointers, offsets, limit, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """float32 [UNROLL, LANES, WIDTH]: WIDTH consecutive elements per thread, each by its own load.

    MASKED: elements from offset `limit` on are not read. The joins keep what a thread loaded inside that thread.
    """
    if WIDTH == 1:
        if MASKED:
            return tl.load(pointers + offsets, mask=offsets < limit, other=0).to(tl.float32)
        else:
            return tl.load(pointers + offsets).to(tl.float32)
    else:
        front = _load_elements(pointers, offsets, limit, WIDTH // 2, MASKED)
        back = _load_elements(pointers, offsets + WIDTH // 2, limit, WIDTH // 2, MASKED)
        if WIDTH == 2:
            return tl.join(front, back)
        else:
            joined = tl.permute(tl.join(front, back), (0, 1, 3, 2))
            return tl.reshape(joined, [offsets.shape[0], offsets.shape[1], WIDTH])


@triton.jit
def fragments(head, groups, vocab, LANES: tl.constexpr, GROUP: tl.constexpr):
    """The head and the tail of a row as a tile [1, LANES, GROUP]: the head is lane 0's, the tail lane 1's.

    Returns (start [1, LANES], limit [1, LANES], columns, valid): lane l holds the columns start + 0 .. GROUP - 1,
    those below its limit being valid.
    """
    lane = tl.arange(0, LANES)[None, :]
    start = tl.where(lane == 0, 0, head + groups * GROUP)
    limit = tl.where(lane == 0, head, tl.where(lane == 1, vocab, 0))
    column = start[:, :, None] + tl.arange(0, GROUP)[None, None, :]
    return start, limit, column, column < limit[:, :, None]


@triton.jit
def load_fragments(pointer, row_start, start, limit, GROUP: tl.constexpr):
    """float32 [1, LANES, GROUP] of the columns that `fragments` laid out; 0 where not valid."""
    return _load_elements(pointer + row_start, start, limit, GROUP, True)


@triton.jit
def rounded(values, element: tl.constexpr):
    """float32 values in dtype `element`, rounded to nearest even."""
    if INTERPRETED and element == tl.bfloat16:
        # The interpreter's own conversion truncates.
        bits = values.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return values.to(element)


@triton.jit
def store_groups(
    pointer, first, tile, groups, values, UNROLL: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Write tile number `tile` of a row, rounded to the tensor's dtype; each group is one 128-bit store.

    `first` counts aligned groups. MASKED: groups from `groups` on are left alone.
    """
    lane = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    offsets = tile * (UNROLL * LANES * GROUP) + (lane[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :])
    values = rounded(values, pointer.dtype.element_ty)
    if MASKED:
        mask = (tile * (UNROLL * LANES) + lane < groups)[:, :, None]
        tl.store(pointer + first * GROUP + offsets, values, mask=mask)
    else:
        tl.store(pointer + first * GROUP + offsets, values)


@triton.jit
def columns(tile, head, UNROLL: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr):
    """[UNROLL, LANES, GROUP] int32: vocabulary index of each entry of a tile."""
    lane = tl.arange(0, UNROLL)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]
    return head + (tile * (UNROLL * LANES) + lane) * GROUP + tl.arange(0, GROUP)[None, None, :]


@triton.jit
def reciprocal(x):
    """1 / x by one MUFU, for x in [1, inf]."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def tanh_accurate(u):
    """(tanh u, 1 - tanh^2 u) to float32 rounding, both in relative terms.

    Below 0.6 by the series (relative error 4.5e-9 before rounding), above by (1 - e) / (1 + e), e = exp(-2|u|).
    """
    square = u * u
    series = 0.020795932039618492 + square * -0.005895108450204134
    series = -0.05378381907939911 + square * series
    series = 0.13331924378871918 + square * series
    series = -0.33333298563957214 + square * series
    small = u + u * (square * series)
    e = exp2_fast(tl.abs(u) * (-2.0 * 1.4426950408889634))
    r = reciprocal(1.0 + e)
    large = (1.0 - e) * r
    large = tl.where(u < 0, -large, large)
    return tl.where(tl.abs(u) < 0.6, small, large), 4.0 * (e * r) * r


@triton.jit
def log1p_double(x):
    """log(1 + x) for x >= 0, to float64 rounding (Kahan's correction of log(w) for w = 1 + x rounded)."""
    w = 1.0 + x
    near = w == 1.0
    safe = tl.where(near, 2.0, w)
    return tl.where(near, x, tl.where(w == float("inf"), x, tl.log(safe) * (x / (safe - 1.0))))


@triton.jit
def expm1_double(x):
    """exp(x) - 1 for x <= 0, to float64 rounding (Kahan)."""
    u = tl.exp(x)
    plain = (u == 1.0) | (u < 0.5)
    safe = tl.where(plain, 0.75, u)
    return tl.where(u == 1.0, x, tl.where(u < 0.5, u - 1.0, (safe - 1.0) * (x / tl.log(safe))))


@triton.jit
def softplus_double(x):
    """log(1 + exp(x)), exactly log 2 at 0, and 0 or inf at the ends."""
    return tl.where(x > 0, x, 0.0) + log1p_double(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid_double(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def scaled_label(x, scale, cap, MAP: tl.constexpr):
    """(z, dz/dx) of one logit in float64; scale and cap are float64."""
    x = x.to(tl.float64)
    if MAP == SOFTCAPPED:
        u = x * scale / cap
        e = expm1_double(-2.0 * tl.abs(u))
        tanh = -e / (2.0 + e)
        slope = 4.0 * (1.0 + e) / ((2.0 + e) * (2.0 + e))
        return cap * tl.where(u < 0, -tanh, tanh), scale * slope
    else:
        return x * scale, scale
