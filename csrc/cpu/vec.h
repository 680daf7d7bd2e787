// Fixed-width vectors for the row kernels, in the compiler's vector types. Intrinsics are used only where g++ 12 does
// not choose the instruction by itself: the maximum with a constant, rounding down, and the conversion of float16.
//
// The row kernels are compiled once per instruction set (see stages.h); DPO_VECTOR_BYTES is its register width.
// Everything here is in an unnamed namespace and force-inlined: if copies for different instruction sets shared a
// symbol, the linker would keep one of them, and a CPU without AVX-512 could run AVX-512 code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef DPO_VECTOR_BYTES
#define DPO_VECTOR_BYTES 16
#endif

#if defined(__AVX512F__) && DPO_VECTOR_BYTES == 64
#define DPO_MM(name) _mm512_##name
#include <immintrin.h>
#elif defined(__AVX2__) && DPO_VECTOR_BYTES == 32
#define DPO_MM(name) _mm256_##name
#include <immintrin.h>
#endif

#define DPO_INLINE inline __attribute__((always_inline))

namespace {

// Storage types of the 16-bit formats; there is no arithmetic in them.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename A>
struct Vec;

template <>
struct Vec<float> {
  // aligned(4): rows of an odd vocabulary size have any alignment. may_alias: the memory is also read as integers.
  typedef float type __attribute__((vector_size(DPO_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(DPO_VECTOR_BYTES), aligned(4), may_alias));
  typedef uint32_t bits __attribute__((vector_size(DPO_VECTOR_BYTES), aligned(4), may_alias));
  typedef uint16_t halves __attribute__((vector_size(DPO_VECTOR_BYTES / 2), aligned(2), may_alias));
  // A register of 16-bit numbers, as 32-bit pairs.
  typedef uint32_t pairs __attribute__((vector_size(DPO_VECTOR_BYTES), aligned(2), may_alias));
  static constexpr int lanes = DPO_VECTOR_BYTES / 4;
};

template <>
struct Vec<double> {
  typedef double type __attribute__((vector_size(DPO_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t integer __attribute__((vector_size(DPO_VECTOR_BYTES), aligned(8), may_alias));
  static constexpr int lanes = DPO_VECTOR_BYTES / 8;
};

using vf = Vec<float>::type;
using vd = Vec<double>::type;

template <typename A>
DPO_INLINE typename Vec<A>::type splat(A x) {
  return typename Vec<A>::type{} + x;
}

template <typename A>
DPO_INLINE typename Vec<A>::type load(const A* p) {
  return *reinterpret_cast<const typename Vec<A>::type*>(p);
}

template <typename A>
DPO_INLINE void store(A* p, typename Vec<A>::type v) {
  *reinterpret_cast<typename Vec<A>::type*>(p) = v;
}

// Two vectors, as many numbers as a register of 16-bit numbers has. Arithmetic on a pair alternates between the two
// vectors operation by operation, so the latency of one dependency chain is hidden by the other.
template <typename A>
struct Two {
  typename Vec<A>::type first, second;
};

template <typename A>
DPO_INLINE Two<A> operator+(Two<A> a, Two<A> b) {
  return {a.first + b.first, a.second + b.second};
}
template <typename A>
DPO_INLINE Two<A> operator-(Two<A> a, Two<A> b) {
  return {a.first - b.first, a.second - b.second};
}
template <typename A>
DPO_INLINE Two<A> operator*(Two<A> a, Two<A> b) {
  return {a.first * b.first, a.second * b.second};
}
template <typename A>
DPO_INLINE Two<A> operator+(Two<A> a, A b) {
  return {a.first + b, a.second + b};
}
template <typename A>
DPO_INLINE Two<A> operator-(Two<A> a, A b) {
  return {a.first - b, a.second - b};
}
template <typename A>
DPO_INLINE Two<A> operator*(Two<A> a, A b) {
  return {a.first * b, a.second * b};
}

// If either operand is NaN, the result is the second one, as of maxps: pass a value whose NaN must be kept second.
DPO_INLINE vf vmax(vf a, vf b) {
#ifdef DPO_MM
  return DPO_MM(max_ps)(a, b);
#else
  return a > b ? a : b;
#endif
}
DPO_INLINE vd vmax(vd a, vd b) { return a > b ? a : b; }
DPO_INLINE Two<float> vmax(vf a, Two<float> b) { return {vmax(a, b.first), vmax(a, b.second)}; }

// 2^n, where n + 127 is in the low bits of t.
DPO_INLINE vf power_in(vf t) {
  const auto bits = reinterpret_cast<const Vec<float>::integer&>(t) << 23;
  return reinterpret_cast<const vf&>(bits);
}
DPO_INLINE Two<float> power_in(Two<float> t) { return {power_in(t.first), power_in(t.second)}; }

// floor(x) for |x| < 2^22.
DPO_INLINE vf round_down(vf x) {
#ifdef DPO_MM
  return DPO_MM(floor_ps)(x);
#else
  const vf nearest = (x + 12582912.0f) - 12582912.0f;
  return nearest > x ? nearest - 1.0f : nearest;
#endif
}

// exp(x) for x <= 0 (valid up to 88) with a relative error below 1e-7; exactly 1 at 0, exactly 0 below -88 and for
// -inf, NaN for NaN. 2^n is made from the low bits of t, where the magic number leaves n + 127. x * log2(e) is rounded
// once, in the FMA. log2(e) is split into two floats: a single one has a relative error of 1.3e-8, and exp(x) would
// have one of 1.3e-8 |x|, always with the same sign. That is visible in a KL divergence between distributions that
// differ by tens of nats.
template <typename V>
DPO_INLINE V exp_by_polynomial(V x) {
  constexpr float log2e = 1.44269504088896341f, log2e_rest = 1.925963033500e-8f;
  constexpr float magic = 12582912.0f + 127.0f;
  x = vmax(splat(-88.05f), x);
  const V t = x * log2e + magic;
  const V n = t - magic;
  const V f = x * log2e_rest + (x * log2e - n);
  V p = f * 1.5353361903787903e-4f + 1.339887441387677e-3f;
  p = p * f + 9.618437357683739e-3f;
  p = p * f + 5.550332471126454e-2f;
  p = p * f + 2.402264791362875e-1f;
  p = p * f + 6.931472028550659e-1f;
  p = p * f + 1.0f;
  return p * power_in(t);
}
DPO_INLINE vf exp_nonpositive(vf x) { return exp_by_polynomial(x); }
DPO_INLINE Two<float> exp_nonpositive(Two<float> x) { return exp_by_polynomial(x); }

// float64 serves for checks, so it uses libm lane by lane.
DPO_INLINE vd exp_nonpositive(vd x) {
  vd out = {};
  for (int i = 0; i < Vec<double>::lanes; ++i) out[i] = std::exp(x[i]);
  return out;
}

DPO_INLINE Two<double> exp_nonpositive(Two<double> x) { return {exp_nonpositive(x.first), exp_nonpositive(x.second)}; }

// tanh for the logit softcap; by a polynomial near 0, where the formula with exp would cancel.
DPO_INLINE vf tanh_any(vf x) {
  const vf magnitude = x < 0.0f ? -x : x;
  const vf e = exp_nonpositive(-2.0f * magnitude);
  const vf large = (1.0f - e) / (1.0f + e);
  const vf s = x * x;
  vf p = s * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * s + -5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s + -3.33332819422e-1f;
  const vf small = x + x * s * p;
  return magnitude < 0.625f ? small : (x < 0.0f ? -large : large);
}

DPO_INLINE vd tanh_any(vd x) {
  vd out = {};
  for (int i = 0; i < Vec<double>::lanes; ++i) out[i] = std::tanh(x[i]);
  return out;
}

DPO_INLINE vf load_as_float(const BFloat16* p) {
  const auto wide = __builtin_convertvector(*reinterpret_cast<const Vec<float>::halves*>(p), Vec<float>::bits) << 16;
  return reinterpret_cast<const vf&>(wide);
}

#ifdef DPO_MM
#if DPO_VECTOR_BYTES == 64
using HalfRegister = __m256i;
#else
using HalfRegister = __m128i;
#endif
DPO_INLINE vf load_as_float(const Half* p) {
  HalfRegister halves;
  std::memcpy(&halves, p, sizeof halves);
  return DPO_MM(cvtph_ps)(halves);
}

// Rounds to nearest even, as torch does.
DPO_INLINE void store_from_float(Half* p, vf v) {
  const HalfRegister halves = DPO_MM(cvtps_ph)(v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &halves, sizeof halves);
}
#else
// float16 to float32 by integer arithmetic: the exponent field is shifted into place and the number rescaled by 2^112,
// which is also right for subnormal numbers; infinities and NaN get the largest exponent.
DPO_INLINE vf load_as_float(const Half* p) {
  const auto h = __builtin_convertvector(*reinterpret_cast<const Vec<float>::halves*>(p), Vec<float>::bits);
  const auto shifted = (h & 0x7fffu) << 13;
  const vf scaled = reinterpret_cast<const vf&>(shifted) * 5.192296858534828e33f;
  auto bits = reinterpret_cast<const Vec<float>::bits&>(scaled);
  bits = (h & 0x7c00u) == 0x7c00u ? (shifted | 0x7f800000u) : bits;
  bits |= (h & 0x8000u) << 16;
  return reinterpret_cast<const vf&>(bits);
}

DPO_INLINE void store_from_float(Half* p, vf v) {
  using bits_t = Vec<float>::bits;
  const bits_t all = reinterpret_cast<const bits_t&>(v);
  const bits_t sign = all & 0x80000000u;
  const bits_t u = all ^ sign;
  // Normal float16: rebias the exponent, and round to nearest even at the 13 dropped bits.
  const bits_t normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  // Subnormal float16: adding 0.5 makes the processor align and round the mantissa at 2^-24.
  const vf aligned = reinterpret_cast<const vf&>(u) + 0.5f;
  const bits_t subnormal = reinterpret_cast<const bits_t&>(aligned) - 0x3f000000u;
  bits_t out = u < (113u << 23) ? subnormal : normal;
  out = u >= 0x47800000u ? bits_t{} + 0x7c00u : out;
  out = u > 0x7f800000u ? bits_t{} + 0x7e00u : out;
  out |= sign >> 16;
  *reinterpret_cast<Vec<float>::halves*>(p) = __builtin_convertvector(out, Vec<float>::halves);
}
#endif

// Round to nearest even, as torch does; NaN stays NaN.
DPO_INLINE void store_from_float(BFloat16* p, vf v) {
  using bits_t = Vec<float>::bits;
  const bits_t u = reinterpret_cast<const bits_t&>(v);
  const bits_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bits_t quiet = bits_t{} + 0x7fc0u;
  const bits_t out = (u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
  *reinterpret_cast<Vec<float>::halves*>(p) = __builtin_convertvector(out, Vec<float>::halves);
}

template <typename A>
DPO_INLINE Two<A> load_two(const A* p) {
  return {load<A>(p), load<A>(p + Vec<A>::lanes)};
}

DPO_INLINE Two<float> load_two(const Half* p) { return {load_as_float(p), load_as_float(p + Vec<float>::lanes)}; }

// The numbers at even positions, then those at odd ones: a bfloat16 is the upper half of a float, so each takes one
// instruction. The original order would need a permutation; sums and element-wise operations do not depend on it.
DPO_INLINE Two<float> load_two(const BFloat16* p) {
  const auto bits = *reinterpret_cast<const Vec<float>::pairs*>(p);
  const Vec<float>::bits even = bits << 16, odd = bits & 0xffff0000u;
  return {reinterpret_cast<const vf&>(even), reinterpret_cast<const vf&>(odd)};
}

}  // namespace
