"""Device functions shared by the Triton kernels: reading a row in 16-byte groups, base-2 exponentials, float64 finish.

How a row is cut. A group is GROUP consecutive logits, 16 bytes, and belongs to one lane; a tile is UNROLL x LANES groups.
In the kernels a tile is a tuple of separate two-dimensional tensors, its parts, each [LANES, 4]: such a tensor has but one
reasonable layout, lanes over threads and four values inside one, whichever Triton compiles it. (What a compiler makes of
[UNROLL, LANES, GROUP] depends on its version, and some spread UNROLL over threads.) So reductions over a lane's values are
plain register arithmetic, and all UNROLL loads of a tile are issued before the first value is used. What is left over at
the ends of a row (fewer than GROUP logits each) are the fragments: one small masked load.

The forward counts groups from the row's first logit, wherever that lies in memory, so that the order of every addition,
and so every bit of the result, is the same for a row in a contiguous tensor, in a strided view and behind padding. A
group is one 128-bit load if the row is 16-byte aligned. If not (V = 50,257 in bfloat16 shifts every row by two bytes) it
is GROUP / 2 + 1 loads of 32 bits, which all but the first find in L1, and a funnel shift each.
The backward adds nothing up, so there groups are counted from an aligned address.

GROUP is 8 where every tensor is 16-bit. Logits are then read as int32 pairs: the maximum of a tile is taken on packed
pairs (half an instruction a logit), and the conversion to float32 is a shift or a mask, which makes two parts of a load:
the even columns and the odd ones. Where GROUP is 4, a load is one part.
"""

# mypy: disable-error-code="assignment"
# (A tuple that grows is one type to Triton's compiler and many to mypy.)

import os

import torch
import triton
import triton.language as tl

#: True where Triton's CPU interpreter runs the kernels; it has no fused multiply-add.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

if INTERPRETED.value:
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _patch_with_index(tensor, scope):
        """The interpreter of Triton 3.6 makes a loop's bound of an array of one element, which numpy >= 2.4 refuses."""
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_with_index

#: What the kernels are compiled for, "cuda" or "hip": this PyTorch's own GPUs, unless the environment names another, for
#: compiling ahead of time. Read once, on import.
TARGET = os.environ.get("DPO_KERNELS_TRITON_TARGET") or ("cuda" if torch.version.hip is None else "hip")
if TARGET not in ("cuda", "hip"):
    raise ValueError(f"DPO_KERNELS_TRITON_TARGET must be cuda or hip, not {TARGET!r}")

#: True where kernels may hold inline PTX. Each function that does also has a form in plain Triton, for everything else:
#: AMD's GPUs and the interpreter.
PTX = tl.constexpr(TARGET == "cuda" and not INTERPRETED.value)

#: Decorates functions that kernels call. The interpreter would patch the whole language anew at each call of a jitted
#: function, which takes ten times as long as what the function does; a plain one runs inside its caller's patch.
device_function = (lambda function: function) if INTERPRETED.value else triton.jit

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: Start of a running maximum: below every logit that can carry mass, and finite, so that no -inf meets a -inf.
FLOOR = tl.constexpr(-1.0e25)
#: Stands in for an entry that a masked tile leaves out: far enough below FLOOR to have no mass, and finite, so that it
#: needs no guard in the moments.
HIDDEN = tl.constexpr(-1.0e30)

#: Logits, and gaps between them, are added up this much smaller where they may be so large that their sum overflows.
TINY = tl.constexpr(2.0**-40)
#: From this size on a float32 logit's neighbours are 128 away or more, and its product with log2(e), 2^31 or more, rounds by
#: more than an exponent has room for.
LARGE = tl.constexpr(1.4e9)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32

#: How a logit x becomes z: folded into the exponential's FFMA, multiplied first (scale <= 0), or softcapped.
FOLDED, SCALED, SOFTCAPPED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@device_function
def first_warp():
    """True in the threads of a program's first warp; where there is no PTX, in all threads.

    For a row's last steps in float64, which every thread would repeat: cards with one float64 unit for every 64 of float32
    need 16 cycles for each warp and instruction. What stands under this condition may exchange nothing between threads,
    so reductions come before it; a store of a scalar is the first thread's anyway.
    """
    if PTX:
        thread = tl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        return thread < 32
    else:
        return True


@device_function
def exp2_fast(x):
    """2^x by one MUFU. `ex2.approx.ftz` skips the denormal range's rescue, which costs three instructions more."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@device_function
def fused(x, factor, offset):
    """x * factor - offset with a single rounding, so that `offset` is subtracted exactly as stored."""
    if INTERPRETED:
        return (x.to(tl.float64) * factor - offset).to(tl.float32)
    else:
        return tl.fma(x, factor, -offset)


@device_function
def rounded_product(x, factor):
    """x * factor as a rounded float32.

    A compiler joins a plain product with a sum that it feeds, and then a difference of two such products, equal once both are
    rounded, is what the rounding of one dropped: 10^17 at FLOOR, and 2 to the power of that inf.
    """
    if INTERPRETED:
        return (x.to(tl.float64) * factor).to(tl.float32)
    elif PTX:
        # A product whose rounding is spelled out is never joined.
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, factor], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        # With + 0 it is a fused multiply-add already (+ -0 would be a plain product to the compiler).
        return tl.fma(x, factor, 0.0)


@device_function
def _max_bf16(a, b):
    return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@device_function
def _max_fp16(a, b):
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
def widen(x):
    """Stored logits as float32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        # The interpreter's own conversion takes subnormal numbers for 0.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@device_function
def to_float(raw, element: tl.constexpr):
    """The float32 parts of a tile as load_tile returned it."""
    parts = ()
    for u in tl.static_range(len(raw)):
        if raw[u].dtype == tl.int32:
            low, high = _unpack(raw[u], element)
            parts = parts + (low, high)  # noqa: RUF005 (no star in Triton)
        else:
            parts = parts + (widen(raw[u]),)  # noqa: RUF005
    return parts


@device_function
def lane_max(parts):
    """[LANES]: each lane's maximum of a tile, NaN ignored."""
    top = parts[0]
    for i in tl.static_range(1, len(parts)):
        top = tl.maximum(top, parts[i])
    return tl.max(top, 1)


@device_function
def raw_lane_max(raw, parts, element: tl.constexpr):
    """lane_max of a tile's stored logits, at half the price where they are pairs. `parts` are their float32 values."""
    if PTX and raw[0].dtype == tl.int32:
        top = raw[0]
        for u in tl.static_range(1, len(raw)):
            top = _max_bf16(top, raw[u]) if element == tl.bfloat16 else _max_fp16(top, raw[u])
        top = tl.reduce(top, 1, _max_bf16 if element == tl.bfloat16 else _max_fp16)
        low, high = _unpack(top, element)
        return tl.maximum(low, high)
    else:
        return lane_max(parts)


@device_function
def lane_sum(parts):
    """[LANES]: each lane's sum over a tile, added in a fixed order inside one thread."""
    total = parts[0]
    for i in tl.static_range(1, len(parts)):
        total += parts[i]
    return tl.sum(total, 1)


@device_function
def lane_dot(a, b):
    """[LANES]: each lane's sum of products over two tiles."""
    total = a[0] * b[0]
    for i in tl.static_range(1, len(a)):
        total += a[i] * b[i]
    return tl.sum(total, 1)


@device_function
def _funnel_right(low, high, odd):
    """The 32 bits of the 64-bit number high:low that start at bit 16 * odd; odd is 0 or 1."""
    if PTX:
        bits = tl.zeros_like(low) + odd * 16
        return tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, bits], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.where(odd == 0, low, ((low >> 16) & 0xFFFF) | (high << 16))


@device_function
def _load(pointers, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=mask, other=0)
    else:
        return tl.load(pointers)


@device_function
def _load_one_by_one(pointer, start, group, mask, GROUP: tl.constexpr, MASKED: tl.constexpr):
    """[LANES, 4] as _load_group returns it, of groups that start at any element: four loads, which stay in their thread.

    Pairs come as aligned words, shifted into place. A word is read whole if it holds a logit of the row, so at most one
    neighbouring logit is read with it, unused.
    """
    if GROUP == 8:
        odd = ((pointer.to(tl.int64) // 2 + start) % 2).to(tl.int32)
        words = (pointer + (start - odd)).to(tl.pointer_type(tl.int32)) + group * 4
        low = _load(words, mask, MASKED)
        parts = ()
        for i in tl.static_range(1, 5):
            # The last word is needed only where the row is off by one logit; else the one before it is read again.
            high = _load(words + (i if i < 4 else 3 + odd), mask, MASKED)
            parts = parts + (_funnel_right(low, high, odd),)  # noqa: RUF005
            low = high
    else:
        parts = ()
        for i in tl.static_range(4):
            parts = parts + (_load(pointer + start + group * 4 + i, mask, MASKED),)  # noqa: RUF005
    pairs = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))  # type: ignore[misc]
    return tl.reshape(pairs, [group.shape[0], 4])


@device_function
def load_tile(
    pointer, start, tile, groups, UNROLL: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Tile number `tile` of the groups that begin at element `start`: a tuple of UNROLL tensors [LANES, 4], int32 pairs
    of a 16-bit dtype if GROUP is 8, else elements as stored.

    ALIGNED: `start` is a multiple of GROUP, and each group is one vector load. MASKED: groups from `groups` on are not
    read, and 0.
    """
    # 64-bit arithmetic stays outside the loop: within a row, offsets fit in 32 bits. That a tile's loads lie a constant
    # apart is left to the compiler to see: then it is part of the instruction.
    group = tile * (UNROLL * LANES) + tl.arange(0, LANES)
    if ALIGNED:
        typed = pointer.to(tl.pointer_type(tl.int32)) if GROUP == 8 else pointer
        first = typed + start // GROUP * 4 + (group[:, None] * 4 + tl.arange(0, 4)[None, :])
    raw = ()
    for u in tl.static_range(UNROLL):
        mask = group + u * LANES < groups
        if ALIGNED:
            raw = raw + (_load(first + u * LANES * 4, mask[:, None], MASKED),)  # noqa: RUF005 (no star in Triton)
        else:
            raw = raw + (_load_one_by_one(pointer, start, group + u * LANES, mask, GROUP, MASKED),)  # noqa: RUF005
    return raw


@device_function
def columns(tile, part: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr):
    """[LANES, 4] int32: places of a tile's part, counted from the first group's first logit."""
    STEP: tl.constexpr = GROUP // 4  # parts of a load
    first = (tile * UNROLL + part // STEP) * (LANES * GROUP) + part % STEP
    return first + (tl.arange(0, LANES)[:, None] * GROUP + tl.arange(0, 4)[None, :] * STEP)


@device_function
def fragments(head, groups, vocab, LANES: tl.constexpr, GROUP: tl.constexpr):
    """What lies before and after a row's groups: (columns [LANES, 1], valid), at most one a lane."""
    lane = tl.arange(0, LANES)[:, None]
    column = tl.where(lane < GROUP, lane, head + groups * GROUP + (lane - GROUP))
    return column, tl.where(lane < GROUP, lane < head, (lane < 2 * GROUP) & (column < vocab))


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
def store_tile(
    pointer, start, tile, groups, parts, UNROLL: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Write tile number `tile` of the groups from element `start` on, a multiple of GROUP; a group is one vector store.

    Parts are rounded to the tensor's dtype. MASKED: groups from `groups` on are left alone.
    """
    group = tile * (UNROLL * LANES) + tl.arange(0, LANES)
    first = pointer + start // GROUP * GROUP + (group[:, None] * GROUP + tl.arange(0, GROUP)[None, :])
    for u in tl.static_range(UNROLL):
        values = tl.reshape(tl.join(parts[2 * u], parts[2 * u + 1]), [LANES, 8]) if GROUP == 8 else parts[u]
        values = rounded(values, pointer.dtype.element_ty)
        if MASKED:
            tl.store(first + u * LANES * GROUP, values, mask=(group + u * LANES < groups)[:, None])
        else:
            tl.store(first + u * LANES * GROUP, values)


@device_function
def reciprocal(x):
    """1 / x by one MUFU, for x in [1, inf]."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@device_function
def _where_below(x, limit: tl.constexpr, below, above):
    """`below` where x < limit, else `above`. As one sequence a value: compilers keep a tile of conditions in registers."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.lt.f32 p, $1, $2; selp.f32 $0, $3, $4, p; }", "=f,f,f,f,f",
            [x, tl.full((), limit, tl.float32), below, above], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.where(x < limit, below, above)


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
    # With the sign of u.
    large = ((1.0 - e) * r).to(tl.int32, bitcast=True) | (u.to(tl.int32, bitcast=True) & -0x80000000)
    large = large.to(tl.float32, bitcast=True)
    return _where_below(tl.abs(u), 0.6, small, large), 4.0 * (e * r) * r


@device_function
def log1p_double(x):
    """log(1 + x) for x >= 0, to float64 rounding (Kahan's correction of log(w) for w = 1 + x rounded)."""
    w = 1.0 + x
    near = w == 1.0
    safe = tl.where(near, 2.0, w)
    return tl.where(near, x, tl.where(w == float("inf"), x, tl.log(safe) * (x / (safe - 1.0))))


@device_function
def exp_expm1(x):
    """(exp(x), exp(x) - 1) of a float64 x, each to a few units in its last place. exp(x) is 0 below -708, finite above 708.

    x = n log 2 + r with |r| <= log(2) / 2, and q = exp(r) - 1 by its series: about 25 instructions for both results, where
    the library's exp and a correction by its log take 70.
    """
    # A sum with 1.5 * 2^52 holds the rounded n in its lowest bits.
    inside = tl.where(x > 708.0, 708.0, tl.where(x < -708.0, -708.0, x))
    shifted = inside * LOG2E + 6755399441055744.0
    n = shifted - 6755399441055744.0
    # log 2 in two parts; the first ends in zeros, so that n times it is exact.
    r = inside - n * 0.6931471803691238 - n * 1.9082149292705877e-10
    q = r * (1.0 / 6227020800) + 1.0 / 479001600
    q = q * r + 1.0 / 39916800
    q = q * r + 1.0 / 3628800
    q = q * r + 1.0 / 362880
    q = q * r + 1.0 / 40320
    q = q * r + 1.0 / 5040
    q = q * r + 1.0 / 720
    q = q * r + 1.0 / 120
    q = q * r + 1.0 / 24
    q = q * r + 1.0 / 6
    q = q * r + 0.5
    q = q * r + 1.0
    q = q * r
    power = ((shifted.to(tl.int64, bitcast=True) + 1023) << 52).to(tl.float64, bitcast=True)
    return tl.where(x < -708.0, 0.0, power * (1.0 + q)), power * q + (power - 1.0)


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
        e = exp_expm1(-2.0 * tl.abs(u))[1]
        tanh = -e / (2.0 + e)
        slope = 4.0 * (1.0 + e) / ((2.0 + e) * (2.0 + e))
        return cap * tl.where(u < 0, -tanh, tanh), scale * slope
    else:
        return x * scale, scale
