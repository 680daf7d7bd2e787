// The seam between host code and the CUDA kernels: plain structs and launch functions, no torch header.
//
// ops.cpp fills these from tensors; tests/cuda_emulator fills them from ctypes. Strides count elements, B and T are the
// two leading sizes of `logits [B, T, V]` (a packed batch is [1, N, V]), and V has unit stride.
#pragma once

#include <cstdint>

#if defined(DPO_EMULATOR)
#include "emulator.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace dpo::cuda {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

struct Logits {
  const void* data;
  int64_t stride_b;
  int64_t stride_t;
  DType dtype;
};

// Weighted sums of sequences and the sigmoid-family loss of each pair. Sequences 0..pairs-1 are chosen, the next
// `pairs` rejected. Sequence s is row s of [B, T], or tokens cu_seqlens[s] .. cu_seqlens[s + 1] of the flattened batch.
struct PreferenceParams {
  const double* weights;          // [B, T]; tokens of weight 0 are skipped, whatever they hold
  const int64_t* cu_seqlens;      // [2 * pairs + 1] or nullptr
  const double* given_ref_sums;   // [2 * pairs] or nullptr
  const double* beta;             // [pairs]
  const double* label_smoothing;  // [pairs]
  double* losses;                 // [pairs]
  double* sums;                   // [2 * pairs]
  double* ref_sums;               // [2 * pairs]
  double* coef;                   // [2 * pairs]: d losses[p] / d sums[s]
  int* counters;                  // [3 * pairs], cleared by the call: rows done per sequence, sequences done per pair
  int64_t pairs;
  int robust;
};

struct TokenLogpsParams {
  Logits policy;
  Logits reference;       // data == nullptr: none
  const int64_t* labels;  // [B, T]
  // [B, T] each; nullptr: not asked for. ref_logps goes with reference, kl needs it.
  double* logps;
  double* lse;
  double* ref_logps;
  double* entropy;
  double* kl;
  double* accuracy;
  double* mean_logits;
  double* log_sum_sq;
  int64_t batch;
  int64_t tokens;
  int64_t vocab;
  int64_t ignore_index;
  float logit_scale;
  float logit_softcap;          // 0: none
  PreferenceParams preference;  // losses == nullptr: token statistics only
};

struct PreferenceLossParams {
  const double* logps;      // [B, T]
  const double* ref_logps;  // [B, T] or nullptr
  int64_t tokens;           // T
  PreferenceParams preference;
};

struct SequenceSumsParams {
  const double* values;   // [B, T]
  const double* weights;  // [B, T]
  const int64_t* cu_seqlens;
  double* sums;
  int64_t sequences;
  int64_t tokens;
};

struct LogitsGradParams {
  Logits logits;
  void* out;  // dtype of logits; may be the same memory with the same strides
  int64_t out_stride_b;
  int64_t out_stride_t;
  const int64_t* labels;     // [B, T]
  const double* logps;       // [B, T]
  const double* lse;         // [B, T]
  const double* grad_logps;  // [B, T]
  // Token-level KL divergences; reference.data == nullptr: none.
  Logits reference;
  const double* ref_logps;        // [B, T]
  const double* kl;               // [B, T], KL(policy || reference) of stage 1; read only where grad_kl is not 0
  const double* grad_kl;          // [B, T] or nullptr
  const double* grad_forward_kl;  // [B, T] or nullptr: of KL(reference || policy)
  int64_t batch;
  int64_t tokens;
  int64_t vocab;
  int64_t ignore_index;
  float logit_scale;
  float logit_softcap;
};

// What the launch heuristics need to know of a device.
struct Device {
  int sm_count;
  int has_clusters;  // compute capability 9.0 and later
  int index;
};

// One per dtype of the policy's logits: each is a translation unit of its own.
cudaError_t token_logps_float32(const TokenLogpsParams& params, const Device& device, cudaStream_t stream);
cudaError_t token_logps_bfloat16(const TokenLogpsParams& params, const Device& device, cudaStream_t stream);
cudaError_t token_logps_float16(const TokenLogpsParams& params, const Device& device, cudaStream_t stream);
cudaError_t preference_loss(const PreferenceLossParams& params, cudaStream_t stream);
cudaError_t sequence_sums(const SequenceSumsParams& params, cudaStream_t stream);
cudaError_t logits_grad_float32(const LogitsGradParams& params, const Device& device, cudaStream_t stream);
cudaError_t logits_grad_bfloat16(const LogitsGradParams& params, const Device& device, cudaStream_t stream);
cudaError_t logits_grad_float16(const LogitsGradParams& params, const Device& device, cudaStream_t stream);

inline cudaError_t token_logps(const TokenLogpsParams& params, const Device& device, cudaStream_t stream) {
  if (params.batch * params.tokens == 0) {
    if (params.preference.losses == nullptr) return cudaSuccess;
    // No row will complete a pair: the separate stage writes what empty sequences give.
    const PreferenceLossParams empty{params.logps, params.ref_logps, params.tokens, params.preference};
    return preference_loss(empty, stream);
  }
  // A node in the stream, so that a call depends on no earlier one: counters that every launch left as zeros would be
  // shared by calls on several streams, by a graph's replays and eager calls, and spoiled by a launch that failed. It
  // costs the host one short call of the driver, where counters that live on had to be found from Python by stream.
  if (params.preference.losses != nullptr) {
    const size_t bytes = 3 * sizeof(int) * static_cast<size_t>(params.preference.pairs);
    const cudaError_t error = cudaMemsetAsync(params.preference.counters, 0, bytes, stream);
    if (error != cudaSuccess) return error;
  }
  switch (params.policy.dtype) {
    case DType::float32:
      return token_logps_float32(params, device, stream);
    case DType::bfloat16:
      return token_logps_bfloat16(params, device, stream);
    case DType::float16:
      return token_logps_float16(params, device, stream);
  }
  return cudaErrorInvalidValue;
}

inline cudaError_t logits_grad(const LogitsGradParams& params, const Device& device, cudaStream_t stream) {
  if (params.batch * params.tokens * params.vocab == 0) return cudaSuccess;
  switch (params.logits.dtype) {
    case DType::float32:
      return logits_grad_float32(params, device, stream);
    case DType::bfloat16:
      return logits_grad_bfloat16(params, device, stream);
    case DType::float16:
      return logits_grad_float16(params, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dpo::cuda
