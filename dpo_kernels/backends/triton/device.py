"""Device functions of the Triton kernels: rows in 16-byte groups, base-2 exponentials, float64 arithmetic per row.

Layout of a row. A group is GROUP consecutive logits, 16 bytes, held by one lane. A tile is UNROLL x LANES groups. In the kernels
a tile is a tuple of two-dimensional tensors [LANES, 4], its parts. Every version of Triton gives such a tensor the same layout:
lanes are spread over threads, and a thread holds its four values. (The layout of one tensor [UNROLL, LANES, GROUP] depends on
the version; some spread UNROLL over threads.) So a reduction over the values of a lane is register arithmetic, and all UNROLL
loads of a tile are issued before the first value is used. The fragments are the remaining logits at the ends of a row, fewer
than GROUP each; one small masked load reads them.

The forward pass counts groups from the first logit of a row, whatever its address. So the order of additions, and with it every
bit of the result, is the same for a row in a contiguous tensor, in a strided view and after padding. If the row is 16-byte
aligned, a group is one 128-bit load. Otherwise (V = 50,257 in bfloat16 shifts every row by two bytes) it is GROUP / 2 + 1 loads
of 32 bits, all but the first of which hit L1, and a funnel shift for each. The backward pass adds nothing up, so it counts groups
from an aligned address.

GROUP is 8 if every tensor is 16-bit. Logits are then loaded as int32 pairs: the maximum of a tile is taken on packed pairs (half
an instruction per logit), and the conversion to float32 is a shift or a mask, which gives two parts per load: the even columns
and the odd ones. If GROUP is 4, a load gives one part.
"""

# mypy: disable-error-code="assignment"
# (mypy gives a tuple that grows a new type at each step; Triton's compiler does not.)

import os

import torch
import triton
import triton.language as tl

#: True if Triton's CPU interpreter runs the kernels; it has no fused multiply-add.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

if INTERPRETED.value:
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _patch_with_index(tensor, scope):
        """Lets the interpreter of Triton 3.6 use an array of one element as a loop bound, which numpy >= 2.4 refuses."""
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_with_index

#: Target of the kernels, "cuda" or "hip": that of the installed torch, unless the environment names another one for compilation
#: ahead of time. Read once, at import.
TARGET = os.environ.get("DPO_KERNELS_TRITON_TARGET") or ("cuda" if torch.version.hip is None else "hip")
if TARGET not in ("cuda", "hip"):
    raise ValueError(f"DPO_KERNELS_TRITON_TARGET must be cuda or hip, not {TARGET!r}")

#: True if kernels may contain inline PTX. Each function with PTX also has a version in plain Triton, for AMD GPUs and the
#: interpreter.
PTX = tl.constexpr(TARGET == "cuda" and not INTERPRETED.value)

#: Decorator of functions that kernels call. The interpreter patches the whole language at each call of a jitted function, which
#: takes ten times as long as the function itself. A plain function runs inside the patch of its caller.
device_function = (lambda function: function) if INTERPRETED.value else triton.jit

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: Initial value of a running maximum: below every logit of nonzero probability, and finite, so that -inf - (-inf) cannot occur.
FLOOR = tl.constexpr(-1.0e25)
#: Value of the entries that a masked tile leaves out: far enough below FLOOR to have probability 0, and finite, so that the
#: moments need no guard.
HIDDEN = tl.constexpr(-1.0e30)

#: Factor for sums of logits or of their differences that could overflow without it.
TINY = tl.constexpr(2.0**-40)
#: From this size on, neighbouring float32 logits differ by 128 or more, and the rounding error of their product with log2(e),
#: which is 2^31 or more, exceeds the range of an exponent.
LARGE = tl.constexpr(1.4e9)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32

#: The map from a logit x to z: scale folded into the exponential's FFMA, multiplied before (scale <= 0), or softcap.
FOLDED, SCALED, SOFTCAPPED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@device_function
def first_warp():
    """True in the threads of a program's first warp; without PTX, in all threads.

    Used for the last steps of a row in float64, which otherwise every warp would repeat: GPUs with one float64 unit per 64
    float32 units need 16 cycles per warp and instruction. Code under this condition must not exchange data between threads, so
    reductions come before it. Storing a scalar is safe, because only the first thread stores it.
    """
    if PTX:
        thread = tl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        return thread < 32
    else:
        return True


@device_function
def exp2_fast(x):
    """2^x by one MUFU instruction. `ex2.approx.ftz` flushes subnormal numbers to 0, which saves three instructions."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@device_function
def fused(x, factor, offset):
    """x * factor - offset with a single rounding (fused multiply-add)."""
    if INTERPRETED:
        return (x.to(tl.float64) * factor - offset).to(tl.float32)
    else:
        return tl.fma(x, factor, -offset)


@device_function
def rounded_product(x, factor):
    """x * factor, rounded to float32.

    Compilers contract a plain product and a following addition into one fused multiply-add, which does not round the product.
    A difference of two equal products would then be the rounding error of one of them instead of 0: 10^17 at FLOOR, whose power
    of 2 is inf.
    """
    if INTERPRETED:
        return (x.to(tl.float64) * factor).to(tl.float32)
    elif PTX:
        # A product with an explicit rounding mode is never contracted.
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, factor], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        # A fused multiply-add with + 0 cannot be contracted further. (With + -0 the compiler would simplify it to a product.)
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
        # The interpreter's own conversion turns subnormal numbers into 0.
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@device_function
def to_float(raw, element: tl.constexpr):
    """The float32 parts of a tile from load_tile."""
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
    """[LANES]: each lane's maximum over a tile; NaN is ignored."""
    top = parts[0]
    for i in tl.static_range(1, len(parts)):
        top = tl.maximum(top, parts[i])
    return tl.max(top, 1)


@device_function
def raw_lane_max(raw, parts, element: tl.constexpr):
    """lane_max of a tile's stored logits, at half the cost if they are packed pairs; `parts` are their float32 values."""
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
    """[LANES]: each lane's sum over a tile, added within one thread in a fixed order."""
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
    """The 32 bits of the 64-bit number high:low from bit 16 * odd on; odd is 0 or 1."""
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
    """[LANES, 4] of groups that start at any element: four loads, whose values stay in the loading thread.

    16-bit pairs are loaded as aligned 32-bit words and shifted into place. A word is loaded if it contains a logit of the row, so
    at most one adjacent logit is loaded with it and not used.
    """
    if GROUP == 8:
        odd = ((pointer.to(tl.int64) // 2 + start) % 2).to(tl.int32)
        words = (pointer + (start - odd)).to(tl.pointer_type(tl.int32)) + group * 4
        low = _load(words, mask, MASKED)
        parts = ()
        for i in tl.static_range(1, 5):
            # The last word is needed only if the row starts at an odd logit; else the word before it is loaded again.
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
    """Tile number `tile` of the groups that begin at element `start`, as a tuple of UNROLL tensors [LANES, 4].

    The elements are int32 pairs of a 16-bit dtype if GROUP is 8, else elements as stored. ALIGNED: `start` is a multiple of
    GROUP, and each group is one vector load. MASKED: groups from `groups` on are not loaded, but 0.
    """
    # 64-bit arithmetic is outside the loop, because offsets within a row fit in 32 bits. The loads of a tile have constant
    # distances, which the compiler encodes as immediate offsets.
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
    """[LANES, 4] int32: columns of a tile's part, counted from the first logit of the first group."""
    STEP: tl.constexpr = GROUP // 4  # parts of a load
    first = (tile * UNROLL + part // STEP) * (LANES * GROUP) + part % STEP
    return first + (tl.arange(0, LANES)[:, None] * GROUP + tl.arange(0, 4)[None, :] * STEP)


@device_function
def fragments(head, groups, vocab, LANES: tl.constexpr, GROUP: tl.constexpr):
    """The logits before and after the groups of a row: (columns [LANES, 1], valid), at most one per lane."""
    lane = tl.arange(0, LANES)[:, None]
    column = tl.where(lane < GROUP, lane, head + groups * GROUP + (lane - GROUP))
    return column, tl.where(lane < GROUP, lane < head, (lane < 2 * GROUP) & (column < vocab))


@device_function
def rounded(values, element: tl.constexpr):
    """float32 values converted to dtype `element`, rounded to nearest even."""
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

    Parts are rounded to the tensor's dtype. MASKED: groups from `groups` on are not written.
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
    """1 / x by one MUFU instruction, for x in [1, inf]."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@device_function
def _where_below(x, limit: tl.constexpr, below, above):
    """`below` where x < limit, else `above`. Inline PTX, because compilers would keep the conditions of a tile in registers."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.lt.f32 p, $1, $2; selp.f32 $0, $3, $4, p; }", "=f,f,f,f,f",
            [x, tl.full((), limit, tl.float32), below, above], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.where(x < limit, below, above)


@device_function
def tanh_accurate(u):
    """(tanh u, 1 - tanh^2 u), both with a relative error of float32 rounding.

    For |u| < 0.6 by a series (relative error 4.5e-9 before rounding), else by (1 - e) / (1 + e) with e = exp(-2|u|).
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
    """log(1 + x) for x >= 0 to float64 rounding (Kahan's correction of log(w), w = 1 + x rounded)."""
    w = 1.0 + x
    near = w == 1.0
    safe = tl.where(near, 2.0, w)
    return tl.where(near, x, tl.where(w == float("inf"), x, tl.log(safe) * (x / (safe - 1.0))))


@device_function
def exp_expm1(x):
    """(exp(x), exp(x) - 1) of a float64 x, with errors of a few ulps. exp(x) is 0 below -708 and finite above 708.

    x = n log 2 + r with |r| <= log(2) / 2, and q = exp(r) - 1 by its series. Both results take about 25 instructions; the
    library's exp with a correction by its log takes 70.
    """
    # The sum with 1.5 * 2^52 has the rounded n in its lowest bits.
    inside = tl.where(x > 708.0, 708.0, tl.where(x < -708.0, -708.0, x))
    shifted = inside * LOG2E + 6755399441055744.0
    n = shifted - 6755399441055744.0
    # log 2 in two parts; the first has trailing zero bits, so its product with n is exact.
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
    """log(1 + exp(x)); exactly log 2 at 0, 0 at -inf, inf at inf."""
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
