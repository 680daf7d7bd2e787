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
    T lanes[Vec<float>::lanes] = {*p};
    return load_as_float(lanes)[0];
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

template <typename A>
DPO_INLINE typename Vec<A>::type transformed(typename Vec<A>::type x, LogitTransform t) {
  x = x * static_cast<A>(t.scale);
  if (t.softcap != 0.0) x = static_cast<A>(t.softcap) * tanh_any(x * static_cast<A>(1.0 / t.softcap));
  return x;
}

// n logits from p into buffer as A, transformed, and padded with -inf up to a whole number of vector pairs.
template <typename A, typename T>
DPO_INLINE void convert_block(const T* p, int64_t n, LogitTransform t, A* buffer) {
  constexpr int lanes = Vec<A>::lanes;
  int64_t i = 0;
  if (t.identity()) {
    for (; i + lanes <= n; i += lanes) store<A>(buffer + i, Convert<A, T>::vector(p + i));
  } else {
    for (; i + lanes <= n; i += lanes) store<A>(buffer + i, transformed<A>(Convert<A, T>::vector(p + i), t));
  }
  if (i < n) {
    T tail[lanes] = {};
    for (int64_t j = i; j < n; ++j) tail[j - i] = p[j];
    auto v = Convert<A, T>::vector(tail);
    if (!t.identity()) v = transformed<A>(v, t);
    for (int64_t j = n - i; j < lanes; ++j) v[j] = -INFINITY;
    store<A>(buffer + i, v);
    i += lanes;
  }
  if (i % (2 * lanes) != 0) store<A>(buffer + i, splat<A>(-INFINITY));
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

// Calls take(p) for each register of n 16-bit logits.
template <typename S, typename F>
DPO_INLINE void each_register(const S* z, int64_t n, F take) {
  constexpr int step = 2 * Vec<float>::lanes;
  int64_t i = 0;
  for (; i + 4 * step <= n; i += 4 * step) {
    for (int k = 0; k < 4; ++k) take(z + i + k * step);
  }
  for (; i < n; i += step) take(z + i);
}

// The extremes of 16-bit logits, n of them, a whole number of registers, found in their own format. Both formats are a
// sign and a magnitude. As signed integers numbers from 0 on keep their order; negative ones come first, in reverse.
//
// The largest integer is the maximum, unless all are negative: then the smallest is. NaN counts as infinity: the row is
// NaN anyway.
template <typename S>
DPO_INLINE float narrow_max(const S* z, int64_t n) {
  auto largest = *reinterpret_cast<const Vec<float>::shorts*>(z), smallest = largest;
  each_register(z, n, [&](const S* p) __attribute__((always_inline)) {
    const auto v = *reinterpret_cast<const Vec<float>::shorts*>(p);
    largest = v > largest ? v : largest;
    smallest = v < smallest ? v : smallest;
  });
  int16_t high = largest[0], low = smallest[0];
  for (int i = 1; i < 2 * Vec<float>::lanes; ++i) {
    high = std::max<int16_t>(high, largest[i]);
    low = std::min<int16_t>(low, smallest[i]);
  }
  const S top{static_cast<uint16_t>(high >= 0 ? high : low)};
  const float value = Convert<float, S>::scalar(&top);
  return value == value ? value : INFINITY;
}

// The minimum or 0, whichever is less: as an unsigned integer, the largest. A NaN may be missed if it is positive.
template <typename S>
DPO_INLINE float narrow_min(const S* z, int64_t n) {
  auto largest = *reinterpret_cast<const Vec<float>::unsigneds*>(z);
  each_register(z, n, [&](const S* p) __attribute__((always_inline)) {
    const auto v = *reinterpret_cast<const Vec<float>::unsigneds*>(p);
    largest = v > largest ? v : largest;
  });
  uint16_t bits = largest[0];
  for (int i = 1; i < 2 * Vec<float>::lanes; ++i) bits = std::max<uint16_t>(bits, largest[i]);
  const S bottom{bits};
  const float value = Convert<float, S>::scalar(&bottom);
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
  // into the row itself or `buffer`, of kBlock entries.
  DPO_INLINE const A* block(int64_t start, int64_t n, A* buffer) const {
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

  DPO_INLINE A at(int64_t v) const {
    A one[2 * Vec<A>::lanes];
    return block(v, 1, one)[0];
  }
};

}  // namespace
