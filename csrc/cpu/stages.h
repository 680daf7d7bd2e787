// The seam between the torch-facing ops.cpp and the row kernels: plain structs and one table of functions per
// instruction set.
//
// token_logps.cpp and logits_grad.cpp are compiled once per instruction set (DPO_ISA = baseline, avx2 or avx512) and
// see no torch header. ops.cpp picks the widest set the CPU has, once. float64 arithmetic, the checking path, is
// compiled into the baseline set only.
#pragma once

#include <cstdint>

#include "../common/params.h"

namespace dpo::cpu {

using dpo::DType;
using dpo::Logits;

// Arithmetic is in float64 as soon as one of the pair is float64, else in float32.
inline bool is_wide(const Logits& policy, const Logits& reference) {
  return policy.dtype == DType::float64 || (reference.data && reference.dtype == DType::float64);
}

struct TokenLogpsParams {
  Logits policy;
  Logits reference;  // data == nullptr: none
  const int64_t* labels;
  const int64_t* tokens;  // the scored tokens, as indices into B * T: unscored rows are never read
  int64_t seq_len;        // T
  int64_t vocab;          // V
  double logit_scale;
  double logit_softcap;            // 0: none
  double* rows[token_row::count];  // [B * T] each; nullptr: not asked for
};

struct LogitsGradParams {
  Logits logits;
  void* out;  // dtype of logits, may be the same memory
  int64_t out_stride_b;
  int64_t out_stride_t;
  const int64_t* labels;
  const int64_t* tokens;
  const double* logps;
  const double* max;
  const double* log_sum;
  const double* grad_logps;
  int64_t seq_len;
  int64_t vocab;
  double logit_scale;
  double logit_softcap;
  // Token-level KL divergences; reference.data == nullptr: none, and the others are not read.
  Logits reference;
  const double* ref_logps;
  const double* ref_max;
  const double* ref_log_sum;
  const double* kl;               // KL(policy || reference)
  const double* grad_kl;          // of the loss with respect to it; nullptr: 0
  const double* grad_forward_kl;  // and to KL(reference || policy); nullptr: 0
};

// Declares functions once for every instruction set.
#define DPO_IN_EVERY_ISA(...) \
  namespace baseline {        \
  __VA_ARGS__                 \
  }                           \
  namespace avx2 {            \
  __VA_ARGS__                 \
  }                           \
  namespace avx512 {          \
  __VA_ARGS__                 \
  }

// Each function handles tokens[begin .. end).
DPO_IN_EVERY_ISA(void token_logps(const TokenLogpsParams& params, int64_t begin, int64_t end);
                 void logits_grad(const LogitsGradParams& params, int64_t begin, int64_t end);)

}  // namespace dpo::cpu
