// Groups of 16 bytes of logits: unpacking to float32, packed maxima, and packing. One trait per dtype.
#pragma once

#include <cmath>

#include "device.cuh"

namespace dpo::cuda {

// The type that stands for the dtype of a missing reference.
struct NoReference {};

template <typename T>
struct Vector;  // kElements per 16 bytes; kMinusInfinity is a packed word

template <>
struct Vector<float> {
  static constexpr int kElements = 4;
  static constexpr uint32_t kMinusInfinity = 0xff800000u;

  static DPO_DEVICE uint32_t max(uint32_t a, uint32_t b) { return as_bits(fmaxf(as_float(a), as_float(b))); }
  static DPO_DEVICE float widest(uint32_t word) { return as_float(word); }
  template <int i>
  static DPO_DEVICE float unpack(uint32_t word) {
    return as_float(word);
  }
  static DPO_DEVICE float widen(float x) { return x; }
  static DPO_DEVICE float narrow(float x) { return x; }
};

template <>
struct Vector<__nv_bfloat16> {
  static constexpr int kElements = 8;
  static constexpr uint32_t kMinusInfinity = 0xff80ff80u;

  template <int i>
  static DPO_DEVICE float unpack(uint32_t word) {
    return as_float(i == 0 ? word << 16 : word & 0xffff0000u);
  }
  static DPO_DEVICE uint32_t max(uint32_t a, uint32_t b) {
#if defined(DPO_EMULATOR)
    const float lo = fmaxf(unpack<0>(a), unpack<0>(b)), hi = fmaxf(unpack<1>(a), unpack<1>(b));
    return as_bits(lo) >> 16 | (as_bits(hi) & 0xffff0000u);
#else
    uint32_t y;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
#endif
  }
  static DPO_DEVICE float widest(uint32_t word) { return fmaxf(unpack<0>(word), unpack<1>(word)); }
  static DPO_DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  static DPO_DEVICE __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
  static DPO_DEVICE uint32_t pack(float lo, float hi) {
#if defined(DPO_EMULATOR)
    return emu::bit_cast<uint32_t>(__floats2bfloat162_rn(lo, hi));
#else
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
#endif
  }
};

template <>
struct Vector<__half> {
  static constexpr int kElements = 8;
  static constexpr uint32_t kMinusInfinity = 0xfc00fc00u;

  template <int i>
  static DPO_DEVICE float unpack(uint32_t word) {
#if defined(DPO_EMULATOR)
    return __half2float(emu::bit_cast<__half>(static_cast<uint16_t>(i == 0 ? word : word >> 16)));
#else
    return __half2float(__ushort_as_half(static_cast<unsigned short>(i == 0 ? word : word >> 16)));
#endif
  }
  static DPO_DEVICE uint32_t max(uint32_t a, uint32_t b) {
#if defined(DPO_EMULATOR)
    return pack(fmaxf(unpack<0>(a), unpack<0>(b)), fmaxf(unpack<1>(a), unpack<1>(b)));
#else
    uint32_t y;
    asm("max.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
#endif
  }
  static DPO_DEVICE float widest(uint32_t word) { return fmaxf(unpack<0>(word), unpack<1>(word)); }
  static DPO_DEVICE float widen(__half x) { return __half2float(x); }
  static DPO_DEVICE __half narrow(float x) { return __float2half_rn(x); }
  static DPO_DEVICE uint32_t pack(float lo, float hi) {
#if defined(DPO_EMULATOR)
    return emu::bit_cast<uint32_t>(__floats2half2_rn(lo, hi));
#else
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
#endif
  }
};

// kSize consecutive logits as packed words of one thread: 16 bytes, or a multiple for the wider of two dtypes that are
// processed together (kSize is that of the narrower).
template <typename T, int kSize>
struct Group {
  static constexpr int kLoads = kSize / Vector<T>::kElements;
  static constexpr int kWords = 4 * kLoads;
  static constexpr int kPerWord = kSize / kWords;
  uint32_t words[kWords];

  // i is a constant after unrolling, so there is no branch.
  DPO_DEVICE float get(int i) const {
    const uint32_t word = words[i / kPerWord];
    return i % kPerWord == 0 ? Vector<T>::template unpack<0>(word) : Vector<T>::template unpack<1>(word);
  }
};

// Reads a row of logits in groups of kSize, from columns that are multiples of kSize.
//
// kAligned: the row is 16-byte aligned, and groups are read by 128-bit loads. Otherwise a group is assembled from
// aligned words; all but the first hit L1, so the traffic to HBM is the same. If a row of 16-bit logits begins in the
// middle of a word, funnel shifts move them into place. A word is read if it contains a logit of the group, so one
// adjacent logit on either side may be read with it and not used. That is legal: the logit before the row shares a word
// with its first one, and the caller leaves at least one logit after the last group.
template <typename T, int kSize, bool kAligned, bool kReadOnly>
struct RowReader {
  const char* words;  // the row's first logit, rounded down to a word
  int last;           // bytes from a group's first word to its last one
  unsigned shift;     // bits of that word before the group

  DPO_DEVICE explicit RowReader(const T* row) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(row);
    const bool halfway = !kAligned && address % 4 != 0;
    words = reinterpret_cast<const char*>(address - (halfway ? 2 : 0));
    shift = halfway ? 16 : 0;
    last = 4 * (Group<T, kSize>::kWords - (halfway ? 0 : 1));
  }

  DPO_DEVICE Group<T, kSize> load(int64_t column) const {
    constexpr int kWords = Group<T, kSize>::kWords;
    const char* address = words + column * static_cast<int64_t>(sizeof(T));
    Group<T, kSize> g;
    if constexpr (kAligned) {
#pragma unroll
      for (int k = 0; k < kWords; k += 4) {
        const uint4 v = load16<kReadOnly>(address + 4 * k);
        g.words[k] = v.x;
        g.words[k + 1] = v.y;
        g.words[k + 2] = v.z;
        g.words[k + 3] = v.w;
      }
    } else {
#pragma unroll
      for (int k = 0; k < kWords; ++k) g.words[k] = load4<kReadOnly>(address + 4 * k);
      if constexpr (sizeof(T) == 2) {
        // Without a shift this reads a word again that has already been read.
        const uint32_t end = load4<kReadOnly>(address + last);
#pragma unroll
        for (int k = 0; k < kWords; ++k) {
          g.words[k] = funnel_right(g.words[k], k + 1 < kWords ? g.words[k + 1] : end, shift);
        }
      }
    }
    return g;
  }
};

template <typename T, int kSize>
DPO_DEVICE Group<T, kSize> empty_group() {
  Group<T, kSize> g;
#pragma unroll
  for (int i = 0; i < g.kWords; ++i) g.words[i] = Vector<T>::kMinusInfinity;
  return g;
}

// Elements from `address` to the next 16-byte boundary, at most `count`.
template <typename T>
DPO_DEVICE int elements_to_boundary(const T* address, int count) {
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16);
  const int head = past == 0 ? 0 : static_cast<int>((16 - past) / sizeof(T));
  return head < count ? head : count;
}

template <typename T>
DPO_DEVICE bool is_aligned16(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

}  // namespace dpo::cuda
