// Marks functions that are compiled for host and device, so that each formula is written once.
//
// On the host they are static: the CPU kernels are compiled once per instruction set, and of a shared inline symbol the
// linker might keep the AVX-512 code, which a CPU without AVX-512 cannot run.
#pragma once

#if defined(__CUDACC__)
#define DPO_HD __host__ __device__ __forceinline__
// For long functions that are rarely called (float64 transcendentals): one copy per GPU kernel instead of one per call.
#define DPO_HD_CALLED static __host__ __device__ __noinline__
#else
#define DPO_HD static inline
#define DPO_HD_CALLED static inline
#endif
