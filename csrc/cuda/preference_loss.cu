// Stage 2 on CUDA, for callers that already hold token log-probs: weighted sequence sums, the sigmoid-family loss and
// its coefficients d loss / d sum. 256 threads per sequence, one block per pair; every value is read once.
//
// The fused forward in token_logps.cu does the same work inside its own launch through the same functions.
#include "sequence.cuh"

namespace dpo::cuda {

__global__ void __launch_bounds__(2 * kSums)
    preference_loss_kernel(const __grid_constant__ PreferenceLossParams params) {
  using Scratch = SequenceScratch[2];
  using Sums = SequenceSums[2];
  DPO_SHARED(Scratch, scratch);
  DPO_SHARED(Sums, sums);
  const PreferenceParams& p = params.preference;
  const int side = static_cast<int>(threadIdx.x) / kSums;  // 0 chosen, 1 rejected
  const int thread = static_cast<int>(threadIdx.x) % kSums;
  const int64_t pair = blockIdx.x;
  const int64_t sequence = pair + side * p.pairs, partner = pair + (1 - side) * p.pairs;
  const TokenRange range = sequence_range(p.cu_seqlens, params.tokens, sequence);
  const int64_t other = sequence_range(p.cu_seqlens, params.tokens, partner).size();
  const int64_t longest = range.size() > other ? range.size() : other;
  const SequenceSums own =
      finish_sequence(p, params.logps, params.ref_logps, sequence, range, longest, thread, kSums, scratch[side]);
  if (thread == 0) sums[side] = own;
  __syncthreads();
  if (threadIdx.x == 0) finish_pair(p, pair, sums[0], sums[1]);
}

__global__ void __launch_bounds__(kSums) sequence_sums_kernel(const __grid_constant__ SequenceSumsParams params) {
  DPO_SHARED(SequenceScratch, scratch);
  const int64_t sequence = blockIdx.x;
  const TokenRange range = sequence_range(params.cu_seqlens, params.tokens, sequence);
  const int thread = static_cast<int>(threadIdx.x);
  const SequenceSums sums =
      sum_sequence(params.values, nullptr, params.weights, range, range.size(), thread, kSums, scratch);
  if (thread == 0) params.sums[sequence] = sums.policy;
}

cudaError_t preference_loss(const PreferenceLossParams& params, cudaStream_t stream) {
  if (params.preference.pairs == 0) return cudaSuccess;
  const LaunchShape shape{dim3(static_cast<unsigned>(params.preference.pairs)), 2 * kSums, 1, 0};
  return launch(preference_loss_kernel, shape, stream, params);
}

cudaError_t sequence_sums(const SequenceSumsParams& params, cudaStream_t stream) {
  if (params.sequences == 0) return cudaSuccess;
  const LaunchShape shape{dim3(static_cast<unsigned>(params.sequences)), kSums, 1, 0};
  return launch(sequence_sums_kernel, shape, stream, params);
}

}  // namespace dpo::cuda
