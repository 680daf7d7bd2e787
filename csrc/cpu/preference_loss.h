// Parameters of stage 2 on a CPU; all arrays are float64 and contiguous.
#pragma once

#include <cstdint>

namespace dpo::cpu {

// Sequence i has tokens cu_seqlens[i] .. cu_seqlens[i + 1] - 1, or, if cu_seqlens is nullptr, row i of [B, T].
struct Sequences {
  const int64_t* cu_seqlens;
  int64_t seq_len;
};

struct PreferenceLossParams {
  const double* logps;      // [tokens]
  const double* ref_logps;  // [tokens] or nullptr
  const double* weights;    // [tokens], 0 if not scored
  const double* ref_sums;   // [2 * pairs] or nullptr; used if ref_logps is nullptr
  Sequences sequences;
  const double* beta;             // [pairs]
  const double* label_smoothing;  // [pairs]
  bool robust;
  int64_t pairs;
  double* losses;        // [pairs]
  double* sums;          // [2 * pairs]
  double* ref_sums_out;  // [2 * pairs]
  double* coef;          // [2 * pairs]
};

double sequence_sum(const double* values, const double* weights, const Sequences& sequences, int64_t i);
// Writes weight * value to the tokens of sequence i, except tokens of weight 0.
void spread(double value, const double* weights, const Sequences& sequences, int64_t i, double* tokens);
void preference_loss(const PreferenceLossParams& params, int64_t begin, int64_t end);

}  // namespace dpo::cpu
