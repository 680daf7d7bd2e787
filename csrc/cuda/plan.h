// How many threads and blocks share a row. Pure functions, so that tests can enumerate them.
//
// The number of threads of a row follows from its length alone: that fixes which thread adds which logits, and so the
// rounding, whatever the batch. Only how those threads are spread over blocks depends on the number of rows: with few
// rows a cluster of small blocks brings more SMs to each row, and gives the same bits.
#pragma once

#include <cstdint>

#include "params.h"

namespace dpo::cuda {

// The choices that benchmarks/gpu_stages.py sweeps on a GPU: -D gives another.
#if !defined(DPO_ROW_THREADS)
#define DPO_ROW_THREADS 256  // that share a row of the forward
#endif
#if !defined(DPO_ROW_UNROLL)
#define DPO_ROW_UNROLL 4  // 128-bit loads of a thread of the forward that are under way at a time
#endif
#if !defined(DPO_MAX_CLUSTER)
#define DPO_MAX_CLUSTER 4  // blocks that share a row where rows are few
#endif
#if !defined(DPO_GRAD_THREADS)
#define DPO_GRAD_THREADS 256  // of a block of the gradient
#endif

constexpr int kMinThreads = 64;  // of a block

struct RowPlan {
  int threads;  // per row
  int blocks;   // per row, one cluster
};

inline RowPlan plan_rows(int64_t rows, int64_t vocab, int logits_per_thread, int max_threads, const Device& device) {
  RowPlan plan{kMinThreads, 1};
  while (plan.threads < max_threads && static_cast<int64_t>(plan.threads) * logits_per_thread < vocab) {
    plan.threads *= 2;
  }
  if (device.has_clusters) {
    while (plan.blocks < DPO_MAX_CLUSTER && plan.threads / plan.blocks > kMinThreads &&
           rows * plan.blocks < 4 * static_cast<int64_t>(device.sm_count)) {
      plan.blocks *= 2;
    }
  }
  return plan;
}

// Blocks that share a row of the gradient, which needs no reduction: enough to fill the device.
inline int plan_gradient_blocks(int64_t rows, int64_t vocab, int logits_per_block, const Device& device) {
  const int64_t tiles = (vocab + logits_per_block - 1) / logits_per_block;
  const int64_t wanted = (8 * static_cast<int64_t>(device.sm_count) + rows - 1) / (rows > 0 ? rows : 1);
  const int64_t blocks = wanted < tiles ? wanted : tiles;
  return static_cast<int>(blocks < 1 ? 1 : blocks);
}

}  // namespace dpo::cuda
