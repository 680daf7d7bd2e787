// Device guard, current stream, and the properties of the device for the launch heuristics. Only this file differs in
// the emulator build, where there is no stream and operators are registered for CPU tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <vector>

#include "params.h"

#if defined(DPO_EMULATOR)

#define DPO_LIBRARY dpo_kernels_cuda_emulated
#define DPO_DISPATCH_KEY CPU

namespace dpo::cuda {

inline const char* error_text(cudaError_t) { return emu::settings().error.c_str(); }

class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor&) {}
  Device device() const { return {132, 1, 0}; }  // the properties of an H100
  cudaStream_t stream() const { return nullptr; }
};

}  // namespace dpo::cuda

#else

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#ifndef DPO_LIBRARY  // the operators' namespace, which dpo_kernels/_build.py chooses
#define DPO_LIBRARY dpo_kernels_cuda
#endif
#define DPO_DISPATCH_KEY CUDA

namespace dpo::cuda {

inline const char* error_text(cudaError_t error) { return cudaGetErrorString(error); }

// aoti_torch_get_current_cuda_stream of the torch in this process. It is looked up at the first call, so the library
// can be linked against and loaded with a torch without CUDA.
inline cudaStream_t current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<Getter>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  if (getter == nullptr || getter(device, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("dpo_kernels: this torch has no CUDA stream to run on");
  }
  return static_cast<cudaStream_t>(stream);
}

// Properties of all devices, queried once; this creates no CUDA context.
inline Device describe(int device) {
  static const std::vector<Device> devices = [] {
    int count = 0;
    cudaGetDeviceCount(&count);
    std::vector<Device> found;
    for (int i = 0; i < count; ++i) {
      int sm_count = 1, major = 0;
      cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, i);
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i);
      found.push_back({sm_count, major >= 9, i});
    }
    return found;
  }();
  return devices.at(static_cast<size_t>(device));
}

class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}
  Device device() const { return describe(index_); }
  cudaStream_t stream() const { return current_stream(index_); }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace dpo::cuda

#endif
