// Runs csrc/cpu/products.cpp, compiled for one instruction set, over shapes at every edge of its tiles, with each
// matrix in memory of its own exact size. Built with AddressSanitizer, so one element read or written outside is an
// error. The results are compared with sums in double.
#include "../csrc/cpu/products.cpp"

#include <cstdio>
#include <random>
#include <vector>

namespace kernels = dpo::cpu::DPO_ISA;
using dpo::cpu::ProductParams;

namespace {

std::mt19937 generator(0);

struct Storage {
  std::vector<float> floats;
  std::vector<uint16_t> halves;
  Matrix matrix;
  double at(int64_t i, int64_t j) const {
    const int64_t place = i * matrix.row + j * matrix.column;
    if (matrix.dtype == DType::float32) return floats[place];
    const BFloat16 stored{halves[place]};
    return Convert<float, BFloat16>::scalar(&stored);
  }
};

Storage random_matrix(int64_t rows, int64_t columns, DType dtype, bool transposed) {
  Storage s;
  s.matrix = {nullptr, dtype, transposed ? 1 : columns, transposed ? rows : 1};
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < rows * columns; ++i) {
    const float x = normal(generator);
    if (dtype == DType::float32) {
      s.floats.push_back(x);
    } else {
      s.halves.push_back(reinterpret_cast<const uint32_t&>(x) >> 16);
    }
  }
  s.matrix.data = dtype == DType::float32 ? static_cast<const void*>(s.floats.data()) : s.halves.data();
  return s;
}

bool check(int64_t rows, int64_t columns, int64_t depth, int variant) {
  const DType in = variant & 1 ? DType::bfloat16 : DType::float32;
  const DType out = variant & 8 ? DType::bfloat16 : DType::float32;
  const Storage a = random_matrix(rows, depth, in, variant & 2), b = random_matrix(depth, columns, in, variant & 4);
  std::vector<float> bias(columns, 0.5f), floats(out == DType::float32 ? rows * columns : 0, 1.0f);
  std::vector<uint16_t> halves(out == DType::float32 ? 0 : rows * columns);
  ProductParams p{};
  p.a = a.matrix;
  p.b = b.matrix;
  p.out = out == DType::float32 ? static_cast<void*>(floats.data()) : halves.data();
  p.out_dtype = out;
  p.out_row = columns;
  p.depth = depth;
  p.add = variant & 16 && out == DType::float32;
  p.bias = p.add ? nullptr : bias.data();
  // Two rectangles that meet inside a tile's width.
  const int64_t cut = columns / 2;
  if (cut > 0) kernels::product(p, {0, rows, 0, cut});
  kernels::product(p, {0, rows, cut, columns - cut});
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double want = p.add ? 1.0 : 0.5, size = 1.0;
      for (int64_t k = 0; k < depth; ++k) {
        want += a.at(i, k) * b.at(k, j);
        size += std::fabs(a.at(i, k) * b.at(k, j));
      }
      const BFloat16 stored{out == DType::float32 ? uint16_t{0} : halves[i * columns + j]};
      const double got = out == DType::float32 ? floats[i * columns + j] : Convert<float, BFloat16>::scalar(&stored);
      const double most = 1e-6 * size + (out == DType::float32 ? 0.0 : std::fabs(want) / 250);
      if (!(std::fabs(got - want) <= most)) {
        std::printf("[%ld, %ld] x %ld, variant %d: entry (%ld, %ld) is %g, not %g\n", long(rows), long(columns),
                    long(depth), variant, long(i), long(j), got, want);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  const std::vector<int64_t> rows{1, kRows - 1, kRows, kRows + 1, kBlockRows + 1};
  const std::vector<int64_t> columns{1, kLanes + 1, kColumns, kColumns + 1, 70, 270};
  const std::vector<int64_t> depths{1, 7, 8, 9, kDepth, kDepth + 1, 2 * kDepth + 3};
  int checked = 0;
  for (int64_t m : rows) {
    for (int64_t n : columns) {
      for (int64_t k : depths) {
        // Every combination of types, orientations and addition comes with every edge of each size.
        if (!check(m, n, k, checked++ * 11 % 32)) return 1;
      }
    }
  }
  if (!check(kMostRows + 3, kColumns + 3, 5, 0) || !check(kMostRows + 3, kColumns + 3, 600, 6)) return 1;
  std::printf("%d products\n", checked);
}
