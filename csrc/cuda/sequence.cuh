// A block sums a sequence and, for the last sequence of a pair, computes the pair's loss. Used by the single-launch
// forward (token_logps.cu) and by the separate stage (preference_loss.cu), so both give the same bits.
//
// Neither padding nor the number of threads shows: weighted tokens are ranked in token order, the token of rank k is
// added to running sum k % 256 in order of k, and the 256 sums are added by a fixed tree. Tokens of weight 0 take part
// in nothing.
#pragma once

#include "../common/sigmoid_family.h"
#include "device.cuh"
#include "params.h"

namespace dpo::cuda {

struct SequenceSums {
  double policy;
  double reference;
};

constexpr int kSums = 256;           // at least the threads of a sequence
constexpr int kTokensPerThread = 4;  // loads that a thread has under way

struct SequenceScratch {
  double sums[2][kSums];                             // policy, reference
  unsigned counts[kTokensPerThread][kSums / kWarp];  // weighted tokens of each warp
};

struct TokenRange {
  int64_t begin;
  int64_t end;

  DPO_DEVICE int64_t size() const { return end - begin; }
};

// Bounds that a host cannot check without waiting for the device are clamped to the tokens that exist.
DPO_DEVICE TokenRange sequence_range(const int64_t* cu_seqlens, int64_t tokens, int64_t sequence) {
  if (cu_seqlens == nullptr) return {sequence * tokens, (sequence + 1) * tokens};
  const int64_t first = cu_seqlens[sequence], last = cu_seqlens[sequence + 1];
  const int64_t begin = first < 0 ? 0 : first < tokens ? first : tokens;
  const int64_t end = last < tokens ? last : tokens;
  return {begin, end < begin ? begin : end};
}

DPO_DEVICE double warp_sum(double value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// `threads` threads of the block call this, `thread` being the place of this one; where the block holds several such
// groups, all of them do, with `longest` the size of the longest of their ranges, since they meet at the same barriers.
// refs may be nullptr. The first warp gets the result. The reads go to L2: another block may have just written them.
//
// A sequence of 32k tokens takes 256 threads 32 steps, each of a trip to L2 and five barriers: about 35 us, where a
// warp on its own needed 300.
DPO_DEVICE SequenceSums sum_sequence(const double* values, const double* refs, const double* weights, TokenRange range,
                                     int64_t longest, int thread, int threads, SequenceScratch& scratch) {
  constexpr unsigned kNone = 0xffu;
  assume_shared(&scratch);
  const int lane = thread % kWarp, warp = thread / kWarp, warps = threads / kWarp;
  const unsigned before = (1u << lane) - 1u;
#pragma unroll 1
  for (int i = thread; i < kSums; i += threads) scratch.sums[0][i] = scratch.sums[1][i] = 0.0;
  unsigned rank = 0;  // of the step's first weighted token, modulo 2^32: only rank % kSums is used
  const int64_t stop = range.begin + longest;
  for (int64_t base = range.begin; base < stop; base += kTokensPerThread * threads) {
    double policy[kTokensPerThread], reference[kTokensPerThread];
    unsigned place = 0;  // among the warp's weighted tokens; a byte each, kNone for tokens of weight 0
#pragma unroll
    for (int k = 0; k < kTokensPerThread; ++k) {
      const int64_t i = base + k * threads + thread;
      const bool inside = i < range.end;
      const double w = inside ? weights[i] : 0.0;
      policy[k] = inside ? w * load_coherent(values + i) : 0.0;
      reference[k] = inside && refs != nullptr ? w * load_coherent(refs + i) : 0.0;
      const unsigned votes = __ballot_sync(kAllLanes, w != 0.0);
      place |= (w != 0.0 ? static_cast<unsigned>(__popc(votes & before)) : kNone) << 8 * k;
      if (lane == 0) scratch.counts[k][warp] = static_cast<unsigned>(__popc(votes));
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kTokensPerThread; ++k) {
      unsigned earlier = 0, all = 0;
#pragma unroll 1
      for (int w = 0; w < warps; ++w) {
        const unsigned count = scratch.counts[k][w];
        earlier += w < warp ? count : 0u;
        all += count;
      }
      // At most kSums tokens, of consecutive ranks: no two of them share a sum.
      const unsigned own = place >> 8 * k & 0xffu;
      if (own != kNone) {
        const unsigned slot = (rank + earlier + own) % kSums;
        scratch.sums[0][slot] += policy[k];
        scratch.sums[1][slot] += reference[k];
      }
      rank += all;
      __syncthreads();  // the next tokens add to the same sums
    }
  }
  if (longest == 0) __syncthreads();
  if (warp != 0) return {};
  SequenceSums sums{};
#pragma unroll
  for (int i = 0; i < kSums; i += kWarp) {
    sums.policy += scratch.sums[0][i + lane];
    sums.reference += scratch.sums[1][i + lane];
  }
  return {warp_sum(sums.policy), refs != nullptr ? warp_sum(sums.reference) : 0.0};
}

// One thread. The sums of both sequences of pair p are known.
static __device__ __noinline__ void finish_pair(const PreferenceParams& p, int64_t pair, SequenceSums chosen,
                                                SequenceSums rejected) {
  const double x = p.beta[pair] * ((chosen.policy - chosen.reference) - (rejected.policy - rejected.reference));
  const PairLoss loss = sigmoid_family(x, p.label_smoothing[pair], p.robust != 0);
  p.losses[pair] = loss.loss;
  p.coef[pair] = p.beta[pair] * loss.slope;
  p.coef[p.pairs + pair] = -p.beta[pair] * loss.slope;
}

// Called as sum_sequence is. Sums the sequence and stores its sums; the first warp gets them.
DPO_DEVICE SequenceSums finish_sequence(const PreferenceParams& p, const double* logps, const double* ref_logps,
                                        int64_t sequence, TokenRange range, int64_t longest, int thread, int threads,
                                        SequenceScratch& scratch) {
  SequenceSums sums = sum_sequence(logps, ref_logps, p.weights, range, longest, thread, threads, scratch);
  if (ref_logps == nullptr && p.given_ref_sums != nullptr) sums.reference = p.given_ref_sums[sequence];
  if (thread == 0) {
    p.sums[sequence] = sums.policy;
    p.ref_sums[sequence] = sums.reference;
  }
  return sums;
}

}  // namespace dpo::cuda
