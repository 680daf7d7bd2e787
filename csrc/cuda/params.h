// Interface between host code and the CUDA kernels: plain structs and launch functions, without torch headers.
//
// ops.cpp fills the structs from tensors, tests/cuda_emulator from ctypes. Strides are in elements. Logits are [B, T,
// V] with unit stride on V; a packed batch is [1, N, V].
#pragma once

#include <cstdint>

#include "../common/hd.h"
#include "../common/params.h"

#if defined(DPO_EMULATOR)
#include "emulator.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace dpo::cuda {

struct Weights {
  const int64_t* labels;  // [B, T]; ignored tokens have weight 0. nullptr if `given` is 0 for them
  int64_t ignore_index;
  const double* given;  // [B, T], or nullptr for 1
};

DPO_HD double weight_of(const Weights& weights, int64_t token) {
  if (weights.labels != nullptr && weights.labels[token] == weights.ignore_index) return 0.0;
  return weights.given != nullptr ? weights.given[token] : 1.0;
}

struct TokenLogpsParams {
  Logits policy;
  Logits reference;                // data is nullptr if there is none
  const int64_t* labels;           // [B, T]
  double* rows[token_row::count];  // [B, T] each; nullptr if not requested. ref_logps and kl need a reference
  int64_t batch;
  int64_t tokens;
  int64_t vocab;
  int64_t ignore_index;
  float logit_scale;
  float logit_softcap;  // 0 for none
  int* to_clear;        // a counter to set to 0 for the next launch, or nullptr
};

// Weighted sums of sequences and the losses of the sigmoid family. Sequences 0 .. pairs - 1 are chosen, the next
// `pairs` rejected. Sequence s is row s of [B, T], or tokens cu_seqlens[s] .. cu_seqlens[s + 1] - 1 of the flattened
// batch.
struct PreferenceLossParams {
  const double* logps;             // [B, T]
  const double* ref_logps;         // [B, T] or nullptr
  int64_t tokens;                  // T
  Weights weights;                 // tokens of weight 0 are skipped, whatever their values
  const int64_t* cu_seqlens;       // [2 * pairs + 1] or nullptr
  const double* given_ref_sums;    // [2 * pairs] or nullptr
  const double* betas;             // [pairs], or nullptr if `beta` is used for every pair
  const double* label_smoothings;  // [pairs], or nullptr if `label_smoothing` is used for every pair
  double beta;
  double label_smoothing;
  int64_t pairs;
  int robust;
  double* losses;    // [pairs]
  double* sums;      // [2 * pairs]
  double* ref_sums;  // [2 * pairs]
  double* coef;      // [2 * pairs], d losses[p] / d sums[s]
  // For a whole call; if loss is nullptr, the other fields are not used.
  double* rewards;             // [2 * pairs]
  double* counts;              // [2 * pairs], number of scored tokens
  double* means;               // [statistics, 2 * pairs], over scored tokens
  const double* first_values;  // [statistics, B, T]
  int64_t values;              // B * T
  int statistics;
  const double* pair_weights;  // [pairs] or nullptr for 1
  double divisor;              // divisor of the sum of losses; 0 for one loss per pair
  float* loss;                 // [1] or [pairs]
  int* pairs_done;             // a counter that is 0 at the start of the launch
};

struct SequenceSumsParams {
  const double* values;   // [B, T]
  const double* weights;  // [B, T]
  const int64_t* cu_seqlens;
  double* sums;
  int64_t sequences;
  int64_t tokens;
};

// Input for the gradients of the tokens' log-probabilities in a whole call.
struct SpreadParams {
  Weights weights;
  const int64_t* cu_seqlens;   // [2 * pairs + 1] or nullptr
  const double* coef;          // [2 * pairs]: d losses[p] / d sums[s]
  const float* grad_loss;      // gradient of the reduced loss, or [pairs]
  int64_t grad_stride;         // stride of grad_loss; 0 if it is one number
  const double* pair_weights;  // [pairs] or nullptr for 1
  double divisor;              // divisor of the sum of losses
  int64_t pairs;
};

struct LogitsGradParams {
  Logits logits;
  void* out;  // dtype of logits; may be the same memory with the same strides
  int64_t out_stride_b;
  int64_t out_stride_t;
  const int64_t* labels;     // [B, T]
  const double* logps;       // [B, T]
  const double* max;         // [B, T]
  const double* log_sum;     // [B, T]
  const double* grad_logps;  // [B, T]; if nullptr, computed from `spread`
  SpreadParams spread;
  // For token-level KL divergences; if reference.data is nullptr there are none.
  Logits reference;
  const double* ref_logps;        // [B, T]
  const double* ref_max;          // [B, T]
  const double* ref_log_sum;      // [B, T]
  const double* kl;               // [B, T], KL(policy || reference) of stage 1; read only where grad_kl is not 0
  const double* grad_kl;          // [B, T] or nullptr
  const double* grad_forward_kl;  // [B, T] or nullptr, gradient of KL(reference || policy)
  int64_t batch;
  int64_t tokens;
  int64_t vocab;
  int64_t ignore_index;
  float logit_scale;
  float logit_softcap;
};

// The properties of a device that the launch heuristics use.
struct Device {
  int sm_count;
  int has_clusters;  // compute capability 9.0 and later
  int index;
};

// One function per dtype of the policy's logits, each in a translation unit of its own.
cudaError_t token_logps_float32(const TokenLogpsParams& params, const Device& device, cudaStream_t stream);
cudaError_t token_logps_bfloat16(const TokenLogpsParams& params, const Device& device, cudaStream_t stream);
cudaError_t token_logps_float16(const TokenLogpsParams& params, const Device& device, cudaStream_t stream);
cudaError_t preference_loss(const PreferenceLossParams& params, cudaStream_t stream);
cudaError_t sequence_sums(const SequenceSumsParams& params, cudaStream_t stream);
cudaError_t logits_grad_float32(const LogitsGradParams& params, const Device& device, cudaStream_t stream);
cudaError_t logits_grad_bfloat16(const LogitsGradParams& params, const Device& device, cudaStream_t stream);
cudaError_t logits_grad_float16(const LogitsGradParams& params, const Device& device, cudaStream_t stream);

inline cudaError_t token_logps(const TokenLogpsParams& params, const Device& device, cudaStream_t stream) {
  // Without rows there is no launch that clears the counter.
  if (params.batch * params.tokens == 0) {
    return params.to_clear == nullptr ? cudaSuccess : cudaMemsetAsync(params.to_clear, 0, sizeof(int), stream);
  }
  switch (params.policy.dtype) {
    case DType::float32:
      return token_logps_float32(params, device, stream);
    case DType::bfloat16:
      return token_logps_bfloat16(params, device, stream);
    case DType::float16:
      return token_logps_float16(params, device, stream);
    default:
      return cudaErrorInvalidValue;
  }
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
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace dpo::cuda
