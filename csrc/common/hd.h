// Marks a function as usable on host and device, so that each formula exists once.
//
// On the host it is static: the CPU kernels are compiled once per instruction set, and a shared inline symbol would let
// the linker serve AVX-512 code to a CPU without it.
#pragma once

#if defined(__CUDACC__)
#define DPO_HD __host__ __device__ __forceinline__
// Rare and long (double transcendentals): one copy per GPU kernel instead of one per use.
#define DPO_HD_CALLED static __host__ __device__ __noinline__
#else
#define DPO_HD static inline
#define DPO_HD_CALLED static inline
#endif
