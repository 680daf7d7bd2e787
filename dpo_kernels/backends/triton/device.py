"""Device functions shared by the Triton kernels: reading a row in 16-byte groups, base-2 exponentials, float64 finish.

How a row is cut. A group is GROUP consecutive logits, 16 bytes; a tile [UNROLL, LANES, GROUP] is UNROLL x LANES groups,
its lane axis spread over the threads and its other two axes inside one thread. Reductions over those two are plain
register arithmetic, and all UNROLL loads of a tile are issued before the first value is used. What is left over at the
ends of a row (fewer than GROUP logits each) are the fragments: one small masked load.

The forward counts groups from the row's first logit, wherever that lies in memory, so that the order of every addition,
and so every bit of the result, is the same for a row in a contiguous tensor, in a strided view and behind padding. A
group is one 128-bit load if the row is 16-byte aligned. If not (V = 50,257 in bfloat16 shifts every row by two bytes) it
is GROUP / 2 + 1 loads of 32 bits, which all but the first find in L1, and a funnel shift each.
The backward adds nothing up, so there groups are counted from an aligned address.

16-bit logits are read as int32 pairs. The maximum of a tile is then taken on packed pairs (half an instruction a logit),
and the conversion to float32 is a shift or a mask.
"""

# mypy: disable-error-code="assignment"
# (A tuple that grows is one type to Triton's compiler and many to mypy.)

import triton
import triton.language as tl

#: True where Triton's CPU interpreter runs the kernels; it has neither inline PTX nor fused multiply-add.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

#: Decorates functions that kernels call. The interpreter would patch the whole language anew at each call of a jitted
#: function, which takes ten times as long as what the function does; a plain one runs inside its caller's patch.
device_function = (lambda function: function) if INTERPRETED.value else triton.jit

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: Start of a running maximum: below every logit that can carry mass, and finite, so that no -inf meets a -inf.
FLOOR = tl.constexpr(-1.0e25)
#: Stands in for an entry that a masked tile leaves out: far enough below FLOOR to have no mass, and finite, so that it
#: needs no guard in the moments. As float32, and as two bfloat16 in one int32.
HIDDEN = tl.constexpr(-1.0e30)
HIDDEN_PAIR = tl.constexpr(0xF14AF14A - (1 << 32))

#: How a logit x becomes z: folded into the exponential's FFMA, multiplied first (scale <= 0), or softcapped.
FOLDED, SCALED, SOFTCAPPED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@device_function
def exp2_fast(x):
    """2^x by one MUFU. `ex2.approx.ftz` skips the denormal range's rescue, which costs three instructions more."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@device_function
def fused(x, factor, offset):
    """x * factor - offset with a single rounding, so that `offset` is subtracted exactly as stored."""
    if INTERPRETED:
        return (x.to(tl.float64) * factor - offset).to(tl.float32)
    else:
        return tl.fma(x, factor, -offset)


@device_function
def _max_pair_bf16(a, b):
    return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@device_function
def _max_pair_fp16(a, b):
    return tl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@device_function
def _unpack(pairs, element: tl.constexpr):
    if element == tl.bfloat16:
        low = (pairs << 16).to(tl.float32, bitcast=True)
        high = (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        low = pairs.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@device_function
def to_float(raw, element: tl.constexpr):
    """float32 values [UNROLL, LANES, GROUP] of a tile as load_groups returned it."""
    if raw.dtype == tl.int32:
        low, high = _unpack(raw, element)
        return tl.reshape(tl.join(low, high), [raw.shape[0], raw.shape[1], raw.shape[2] * 2])
    else:
        return raw.to(tl.float32)


@device_function
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


@device_function
def lane_sum(values):
    """[LANES]: each lane's sum over the tile, added in a fixed order inside one thread."""
    return tl.sum(tl.sum(values, 2), 0)


@device_function
def _funnel_right(low, high, bits):
    """The 32 bits of the 64-bit number high:low that start at bit `bits`, which is 0 or 16."""
    if INTERPRETED:
        moved = ((low.to(tl.uint32, bitcast=True) >> 16) | (high.to(tl.uint32, bitcast=True) << 16)).to(
            tl.int32, bitcast=True
        )
        return tl.where(bits == 0, low, moved)
    else:
        return tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, bits], dtype=tl.int32, is_pure=True, pack=1
        )


@device_function
def _interleave(parts, WIDTH: tl.constexpr):
    """[UNROLL, LANES, WIDTH] of WIDTH tensors [UNROLL, LANES]; what a thread holds stays in that thread."""
    if WIDTH == 1:
        return parts[0]
    elif WIDTH == 2:
        return tl.join(parts[0], parts[1])
    else:
        pairs = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
        return tl.reshape(pairs, [parts[0].shape[0], parts[0].shape[1], 4])


@device_function
def _load_words(pointer, start, group, mask, GROUP: tl.constexpr, MASKED: tl.constexpr):
    """int32 pairs [UNROLL, LANES, GROUP / 2] of groups that start at any element: aligned words, shifted into place.

    A word is read whole if it holds a logit of the row, so at most one neighbouring logit is read with it, unused.
    """
    odd = ((pointer.to(tl.int64) // 2 + start) % 2).to(tl.int32)
    base = (pointer + (start - odd)).to(tl.pointer_type(tl.int32))
    offset = group * (GROUP // 2)
    low = _load(base + offset, mask, MASKED)
    words = ()
    for i in tl.static_range(1, GROUP // 2 + 1):
        # The last word is needed only where the row is off by one logit; else the one before it is read again.
        step = i if i < GROUP // 2 else i - 1 + odd
        high = _load(base + offset + step, mask, MASKED)
        words = words + (_funnel_right(low, high, tl.zeros_like(low) + odd * 16),)  # noqa: RUF005 (no star in Triton)
        low = high
    return _interleave(words, GROUP // 2)


@device_function
def _load(pointers, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=mask, other=0)
    else:
        return tl.load(pointers)


@device_function
def _load_elements(pointers, limit, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """float32 [UNROLL, LANES, WIDTH]: WIDTH consecutive elements per thread, each by its own load.

    MASKED: of each thread's elements only the first `limit` are read.
    """
    if WIDTH == 8:
        front = _load_elements(pointers, limit, 4, MASKED)
        back = _load_elements(pointers + 4, limit - 4, 4, MASKED)
        return tl.reshape(tl.permute(tl.join(front, back), (0, 1, 3, 2)), [front.shape[0], front.shape[1], 8])
    else:
        parts = ()
        for i in tl.static_range(WIDTH):
            parts = parts + (_load(pointers + i, i < limit, MASKED).to(tl.float32),)  # noqa: RUF005 (no star in Triton)
        return _interleave(parts, WIDTH)


@device_function
def load_groups(
    pointer, start, tile, groups, UNROLL: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Tile number `tile` of the groups that begin at element `start`: int32 pairs [UNROLL, LANES, GROUP / 2] of a 16-bit
    dtype, or float32 values [UNROLL, LANES, GROUP].

    ALIGNED: `start` is a multiple of GROUP, and each group is one vector load. MASKED: groups from `groups` on are not
    read.
    """
    PACKED: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth == 16
    group = tile * (UNROLL * LANES) + tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    mask = group < groups
    # 64-bit arithmetic stays outside the loop: within a row, offsets fit in 32 bits.
    if ALIGNED:
        WIDTH: tl.constexpr = GROUP // 2 if PACKED else GROUP
        typed = pointer.to(tl.pointer_type(tl.int32)) if PACKED else pointer
        offsets = group[:, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
        return _load(typed + start // GROUP * WIDTH + offsets, mask[:, :, None], MASKED)
    elif PACKED:
        return _load_words(pointer, start, group, mask, GROUP, MASKED)
    else:
        return _load_elements(pointer + start + group * GROUP, tl.where(mask, GROUP, 0), GROUP, MASKED)


@device_function
def fragments(head, groups, vocab, LANES: tl.constexpr, GROUP: tl.constexpr):
    """What lies before and after a row's groups, as a tile [1, LANES, GROUP]: the head is lane 0's, the tail lane 1's.

    Returns (begin [1, LANES], limit [1, LANES], columns, valid): a lane holds the columns from `begin` on, `limit` many.
    """
    lane = tl.arange(0, LANES)[None, :]
    tail = head + groups * GROUP
    begin = tl.where(lane == 0, 0, tail)
    limit = tl.where(lane == 0, head, tl.where(lane == 1, vocab - tail, 0))
    place = tl.arange(0, GROUP)[None, None, :]
    return begin, limit, begin[:, :, None] + place, place < limit[:, :, None]


@device_function
def load_fragments(pointer, start, begin, limit, GROUP: tl.constexpr):
    """float32 [1, LANES, GROUP] of what `fragments` laid out in the row that starts at `start`; 0 where not valid."""
    return _load_elements(pointer + start + begin, limit, GROUP, True)


@device_function
def rounded(values, element: tl.constexpr):
    """float32 values in dtype `element`, rounded to nearest even."""
    if INTERPRETED and element == tl.bfloat16:
        # The interpreter's own conversion truncates.
        bits = values.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return values.to(element)


@device_function
def store_groups(
    pointer, start, tile, groups, values, UNROLL: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Write tile number `tile` of the groups from element `start` on, a multiple of GROUP; a group is one 128-bit store.

    Values are rounded to the tensor's dtype. MASKED: groups from `groups` on are left alone.
    """
    # Unlike the loads' offsets (half as wide, being pairs) these cost least with the tile's place as a scalar of its own.
    first = tile * (UNROLL * LANES)
    lane = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    base = pointer + (start // GROUP + first) * GROUP
    pointers = base + (lane[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :])
    values = rounded(values, pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointers, values, mask=(first + lane < groups)[:, :, None])
    else:
        tl.store(pointers, values)


@device_function
def hide_in_pairs(pairs, tile, groups, label, UNROLL: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The bfloat16 pairs of a tile with HIDDEN at the label and in the groups from `groups` on."""
    group = tile * (UNROLL * LANES) + tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    half = tl.where(label % 2 == 0, 0xFFFF, -65536)
    without = (pairs & (-1 - half)) | (half & HIDDEN_PAIR)
    pair = group[:, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    return tl.where((group < groups)[:, :, None], tl.where(pair == label // 2, without, pairs), HIDDEN_PAIR)


@device_function
def columns(tile, head, UNROLL: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr):
    """[UNROLL, LANES, GROUP] int32: vocabulary index of each entry of a tile."""
    group = tile * (UNROLL * LANES) + tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    return head + (group[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :])


@device_function
def reciprocal(x):
    """1 / x by one MUFU, for x in [1, inf]."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@device_function
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


@device_function
def log1p_double(x):
    """log(1 + x) for x >= 0, to float64 rounding (Kahan's correction of log(w) for w = 1 + x rounded)."""
    w = 1.0 + x
    near = w == 1.0
    safe = tl.where(near, 2.0, w)
    return tl.where(near, x, tl.where(w == float("inf"), x, tl.log(safe) * (x / (safe - 1.0))))


@device_function
def expm1_double(x):
    """exp(x) - 1 for x <= 0, to float64 rounding (Kahan)."""
    u = tl.exp(x)
    plain = (u == 1.0) | (u < 0.5)
    safe = tl.where(plain, 0.75, u)
    return tl.where(u == 1.0, x, tl.where(u < 0.5, u - 1.0, (safe - 1.0) * (x / tl.log(safe))))


@device_function
def softplus_double(x):
    """log(1 + exp(x)), exactly log 2 at 0, and 0 or inf at the ends."""
    return tl.where(x > 0, x, 0.0) + log1p_double(tl.exp(-tl.abs(x)))


@device_function
def sigmoid_double(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@device_function
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
