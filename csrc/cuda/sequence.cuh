// One warp sums a sequence and, for the last sequence of a pair, computes the pair's loss. Used by the single-launch
// forward (token_logps.cu) and by the separate stage (preference_loss.cu), so both give the same bits.
//
// Padding never shows: weighted tokens are ranked in token order, token of rank k is added by lane k % 32 in order of
// k, and the 32 lanes are summed by a fixed tree. Tokens of weight 0 take part in nothing.
#pragma once

#include "../common/sigmoid_family.h"
#include "device.cuh"
#include "params.h"

namespace dpo::cuda {

struct SequenceSums {
  double policy;
  double reference;
};

// Where the tokens of one step meet their lanes: [policy, reference][lane].
using SequenceScratch = double[2][kWarp];

struct TokenRange {
  int64_t begin;
  int64_t end;

  DPO_DEVICE int64_t size() const { return end - begin; }
};

// Bounds that a host cannot check without waiting for the device are clamped to the tokens that exist.
DPO_DEVICE TokenRange sequence_range(const int64_t* cu_seqlens, int64_t tokens, int64_t sequence) {
  if (cu_seqlens == nullptr) return {sequence * tokens, (sequence + 1) * tokens};
  const int64_t first = cu_seqlens[sequence], last = cu_seqlens[sequence + 1];
  const int64_t begin = first < 0 ? 0 : first;
  const int64_t end = last < tokens ? last : tokens;
  return {begin, end < begin ? begin : end};
}

DPO_DEVICE double warp_sum(double value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// All lanes of a warp call this. refs may be nullptr. The reads go to L2: another block may have just written them.
DPO_DEVICE SequenceSums sum_sequence(const double* values, const double* refs, const double* weights, TokenRange range,
                                     SequenceScratch& scratch) {
  constexpr int kSteps = 4;  // loads of this many steps are in flight at a time
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const unsigned before = (1u << lane) - 1u;
  double policy = 0.0, reference = 0.0;
  unsigned rank = 0;  // modulo 2^32 is enough: only rank % 32 is used
  for (int64_t base = range.begin; base < range.end; base += kSteps * kWarp) {
    double w[kSteps], v[kSteps], r[kSteps];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int64_t i = base + k * kWarp + lane;
      const bool inside = i < range.end;
      w[k] = inside ? weights[i] : 0.0;
      v[k] = inside ? load_coherent(values + i) : 0.0;
      r[k] = inside && refs != nullptr ? load_coherent(refs + i) : 0.0;
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const unsigned weighted = __ballot_sync(kAllLanes, w[k] != 0.0);
      if (w[k] != 0.0) {
        const unsigned slot = (rank + static_cast<unsigned>(__popc(weighted & before))) % kWarp;
        scratch[0][slot] = w[k] * v[k];
        scratch[1][slot] = w[k] * r[k];
      }
      __syncwarp();
      const unsigned count = static_cast<unsigned>(__popc(weighted));
      if ((static_cast<unsigned>(lane) - rank) % kWarp < count) {
        policy += scratch[0][lane];
        reference += scratch[1][lane];
      }
      __syncwarp();  // the slots are read before the next step fills them
      rank += count;
    }
  }
  return {warp_sum(policy), refs != nullptr ? warp_sum(reference) : 0.0};
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

// One warp. Sums sequence s and stores its sums; every lane returns them.
DPO_DEVICE SequenceSums finish_sequence(const PreferenceParams& p, const double* logps, const double* ref_logps,
                                        int64_t sequence, TokenRange range, SequenceScratch& scratch) {
  SequenceSums sums = sum_sequence(logps, ref_logps, p.weights, range, scratch);
  if (ref_logps == nullptr && p.given_ref_sums != nullptr) sums.reference = p.given_ref_sums[sequence];
  if (threadIdx.x % kWarp == 0) {
    p.sums[sequence] = sums.policy;
    p.ref_sums[sequence] = sums.reference;
  }
  return sums;
}

}  // namespace dpo::cuda
