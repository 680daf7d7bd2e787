// Reading and writing a row of logits in blocks that stay in the first-level cache.
//
// A block is read from memory once; the maximum pass and the exponential pass over it then hit the cache. Rows without
// scale or softcap are used in place, in the type in which they are stored; everything else is converted into a buffer
// on the way.
#pragma once

#include <algorithm>
#include <limits>

#include "stages.h"
#include "vec.h"

namespace {

// 2,048 floats are 8 KB: a policy and a reference block and their buffers fit in 32 KB of L1.
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

// float64 arithmetic over a narrower input: the other operand of the pair was float64.
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

// n logits from p into buffer as A, changed by `transform`, and padded with -inf up to a whole number of vector pairs.
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

// Whether a format is quick to read: halves are where the processor converts them. Others go through a buffer.
template <typename S>
constexpr bool kQuick = true;
#ifndef DPO_MM
template <>
constexpr bool kQuick<Half> = false;
#endif

// n 16-bit logits, a whole number of registers, as integers of type I, reduced by `choose`.
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

// The extremes of 16-bit logits, found in their own format, which is a sign and a magnitude in both. As signed integers
// numbers from 0 on keep their order; negative ones come before them, in reverse: the largest integer is the maximum,
// unless it is negative: then the smallest is. A positive NaN counts as infinity, a negative one may be missed: the row
// is NaN anyway.
template <typename S>
DPO_INLINE float narrow_max(const S* z, int64_t n) {
  int16_t bits = choose_bits<int16_t>(z, n, [](auto a, auto b) { return a > b ? a : b; });
  if (bits < 0) bits = choose_bits<int16_t>(z, n, [](auto a, auto b) { return a < b ? a : b; });
  const float value = from_bits<S>(static_cast<uint16_t>(bits));
  return value == value ? value : INFINITY;
}

// The minimum or 0, whichever is less: the largest unsigned integer.
template <typename S>
DPO_INLINE float narrow_min(const S* z, int64_t n) {
  const float value = from_bits<S>(choose_bits<uint16_t>(z, n, [](auto a, auto b) { return a > b ? a : b; }));
  return value > 0.0f ? 0.0f : value;
}

// Where the row goes on in memory after the block at hand, and how many bytes a vocabulary entry takes there.
struct Ahead {
  const char* data;
  int64_t entry_bytes;
};

// One row of a [B, T, V] tensor, handed out block by block.
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

  // Logits start .. start + n as A, readable up to a whole number of vector pairs (padding is -inf). Either a pointer
  // into the row itself or `buffer`, of kBlock entries. Called once a block; inlined, its conversions would be most of
  // what there is to compile.
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

  // Whether the row's logits are what is stored, as S.
  template <typename S>
  DPO_INLINE bool stores() const {
    return dtype == kDType<S> && transform.identity();
  }

  // The same of a row that stores<S>(), as it is stored.
  template <typename S>
  DPO_INLINE const S* block(int64_t start, int64_t n, S* buffer) const {
    constexpr int64_t step = 2 * Vec<A>::lanes;
    const S* p = reinterpret_cast<const S*>(data) + start;
    if (n % step == 0) return p;
    std::fill(std::copy_n(p, n, buffer), buffer + (n + step - 1) / step * step, kMinusInfinity<S>);
    return buffer;
  }

  // The row's memory from logit `start` on (perhaps past its end), for prefetching only.
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
