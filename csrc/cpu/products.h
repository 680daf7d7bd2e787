// Parameters of the matrix products on a CPU; products.cpp describes the data flow.
#pragma once

#include <cstdint>

#include "stages.h"

namespace dpo::cpu {

// Strides are in elements; one of them is 1.
struct Matrix {
  const void* data;
  DType dtype;  // float32, bfloat16 or float16
  int64_t row, column;
};

// out = a b + bias, or out += a b.
struct ProductParams {
  Matrix a;           // [M, K]
  Matrix b;           // [K, N]
  const float* bias;  // [N], added to every row; nullptr if there is none
  void* out;          // [M, N], unit stride on N
  DType out_dtype;
  int64_t out_row;  // row stride of out
  int64_t depth;    // K
  bool add;         // only for float32 out and without bias
};

// The part of `out` that a thread computes.
struct Rectangle {
  int64_t row, rows, column, columns;
};

DPO_IN_EVERY_ISA(void product(const ProductParams& params, const Rectangle& part);)

}  // namespace dpo::cpu
