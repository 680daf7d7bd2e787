// Stage 3 on CUDA: dz = g (onehot(label) - softmax(z)) times dz/dx, with one read and one write of each logit, in place
// or not.
//
// Data flow. A row is divided into tiles of 256 threads x 4 groups of 16 bytes. A block processes all tiles of the row,
// or every n-th tile if few rows would leave SMs idle; there is no reduction, so the results are bitwise equal. Rows
// whose gradient is 0 are written without being read.
//
// softmax(z) = 2^(z log2(e) - m) * f with lse = max + log_sum, m = float32(lse log2(e)), f = 2^(m - lse log2(e)) in
// float64. f is multiplied with the row's factor, so rounding lse to float32 loses no precision. The label's entry is
// -g expm1(logp), which does not cancel if p is near 1; the thread that stored the entry overwrites it after its tile.
//
// With token-level KL divergences the reference's row is read once, together with the policy's, two groups of each in
// flight:
//   dz += g_kl p (d - D) + g_forward (p - q),    d = (z - max) - (z' - max'), D = sum p d, q = softmax(z')
// D is subtracted in two parts, for the reason given in csrc/cpu/logits_grad.cpp. The label's z is computed as max +
// log_sum + logp, because an in-place gradient may overwrite the logit before another block reads it.
//
// Groups are aligned to `out`, because an unaligned store costs more than an unaligned load.
//
// There is one translation unit per dtype of the logits (-DDPO_POLICY, the number of a DType), so that they compile in
// parallel; without DPO_POLICY, one unit has all of them.
#include <cfloat>
#include <cmath>
#include <type_traits>

#include "plan.h"
#include "vectors.cuh"

namespace dpo::cuda {

constexpr int kGradThreads = DPO_GRAD_THREADS;

// kForward: the reference's softmax is computed as well, for KL(reference || policy). With a softcap it is always
// computed, because tanh costs more.
template <typename T_, typename R_, bool kSoftcap_, bool kForward_>
struct GradTraits {
  using T = T_;
  static constexpr bool kKl = !std::is_same_v<R_, NoReference>;
  using R = std::conditional_t<kKl, R_, T_>;
  static constexpr bool kSoftcap = kSoftcap_;
  static constexpr bool kForward = kForward_;
  static constexpr int kSize =
      Vector<T>::kElements > Vector<R>::kElements ? Vector<T>::kElements : Vector<R>::kElements;
  static constexpr int kUnroll = kKl ? 2 : 4;  // 64 bytes in flight, with a reference or without
  // Minimum of resident blocks per SM: 64 registers per thread, 80 with both divergences or a softcap.
  static constexpr int kResident = ((kKl && kForward) || kSoftcap ? 3 : 4) * 256 / DPO_GRAD_THREADS;
};

// Computes entries of a row's gradient from its logits; the fields are equal for the whole row.
template <typename Tr>
struct GradTransform {
  float log2_scale;
  float origin;  // m
  float factor;  // factor of p, without the softcap's derivative
  float cap;
  float inverse;
  // For a reference: by_gap is the factor of p (d - D) = p ((z - top) - (z' - center)), by_q that of the reference's
  // softmax relative to ref_origin.
  float top;
  float center;
  float by_gap;
  float gap_limit;
  float ref_log2_scale;
  float ref_origin;
  float by_q;

  DPO_DEVICE float operator()(float x, float ref) const {
    float z = x, ref_z = ref, slope = 1.0f;
    if constexpr (Tr::kSoftcap) {
      const float t = tanhf(x * inverse);
      z = cap * t;
      slope = fmaf(-t, t, 1.0f);
      if constexpr (Tr::kKl) ref_z = cap * tanhf(ref * inverse);
    }
    const float e = fast_exp2(fmaf(z, log2_scale, -origin));
    float dz;
    if constexpr (Tr::kKl) {
      // The gap is infinite if one of the two is -inf. It is limited, so that a product with e = 0 or by_gap = 0 is 0.
      const float gap = fminf(fmaxf((z - top) - (ref_z - center), -gap_limit), gap_limit);
      dz = e * fmaf(gap, by_gap, factor);
      if constexpr (Tr::kForward) dz = fmaf(-by_q, fast_exp2(fmaf(ref_z, ref_log2_scale, -ref_origin)), dz);
    } else {
      dz = factor * e;
    }
    return Tr::kSoftcap ? dz * slope : dz;
  }
};

template <typename T, int kSize>
DPO_DEVICE void store_gradient(T* out, const float (&values)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; i += Vector<T>::kElements) {
    const float* v = values + i;
    uint4 packed;
    if constexpr (sizeof(T) == 4) {
      packed = {as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3])};
    } else {
      packed = {Vector<T>::pack(v[0], v[1]), Vector<T>::pack(v[2], v[3]), Vector<T>::pack(v[4], v[5]),
                Vector<T>::pack(v[6], v[7])};
    }
    store16(out + i, packed);
  }
}

// kAligned: the rows of policy and reference are 16-byte aligned.
template <typename Tr, bool kAligned>
DPO_DEVICE void write_row(const GradTransform<Tr>& f, const typename Tr::T* x, const typename Tr::R* ref,
                          typename Tr::T* out, int groups) {
  using T = typename Tr::T;
  using R = typename Tr::R;
  constexpr int kSize = Tr::kSize, kUnroll = Tr::kUnroll;
  constexpr int kTile = kGradThreads * kUnroll;
  const RowReader<T, kSize, kAligned, false> policy(x);
  const RowReader<R, kSize, kAligned, false> reference(ref);
  const auto store = [&](T* address, const Group<T, kSize>& g, const Group<R, kSize>& r) {
    float values[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = f(g.get(i), Tr::kKl ? r.get(i) : 0.0f);
    store_gradient<T, kSize>(address, values);
  };
  const int full = groups / kTile;
  const int stride = static_cast<int>(gridDim.y);
  Group<T, kSize> a[kUnroll];
  Group<R, kSize> b[kUnroll];
  int tile = static_cast<int>(blockIdx.y);
  for (; tile < full; tile += stride) {
    const int64_t g = static_cast<int64_t>(tile) * kTile + threadIdx.x;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      a[u] = policy.load((g + u * kGradThreads) * kSize);
      if constexpr (Tr::kKl) b[u] = reference.load((g + u * kGradThreads) * kSize);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) store(out + (g + u * kGradThreads) * kSize, a[u], b[u]);
  }
  if (tile != full) return;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t g = static_cast<int64_t>(full) * kTile + u * kGradThreads + threadIdx.x;
    a[u] = g < groups ? policy.load(g * kSize) : empty_group<T, kSize>();
    if constexpr (Tr::kKl) b[u] = g < groups ? reference.load(g * kSize) : empty_group<R, kSize>();
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t g = static_cast<int64_t>(full) * kTile + u * kGradThreads + threadIdx.x;
    if (g < groups) store(out + g * kSize, a[u], b[u]);
  }
}

template <typename T, int kSize>
DPO_DEVICE void write_zeros(T* out, int groups) {
  const int step = kGradThreads * static_cast<int>(gridDim.y);
  for (int64_t g = static_cast<int64_t>(blockIdx.y) * kGradThreads + threadIdx.x; g < groups; g += step) {
#pragma unroll
    for (int i = 0; i < kSize; i += Vector<T>::kElements) store16(out + g * kSize + i, uint4{0, 0, 0, 0});
  }
}

// The softmax of a row, p = 2^(z log2_scale - origin) factor, where z is the loop's variable.
struct Softmax {
  float log2_scale, origin;
  double factor;
};

// The biased exponent of a float.
DPO_DEVICE int exponent_of(float x) { return static_cast<int>(as_bits(x) >> 23 & 0xff); }

// A factor of p may exceed float32, for example IPO's coefficient, or a loss scale times a large gap. Then a power of
// two is moved from the factor into the exponential, so that an entry with p = 0 gives 0 and not 0 * inf. Returns its
// exponent n >= 0, by which the exponent of `by` exceeds `most`.
DPO_DEVICE int excess_of(double by, int most) {
  const int exponent = exponent_of(static_cast<float>(by)) - 126;
  return exponent > most ? exponent - most : 0;
}

// Factors up to 2^kMost cannot overflow in a sum of two products.
constexpr int kMost = 125;
// For the factor of a gap, which may be as large as the largest float32.
constexpr int kMostOfGap = -2;

// Conversion to float32; finite numbers beyond its range become the largest finite number.
DPO_DEVICE float saturated(double x) {
  const float y = static_cast<float>(x);
  return fabsf(y) > FLT_MAX && fabs(x) < INFINITY ? copysignf(FLT_MAX, y) : y;
}

// max and log_sum are in nats. From kLarge on, the rounding error of `origin` exceeds the range of an exponent. There
// only logits equal to the maximum have nonzero probability. The scale is then `coarse`, a power of two, so that
// products are exact and tell them from the others; it is at most half of log2_scale, and so small that no logit
// overflows.
DPO_DEVICE Softmax softmax_of(double max, double log_sum, double unit, float log2_scale, int excess) {
  const bool large = fabs(max) >= kLarge;
  const float top = static_cast<float>(max / unit);
  const int of_scale = exponent_of(log2_scale) - 1, of_top = 379 - exponent_of(top);
  const float coarse = as_float(static_cast<uint32_t>(of_scale < of_top ? of_scale : of_top) << 23);
  // lse in base 2, with log2(e) rounded to float32 as in the kernel, because z and lse need the same scale.
  const double exact = (max + log_sum) * (static_cast<double>(log2_scale) / unit);
  const float origin = static_cast<float>(exact - excess);
  // |r| < 1e-2 unless |lse| > 1e5 or there is an excess.
  const double r = large ? -log_sum : (static_cast<double>(origin) - exact) * kLn2;
  const double factor = fabs(r) < 1e-2 ? 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0))) : exp(r);
  return large ? Softmax{coarse, top * coarse, factor} : Softmax{log2_scale, origin, factor};
}

// The gradients of a token's log-probability and divergences.
struct TokenGrads {
  double logp, kl, forward_kl;

  DPO_DEVICE bool any() const { return logp != 0.0 || kl != 0.0 || forward_kl != 0.0; }
};

// The sequence of a packed token; -1 or `sequences` for a token outside all sequences. The bounds must rise
// (`rising_bounds` in stages.py).
DPO_DEVICE int64_t owner(const int64_t* bounds, int64_t sequences, int64_t token) {
  int64_t low = 0, high = sequences + 1;  // the index of the first bound after the token is in [low, high]
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (bounds[middle] <= token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - 1;
}

// The gradient of a token's log-probability, computed by one thread. In a whole call it follows from the gradient of
// the loss, by the same sequence of operations as in `preference_backward` (dpo_kernels/backends/whole_call.py). Not
// inlined, so that its registers and its division do not count for the kernel.
static __device__ __noinline__ double grad_of_logp(const LogitsGradParams& p, int64_t token) {
  if (p.grad_logps != nullptr) return p.grad_logps[token];
  const SpreadParams& s = p.spread;
  const int64_t sequence = s.cu_seqlens == nullptr ? token / p.tokens : owner(s.cu_seqlens, 2 * s.pairs, token);
  const double weight = weight_of(s.weights, token);
  if (weight == 0.0 || sequence < 0 || sequence >= 2 * s.pairs) return 0.0;
  const int64_t pair = sequence < s.pairs ? sequence : sequence - s.pairs;
  double grad = static_cast<double>(s.grad_loss[pair * s.grad_stride]) / s.divisor;
  if (s.pair_weights != nullptr) grad *= s.pair_weights[pair];
  return weight * (s.coef[sequence] * grad);
}

template <typename Tr>
DPO_DEVICE TokenGrads token_grads(const LogitsGradParams& p, int64_t token, double grad_logp) {
  TokenGrads g{grad_logp, 0.0, 0.0};
  if constexpr (Tr::kKl) {
    if (p.grad_kl != nullptr) g.kl = p.grad_kl[token];
    if (p.grad_forward_kl != nullptr) g.forward_kl = p.grad_forward_kl[token];
  }
  return g;
}

// The label's entry, in float64. Its inputs are read again after the row, because keeping them during the loop would
// cost registers.
template <typename Tr>
DPO_DEVICE float label_entry(const LogitsGradParams& p, int64_t token, double grad_logp) {
  const TokenGrads g = token_grads<Tr>(p, token, grad_logp);
  const double logp = p.logps[token];
  double dz = -g.logp * expm1(logp);
  if constexpr (Tr::kKl) {
    const double ref_logp = p.ref_logps[token], p_label = exp(logp);
    if (g.kl != 0.0 && p_label != 0.0) dz -= g.kl * p_label * (p.kl[token] - logp + ref_logp);
    if (g.forward_kl != 0.0) dz += g.forward_kl * (expm1(logp) - expm1(ref_logp));
  }
  double slope = static_cast<double>(p.logit_scale);
  if constexpr (Tr::kSoftcap) {
    const double t = (p.max[token] + (p.log_sum[token] + logp)) / static_cast<double>(p.logit_softcap);
    slope *= 1.0 - t * t;
  }
  return static_cast<float>(dz * slope);
}

template <typename Tr>
__global__ void __launch_bounds__(kGradThreads, Tr::kResident)
    logits_grad_kernel(const __grid_constant__ LogitsGradParams p) {
  using T = typename Tr::T;
  using R = typename Tr::R;
  constexpr int kSize = Tr::kSize;
  const int64_t token = blockIdx.x;
  // Called first, because values that live across the call would cost registers.
  DPO_SHARED(double, grad_logp);
  if (threadIdx.x == 0) grad_logp = grad_of_logp(p, token);
  __syncthreads();
  const int64_t b = token / p.tokens, t = token % p.tokens;
  T* out = static_cast<T*>(p.out) + b * p.out_stride_b + t * p.out_stride_t;
  const int vocab = static_cast<int>(p.vocab);
  const int head = elements_to_boundary(out, vocab);
  const int groups = (vocab - head - 1) / kSize;  // at least one logit is left: RowReader may read one past a group
  const int tail = head + groups * kSize;

  // The logit outside whole groups that this thread processes, or -1.
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
  const TokenGrads g = token_grads<Tr>(p, token, grad_logp);
  if (label == p.ignore_index || !g.any()) {
    if (single >= 0) out[single] = Vector<T>::narrow(0.0f);
    write_zeros<T, kSize>(out + head, groups);
    return;
  }

  const T* x = static_cast<const T*>(p.logits.data) + b * p.logits.stride_b + t * p.logits.stride_t;
  const R* ref = nullptr;
  if constexpr (Tr::kKl) {
    ref = static_cast<const R*>(p.reference.data) + b * p.reference.stride_b + t * p.reference.stride_t;
  }
  // For an illegal label max is NaN, so the whole row becomes NaN; there is no label's entry to write.
  const bool legal = label >= 0 && label < vocab;
  bool owns_label = false;
  if (legal) {
    if (label < head || label >= tail) {
      owns_label = single == label;
    } else {
      const int group = static_cast<int>(label - head) / kSize;
      const int block = group / (kGradThreads * Tr::kUnroll) % static_cast<int>(gridDim.y);
      owns_label = block == static_cast<int>(blockIdx.y) && group % kGradThreads == thread;
    }
  }

  const double scale = static_cast<double>(p.logit_scale);
  GradTransform<Tr> f{};
  f.cap = p.logit_softcap;
  f.inverse = Tr::kSoftcap ? p.logit_scale / p.logit_softcap : 0.0f;
  const float log2_scale = Tr::kSoftcap ? kLog2E : kLog2E * p.logit_scale;
  const double unit = Tr::kSoftcap ? 1.0 : scale;  // z divided by the loop's variable
  double by_p = -g.logp;
  int excess = 0;
  if constexpr (Tr::kKl) {
    const double ref_max = p.ref_max[token], ref_log_sum = p.ref_log_sum[token];
    if (g.kl != 0.0) {
      const double mean = p.kl[token] + p.log_sum[token] - ref_log_sum;  // D
      f.top = static_cast<float>(p.max[token] / unit);
      f.center = static_cast<float>((ref_max - mean) / unit);
      by_p -= g.kl * (unit * static_cast<double>(f.center) - (ref_max - mean));
      excess = excess_of(g.kl * scale * unit, kMostOfGap);
    }
    if (g.forward_kl != 0.0) {
      const double by_q = g.forward_kl * scale;
      const Softmax other = softmax_of(ref_max, ref_log_sum, unit, log2_scale, excess_of(by_q, kMost));
      f.ref_log2_scale = other.log2_scale;
      f.ref_origin = other.origin;
      f.by_q = saturated(by_q * other.factor);
      by_p += g.forward_kl;
    }
  }
  by_p *= scale;
  const int excess_of_p = excess_of(by_p, kMost);
  if (excess_of_p > excess) excess = excess_of_p;
  const Softmax own = softmax_of(p.max[token], p.log_sum[token], unit, log2_scale, excess);
  f.log2_scale = own.log2_scale;
  f.origin = own.origin;
  f.factor = saturated(by_p * own.factor);
  if constexpr (Tr::kKl) {
    f.by_gap = static_cast<float>(g.kl * scale * unit * own.factor);
    // by_gap can still be large, if the excess could not be moved completely or `origin` has a large rounding error.
    f.gap_limit = fabsf(f.by_gap) < 0.5f ? FLT_MAX : 0.5f * FLT_MAX / fabsf(f.by_gap);
  }

  if (single >= 0 && single != label) {
    const float ref_single = Tr::kKl ? Vector<R>::widen(ref[single]) : 0.0f;
    out[single] = Vector<T>::narrow(f(Vector<T>::widen(x[single]), ref_single));
  }
  const R* ref_groups = Tr::kKl ? ref + head : nullptr;
  if (is_aligned16(x + head) && is_aligned16(ref_groups)) {
    write_row<Tr, true>(f, x + head, ref_groups, out + head, groups);
  } else {
    write_row<Tr, false>(f, x + head, ref_groups, out + head, groups);
  }
  if (owns_label) out[label] = Vector<T>::narrow(label_entry<Tr>(p, token, grad_logp));
}

namespace {

template <typename Tr>
cudaError_t run(const LogitsGradParams& p, const Device& device, cudaStream_t stream) {
  const int64_t rows = p.batch * p.tokens;
  const int tile = kGradThreads * Tr::kUnroll * Tr::kSize;
  LaunchShape shape{};
  shape.grid =
      dim3(static_cast<unsigned>(rows), static_cast<unsigned>(plan_gradient_blocks(rows, p.vocab, tile, device)));
  shape.threads = kGradThreads;
  shape.cluster = 1;
  return launch(logits_grad_kernel<Tr>, shape, stream, p);
}

template <typename T, typename R>
cudaError_t with_divergences(const LogitsGradParams& p, const Device& device, cudaStream_t stream) {
  if (p.logit_softcap != 0.0f) return run<GradTraits<T, R, true, true>>(p, device, stream);
  // Mixed dtypes are rare, so they use one kernel with both divergences.
  if constexpr (std::is_same_v<T, R>) {
    if (p.grad_forward_kl == nullptr) return run<GradTraits<T, R, false, false>>(p, device, stream);
  }
  return run<GradTraits<T, R, false, true>>(p, device, stream);
}

template <typename T>
cudaError_t with_reference(const LogitsGradParams& p, const Device& device, cudaStream_t stream) {
  if (p.reference.data == nullptr) {
    return p.logit_softcap != 0.0f ? run<GradTraits<T, NoReference, true, false>>(p, device, stream)
                                   : run<GradTraits<T, NoReference, false, false>>(p, device, stream);
  }
  switch (p.reference.dtype) {
    case DType::float32:
      return with_divergences<T, float>(p, device, stream);
    case DType::bfloat16:
      return with_divergences<T, __nv_bfloat16>(p, device, stream);
    case DType::float16:
      return with_divergences<T, __half>(p, device, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

#define DPO_FOR_POLICY(name, type)                                                                            \
  cudaError_t logits_grad_##name(const LogitsGradParams& params, const Device& device, cudaStream_t stream) { \
    return with_reference<type>(params, device, stream);                                                      \
  }
#if !defined(DPO_POLICY) || DPO_POLICY == 0
DPO_FOR_POLICY(float32, float)
#endif
#if !defined(DPO_POLICY) || DPO_POLICY == 2
DPO_FOR_POLICY(bfloat16, __nv_bfloat16)
#endif
#if !defined(DPO_POLICY) || DPO_POLICY == 3
DPO_FOR_POLICY(float16, __half)
#endif

}  // namespace dpo::cuda
