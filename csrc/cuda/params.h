// The seam between host code and the CUDA kernels: plain structs and launch functions, no torch header.
//
// ops.cpp fills these from tensors; tests/cuda_emulator fills them from ctypes. Strides count elements, B and T are the
// two leading sizes of `logits [B, T, V]` (a packed batch is [1, N, V]), and V has unit stride.
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
  const int64_t* labels;  // [B, T]; ignored tokens have weight 0. nullptr: the weights say it themselves
  int64_t ignore_index;
  const double* given;  // [B, T], or nullptr for 1
};

DPO_HD double weight_of(const Weights& weights, int64_t token) {
  if (weights.labels != nullptr && weights.labels[token] == weights.ignore_index) return 0.0;
  return weights.given != nullptr ? weights.given[token] : 1.0;
}

struct TokenLogpsParams {
  Logits policy;
  Logits reference;                // data == nullptr: none
  const int64_t* labels;           // [B, T]
  double* rows[token_row::count];  // [B, T] each; nullptr: not asked for. ref_logps goes with reference, kl needs it
  int64_t batch;
  int64_t tokens;
  int64_t vocab;
  int64_t ignore_index;
  float logit_scale;
  float logit_softcap;  // 0: none
  int* to_clear;        // a counter of the launch that follows, or nullptr
};

// Weighted sums of sequences and the sigmoid-family loss of each pair. Sequences 0..pairs-1 are chosen, the next
// `pairs` rejected. Sequence s is row s of [B, T], or tokens cu_seqlens[s] .. cu_seqlens[s + 1] of the flattened batch.
struct PreferenceLossParams {
  const double* logps;             // [B, T]
  const double* ref_logps;         // [B, T] or nullptr
  int64_t tokens;                  // T
  Weights weights;                 // tokens of weight 0 are skipped, whatever they hold
  const int64_t* cu_seqlens;       // [2 * pairs + 1] or nullptr
  const double* given_ref_sums;    // [2 * pairs] or nullptr
  const double* betas;             // [pairs], or nullptr where beta holds for every pair
  const double* label_smoothings;  // and so on
  double beta;
  double label_smoothing;
  int64_t pairs;
  int robust;
  double* losses;    // [pairs]
  double* sums;      // [2 * pairs], as all that follow
  double* ref_sums;  //
  double* coef;      // d losses[p] / d sums[s]
  // A whole call's; loss == nullptr: none of it.
  double* rewards;
  double* counts;              // of scored tokens
  double* means;               // [statistics, 2 * pairs], over scored tokens
  const double* first_values;  // [statistics, B, T]
  int64_t values;              // B * T
  int statistics;
  const double* pair_weights;  // [pairs] or nullptr for 1
  double divisor;              // of the losses' sum; 0: no sum, each is wanted
  float* loss;                 // [1] or [pairs]
  int* pairs_done;             // 0 when the launch begins
};

struct SequenceSumsParams {
  const double* values;   // [B, T]
  const double* weights;  // [B, T]
  const int64_t* cu_seqlens;
  double* sums;
  int64_t sequences;
  int64_t tokens;
};

// How the gradient of a whole call's loss reaches the tokens.
struct SpreadParams {
  Weights weights;
  const int64_t* cu_seqlens;   // [2 * pairs + 1] or nullptr
  const double* coef;          // [2 * pairs]: d losses[p] / d sums[s]
  const float* grad_loss;      // of the reduced loss, or [pairs]
  int64_t grad_stride;         // 0 where one number is every pair's
  const double* pair_weights;  // [pairs] or nullptr for 1
  double divisor;              // of the losses' sum
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
  const double* grad_logps;  // [B, T]; nullptr: by `spread`
  SpreadParams spread;
  // Token-level KL divergences; reference.data == nullptr: none.
  Logits reference;
  const double* ref_logps;        // [B, T]
  const double* ref_max;          // [B, T]
  const double* ref_log_sum;      // [B, T]
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
  // Without rows no launch would clear the counter.
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
