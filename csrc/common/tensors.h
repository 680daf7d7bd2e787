// Conversion of torch's tensors to the pointers that kernels take. Only ops.cpp includes it; it uses PyTorch's stable
// ABI.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "params.h"

namespace dpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(std::string("dpo_kernels: ") + message);
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      throw std::runtime_error("dpo_kernels: logits must be float32, float64, bfloat16 or float16");
  }
}

inline Logits logits_of(const Tensor& t) {
  require(t.dim() == 3, "logits must be [B, T, V]");
  require(t.size(2) <= 1 || t.stride(2) == 1, "logits must have unit stride along the vocabulary");
  return {t.const_data_ptr(), dtype_of(t), t.stride(0), t.stride(1)};
}

inline void require_values(const Tensor& t) {
  require(t.scalar_type() == ScalarType::Double && t.is_contiguous(), "token values must be contiguous float64");
}

inline const double* in_of(const Tensor& t) {
  require_values(t);
  return static_cast<const double*>(t.const_data_ptr());
}

inline const double* in_of(const std::optional<Tensor>& t) { return t ? in_of(*t) : nullptr; }

inline double* out_of(const Tensor& t) {
  require_values(t);
  return static_cast<double*>(t.mutable_data_ptr());
}

inline const int64_t* labels_of(const Tensor& t) {
  require(t.scalar_type() == ScalarType::Long && t.is_contiguous(), "labels and bounds must be contiguous int64");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

inline const int64_t* bounds_of(const std::optional<Tensor>& t) { return t ? labels_of(*t) : nullptr; }

}  // namespace dpo
