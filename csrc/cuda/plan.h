// The number of threads and blocks that share a row. Pure functions, so that tests can enumerate them.
//
// The number of threads of a row depends only on its length. It determines which thread adds which logits, and with it
// the rounding, which therefore does not depend on the batch. Only the distribution of these threads over blocks
// depends on the number of rows: with few rows, a cluster of small blocks uses more SMs per row, with bitwise equal
// results.
#pragma once

#include <cstdint>

#include "params.h"

namespace dpo::cuda {

// Launch parameters; -D changes them. benchmarks/gpu_stages.py measures other values on a GPU.
#if !defined(DPO_ROW_THREADS)
#define DPO_ROW_THREADS 256  // threads per row in the forward kernel
#endif
#if !defined(DPO_ROW_UNROLL)
#define DPO_ROW_UNROLL 4  // 128-bit loads in flight per thread in the forward kernel
#endif
#if !defined(DPO_MAX_CLUSTER)
#define DPO_MAX_CLUSTER 4  // most blocks per row if there are few rows
#endif
#if !defined(DPO_GRAD_THREADS)
#define DPO_GRAD_THREADS 256  // threads per block in the gradient kernel
#endif

constexpr int kMinThreads = 64;  // per block

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

// Blocks per row in the gradient kernel, which needs no reduction: enough to occupy the device.
inline int plan_gradient_blocks(int64_t rows, int64_t vocab, int logits_per_block, const Device& device) {
  const int64_t tiles = (vocab + logits_per_block - 1) / logits_per_block;
  const int64_t wanted = (8 * static_cast<int64_t>(device.sm_count) + rows - 1) / (rows > 0 ? rows : 1);
  const int64_t blocks = wanted < tiles ? wanted : tiles;
  return static_cast<int>(blocks < 1 ? 1 : blocks);
}

}  // namespace dpo::cuda
