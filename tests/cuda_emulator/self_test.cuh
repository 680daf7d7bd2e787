// Small kernels that test the emulator: one for each feature that the real kernels use, and some with planted errors.
#pragma once

#include "../../csrc/cuda/device.cuh"

namespace self_test {

struct Params {
  const float* in;
  float* out;
  int n;
};

// out[block] = sum of in[block * 256 ..], through shuffles, static and dynamic shared memory and a barrier.
template <bool kBarrier>
void block_sum(Params p) {
  using Partials = float[8];
  DPO_SHARED(Partials, partials);
  float* copy = emu::dynamic_shared<float>();
  copy[threadIdx.x] = p.in[blockIdx.x * blockDim.x + threadIdx.x];
  float v = copy[threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(dpo::cuda::kAllLanes, v, offset);
  if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = v;
  if (kBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += partials[w];
    p.out[blockIdx.x] = sum;
  }
}

// out[cluster] = sum over the cluster's blocks of rank + 1, stored by every block into block 0's shared memory.
void cluster_sum(Params p) {
  using Slots = float[8];
  DPO_SHARED(Slots, slots);
  const int rank = dpo::cuda::cluster_rank();
  dpo::cuda::cluster_arrive();
  dpo::cuda::cluster_wait();
  if (threadIdx.x == 0) dpo::cuda::store_to_leader(&slots[rank], static_cast<float>(rank) + 1.0f);
  dpo::cuda::cluster_arrive();
  dpo::cuda::cluster_wait();
  if (rank != 0 || threadIdx.x != 0) return;
  float sum = 0.0f;
  for (int k = 0; k < dpo::cuda::cluster_size(); ++k) sum += slots[k];
  p.out[blockIdx.x / static_cast<unsigned>(dpo::cuda::cluster_size())] = sum;
}

// Lanes of one warp vote in different places: undefined on a GPU.
void divergent_vote(Params p) {
  const unsigned all = dpo::cuda::kAllLanes;
  p.out[threadIdx.x] = static_cast<float>(threadIdx.x < 16 ? __ballot_sync(all, 1) : __shfl_sync(all, 1u, 0));
}

// Half of the block neither reaches the barrier nor returns.
void deadlock(Params p) {
  if (threadIdx.x < 32) __syncthreads();
  if (threadIdx.x >= 32) dpo::cuda::cluster_arrive(), dpo::cuda::cluster_wait();
  p.out[0] = 1.0f;
}

// Every block increments a counter, which is in[0]. The last block writes the result.
void last_block(Params p) {
  int* counter = reinterpret_cast<int*>(p.out + 1);
  if (threadIdx.x != 0) return;
  if (dpo::cuda::count_arrival(counter) == static_cast<int>(gridDim.x) - 1) p.out[0] = static_cast<float>(*counter);
}

inline int run(int which, const float* in, float* out, int n) {
  const Params p{in, out, n};
  const auto go = [&](void (*kernel)(Params), unsigned blocks, int threads, int cluster) {
    const dpo::cuda::LaunchShape shape{dim3(blocks), threads, cluster, sizeof(float) * static_cast<size_t>(threads)};
    return static_cast<int>(dpo::cuda::launch(kernel, shape, nullptr, p));
  };
  switch (which) {
    case 0:
      return go(block_sum<true>, static_cast<unsigned>(n), 256, 1);
    case 1:
      return go(block_sum<false>, static_cast<unsigned>(n), 256, 1);
    case 2:
      return go(cluster_sum, static_cast<unsigned>(n) * 4, 64, 4);
    case 3:
      return go(divergent_vote, 1, 32, 1);
    case 4:
      return go(deadlock, 1, 64, 1);
    case 5:
      return go(last_block, static_cast<unsigned>(n), 32, 1);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace self_test
