// Stage 2 on CUDA: weighted sums of sequences, losses and coefficients d loss / d sum of the sigmoid family; in a whole
// call also the rewards, the means of the statistics and the reduced loss.
//
// 256 threads sum a sequence. One block processes a pair, and further blocks its statistics, two per block. Every value
// is read once. The block that finishes last reduces the losses.
//
// Results do not depend on padding: tokens with a weight are numbered in token order, token k is added to running sum
// k % 256 in order of k, and a fixed tree adds the 256 sums. Tokens of weight 0 are skipped.
#include "../common/sigmoid_family.h"
#include "device.cuh"
#include "params.h"

namespace dpo::cuda {

constexpr int kSums = 256;           // threads per sequence
constexpr int kTokensPerThread = 4;  // loads in flight per thread

struct SequenceSums {
  double values;
  double others;
  double count;  // number of tokens whose weight is not 0
};

struct SequenceScratch {
  double sums[2][kSums];
  unsigned counts[kTokensPerThread][kSums / kWarp];  // number of weighted tokens of each warp
};

struct TokenRange {
  int64_t begin;
  int64_t end;

  DPO_DEVICE int64_t size() const { return end - begin; }
};

// The bounds are clamped to the tokens that exist, because the host cannot check them without synchronizing.
DPO_DEVICE TokenRange sequence_range(const int64_t* cu_seqlens, int64_t tokens, int64_t sequence) {
  if (cu_seqlens == nullptr) return {sequence * tokens, (sequence + 1) * tokens};
  const int64_t first = cu_seqlens[sequence], last = cu_seqlens[sequence + 1];
  const int64_t begin = first < 0 ? 0 : first < tokens ? first : tokens;
  const int64_t end = last < tokens ? last : tokens;
  return {begin, end < begin ? begin : end};
}

// Called by 256 threads; `thread` is the index of this one. If the block has several such groups, all of them call
// this, and `longest` is the size of the longest of their ranges, because they share the barriers. `others` is summed
// as well, unless it is nullptr. The first warp gets the result.
//
// A sequence of 32k tokens takes 32 steps of one access to L2 and five barriers each: about 35 us. A single warp needed
// 300 us.
DPO_DEVICE SequenceSums sum_sequence(const double* values, const double* others, const Weights& weights,
                                     TokenRange range, int64_t longest, int thread, SequenceScratch& scratch) {
  constexpr unsigned kNone = 0xffu;
  const int lane = thread % kWarp, warp = thread / kWarp;
  const unsigned before = (1u << lane) - 1u;
  scratch.sums[0][thread] = scratch.sums[1][thread] = 0.0;
  unsigned rank = 0;  // rank of the step's first weighted token
  const int64_t stop = range.begin + longest;
  for (int64_t base = range.begin; base < stop; base += kTokensPerThread * kSums) {
    double products[kTokensPerThread], other_products[kTokensPerThread];
    unsigned place = 0;  // one byte per token: its index among the warp's weighted tokens, or kNone for weight 0
#pragma unroll
    for (int k = 0; k < kTokensPerThread; ++k) {
      const int64_t i = base + k * kSums + thread;
      const bool inside = i < range.end;
      const double w = inside ? weight_of(weights, i) : 0.0;
      products[k] = inside ? w * values[i] : 0.0;
      other_products[k] = inside && others != nullptr ? w * others[i] : 0.0;
      const unsigned votes = __ballot_sync(kAllLanes, w != 0.0);
      place |= (w != 0.0 ? static_cast<unsigned>(__popc(votes & before)) : kNone) << 8 * k;
      if (lane == 0) scratch.counts[k][warp] = static_cast<unsigned>(__popc(votes));
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kTokensPerThread; ++k) {
      unsigned earlier = 0, all = 0;
#pragma unroll 1
      for (int w = 0; w < kSums / kWarp; ++w) {
        const unsigned count = scratch.counts[k][w];
        earlier += w < warp ? count : 0u;
        all += count;
      }
      // At most kSums tokens with consecutive ranks, so no two of them are added to the same sum.
      const unsigned own = place >> 8 * k & 0xffu;
      if (own != kNone) {
        const unsigned slot = (rank + earlier + own) % kSums;
        scratch.sums[0][slot] += products[k];
        scratch.sums[1][slot] += other_products[k];
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
    sums.values += scratch.sums[0][i + lane];
    sums.others += scratch.sums[1][i + lane];
  }
  return {warp_sum(sums.values), others != nullptr ? warp_sum(sums.others) : 0.0, static_cast<double>(rank)};
}

DPO_DEVICE double beta_of(const PreferenceLossParams& p, int64_t pair) {
  return p.betas != nullptr ? p.betas[pair] : p.beta;
}

// Called by one thread, with the sums of both sequences of the pair.
DPO_DEVICE void finish_pair(const PreferenceLossParams& p, int64_t pair, SequenceSums chosen, SequenceSums rejected) {
  const double beta = beta_of(p, pair);
  const double x = beta * ((chosen.values - chosen.others) - (rejected.values - rejected.others));
  const double smoothing = p.label_smoothings != nullptr ? p.label_smoothings[pair] : p.label_smoothing;
  const PairLoss loss = sigmoid_family(x, smoothing, p.robust != 0);
  p.losses[pair] = loss.loss;
  p.coef[pair] = beta * loss.slope;
  p.coef[p.pairs + pair] = -beta * loss.slope;
}

// Reads a loss from L2, because another block may have written it just before.
DPO_DEVICE double weighted_loss(const PreferenceLossParams& p, int64_t pair) {
  const double loss = load_coherent(p.losses + pair);
  return p.pair_weights != nullptr ? loss * p.pair_weights[pair] : loss;
}

// Called by the whole block, after its first thread has stored the loss of the pair.
DPO_DEVICE void reduce_losses(const PreferenceLossParams& p, int64_t pair) {
  if (p.divisor == 0.0) {
    if (threadIdx.x == 0) p.loss[pair] = static_cast<float>(weighted_loss(p, pair));
    return;
  }
  // The barrier makes the losses that the first thread acquired visible to the threads that read them now.
  const bool last = threadIdx.x == 0 && count_arrival(p.pairs_done) + 1 == p.pairs;
  if (__syncthreads_or(last) == 0 || threadIdx.x >= kWarp) return;
  double total = 0.0;
  for (int64_t i = threadIdx.x; i < p.pairs; i += kWarp) total += weighted_loss(p, i);
  total = warp_sum(total);
  if (threadIdx.x == 0) *p.loss = static_cast<float>(total / p.divisor);
}

__global__ void __launch_bounds__(2 * kSums) preference_loss_kernel(const __grid_constant__ PreferenceLossParams p) {
  using Scratch = SequenceScratch[2];
  using Sums = SequenceSums[2];
  DPO_SHARED(Scratch, scratch);
  DPO_SHARED(Sums, sums);
  const int side = static_cast<int>(threadIdx.x) / kSums;  // 0 chosen, 1 rejected
  const int thread = static_cast<int>(threadIdx.x) % kSums;
  const int64_t pair = blockIdx.x;
  const int64_t sequence = pair + side * p.pairs, partner = pair + (1 - side) * p.pairs;
  const TokenRange range = sequence_range(p.cu_seqlens, p.tokens, sequence);
  const int64_t other = sequence_range(p.cu_seqlens, p.tokens, partner).size();
  const int64_t longest = range.size() > other ? range.size() : other;
  const int statistic = 2 * static_cast<int>(blockIdx.y) - 2;
  const bool two = statistic + 1 < p.statistics;
  const double* values = statistic < 0 ? p.logps : p.first_values + statistic * p.values;
  const double* others = statistic < 0 ? p.ref_logps : two ? values + p.values : nullptr;
  Weights weights = p.weights;
  if (statistic >= 0) weights.given = nullptr;  // means are over the scored tokens, without weights
  SequenceSums own = sum_sequence(values, others, weights, range, longest, thread, scratch[side]);
  if (statistic >= 0) {
    if (thread != 0) return;
    const double count = own.count > 1.0 ? own.count : 1.0;
    double* mean = p.means + 2 * p.pairs * statistic + sequence;
    *mean = own.values / count;
    if (two) mean[2 * p.pairs] = own.others / count;
    return;
  }
  if (thread == 0) {
    if (p.ref_logps == nullptr && p.given_ref_sums != nullptr) own.others = p.given_ref_sums[sequence];
    sums[side] = own;
    p.sums[sequence] = own.values;
    p.ref_sums[sequence] = own.others;
    if (p.loss != nullptr) {
      p.rewards[sequence] = beta_of(p, pair) * (own.values - own.others);
      p.counts[sequence] = own.count;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) finish_pair(p, pair, sums[0], sums[1]);
  if (p.loss != nullptr) reduce_losses(p, pair);
}

__global__ void __launch_bounds__(kSums) sequence_sums_kernel(const __grid_constant__ SequenceSumsParams p) {
  DPO_SHARED(SequenceScratch, scratch);
  const int64_t sequence = blockIdx.x;
  const TokenRange range = sequence_range(p.cu_seqlens, p.tokens, sequence);
  const Weights weights{nullptr, 0, p.weights};
  const int thread = static_cast<int>(threadIdx.x);
  const SequenceSums sums = sum_sequence(p.values, nullptr, weights, range, range.size(), thread, scratch);
  if (thread == 0) p.sums[sequence] = sums.values;
}

cudaError_t preference_loss(const PreferenceLossParams& params, cudaStream_t stream) {
  if (params.pairs == 0) {
    // The mean and the sum over no pairs are 0.
    const bool reduced = params.loss != nullptr && params.divisor != 0.0;
    return reduced ? cudaMemsetAsync(params.loss, 0, sizeof(float), stream) : cudaSuccess;
  }
  const unsigned parts = params.loss == nullptr ? 1 : 1 + (static_cast<unsigned>(params.statistics) + 1) / 2;
  const LaunchShape shape{dim3(static_cast<unsigned>(params.pairs), parts), 2 * kSums, 1, 0};
  return launch(preference_loss_kernel, shape, stream, params);
}

cudaError_t sequence_sums(const SequenceSumsParams& params, cudaStream_t stream) {
  if (params.sequences == 0) return cudaSuccess;
  const LaunchShape shape{dim3(static_cast<unsigned>(params.sequences)), kSums, 1, 0};
  return launch(sequence_sums_kernel, shape, stream, params);
}

}  // namespace dpo::cuda
