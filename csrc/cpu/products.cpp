// Matrix products of the linear path on a CPU, in float32 arithmetic, for row- and column-major matrices of any 16- or
// 32-bit floating dtype.
//
// Source: Goto and van de Geijn 2008, Anatomy of High-Performance Matrix Multiplication, ACM TOMS 34. A tile of kRows x
// kColumns sums stays in registers, two vectors wide. Each step over K loads two vectors of b, broadcasts kRows numbers
// of a, and does 2 kRows multiply-adds. Both operands are packed: copied into the order in which the tile reads them.
// Packing converts 16-bit numbers to float32 and transposes if necessary, so products of all dtypes and layouts have
// the same speed. A panel of b, kDepth x kColumns, stays in the L1 cache during a pass over the rows of a; a block of
// a, kBlockRows x kDepth, stays in the L2 cache.
//
// The sum of an entry has a fixed order over K: blocks of kDepth in sequence, and in sequence within a block. It does
// not depend on the shape of `out`, the number of threads, or the position of the entry in its tile. So the logits of a
// token are bitwise equal in every batch.
#include "products.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#include "blocks.h"

#ifndef DPO_ISA
#define DPO_ISA baseline
#endif

namespace {

using dpo::cpu::DType;
using dpo::cpu::Matrix;

constexpr int kLanes = Vec<float>::lanes;
constexpr int kColumns = 2 * kLanes;
// Two vectors per row, two for b and one for a use 15 of 16 registers, or 31 of 32 with AVX-512.
constexpr int kRows = DPO_VECTOR_BYTES == 64 ? 14 : 6;
constexpr int64_t kBlockRows = 16 * kRows;
// A panel of b is 20 KB.
constexpr int64_t kDepth = 5120 / kColumns;
// Most rows that use the same packed block of b, and the size, in floats (2 MB), up to which a is packed once for all
// columns.
constexpr int64_t kMostRows = 1024 / kRows * kRows;
constexpr int64_t kKeptFloats = 1 << 19;

struct Free {
  void operator()(float* p) const { std::free(p); }
};

std::unique_ptr<float, Free> scratch(int64_t count) {
  const size_t bytes = (count * sizeof(float) + 127) / 64 * 64;
  std::unique_ptr<float, Free> memory(static_cast<float*>(std::aligned_alloc(64, bytes)));
  if (!memory) throw std::runtime_error("no memory left for " + std::to_string(bytes) + " bytes of a product's blocks");
  return memory;
}

// The size of equal parts of at most about `most`, rounded up to a multiple of `step`.
int64_t even(int64_t size, int64_t most, int64_t step) {
  const int64_t count = std::max<int64_t>(1, (size + most - 1) / most);
  return ((size + count - 1) / count + step - 1) / step * step;
}

// ---- The tile ----

// c[R][columns] = a b, or += if `add`, over `depth`; a is packed in panels of R, b in panels of kColumns.
template <int R>
void tile(const float* a, const float* b, int64_t depth, float* c, int64_t stride, int64_t columns, bool add) {
  for (int r = 0; r < R; ++r) __builtin_prefetch(c + r * stride, 1);
  vf sums[R][2] = {};
#pragma GCC unroll 8
  for (int64_t k = 0; k < depth; ++k, a += R, b += kColumns) {
    const vf first = load<float>(b), second = load<float>(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      sums[r][0] += first * a[r];
      sums[r][1] += second * a[r];
    }
  }
  if (columns == kColumns) {
    for (int r = 0; r < R; ++r) {
      for (int half = 0; half < 2; ++half) {
        float* to = c + r * stride + half * kLanes;
        store<float>(to, add ? load<float>(to) + sums[r][half] : sums[r][half]);
      }
    }
    return;
  }
  float all[R][kColumns];
  for (int r = 0; r < R; ++r) {
    store<float>(all[r], sums[r][0]);
    store<float>(all[r] + kLanes, sums[r][1]);
  }
  for (int r = 0; r < R; ++r) {
    for (int64_t j = 0; j < columns; ++j) c[r * stride + j] = add ? c[r * stride + j] + all[r][j] : all[r][j];
  }
}

using Tile = void (*)(const float*, const float*, int64_t, float*, int64_t, int64_t, bool);

template <int R = kRows>
Tile tile_of(int64_t rows) {
  if constexpr (R == 1) {
    return tile<1>;
  } else {
    return rows == R ? tile<R> : tile_of<R - 1>(rows);
  }
}

// ---- Packing ----

// n numbers as float32: in place if they are float32, else converted into `buffer`.
template <typename S>
DPO_INLINE const float* as_floats(const S* from, int64_t n, float* buffer) {
  if constexpr (sizeof(S) == 4) {
    return from;
  } else {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store<float>(buffer + i, Convert<float, S>::vector(from + i));
    if (i < n) {
      S rest[kLanes] = {};
      std::copy(from + i, from + n, rest);
      const vf last = Convert<float, S>::vector(rest);
      for (int64_t j = i; j < n; ++j) buffer[j] = last[j - i];
    }
    return buffer;
  }
}

typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

// The numbers of two vectors at the given indices; from 8 on those of the second vector. clang's builtin exists in g++
// since version 12.
#if defined(__clang__) || __GNUC__ >= 12
#define DPO_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t Places __attribute__((vector_size(32)));
#define DPO_PICK(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif

// Transposes an 8 x 8 block.
DPO_INLINE void transpose(const float* from, int64_t stride, Eight (&to)[8]) {
  Eight rows[8], pairs[8], fours[8];
  for (int i = 0; i < 8; ++i) rows[i] = *reinterpret_cast<const Eight*>(from + i * stride);
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = DPO_PICK(rows[i], rows[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    pairs[i + 1] = DPO_PICK(rows[i], rows[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i : {0, 1, 4, 5}) {
    fours[i] = DPO_PICK(pairs[i], pairs[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    fours[i + 2] = DPO_PICK(pairs[i], pairs[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; ++i) {
    to[i] = DPO_PICK(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    to[i + 4] = DPO_PICK(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// Interleaves `width` lines of `length` numbers: to[i * kStep + j] = number i of line j; 0 for lines from `width` on.
template <int kStep, typename S>
void interleave(const S* lines, int64_t stride, int64_t width, int64_t length, float* to, float* stage) {
  const float* from = stage;
  if constexpr (sizeof(S) == 4) {
    from = lines;
  } else {
    for (int64_t j = 0; j < width; ++j) as_floats(lines + j * stride, length, stage + j * length);
    stride = length;
  }
  int64_t done = 0;
  if (width == kStep && kStep % 8 == 0) {
    for (; done + 8 <= length; done += 8) {
      for (int j = 0; j < kStep; j += 8) {
        Eight block[8];
        transpose(from + done + j * stride, stride, block);
        for (int i = 0; i < 8; ++i) *reinterpret_cast<Eight*>(to + (done + i) * kStep + j) = block[i];
      }
    }
  } else if (width == 6 && kStep == 6) {
    // Only 6 of the 8 lines of the transposed block are used.
    for (; done + 8 <= length; done += 8) {
      Eight block[8];
      float eight[8][8];
      for (int j = 0; j < 6; ++j) std::copy_n(from + done + j * stride, 8, eight[j]);
      transpose(eight[0], 8, block);
      for (int i = 0; i < 8; ++i) std::copy_n(reinterpret_cast<const float*>(&block[i]), 6, to + (done + i) * 6);
    }
  }
  for (; done < length; ++done) {
    for (int64_t j = 0; j < kStep; ++j) to[done * kStep + j] = j < width ? from[done + j * stride] : 0.0f;
  }
}

// Packs b[k .. k + depth - 1, column .. column + n - 1] in panels of [depth][kColumns].
template <typename S>
void pack_b(const Matrix& b, int64_t k, int64_t depth, int64_t column, int64_t n, float* to, float* stage) {
  const S* data = static_cast<const S*>(b.data) + k * b.row + column * b.column;
  for (int64_t p = 0; p < n; p += kColumns, to += depth * kColumns) {
    const int64_t width = std::min<int64_t>(kColumns, n - p);
    const S* from = data + p * b.column;
    if (b.column != 1) {
      interleave<kColumns>(from, b.column, width, depth, to, stage);
    } else {
      for (int64_t i = 0; i < depth; ++i, from += b.row) {
        if (width == kColumns) {
          store<float>(to + i * kColumns, Convert<float, S>::vector(from));
          store<float>(to + i * kColumns + kLanes, Convert<float, S>::vector(from + kLanes));
        } else {
          float line[kColumns] = {};
          std::copy_n(as_floats(from, width, stage), width, line);
          std::copy_n(line, kColumns, to + i * kColumns);
        }
      }
    }
  }
}

// Packs a[row .. row + m - 1, k .. k + depth - 1] in panels of [depth][kRows]; the last panel may be narrower.
template <typename S>
void pack_a(const Matrix& a, int64_t row, int64_t m, int64_t k, int64_t depth, float* to, float* stage) {
  const S* data = static_cast<const S*>(a.data) + row * a.row + k * a.column;
  const int64_t whole = m / kRows * kRows, rest = m - whole;
  if (a.column == 1) {
    for (int64_t p = 0; p < whole; p += kRows) {
      interleave<kRows>(data + p * a.row, a.row, kRows, depth, to + p * depth, stage);
    }
    for (int64_t j = 0; j < rest; ++j) {
      const float* line = as_floats(data + (whole + j) * a.row, depth, stage);
      for (int64_t i = 0; i < depth; ++i) to[whole * depth + i * rest + j] = line[i];
    }
    return;
  }
  for (int64_t i = 0; i < depth; ++i) {
    const float* line = as_floats(data + i * a.column, m, stage);
    for (int64_t p = 0; p < whole; p += kRows) std::copy_n(line + p, kRows, to + p * depth + i * kRows);
    for (int64_t j = 0; j < rest; ++j) to[whole * depth + i * rest + j] = line[whole + j];
  }
}

template <typename F>
auto by_dtype(DType dtype, F run) {
  return dtype == DType::bfloat16 ? run(BFloat16{}) : dtype == DType::float16 ? run(Half{}) : run(float{});
}

// ---- A block of out ----

// Adds the bias to rows of float32 sums, and stores them in the type of `out`.
template <typename S>
void finish(const float* sums, int64_t stride, int64_t rows, int64_t columns, const float* bias, S* out,
            int64_t out_row) {
  for (int64_t r = 0; r < rows; ++r, sums += stride, out += out_row) {
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) {
      const vf sum = load<float>(sums + j);
      Convert<float, S>::put(out + j, bias ? sum + load<float>(bias + j) : sum);
    }
    if (j < columns) {
      vf last = {};
      for (int64_t i = j; i < columns; ++i) last[i - j] = bias ? sums[i] + bias[i] : sums[i];
      S rest[kLanes];
      Convert<float, S>::put(rest, last);
      std::copy_n(rest, columns - j, out + j);
    }
  }
}

}  // namespace

namespace dpo::cpu::DPO_ISA {

void product(const ProductParams& p, const Rectangle& whole) {
  const int64_t depth = even(p.depth, kDepth, 8);
  const int64_t most_rows = std::min(even(whole.rows, kMostRows, kRows), whole.rows);
  // If the packed rows of a fit in the L2 cache, narrow blocks of b are best; else a is packed for each block of b.
  const bool keeps = most_rows * p.depth <= kKeptFloats;
  const int64_t most_columns = std::min(even(whole.columns, keeps ? 256 : 512, kColumns), whole.columns + kColumns);
  const bool direct = p.out_dtype == DType::float32;
  const auto a = scratch(keeps ? most_rows * p.depth : kBlockRows * depth);
  const auto b = scratch((most_columns + kColumns) * depth);
  const auto stage = scratch(std::max<int64_t>(kColumns, kRows) * depth + kBlockRows);
  const auto sums = scratch(direct ? 0 : most_rows * most_columns);

  for (int64_t top = 0; top < whole.rows; top += most_rows) {
    const int64_t rows = std::min(most_rows, whole.rows - top), row = whole.row + top;
    for (int64_t left = 0; left < whole.columns; left += most_columns) {
      const int64_t columns = std::min(most_columns, whole.columns - left), column = whole.column + left;
      float* const out = static_cast<float*>(p.out) + row * p.out_row + column;  // used if direct
      float* const c = direct ? out : sums.get();
      const int64_t stride = direct ? p.out_row : columns;
      for (int64_t k = 0; k == 0 || k < p.depth; k += depth) {
        const int64_t n = std::min(depth, p.depth - k);
        by_dtype(p.b.dtype,
                 [&](auto type) { pack_b<decltype(type)>(p.b, k, n, column, columns, b.get(), stage.get()); });
        for (int64_t i = 0; i < rows; i += kBlockRows) {
          const int64_t m = std::min(kBlockRows, rows - i);
          float* const block = keeps ? a.get() + rows * k + i * n : a.get();
          if (!keeps || left == 0) {
            by_dtype(p.a.dtype, [&](auto type) { pack_a<decltype(type)>(p.a, row + i, m, k, n, block, stage.get()); });
          }
          for (int64_t j = 0; j < columns; j += kColumns) {
            for (int64_t r = 0; r < m; r += kRows) {
              tile_of(std::min<int64_t>(kRows, m - r))(block + r * n, b.get() + j * n, n, c + (i + r) * stride + j,
                                                       stride, std::min<int64_t>(kColumns, columns - j),
                                                       p.add || k > 0);
            }
          }
        }
      }
      const float* bias = p.bias ? p.bias + column : nullptr;
      if (direct && bias) finish(c, stride, rows, columns, bias, out, p.out_row);
      if (!direct) {
        by_dtype(p.out_dtype, [&](auto type) {
          auto* to = static_cast<decltype(type)*>(p.out) + row * p.out_row + column;
          finish(c, stride, rows, columns, bias, to, p.out_row);
        });
      }
    }
  }
}

}  // namespace dpo::cpu::DPO_ISA
