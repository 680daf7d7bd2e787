// Stage 3 on CUDA: dz = g (onehot(label) - softmax(z)) times dz/dx, one read and one write of each logit, in place or
// not.
//
// Data flow. A row is cut into tiles of 256 threads x 4 groups of 16 bytes; a block walks the row's tiles, or every
// n-th of them when few rows would leave SMs idle (no reduction, so the split changes no bit). Rows whose gradient is
// zero are written without being read.
//
// softmax(z) = 2^(z log2(e) - m) * f with m = float32(lse log2(e)), f = 2^(m - lse log2(e)) in float64: f joins the row
// factor, so rounding lse to float32 costs nothing. The label's entry is -g expm1(logp), which does not cancel when the
// policy is almost sure; its thread overwrites it after the tile's store.
//
// Vectors follow the alignment of `out`: a store that is not whole would cost more than a load that is not.
#include <cmath>

#include "plan.h"
#include "vectors.cuh"

namespace dpo::cuda {

constexpr int kGradThreads = 256;
constexpr int kUnroll = 4;

template <bool kSoftcap>
struct GradTransform {
  float log2_scale;
  float origin;  // m
  float factor;  // -g f dz/dx, without the softcap's own slope
  float cap;
  float inverse;

  DPO_DEVICE float operator()(float x) const {
    if constexpr (kSoftcap) {
      const float t = tanhf(x * inverse);
      return factor * fast_exp2(fmaf(cap * t, log2_scale, -origin)) * fmaf(-t, t, 1.0f);
    }
    return factor * fast_exp2(fmaf(x, log2_scale, -origin));
  }
};

template <typename T>
DPO_DEVICE void store_gradient(T* out, const float (&values)[Vector<T>::kElements]) {
  uint4 v;
  if constexpr (sizeof(T) == 4) {
    v = {as_bits(values[0]), as_bits(values[1]), as_bits(values[2]), as_bits(values[3])};
  } else {
    v = {Vector<T>::pack(values[0], values[1]), Vector<T>::pack(values[2], values[3]),
         Vector<T>::pack(values[4], values[5]), Vector<T>::pack(values[6], values[7])};
  }
  store16(out, v);
}

template <typename T, bool kAligned, typename F>
DPO_DEVICE void write_row(const F& f, const T* x, T* out, int groups) {
  constexpr int kSize = Vector<T>::kElements;
  constexpr int kTile = kGradThreads * kUnroll;
  const RowReader<T, kSize, kAligned, false> row(x);
  const auto store = [&](T* address, const Group<T, kSize>& g) {
    float values[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = f(g.get(i));
    store_gradient(address, values);
  };
  const int full = groups / kTile;
  const int stride = static_cast<int>(gridDim.y);
  Group<T, kSize> a[kUnroll];
  int tile = static_cast<int>(blockIdx.y);
  for (; tile < full; tile += stride) {
    const int64_t g = static_cast<int64_t>(tile) * kTile + threadIdx.x;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) a[u] = row.load((g + u * kGradThreads) * kSize);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) store(out + (g + u * kGradThreads) * kSize, a[u]);
  }
  if (tile != full) return;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t g = static_cast<int64_t>(full) * kTile + u * kGradThreads + threadIdx.x;
    a[u] = g < groups ? row.load(g * kSize) : empty_group<T, kSize>();
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t g = static_cast<int64_t>(full) * kTile + u * kGradThreads + threadIdx.x;
    if (g < groups) store(out + g * kSize, a[u]);
  }
}

template <typename T>
DPO_DEVICE void write_zeros(T* out, int groups) {
  constexpr int kSize = Vector<T>::kElements;
  const int step = kGradThreads * static_cast<int>(gridDim.y);
  for (int64_t g = static_cast<int64_t>(blockIdx.y) * kGradThreads + threadIdx.x; g < groups; g += step) {
    store16(out + g * kSize, uint4{0, 0, 0, 0});
  }
}

template <typename T, bool kSoftcap>
__global__ void __launch_bounds__(kGradThreads, 4) logits_grad_kernel(const __grid_constant__ LogitsGradParams p) {
  constexpr int kSize = Vector<T>::kElements;
  const int64_t token = blockIdx.x;
  const int64_t b = token / p.tokens, t = token % p.tokens;
  T* out = static_cast<T*>(p.out) + b * p.out_stride_b + t * p.out_stride_t;
  const int vocab = static_cast<int>(p.vocab);
  const int head = elements_to_boundary(out, vocab);
  const int groups = (vocab - head - 1) / kSize;  // a logit is left at least: RowReader may look one past a group
  const int tail = head + groups * kSize;

  // The logit outside whole groups that this thread owns, if any.
  const int thread = static_cast<int>(threadIdx.x);
  int single = -1;
  if (blockIdx.y == 0) {
    if (thread < head) {
      single = thread;
    } else if (thread < head + vocab - tail) {
      single = tail + thread - head;
    }
  }

  const int64_t label = p.labels[token];
  const double g = p.grad_logps[token];
  if (label == p.ignore_index || g == 0.0) {
    if (single >= 0) out[single] = Vector<T>::narrow(0.0f);
    write_zeros(out + head, groups);
    return;
  }

  const T* x = static_cast<const T*>(p.logits.data) + b * p.logits.stride_b + t * p.logits.stride_t;
  // An illegal label has lse = NaN: the whole row becomes NaN and no logit of the label is touched.
  bool owns_label = false;
  if (label >= 0 && label < vocab) {
    if (label < head || label >= tail) {
      owns_label = single == label;
    } else {
      const int group = static_cast<int>(label - head) / kSize;
      const int block = group / (kGradThreads * kUnroll) % static_cast<int>(gridDim.y);
      owns_label = block == static_cast<int>(blockIdx.y) && group % kGradThreads == thread;
    }
  }
  // Read before an in-place store can overwrite it.
  const float label_x = kSoftcap && owns_label ? Vector<T>::widen(x[label]) : 0.0f;

  const double scale = static_cast<double>(p.logit_scale);
  GradTransform<kSoftcap> f;
  f.cap = p.logit_softcap;
  f.inverse = kSoftcap ? p.logit_scale / p.logit_softcap : 0.0f;
  f.log2_scale = kSoftcap ? kLog2E : kLog2E * p.logit_scale;
  // lse in the kernel's own base-2 scale, which is log2(e) rounded to float32: z and lse must be scaled alike.
  const double lse = p.lse[token] * (static_cast<double>(f.log2_scale) / (kSoftcap ? 1.0 : scale));
  f.origin = static_cast<float>(lse);
  const double r = (static_cast<double>(f.origin) - lse) * kLn2;
  // exp(r) for the rounding residue r of lse: |r| < 1e-2 unless |lse| > 1e5.
  const double residue = fabs(r) < 1e-2 ? 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0))) : exp(r);
  f.factor = static_cast<float>(-g * scale * residue);

  if (single >= 0 && single != label) out[single] = Vector<T>::narrow(f(Vector<T>::widen(x[single])));
  if (is_aligned16(x + head)) {
    write_row<T, true>(f, x + head, out + head, groups);
  } else {
    write_row<T, false>(f, x + head, out + head, groups);
  }
  if (owns_label) {
    double slope = scale;
    if constexpr (kSoftcap) {
      const double u = tanh(static_cast<double>(label_x) * scale / static_cast<double>(p.logit_softcap));
      slope *= 1.0 - u * u;
    }
    out[label] = Vector<T>::narrow(static_cast<float>(-g * expm1(p.logps[token]) * slope));
  }
}

namespace {

template <typename T>
cudaError_t run(const LogitsGradParams& p, const Device& device, cudaStream_t stream) {
  const int64_t rows = p.batch * p.tokens;
  const int tile = kGradThreads * kUnroll * Vector<T>::kElements;
  LaunchShape shape{};
  shape.grid =
      dim3(static_cast<unsigned>(rows), static_cast<unsigned>(plan_gradient_blocks(rows, p.vocab, tile, device)));
  shape.threads = kGradThreads;
  shape.cluster = 1;
  return p.logit_softcap != 0.0f ? launch(logits_grad_kernel<T, true>, shape, stream, p)
                                 : launch(logits_grad_kernel<T, false>, shape, stream, p);
}

}  // namespace

cudaError_t logits_grad(const LogitsGradParams& params, const Device& device, cudaStream_t stream) {
  if (params.batch * params.tokens * params.vocab == 0) return cudaSuccess;
  switch (params.logits.dtype) {
    case DType::float32:
      return run<float>(params, device, stream);
    case DType::bfloat16:
      return run<__nv_bfloat16>(params, device, stream);
    case DType::float16:
      return run<__half>(params, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dpo::cuda
