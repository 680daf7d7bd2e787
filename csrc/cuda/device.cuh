// Everything the kernels ask of the machine, each with a device body (PTX or intrinsic) and an emulator body.
//
// Kernels call these and standard CUDA (__syncthreads, __shfl_xor_sync, ...), so the same sources compile with nvcc
// and, with DPO_EMULATOR defined, with a host compiler against tests/cuda_emulator.
#pragma once

#include <cstdint>

#if defined(DPO_EMULATOR)
#include "emulator.h"
#else
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DPO_DEVICE __device__ __forceinline__

namespace dpo::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;
// From this size on a logit's product with log2(e), 2^31 or more, rounds by more than an exponent has room for.
constexpr double kLarge = 1.4e9;
// Origin of an empty running sum: finite, so that -inf minus it stays -inf and never becomes NaN.
constexpr float kFloor = -1e30f;

// 2^x with 2 units in the last place and denormals flushed: one MUFU instruction, where exp2f costs three more.
DPO_DEVICE float fast_exp2(float x) {
#if defined(DPO_EMULATOR)
  return emu::exp2_ftz(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// A product that is never fused into an addition, so that every variant of a kernel rounds it alike.
DPO_DEVICE float multiply(float a, float b) {
#if defined(DPO_EMULATOR)
  return a * b;
#else
  return __fmul_rn(a, b);
#endif
}

DPO_DEVICE float as_float(uint32_t bits) {
#if defined(DPO_EMULATOR)
  return emu::bit_cast<float>(bits);
#else
  return __uint_as_float(bits);
#endif
}

DPO_DEVICE uint32_t as_bits(float value) {
#if defined(DPO_EMULATOR)
  return emu::bit_cast<uint32_t>(value);
#else
  return __float_as_uint(value);
#endif
}

// Logits of a forward: read once by one thread, so they need no place in L1. `read_only` is legal only where nothing in
// the launch writes them (the in-place gradient must not use it).
template <bool kReadOnly>
DPO_DEVICE uint4 load16(const void* address) {
#if defined(DPO_EMULATOR)
  return emu::load16(address);
#else
  uint4 v;
  if constexpr (kReadOnly) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
  } else {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address)
                 : "memory");
  }
  return v;
#endif
}

// An aligned word of logits, through L1: neighbouring words of a line are asked for one by one.
template <bool kReadOnly>
DPO_DEVICE uint32_t load4(const void* address) {
#if defined(DPO_EMULATOR)
  return emu::load4(address);
#else
  uint32_t v;
  if constexpr (kReadOnly) {
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(address));
  } else {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
  }
  return v;
#endif
}

// The 32 bits of high:low that start at bit `shift` < 32.
DPO_DEVICE uint32_t funnel_right(uint32_t low, uint32_t high, unsigned shift) {
#if defined(DPO_EMULATOR)
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> shift);
#else
  return __funnelshift_r(low, high, shift);
#endif
}

DPO_DEVICE void store16(void* address, uint4 v) {
#if defined(DPO_EMULATOR)
  emu::store16(address, v);
#else
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#endif
}

// A value another block wrote before the counter said so: read at L2, past this SM's L1.
DPO_DEVICE double load_coherent(const double* address) {
#if defined(DPO_EMULATOR)
  return *address;
#else
  return __ldcg(address);
#endif
}

// Counts one arrival: what this thread wrote before is visible to whoever sees the new count, and the other way round.
DPO_DEVICE int count_arrival(int* counter) {
#if defined(DPO_EMULATOR)
  return emu::atomic_add(counter, 1);
#else
  int old;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(old) : "l"(counter) : "memory");
  return old;
#endif
}

DPO_DEVICE double warp_sum(double value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// ---- Thread-block clusters. In code compiled for a target before sm_90 a block is its own cluster, and a launch must
// not ask for more (has_cluster_code). ----

#if defined(DPO_EMULATOR) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define DPO_HAS_CLUSTERS 1
#else
#define DPO_HAS_CLUSTERS 0
#endif

DPO_DEVICE int cluster_size() {
#if defined(DPO_EMULATOR)
  return emu::cluster_size();
#elif DPO_HAS_CLUSTERS
  uint32_t n;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return static_cast<int>(n);
#else
  return 1;
#endif
}

DPO_DEVICE int cluster_rank() {
#if defined(DPO_EMULATOR)
  return emu::cluster_rank();
#elif DPO_HAS_CLUSTERS
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return static_cast<int>(r);
#else
  return 0;
#endif
}

// Arrive and wait are apart so that the wait for all blocks to have started hides behind the row's loads.
DPO_DEVICE void cluster_arrive() {
#if defined(DPO_EMULATOR)
  emu::cluster_arrive();
#elif DPO_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

DPO_DEVICE void cluster_wait() {
#if defined(DPO_EMULATOR)
  emu::cluster_wait();
#elif DPO_HAS_CLUSTERS
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Stores into block 0's copy of a shared variable (distributed shared memory).
DPO_DEVICE void store_to_leader(float* own_copy, float value) {
#if defined(DPO_EMULATOR)
  *emu::leader_copy(own_copy) = value;
#elif DPO_HAS_CLUSTERS
  uint32_t own = static_cast<uint32_t>(__cvta_generic_to_shared(own_copy));
  asm volatile(
      "{\n .reg .u32 remote;\n mapa.shared::cluster.u32 remote, %0, 0;\n"
      " st.shared::cluster.f32 [remote], %1;\n}" ::"r"(own),
      "f"(value)
      : "memory");
#else
  *own_copy = value;
#endif
}

// ---- Shared memory and launches ----

// Statically sized shared memory. The emulator keeps one copy per block, so that blocks of a cluster do not alias.
#if defined(DPO_EMULATOR)
#define DPO_SHARED(type, name)      \
  static const char name##_key = 0; \
  type& name = *emu::shared_variable<type>(&name##_key)
#else
#define DPO_SHARED(type, name) __shared__ type name
#endif

// Tells the compiler that an argument of a function that is not inlined lies in shared memory: 32-bit addresses then,
// and instructions that need not find out.
DPO_DEVICE void assume_shared(const void* address) {
#if defined(DPO_EMULATOR)
  (void)address;
#else
  __builtin_assume(__isShared(address));
#endif
}

// The barrier between the warps' partial results and the warp that merges them. The emulator's negative test compiles
// the kernel without it and must see wrong results.
#if !defined(DPO_BARRIER_BEFORE_MERGE)
#define DPO_BARRIER_BEFORE_MERGE() __syncthreads()
#endif

// Was the kernel that a launch on this device would run compiled for a target with clusters? The device cannot tell: an
// H100 also runs PTX of compute_80, in which a block takes itself for its own cluster. Asked for once.
template <typename Params>
bool has_cluster_code(void (*kernel)(Params), int device) {
#if defined(DPO_EMULATOR)
  (void)kernel, (void)device;
  return emu::has_cluster_code();
#else
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(reinterpret_cast<const void*>(kernel), device);
  auto found = known.find(key);
  if (found == known.end()) {
    cudaFuncAttributes attributes{};
    // ptxVersion is the virtual architecture, __CUDA_ARCH__ / 10, of SASS and of PTX that the driver compiled.
    if (cudaFuncGetAttributes(&attributes, key.first) != cudaSuccess) {
      cudaGetLastError();  // the launch will say what is wrong
      return false;
    }
    found = known.emplace(key, attributes.ptxVersion >= 90).first;
  }
  return found->second;
#endif
}

struct LaunchShape {
  dim3 grid;
  int threads;
  int cluster;  // blocks per cluster along x
  size_t shared_bytes;
};

template <typename Params>
cudaError_t launch(void (*kernel)(Params), const LaunchShape& shape, cudaStream_t stream, const Params& params) {
#if defined(DPO_EMULATOR)
  return emu::launch([&] { kernel(params); }, shape.grid, shape.threads, shape.cluster, shape.shared_bytes, stream);
#else
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  if (shape.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
#endif
}

}  // namespace dpo::cuda
