// Interface between ops.cpp, which uses torch, and the row kernels: plain structs and functions for each instruction
// set.
//
// token_logps.cpp, logits_grad.cpp, filtered_grad.cpp and products.cpp are compiled once per instruction set (DPO_ISA =
// baseline, avx2 or avx512) without torch headers. ops.cpp selects the widest set of the CPU once. float64 arithmetic,
// which serves for checks, is compiled for the baseline set only.
#pragma once

#include <cstdint>

#include "../common/params.h"

namespace dpo::cpu {

using dpo::DType;
using dpo::Logits;

// Whether arithmetic is in float64, because policy or reference is float64; else it is in float32.
inline bool is_wide(const Logits& policy, const Logits& reference) {
  return policy.dtype == DType::float64 || (reference.data && reference.dtype == DType::float64);
}

struct TokenLogpsParams {
  Logits policy;
  Logits reference;  // data is nullptr if there is none
  const int64_t* labels;
  const int64_t* tokens;  // indices in B * T of the scored tokens; other rows are not read
  int64_t seq_len;        // T
  int64_t vocab;          // V
  double logit_scale;
  double logit_softcap;            // 0 for none
  double* rows[token_row::count];  // [B * T] each; nullptr if not requested
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
  // For token-level KL divergences. If reference.data is nullptr there are none, and the other fields are not read.
  Logits reference;
  const double* ref_logps;
  const double* ref_max;
  const double* ref_log_sum;
  const double* kl;               // KL(policy || reference)
  const double* grad_kl;          // d loss / d KL(policy || reference); nullptr for 0
  const double* grad_forward_kl;  // d loss / d KL(reference || policy); nullptr for 0
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
