// The kernel of stage 1 on CUDA: log-probability of the label and statistics.
//
// Data flow. The `threads` threads of a block share a row of V logits; if there are few rows, a cluster of blocks
// shares it. Every logit is read from HBM once, in loads of 16 bytes, four in flight per thread. Each thread keeps its
// running maximum and sums in registers; the main loop has no barrier and no shuffle. At the end of the row one warp
// merges the states of all threads in a fixed order, through shared memory (in a cluster, distributed shared memory of
// the first block). Only a few float64 numbers per row are written.
//
// The running sum does not include the label (common/online_softmax.h). The loops skip the label's group. Its other
// logits, and those after the last whole group, are processed one per thread. So the group loop needs masks in only two
// tiles: that of the label and the last, partial one.
//
// Rounding does not depend on the address of a row, the number of blocks that share it, or the requested statistics:
// groups are counted from the first logit of the row, so column and V determine which thread processes a logit, and
// when. If a row is not 16-byte aligned, its groups are assembled from narrower loads (RowReader).
//
// Rows whose float32 sums are invalid or inaccurate are read again, by one block, in float64 (careful_row).
//
// In the unguarded loop a logit of -inf makes the moments (entropy, KL) NaN by 0 * inf. This is detected at the end of
// the row, and the thread then processes its logits again with guards. That is slow for such rows, but they are rare,
// and a guard of each logit would cost an issue slot in every row.
//
// Bandwidth for [8192, 128256] bf16 without statistics (2.10 GB read once, 0.63 ms at 3.35 TB/s), by the model at the
// top of benchmarks/machine_code.py (bandwidth_share), whose figures are tested:
//   One row per block of 256 threads. 64 registers allow 4 blocks (1,024 threads) per SM, so 8 warps share a scheduler.
//   An iteration of the loop is 32 logits per thread in 4 loads of 16 bytes, 64 KB per SM. A warp waits 1,450 cycles
//   for it (H100: 700 ns for the loads, and 2 us at the ends of a row spread over its 15.7 iterations) and needs 272
//   cycles of its scheduler (34 MUFU of 8 cycles each; the 177 instructions are issued meanwhile).
//   8 warps take 1,450 + 8 x 272 = 3,630 cycles per iteration if they all wait and then all compute, and 2,380 if they
//   run independently. At full bandwidth 64 KB take 4,530 cycles on an SM of an H100, 3,160 on an H200, 2,240 on a
//   B200. So the kernel can request 1.25 to 1.9, 0.87 to 1.3 and 0.61 to 0.93 times the full bandwidth.
//   8,192 rows on 528 resident blocks are 15.5 rounds, and blocks run independently, so the end of the launch costs at
//   most 2 %. Shares of the bandwidth: H100 0.98 to 0.99, H200 0.84 to 0.98, B200 0.58 to 0.89. On a B200 the
//   exponentials are the limit.
#pragma once

#include <cmath>
#include <type_traits>

#include "../common/online_softmax.h"
#include "device.cuh"
#include "plan.h"
#include "vectors.cuh"

namespace dpo::cuda {

template <typename T_, typename R_, bool kEntropy_, bool kMean_, bool kSquares_, bool kSoftcap_>
struct Traits {
  using T = T_;
  static constexpr bool kKl = !std::is_same_v<R_, NoReference>;
  using R = std::conditional_t<kKl, R_, T_>;
  static constexpr bool kEntropy = kEntropy_;
  static constexpr bool kMean = kMean_;
  static constexpr bool kSquares = kSquares_;
  static constexpr bool kSoftcap = kSoftcap_;
  static constexpr int kSize =
      Vector<T>::kElements > Vector<R>::kElements ? Vector<T>::kElements : Vector<R>::kElements;
  // Groups of each tensor that a thread loads before it uses the first: 64 bytes in flight in all variants.
  static constexpr int kUnroll = kKl ? DPO_ROW_UNROLL / 2 : DPO_ROW_UNROLL;
  // Minimum of resident blocks per SM: at most 64 registers per thread without statistics and reference, 80 with one of
  // them, 128 with everything, where fewer registers would spill and the tanh limits the speed in any case.
  static constexpr bool kWidest = kKl && kSquares && kSoftcap;
  static constexpr int kResident = (kWidest ? 2 : kKl || kEntropy || kMean || kSquares ? 3 : 4) * 256 / DPO_ROW_THREADS;
  // Fields of a thread's state in the merge.
  static constexpr int kOrigin = 0, kTop = 1, kSum = 2;
  static constexpr int kShifted = 3;
  static constexpr int kTotal = kShifted + kEntropy;
  static constexpr int kSquared = kTotal + kMean;
  static constexpr int kDrift = kSquared + kSquares;
  static constexpr int kRefOrigin = kDrift + 1, kRefTop = kDrift + 2, kRefSum = kDrift + 3;
  static constexpr int kFields = kDrift + (kKl ? 4 : 0);
};

// The distribution of a row over threads is the same in all variants, so the bits of logps do not depend on the
// requested statistics or the reference: threads per row, groups of a thread per tile, and groups per maximum.
constexpr int kRowThreads = DPO_ROW_THREADS;
constexpr int kTileGroups = DPO_ROW_UNROLL;
constexpr int kStep = 2;

// The state of one thread. Exponents are in base 2: t = z log2(e) - origin. The origin may be up to kSlack below the
// maximum, so it is raised rarely; float32 sums of 2^t <= 2^kSlack lose no precision by that.
constexpr float kSlack = 8.0f;
constexpr int kChains = 2;  // dependency chains of additions; with 8 warps per scheduler two hide their latency

template <typename Tr>
struct ThreadState {
  float origin = kFloor;
  float top = -INFINITY;  // exact maximum of the raw logits
  float sum[kChains] = {};
  float shifted[kChains] = {};  // sum 2^t t
  float drift[kChains] = {};    // sum 2^t (z - z')
  float squares[kChains] = {};  // sum 4^t
  float total[kChains] = {};    // sum z
  float ref_origin = kFloor;
  float ref_top = -INFINITY;
  float ref_sum[kChains] = {};
};

template <typename Tr>
struct Transform {
  float log2_scale;  // z log2(e) = value(x) * log2_scale
  float cap;
  float inverse;  // logit_scale / cap

  DPO_DEVICE float value(float x) const {
    if constexpr (Tr::kSoftcap) return cap * tanhf(x * inverse);
    return x;
  }
};

template <typename Tr>
DPO_DEVICE Transform<Tr> transform_of(const TokenLogpsParams& p) {
  Transform<Tr> f;
  f.log2_scale = Tr::kSoftcap ? kLog2E : kLog2E * p.logit_scale;
  f.cap = p.logit_softcap;
  f.inverse = Tr::kSoftcap ? p.logit_scale / p.logit_softcap : 0.0f;
  return f;
}

template <typename T>
DPO_DEVICE const T* row_of(const Logits& logits, const TokenLogpsParams& p, int64_t token) {
  const int64_t b = token / p.tokens, t = token % p.tokens;
  return static_cast<const T*>(logits.data) + b * logits.stride_b + t * logits.stride_t;
}

template <typename Tr>
DPO_DEVICE void raise_origin(ThreadState<Tr>& s, float origin) {
  const float delta = s.origin - origin;
  const float factor = fast_exp2(delta);
#pragma unroll
  for (int k = 0; k < kChains; ++k) {
    if constexpr (Tr::kEntropy) s.shifted[k] = factor * fmaf(delta, s.sum[k], s.shifted[k]);
    if constexpr (Tr::kKl) s.drift[k] *= factor;
    if constexpr (Tr::kSquares) s.squares[k] *= factor * factor;
    s.sum[k] *= factor;
  }
  s.origin = origin;
}

template <typename Tr>
DPO_DEVICE void raise_ref_origin(ThreadState<Tr>& s, float origin) {
  const float factor = fast_exp2(s.ref_origin - origin);
#pragma unroll
  for (int k = 0; k < kChains; ++k) s.ref_sum[k] *= factor;
  s.ref_origin = origin;
}

// Adds one logit (and its reference) with the current origins. kGuarded: a logit of -inf, whose probability is 0, does
// not change the moments; without the guard they become NaN by 0 * inf.
template <typename Tr, bool kGuarded>
DPO_DEVICE void add_logit(ThreadState<Tr>& s, const Transform<Tr>& f, float x, float ref, int chain, bool in_mean) {
  const float z = f.value(x);
  const float t = fmaf(z, f.log2_scale, -s.origin);
  const float e = fast_exp2(t);
  s.sum[chain] += e;
  if constexpr (Tr::kEntropy) s.shifted[chain] = fmaf(e, kGuarded ? fmaxf(t, kFloor) : t, s.shifted[chain]);
  if constexpr (Tr::kSquares) s.squares[chain] = fmaf(e, e, s.squares[chain]);
  if constexpr (Tr::kMean) {
    if (in_mean) s.total[chain] += z;
  }
  if constexpr (Tr::kKl) {
    const float ref_z = f.value(ref);
    const float gap = z - ref_z;
    s.ref_sum[chain] += fast_exp2(fmaf(ref_z, f.log2_scale, -s.ref_origin));
    s.drift[chain] = fmaf(e, kGuarded ? fmaxf(gap, kFloor) : gap, s.drift[chain]);
  }
}

// Whether the moments, but not the sum, became NaN in the unguarded loop, by 0 * inf. A NaN logit makes both NaN.
template <typename Tr>
DPO_DEVICE bool lost_moments(const ThreadState<Tr>& s) {
  float moments = 0.0f, sums = 0.0f;
#pragma unroll
  for (int k = 0; k < kChains; ++k) {
    if constexpr (Tr::kEntropy) moments += s.shifted[k];
    if constexpr (Tr::kKl) moments += s.drift[k];
    sums += s.sum[k];
  }
  return moments != moments && sums == sums;
}

template <typename T, int kSize>
DPO_DEVICE float maximum(const Group<T, kSize>* groups) {
  uint32_t top = groups[0].words[0];
#pragma unroll
  for (int u = 0; u < kStep; ++u) {
#pragma unroll
    for (int w = u == 0; w < Group<T, kSize>::kWords; ++w) top = Vector<T>::max(top, groups[u].words[w]);
  }
  return Vector<T>::widest(top);
}

// Adds kStep groups. Groups whose bit in `present` is 0 contain -inf, which with guards changes only the mean.
template <typename Tr, bool kMasked>
DPO_DEVICE void add_groups(ThreadState<Tr>& s, const Transform<Tr>& f, const Group<typename Tr::T, Tr::kSize>* x,
                           const Group<typename Tr::R, Tr::kSize>* ref, unsigned present) {
  const float top = maximum<typename Tr::T, Tr::kSize>(x);
  s.top = fmaxf(s.top, top);
  const float peak = multiply(f.value(top), f.log2_scale);
  if (__builtin_expect(peak > s.origin + kSlack, 0)) raise_origin(s, peak);
  if constexpr (Tr::kKl) {
    const float ref_top = maximum<typename Tr::R, Tr::kSize>(ref);
    s.ref_top = fmaxf(s.ref_top, ref_top);
    const float ref_peak = multiply(f.value(ref_top), f.log2_scale);
    if (__builtin_expect(ref_peak > s.ref_origin + kSlack, 0)) raise_ref_origin(s, ref_peak);
  }
#pragma unroll
  for (int u = 0; u < kStep; ++u) {
    const bool in_mean = !kMasked || (present >> u & 1u) != 0;
    if (Tr::kSoftcap && !in_mean) continue;  // a softcap makes -inf finite, so absent groups must be skipped
#pragma unroll
    for (int i = 0; i < Tr::kSize; ++i) {
      add_logit<Tr, kMasked>(s, f, x[u].get(i), Tr::kKl ? ref[u].get(i) : 0.0f, i % kChains, in_mean);
    }
  }
}

// A row has `groups` groups from its first logit on, then single logits to the end.
struct RowLayout {
  int groups;
  int label_group;  // INT32_MAX if the label comes after the groups
};

// Adds the logits outside the groups of the loops, at most one per thread: the end of the row, and the rest of the
// label's group.
template <typename Tr>
DPO_DEVICE void add_single(ThreadState<Tr>& s, const Transform<Tr>& f, const typename Tr::T* x,
                           const typename Tr::R* ref, const RowLayout& row, int label, int vocab, int thread) {
  constexpr int kSize = Tr::kSize;
  const int grouped = row.groups * kSize;
  const int rest = vocab - grouped;
  int i = -1;
  if (thread < rest) {
    i = grouped + thread;
  } else if (row.label_group != INT32_MAX && thread < rest + kSize) {
    i = row.label_group * kSize + thread - rest;
  }
  if (i < 0 || i == label) return;
  const float value = Vector<typename Tr::T>::widen(x[i]);
  const float ref_value = Tr::kKl ? Vector<typename Tr::R>::widen(ref[i]) : 0.0f;
  s.top = value;
  s.origin = fmaxf(multiply(f.value(value), f.log2_scale), kFloor);
  if constexpr (Tr::kKl) {
    s.ref_top = ref_value;
    s.ref_origin = fmaxf(multiply(f.value(ref_value), f.log2_scale), kFloor);
  }
  add_logit<Tr, true>(s, f, value, ref_value, 0, true);
}

// Tile t of the row is threads * kTileGroups consecutive groups. A warp processes kTileGroups times 512 consecutive
// bytes of it, so the addresses of a thread's loads differ by constant offsets. A tile takes kTileGroups / kUnroll
// phases. The tiles that need masks come first, that of the label and the partial last one, then all others. kAligned:
// the rows of policy and reference are 16-byte aligned.
template <typename Tr, bool kAligned>
DPO_DEVICE ThreadState<Tr> add_row(const Transform<Tr>& f, const typename Tr::T* x, const typename Tr::R* ref,
                                   const RowLayout& row, int label, int vocab, int thread, int threads) {
  using T = typename Tr::T;
  using R = typename Tr::R;
  constexpr int kSize = Tr::kSize, kUnroll = Tr::kUnroll, kPhases = kTileGroups / kUnroll;
  const int tile = threads * kTileGroups;
  const int first = thread / kWarp * (kWarp * kTileGroups) + thread % kWarp;
  const int full = row.groups / tile;
  const int label_tile = row.label_group == INT32_MAX ? INT32_MAX : row.label_group / tile;
  const int others = full - (label_tile < full);
  const RowReader<T, kSize, kAligned, true> policy(x);
  const RowReader<R, kSize, kAligned, true> reference(ref);
  Group<T, kSize> a[kUnroll];
  Group<R, kSize> b[kUnroll];

  for (bool again = false;; again = true) {
    ThreadState<Tr> s;
    add_single(s, f, x, ref, row, label, vocab, thread);
    // Guarded iterations: the two tiles that need masks, or, the second time, all tiles in the same order.
    const int guarded = (2 + (again ? others : 0)) * kPhases;
    for (int k = 0; k < guarded; ++k) {
      const int j = k / kPhases - 2;
      const int t = j >= 0 ? j + (j >= label_tile) : j == -2 ? label_tile : full;
      if (j == -2 && label_tile >= full) continue;
      const int g = t * tile + first + k % kPhases * (kUnroll * kWarp);
      const int64_t column = static_cast<int64_t>(g) * kSize;
      unsigned present = 0;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int group = g + u * kWarp;
        const bool take = group < row.groups && group != row.label_group;
        a[u] = take ? policy.load(column + u * kWarp * kSize) : empty_group<T, kSize>();
        if constexpr (Tr::kKl) b[u] = take ? reference.load(column + u * kWarp * kSize) : empty_group<R, kSize>();
        present |= static_cast<unsigned>(take) << u;
      }
#pragma unroll
      for (int u = 0; u < kUnroll; u += kStep) add_groups<Tr, true>(s, f, a + u, b + u, present >> u);
    }
    if (again) return s;

    for (int k = 0; k < others * kPhases; ++k) {
      const int j = k / kPhases;
      const int g = (j + (j >= label_tile)) * tile + first + k % kPhases * (kUnroll * kWarp);
      const int64_t column = static_cast<int64_t>(g) * kSize;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        a[u] = policy.load(column + u * kWarp * kSize);
        if constexpr (Tr::kKl) b[u] = reference.load(column + u * kWarp * kSize);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; u += kStep) add_groups<Tr, false>(s, f, a + u, b + u, 0);
    }
    if (!lost_moments(s)) return s;
  }
}

// The merged state of the row. Sums are float64, so the merge adds no rounding error. The tops are raw logits.
struct MergedState {
  double origin, top, sum, shifted, drift, total, ref_origin, ref_top, ref_sum, squares;
};

DPO_DEVICE float warp_max(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

DPO_DEVICE float add_chains(const float (&chains)[kChains]) { return chains[0] + chains[1]; }

// The states of all threads in shared memory of the row's first block, by field and thread.
template <typename Tr>
using States = float[Tr::kFields][kRowThreads];

template <typename Tr>
DPO_DEVICE void hand_to_leader(const ThreadState<Tr>& s, States<Tr>& states, int thread) {
  store_to_leader(&states[Tr::kOrigin][thread], s.origin);
  store_to_leader(&states[Tr::kTop][thread], s.top);
  store_to_leader(&states[Tr::kSum][thread], add_chains(s.sum));
  if constexpr (Tr::kEntropy) store_to_leader(&states[Tr::kShifted][thread], add_chains(s.shifted));
  if constexpr (Tr::kMean) store_to_leader(&states[Tr::kTotal][thread], add_chains(s.total));
  if constexpr (Tr::kSquares) store_to_leader(&states[Tr::kSquared][thread], add_chains(s.squares));
  if constexpr (Tr::kKl) {
    store_to_leader(&states[Tr::kDrift][thread], add_chains(s.drift));
    store_to_leader(&states[Tr::kRefOrigin][thread], s.ref_origin);
    store_to_leader(&states[Tr::kRefTop][thread], s.ref_top);
    store_to_leader(&states[Tr::kRefSum][thread], add_chains(s.ref_sum));
  }
}

// One warp merges the states of all threads of the row; every lane gets the result. The order is fixed: each lane adds
// the states of its lane in every warp, then a tree adds the lanes. Only this warp uses float64, because on consumer
// GPUs it has 1/64 of the float32 rate.
template <typename Tr>
DPO_DEVICE MergedState merge_row(const States<Tr>& states, int threads) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float origin = kFloor, top = -INFINITY, ref_origin = kFloor, ref_top = -INFINITY;
  for (int i = lane; i < threads; i += kWarp) {
    origin = fmaxf(origin, states[Tr::kOrigin][i]);
    top = fmaxf(top, states[Tr::kTop][i]);
    if constexpr (Tr::kKl) {
      ref_origin = fmaxf(ref_origin, states[Tr::kRefOrigin][i]);
      ref_top = fmaxf(ref_top, states[Tr::kRefTop][i]);
    }
  }
  origin = warp_max(origin);
  if constexpr (Tr::kKl) ref_origin = warp_max(ref_origin);
  MergedState out{};
  for (int i = lane; i < threads; i += kWarp) {
    const float delta = states[Tr::kOrigin][i] - origin;
    const double factor = fast_exp2(delta), sum = states[Tr::kSum][i];
    out.sum += factor * sum;
    if constexpr (Tr::kEntropy) out.shifted += factor * (states[Tr::kShifted][i] + delta * sum);
    if constexpr (Tr::kMean) out.total += states[Tr::kTotal][i];
    if constexpr (Tr::kSquares) out.squares += factor * factor * states[Tr::kSquared][i];
    if constexpr (Tr::kKl) {
      out.drift += factor * states[Tr::kDrift][i];
      out.ref_sum += static_cast<double>(fast_exp2(states[Tr::kRefOrigin][i] - ref_origin)) * states[Tr::kRefSum][i];
    }
  }
  out.origin = origin;
  out.top = warp_max(top);
  out.sum = warp_sum(out.sum);
  if constexpr (Tr::kEntropy) out.shifted = warp_sum(out.shifted);
  if constexpr (Tr::kMean) out.total = warp_sum(out.total);
  if constexpr (Tr::kSquares) out.squares = warp_sum(out.squares);
  if constexpr (Tr::kKl) {
    out.drift = warp_sum(out.drift);
    out.ref_origin = ref_origin;
    out.ref_top = warp_max(ref_top);
    out.ref_sum = warp_sum(out.ref_sum);
  }
  return out;
}

// ---- Finishing a row: one thread, float64 ----

struct TokenValues {
  double of[token_row::count];
};

// The results of the policy's or the reference's row. z is the label's logit, top the largest of the others.
struct Side {
  FinishedRow row;  // relative to top, with the loop's rounded log2(e)
  double z, top, logp, max, log_sum;
};

// Input of finish_row_of_batch from the templated kernel, in shared memory.
struct RowSummary {
  MergedState state;
  Side policy, reference;
  float label_x, label_ref;
  bool legal, earlier_tie;
  bool pair;  // whether the reference was read in the same kernel
  // centred: careful_row made the drift relative to the tops. exact, ref_exact: it computed the sum (and moments), or
  // the reference's sum, relative to the top itself.
  bool centred, exact, ref_exact;
};

// If the maxima of policy and reference differ by more, float32 sums of their gaps are too inaccurate.
constexpr double kNear = 256.0;

// The loops' variable for the logit x.
DPO_DEVICE float loop_value(const TokenLogpsParams& p, float x) {
  return p.logit_softcap != 0.0f ? p.logit_softcap * tanhf(x * (p.logit_scale / p.logit_softcap)) : x;
}

// z divided by the loops' variable.
DPO_DEVICE double unit_of(const TokenLogpsParams& p) {
  return p.logit_softcap != 0.0f ? 1.0 : static_cast<double>(p.logit_scale);
}

// The factor by which z is too large in the loops, because log2(e) is rounded to float32.
DPO_DEVICE double stretch_of(const TokenLogpsParams& p) {
  return static_cast<double>(p.logit_softcap != 0.0f ? kLog2E : kLog2E * p.logit_scale) * kLn2 / unit_of(p);
}

// Whether a sum of exponentials relative to `top` is invalid: it overflowed or is 0, or the logits are too large for
// the loop.
DPO_DEVICE bool is_wrong(double sum, double top) {
  return !(fabs(sum) < INFINITY) || sum == 0.0 || !(fabs(top) < kLarge);
}

// Whether the row needs careful_row: a sum is invalid, a moment overflowed or is NaN by 0 * inf, or policy and
// reference differ so much that float32 sums of their gaps are inaccurate. (Also true if a logit is NaN.)
static __device__ __noinline__ bool is_hostile(const TokenLogpsParams& p, RowSummary& row) {
  assume_shared(&row);
  const MergedState& s = row.state;
  const double unit = unit_of(p), top = unit * loop_value(p, static_cast<float>(s.top));
  const double ref_top = row.pair ? unit * loop_value(p, static_cast<float>(s.ref_top)) : 0.0;
  row.centred = false;
  row.exact = is_wrong(s.sum, top);
  row.ref_exact = row.pair && is_wrong(s.ref_sum, ref_top);
  const double gap = row.pair ? unit * s.drift / s.sum - (top - ref_top) : 0.0;
  const bool far = row.pair && !(fabs(top - ref_top) <= kNear && fabs(gap) < kSmallGap);
  const double moments = s.shifted + s.drift + s.total + s.squares;
  return row.exact || row.ref_exact || far || !(fabs(moments) < INFINITY);
}

// Computes the results of one of the two rows of a token. Not inlined: policy and reference share the code, and its
// float64 values use no registers of the caller.
static __device__ __noinline__ void finish_side(const TokenLogpsParams& p, RowSummary& summary, bool reference) {
  assume_shared(&summary);
  const MergedState& s = summary.state;
  // The loops scale by log2(e) rounded to float32, which multiplies every z by 1 + 1.3e-8 ("stretch"). Here the label
  // and the moments are multiplied by the same factor, to be consistent with the sums, and a log-probability is then
  // divided by it. Everything is relative to the largest of the other logits, so the factor affects only differences.
  const double unit = unit_of(p), stretch = stretch_of(p);
  double z = static_cast<double>(reference ? summary.label_ref : summary.label_x) * static_cast<double>(p.logit_scale);
  if (p.logit_softcap != 0.0f) z = p.logit_softcap * tanh(z / static_cast<double>(p.logit_softcap));
  const double raw_top = reference ? s.ref_top : s.top, sum = reference ? s.ref_sum : s.sum;
  // If all other logits are -inf, everything is relative to the label's logit.
  const double top = raw_top > -INFINITY ? unit * loop_value(p, static_cast<float>(raw_top)) : z;
  OnlineSoftmax<double> others{-INFINITY, sum, 0.0, 0.0, 0.0};
  if (sum != 0.0) others.max = (reference ? s.ref_origin : s.origin) * kLn2 - top * stretch;
  if (reference ? summary.ref_exact : summary.exact) others.max = sum != 0.0 ? 0.0 : -INFINITY;
  if (!reference) {
    others.shifted = s.shifted * kLn2;
    others.drift = s.drift * unit;
    others.squares = s.squares;
  }
  Side& side = reference ? summary.reference : summary.policy;
  side.z = z;
  side.top = top;
  const double rise = z - top, above = fmax(rise, 0.0);
  side.row = finish_row(others, rise * stretch);
  side.max = side.row.logp == side.row.logp ? top + above : NAN;
  side.log_sum = side.row.log_sum + (side.row.max - above * stretch);
  // If the label is below the top, its distance is added without the stretch: if it is 1e15, the rounding errors of a
  // multiplication and a division would exceed the other part of logp.
  side.logp = rise < 0.0 ? rise - side.log_sum : side.row.logp / stretch;
}

DPO_DEVICE TokenValues finish_token(const TokenLogpsParams& p, RowSummary& summary) {
  finish_side(p, summary, false);
  if (summary.pair) finish_side(p, summary, true);
  const Side &own = summary.policy, &ref = summary.reference;
  const MergedState& s = summary.state;
  TokenValues out{};
  const bool nan = own.logp != own.logp;
  out.of[token_row::logps] = own.logp;
  out.of[token_row::max] = own.max;
  out.of[token_row::log_sum] = own.log_sum;
  out.of[token_row::entropy] = nan ? NAN : own.row.entropy;
  const double label = static_cast<double>(summary.label_x);
  out.of[token_row::accuracy] = nan ? NAN : (label > s.top || (label == s.top && !summary.earlier_tie));
  const double unit = unit_of(p);
  out.of[token_row::mean_logits] = (s.total * unit + own.z) / static_cast<double>(p.vocab);
  out.of[token_row::log_sum_sq] = own.row.log_sum_sq;
  if (summary.pair) {
    out.of[token_row::ref_logps] = ref.logp;
    out.of[token_row::ref_max] = ref.max;
    out.of[token_row::ref_log_sum] = ref.log_sum;
    // Gaps are computed without the stretch, as in stage 3.
    FinishedRow row = own.row, ref_row = ref.row;
    const double rise = own.z - own.top, ref_rise = ref.z - ref.top;
    row.max = fmax(rise, 0.0);
    row.log_sum = own.log_sum;
    ref_row.max = fmax(ref_rise, 0.0);
    ref_row.log_sum = ref.log_sum;
    if (!summary.centred) row.drift -= row.p_others * (own.top - ref.top);
    const double kl = kl_of(row, ref_row, rise, ref_rise);
    // NaN by 0 * inf: a reference of -inf and a policy probability that underflowed to 0 but is positive.
    out.of[token_row::kl] = kl != kl && !nan && ref.log_sum == ref.log_sum ? INFINITY : kl;
  }
  return out;
}

// Computes and stores the results of a row from its merged state, in float64, in the first thread. Not inlined: it is a
// few hundred instructions, executed once per row, which would be compiled into every kernel and need more registers
// than the loops.
static __device__ __noinline__ void finish_row_of_batch(const TokenLogpsParams& p, RowSummary& row, int64_t token,
                                                        bool is_reference) {
  assume_shared(&row);
  const bool scored = p.labels[token] != p.ignore_index;
  TokenValues values{};
  if (row.legal && scored) {
    values = finish_token(p, row);
  } else if (scored) {
#pragma unroll
    for (double& value : values.of) value = NAN;
  }
  if (is_reference) {
    p.rows[token_row::ref_logps][token] = values.of[token_row::logps];
    return;
  }
#pragma unroll
  for (int r = 0; r < token_row::count; ++r) {
    const bool found = r != token_row::ref_logps || row.pair;  // else the block of the reference's row stores it
    if (found && p.rows[r] != nullptr) p.rows[r][token] = values.of[r];
  }
  if (token == 0 && p.to_clear != nullptr) *p.to_clear = 0;
}

// ---- A row with extreme values ----

constexpr int kCarefulSums = 6;
using CarefulScratch = double[kRowThreads / kWarp * kCarefulSums];

// Computes the sums of the row again in float64, guarded, and relative to the exact maxima. A valid sum of the loops is
// kept, so the bits of a log-probability do not depend on the requested statistics; the moments are converted to its
// origin and scale. All threads of the row's first block call this.
template <typename Tr>
static __device__ __noinline__ void careful_row(const TokenLogpsParams& p, int64_t token, bool is_reference,
                                                double* scratch, RowSummary& summary) {
  assume_shared(&summary);
  const int label = static_cast<int>(p.labels[token]), vocab = static_cast<int>(p.vocab);
  const typename Tr::T* x = row_of<typename Tr::T>(is_reference ? p.reference : p.policy, p, token);
  const typename Tr::R* ref = Tr::kKl ? row_of<typename Tr::R>(p.reference, p, token) : nullptr;
  const Transform<Tr> f = transform_of<Tr>(p);
  const float top = static_cast<float>(summary.state.top), ref_top = static_cast<float>(summary.state.ref_top);
  const float origin = top == -INFINITY ? 0.0f : f.value(top);
  const float ref_origin = !Tr::kKl || ref_top == -INFINITY ? 0.0f : f.value(ref_top);
  double sum = 0.0, shifted = 0.0, squares = 0.0, total = 0.0, drift = 0.0, ref_sum = 0.0;
  for (int i = static_cast<int>(threadIdx.x); i < vocab; i += static_cast<int>(blockDim.x)) {
    if (i == label) continue;
    const float z = f.value(Vector<typename Tr::T>::widen(x[i]));
    // With a reference in float64: a probability that underflows in float32 is positive, and a reference of -inf then
    // makes the divergence infinite.
    const float t = (z - origin) * f.log2_scale;
    const double e = Tr::kKl ? exp(static_cast<double>(t) * kLn2) : static_cast<double>(fast_exp2(t));
    sum += e;
    if (Tr::kEntropy && e > 0.0) shifted += e * t;
    if constexpr (Tr::kSquares) squares += e * e;
    if constexpr (Tr::kMean) total += z;
    if constexpr (Tr::kKl) {
      const float ref_z = f.value(Vector<typename Tr::R>::widen(ref[i]));
      if (e > 0.0) drift += e * ((static_cast<double>(z) - origin) - (static_cast<double>(ref_z) - ref_origin));
      ref_sum += fast_exp2((ref_z - ref_origin) * f.log2_scale);
    }
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const auto add_up = [&](double value, int field) {
    value = warp_sum(value);
    if (threadIdx.x % kWarp == 0) scratch[warp * kCarefulSums + field] = value;
  };
  add_up(sum, 0);
  if constexpr (Tr::kEntropy) add_up(shifted, 1);
  if constexpr (Tr::kSquares) add_up(squares, 2);
  if constexpr (Tr::kMean) add_up(total, 3);
  if constexpr (Tr::kKl) add_up(drift, 4);
  if constexpr (Tr::kKl) add_up(ref_sum, 5);
  __syncthreads();
  if (threadIdx.x != 0) return;
  const auto whole = [&](int field) {
    double value = 0.0;
    for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) value += scratch[w * kCarefulSums + field];
    return value;
  };
  MergedState& s = summary.state;
  sum = whole(0);
  const double delta = summary.exact ? 0.0 : static_cast<double>(f.log2_scale) * origin - s.origin;
  if (summary.exact) s.sum = sum;
  const double ratio = sum > 0.0 ? s.sum / sum : 1.0;
  if constexpr (Tr::kEntropy) s.shifted = ratio * (whole(1) + delta * sum);
  if constexpr (Tr::kSquares) s.squares = ratio * ratio * whole(2);
  if constexpr (Tr::kMean) s.total = whole(3);
  if constexpr (Tr::kKl) s.drift = ratio * whole(4);
  if (Tr::kKl && summary.ref_exact) s.ref_sum = whole(5);
  summary.centred = true;
}

// ---- The kernel ----

// Whether a logit equal to the label's comes before the label. All threads of the block call this.
template <typename T>
DPO_DEVICE bool appears_before(const T* x, int label, float value) {
  bool found = false;
  for (int i = static_cast<int>(threadIdx.x); i < label; i += static_cast<int>(blockDim.x)) {
    found = found || Vector<T>::widen(x[i]) == value;
  }
  return __syncthreads_or(found) != 0;
}

template <typename Tr>
__global__ void __launch_bounds__(kRowThreads, Tr::kResident)
    token_logps_kernel(const __grid_constant__ TokenLogpsParams p) {
  using T = typename Tr::T;
  using R = typename Tr::R;
  DPO_SHARED(States<Tr>, states);
  DPO_SHARED(RowSummary, summary);
  DPO_SHARED(CarefulScratch, scratch);
  DPO_SHARED(int, tied);
  DPO_SHARED(int, hostile);

  const int blocks_per_row = cluster_size();
  const int rank = cluster_rank();
  const int64_t token = blockIdx.x / blocks_per_row;
  const int threads = static_cast<int>(blockDim.x) * blocks_per_row;
  const int thread = rank * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  const bool leader_warp = threadIdx.x < kWarp;
  // Without kl the rows of the reference are processed like rows of the policy, in the second half of the grid.
  const bool is_reference = blockIdx.y == 1;
  if (blocks_per_row > 1) cluster_arrive();

  const int64_t label64 = p.labels[token];
  const bool legal = label64 != p.ignore_index && label64 >= 0 && label64 < p.vocab;
  if (threadIdx.x == 0) {
    summary.legal = legal;
    summary.pair = Tr::kKl;
  }

  if (legal) {
    const int label = static_cast<int>(label64), vocab = static_cast<int>(p.vocab);
    const T* x = row_of<T>(is_reference ? p.reference : p.policy, p, token);
    const R* ref = nullptr;
    if constexpr (Tr::kKl) ref = row_of<R>(p.reference, p, token);
    RowLayout row;
    row.groups = (vocab - 1) / Tr::kSize;  // at least one logit is left, so no group reads past the end of the row
    row.label_group = label < row.groups * Tr::kSize ? label / Tr::kSize : INT32_MAX;
    const Transform<Tr> f = transform_of<Tr>(p);

    const float label_x = Vector<T>::widen(x[label]);
    const float label_ref = Tr::kKl ? Vector<R>::widen(ref[label]) : 0.0f;
    const bool aligned = is_aligned16(x) && (!Tr::kKl || is_aligned16(ref));
    const ThreadState<Tr> state = aligned ? add_row<Tr, true>(f, x, ref, row, label, vocab, thread, threads)
                                          : add_row<Tr, false>(f, x, ref, row, label, vocab, thread, threads);

    if (blocks_per_row > 1) cluster_wait();  // until block 0 has started and its shared memory exists
    hand_to_leader<Tr>(state, states, thread);
    if (blocks_per_row > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      DPO_BARRIER_BEFORE_MERGE();
    }
    if (rank != 0) return;

    if (leader_warp) {
      const MergedState merged = merge_row<Tr>(states, threads);
      if (threadIdx.x == 0) {
        summary.state = merged;
        summary.label_x = label_x;
        summary.label_ref = label_ref;
        summary.earlier_tie = false;
        hostile = is_hostile(p, summary);
        tied = merged.top == static_cast<double>(label_x);
      }
    }
    __syncthreads();
    if (hostile) careful_row<Tr>(p, token, is_reference, scratch, summary);
    if (p.rows[token_row::accuracy] != nullptr && !is_reference) {
      // argmax returns the first maximum. If the label ties with it, the block reads the start of the row again.
      if (tied) {
        const bool found = appears_before(x, label, label_x);
        if (threadIdx.x == 0) summary.earlier_tie = found;
      }
    }
  } else if (blocks_per_row > 1) {
    cluster_wait();
  }
  if (rank == 0 && threadIdx.x == 0) finish_row_of_batch(p, summary, token, is_reference);
}

}  // namespace dpo::cuda
