// Reads and writes rows of logits in blocks that fit in the L1 cache.
//
// A block is read from memory once; the passes for maximum and exponentials then hit the cache. Rows without scale or
// softcap are used without a copy, in the type in which they are stored; other rows are converted into a buffer.
#pragma once

#include <algorithm>
#include <limits>

#include "stages.h"
#include "vec.h"

namespace {

// 2,048 floats are 8 KB: a block of the policy, a block of the reference and their buffers fit in 32 KB of L1.
constexpr int64_t kBlock = 2048;

// Scale and softcap: z = cap tanh(scale x / cap), or z = scale x.
struct LogitTransform {
  double scale;
  double softcap;
  bool identity() const { return scale == 1.0 && softcap == 0.0; }
};

template <typename A, typename T>
struct Convert;

template <typename A>
struct Convert<A, A> {
  static DPO_INLINE typename Vec<A>::type vector(const A* p) { return load<A>(p); }
  static DPO_INLINE A scalar(const A* p) { return *p; }
  static DPO_INLINE void put(A* p, typename Vec<A>::type v) { store<A>(p, v); }
};

template <typename T>
struct Convert16 {
  static DPO_INLINE vf vector(const T* p) { return load_as_float(p); }
  static DPO_INLINE float scalar(const T* p) {
    const auto lanes = Vec<float>::halves{} + p->bits;
    return load_as_float(reinterpret_cast<const T*>(&lanes))[0];
  }
  static DPO_INLINE void put(T* p, vf v) { store_from_float(p, v); }
};
template <>
struct Convert<float, BFloat16> : Convert16<BFloat16> {};
template <>
struct Convert<float, Half> : Convert16<Half> {};

// float64 arithmetic on a narrower input, for the case that only one of policy and reference is float64.
template <typename T>
struct ConvertWiden {
  static DPO_INLINE vd vector(const T* p) {
    vd v = {};
    for (int i = 0; i < Vec<double>::lanes; ++i) v[i] = Convert<float, T>::scalar(p + i);
    return v;
  }
  static DPO_INLINE double scalar(const T* p) { return Convert<float, T>::scalar(p); }
};
template <>
struct Convert<double, float> : ConvertWiden<float> {};
template <>
struct Convert<double, BFloat16> : ConvertWiden<BFloat16> {};
template <>
struct Convert<double, Half> : ConvertWiden<Half> {};

// Converts n logits from p to A, applies `transform`, and pads with -inf up to a multiple of a vector pair.
template <typename A, typename T, typename F>
DPO_INLINE void convert_block_by(const T* p, int64_t n, F transform, A* buffer) {
  constexpr int lanes = Vec<A>::lanes;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store<A>(buffer + i, transform(Convert<A, T>::vector(p + i)));
  if (i < n) {
    T tail[lanes] = {};
    for (int64_t j = i; j < n; ++j) tail[j - i] = p[j];
    typename Vec<A>::type v = transform(Convert<A, T>::vector(tail));
    for (int64_t j = n - i; j < lanes; ++j) v[j] = -INFINITY;
    store<A>(buffer + i, v);
    i += lanes;
  }
  if (i % (2 * lanes) != 0) store<A>(buffer + i, splat<A>(-INFINITY));
}

template <typename A, typename T>
DPO_INLINE void convert_block(const T* p, int64_t n, LogitTransform t, A* buffer) {
  using V = typename Vec<A>::type;
  const A scale = static_cast<A>(t.scale), cap = static_cast<A>(t.softcap);
  if (t.identity()) return convert_block_by(p, n, [](V x) { return x; }, buffer);
  if (cap == A(0)) return convert_block_by(p, n, [=](V x) { return x * scale; }, buffer);
  const A inverse = static_cast<A>(1.0 / t.softcap);
  convert_block_by(p, n, [=](V x) { return cap * tanh_any(x * scale * inverse); }, buffer);
}

template <typename S>
constexpr S kMinusInfinity = -std::numeric_limits<S>::infinity();
template <>
constexpr BFloat16 kMinusInfinity<BFloat16>{0xff80};
template <>
constexpr Half kMinusInfinity<Half>{0xfc00};

template <typename S>
constexpr dpo::cpu::DType kDType = sizeof(S) == 8 ? dpo::cpu::DType::float64 : dpo::cpu::DType::float32;
template <>
constexpr dpo::cpu::DType kDType<BFloat16> = dpo::cpu::DType::bfloat16;
template <>
constexpr dpo::cpu::DType kDType<Half> = dpo::cpu::DType::float16;

// Whether logits of this type are used without a buffer: float16 only if the processor has instructions to convert it.
template <typename S>
constexpr bool kQuick = true;
#ifndef DPO_MM
template <>
constexpr bool kQuick<Half> = false;
#endif

// Reduction by `choose` of n 16-bit logits as integers of type I; n is a multiple of a register.
template <typename I, typename S, typename F>
DPO_INLINE I choose_bits(const S* z, int64_t n, F choose) {
  typedef I many __attribute__((vector_size(DPO_VECTOR_BYTES), aligned(2), may_alias));
  constexpr int step = DPO_VECTOR_BYTES / 2;
  const auto at = [&](int64_t i) __attribute__((always_inline)) { return *reinterpret_cast<const many*>(z + i); };
  many chosen = at(0);
  int64_t i = step;
  for (; i + 4 * step <= n; i += 4 * step)
    chosen = choose(choose(choose(choose(chosen, at(i)), at(i + step)), at(i + 2 * step)), at(i + 3 * step));
  for (; i < n; i += step) chosen = choose(chosen, at(i));
  I one = chosen[0];
  for (int lane = 1; lane < step; ++lane) one = choose(one, chosen[lane]);
  return one;
}

template <typename S>
DPO_INLINE float from_bits(uint16_t bits) {
  const S stored{bits};
  return Convert<float, S>::scalar(&stored);
}

// Maximum of 16-bit logits by integer comparisons; both formats are sign and magnitude. As signed integers,
// non-negative numbers have the right order, and negative numbers come before them in reverse order. So the largest
// integer is the maximum, unless it is negative; then it is the smallest integer. A positive NaN counts as infinity. A
// negative NaN may be missed, which does not matter, because it makes the results of the row NaN in any case.
template <typename S>
DPO_INLINE float narrow_max(const S* z, int64_t n) {
  int16_t bits = choose_bits<int16_t>(z, n, [](auto a, auto b) { return a > b ? a : b; });
  if (bits < 0) bits = choose_bits<int16_t>(z, n, [](auto a, auto b) { return a < b ? a : b; });
  const float value = from_bits<S>(static_cast<uint16_t>(bits));
  return value == value ? value : INFINITY;
}

// The smaller of the minimum and 0: the number whose bits are the largest unsigned integer.
template <typename S>
DPO_INLINE float narrow_min(const S* z, int64_t n) {
  const float value = from_bits<S>(choose_bits<uint16_t>(z, n, [](auto a, auto b) { return a > b ? a : b; }));
  return value > 0.0f ? 0.0f : value;
}

// The address of the logits after the current block, and the bytes per logit there.
struct Ahead {
  const char* data;
  int64_t entry_bytes;
};

// One row of a [B, T, V] tensor, read block by block.
template <typename A>
struct Row {
  const char* data;
  dpo::cpu::DType dtype;
  LogitTransform transform;

  static Row of(const dpo::cpu::Logits& logits, int64_t token, int64_t seq_len, LogitTransform t) {
    const int64_t offset = (token / seq_len) * logits.stride_b + (token % seq_len) * logits.stride_t;
    const int64_t size = logits.dtype == dpo::cpu::DType::float64   ? 8
                         : logits.dtype == dpo::cpu::DType::float32 ? 4
                                                                    : 2;
    return {static_cast<const char*>(logits.data) + offset * size, logits.dtype, t};
  }

  // Logits start .. start + n as A, padded with -inf up to a multiple of a vector pair. The result points into the row
  // or to `buffer`, which has kBlock entries. Not inlined: it is called once per block, and copies of its conversions
  // would dominate the compilation time.
  __attribute__((noinline)) const A* block(int64_t start, int64_t n, A* buffer) const {
    using dpo::cpu::DType;
    const bool own = sizeof(A) == 8 ? dtype == DType::float64 : dtype == DType::float32;
    if (own) {
      const A* p = reinterpret_cast<const A*>(data) + start;
      if (transform.identity() && n % (2 * Vec<A>::lanes) == 0) return p;
      convert_block<A, A>(p, n, transform, buffer);
    } else if (dtype == DType::bfloat16) {
      convert_block<A, BFloat16>(reinterpret_cast<const BFloat16*>(data) + start, n, transform, buffer);
    } else if (dtype == DType::float16) {
      convert_block<A, Half>(reinterpret_cast<const Half*>(data) + start, n, transform, buffer);
    } else if constexpr (sizeof(A) == 8) {
      convert_block<A, float>(reinterpret_cast<const float*>(data) + start, n, transform, buffer);
    }
    return buffer;
  }

  // Whether the row is stored as S and needs no transform.
  template <typename S>
  DPO_INLINE bool stores() const {
    return dtype == kDType<S> && transform.identity();
  }

  // The same without conversion, for a row for which stores<S>() is true.
  template <typename S>
  DPO_INLINE const S* block(int64_t start, int64_t n, S* buffer) const {
    constexpr int64_t step = 2 * Vec<A>::lanes;
    const S* p = reinterpret_cast<const S*>(data) + start;
    if (n % step == 0) return p;
    std::fill(std::copy_n(p, n, buffer), buffer + (n + step - 1) / step * step, kMinusInfinity<S>);
    return buffer;
  }

  // The address of logit `start`, which may be after the end of the row; for prefetching only.
  DPO_INLINE Ahead ahead(int64_t start) const {
    const int64_t bytes = dtype == dpo::cpu::DType::float64 ? 8 : dtype == dpo::cpu::DType::float32 ? 4 : 2;
    return {data + start * bytes, bytes};
  }

  A at(int64_t v) const {
    A one[2 * Vec<A>::lanes];
    return block(v, 1, one)[0];
  }
};

}  // namespace
