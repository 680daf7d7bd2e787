// Hardware-specific functions of the kernels. Each has a version for the device (PTX or an intrinsic) and one for the
// emulator.
//
// Kernels use only these functions and standard CUDA (__syncthreads, __shfl_xor_sync, ...). So the same sources compile
// with nvcc, and, with DPO_EMULATOR defined, with a host compiler against tests/cuda_emulator.
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
// From this size on, the rounding error of a logit's product with log2(e), which is 2^31 or more, exceeds the range of
// an exponent.
constexpr double kLarge = 1.4e9;
// Origin of an empty running sum: finite, so that -inf minus the origin is -inf and not NaN.
constexpr float kFloor = -1e30f;

// 2^x with an error of 2 ulps and subnormal numbers flushed to 0: one MUFU instruction; exp2f needs three more.
DPO_DEVICE float fast_exp2(float x) {
#if defined(DPO_EMULATOR)
  return emu::exp2_ftz(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// A product that compilers do not contract to a fused multiply-add, so every variant of a kernel rounds it equally.
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

// Loads 16 bytes of logits without caching them in L1, because only one thread reads them, once. kReadOnly is legal
// only if nothing in the launch writes them, so the in-place gradient must not use it.
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

// Loads an aligned word of logits through L1, because the words of a cache line are loaded one by one.
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

// The 32 bits of high:low from bit `shift` < 32 on.
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

// Reads a value that another block wrote before it incremented the counter: from L2, because L1 may have an old value.
DPO_DEVICE double load_coherent(const double* address) {
#if defined(DPO_EMULATOR)
  return *address;
#else
  return __ldcg(address);
#endif
}

// Increments the counter atomically with acquire and release: earlier writes of this thread are visible to threads that
// read the new count, and writes that preceded earlier increments are visible to this thread. Returns the old count.
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

// ---- Thread-block clusters. In code for targets before sm_90 every block is a cluster of its own, and launches must
// not request larger ones (has_cluster_code). ----

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

// Arrive and wait are separate functions, so that the loads of the row hide the wait for the start of all blocks.
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

// Stores to the copy of a shared variable in block 0 of the cluster (distributed shared memory).
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

// Shared memory of static size. The emulator has one copy per block, so that blocks of a cluster do not alias.
#if defined(DPO_EMULATOR)
#define DPO_SHARED(type, name)      \
  static const char name##_key = 0; \
  type& name = *emu::shared_variable<type>(&name##_key)
#else
#define DPO_SHARED(type, name) __shared__ type name
#endif

// Tells the compiler that an argument of a function that is not inlined is in shared memory, so that it uses 32-bit
// addresses and instructions for shared memory.
DPO_DEVICE void assume_shared(const void* address) {
#if defined(DPO_EMULATOR)
  (void)address;
#else
  __builtin_assume(__isShared(address));
#endif
}

// The barrier between the stores of the threads' states and the warp that merges them. A test of the emulator compiles
// the kernel without it and must detect the error.
#if !defined(DPO_BARRIER_BEFORE_MERGE)
#define DPO_BARRIER_BEFORE_MERGE() __syncthreads()
#endif

// Whether the code of the kernel that this device would run was compiled for a target with clusters. The device itself
// does not determine it: an H100 also runs PTX of compute_80, in which every block is a cluster of its own. Queried
// once.
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
      cudaGetLastError();  // cleared, because the launch will report the error
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
