// What all kernels and the torch-facing code share: dtypes, tensors of logits, and the rows of results by name.
#pragma once

#include <cstdint>

namespace dpo {

enum class DType : int { float32, float64, bfloat16, float16 };

// A [B, T, V] tensor, unit stride on V. Strides count elements.
struct Logits {
  const void* data;
  DType dtype;
  int64_t stride_b;
  int64_t stride_t;
};

// Stage 1's rows, in the order of `token_rows` (dpo_kernels/stages.py).
namespace token_row {
enum : int {
  logps,
  max,
  log_sum,
  ref_logps,
  ref_max,
  ref_log_sum,
  entropy,
  kl,
  accuracy,
  mean_logits,
  log_sum_sq,
  count
};
}

// A whole call's results per sequence, in the order of SEQUENCE_ROWS (dpo_kernels/backends/whole_call.py); from `means`
// on, the means of the statistics asked for.
namespace sequence_row {
enum : int { logps, ref_logps, rewards, coef, counts, means };
}

// The order of REDUCTIONS there.
enum Reduction : int64_t { kMean, kSum, kNone };

// Where each of stage 1's rows goes; nullptr: not asked for. `asked` has a bit for each; `first` is where those asked
// for lie one behind the other, `tokens` numbers each.
inline void point_at_rows(double* (&rows)[token_row::count], double* first, int64_t tokens, int64_t asked) {
  for (int row = 0; row < token_row::count; ++row) {
    rows[row] = nullptr;
    if (!(asked >> row & 1)) continue;
    rows[row] = first;
    first += tokens;
  }
}

}  // namespace dpo
