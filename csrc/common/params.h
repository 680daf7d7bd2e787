// Definitions shared by all kernels and by the code that uses torch: dtypes, tensors of logits, names of result rows.
#pragma once

#include <cstdint>

namespace dpo {

enum class DType : int { float32, float64, bfloat16, float16 };

// A [B, T, V] tensor with unit stride on V. Strides are in elements.
struct Logits {
  const void* data;
  DType dtype;
  int64_t stride_b;
  int64_t stride_t;
};

// The rows of stage 1, in the order of `token_rows` (dpo_kernels/stages.py).
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

// The results per sequence of a whole call, in the order of SEQUENCE_ROWS (dpo_kernels/backends/whole_call.py). From
// `means` on follow the means of the requested statistics.
namespace sequence_row {
enum : int { logps, ref_logps, rewards, coef, counts, means };
}

// In the order of REDUCTIONS in the same file.
enum Reduction : int64_t { kMean, kSum, kNone };

// Sets the pointer of each row of stage 1; nullptr if it is not requested. `asked` has one bit per row. The requested
// rows are consecutive from `first` on, with `tokens` numbers each.
inline void point_at_rows(double* (&rows)[token_row::count], double* first, int64_t tokens, int64_t asked) {
  for (int row = 0; row < token_row::count; ++row) {
    rows[row] = nullptr;
    if (!(asked >> row & 1)) continue;
    rows[row] = first;
    first += tokens;
  }
}

}  // namespace dpo
