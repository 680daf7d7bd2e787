// Stage 3 on CPU: dz = g (onehot(label) - softmax(z)), one read and one write of each logits row, in place or not.
//
// softmax(z) = exp(z - m) f with m = float32(lse) and f = exp(m - lse) in float64: f joins the row factor g, so
// rounding lse to float32 (up to 1e-6 relative at lse = 16) costs nothing. The label's entry is g (1 - p) = -g
// expm1(logp), which does not cancel when p is near 1.
#include <algorithm>
#include <cmath>

#include "blocks.h"

#ifndef DPO_ISA
#define DPO_ISA baseline
#endif

namespace {

template <typename A, typename T>
void grad_row(const Row<A>& row, T* out, int64_t vocab, int64_t label, double logp, double lse, double g,
              LogitTransform transform) {
  constexpr int lanes = Vec<A>::lanes;
  alignas(64) A buffer[kBlock];
  const A origin = static_cast<A>(lse);
  const auto m = splat<A>(origin);
  const auto factor = splat<A>(static_cast<A>(-g * std::exp(static_cast<double>(origin) - lse) * transform.scale));
  const A cap = static_cast<A>(transform.softcap);
  const A z_label = row.at(label);
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, vocab - start);
    const A* z = row.block(start, n, buffer);
    T* to = out + start;
    const auto gradient = [&](int64_t i) __attribute__((always_inline)) {
      const auto logit = load<A>(z + i);
      const auto x = logit - m;
      auto dz = exp_nonpositive(x) * factor;
      if (cap != A(0)) {
        const auto t = logit * (A(1) / cap);
        dz *= A(1) - t * t;
      }
      return dz;
    };
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) Convert<A, T>::put(to + i, gradient(i));
    if (i < n) {
      T tail[lanes];
      Convert<A, T>::put(tail, gradient(i));
      std::copy(tail, tail + (n - i), to + i);
    }
  }
  double slope = transform.scale;
  if (transform.softcap != 0.0) {
    const double t = static_cast<double>(z_label) / transform.softcap;
    slope *= 1.0 - t * t;
  }
  T one[lanes];
  Convert<A, T>::put(one, splat<A>(static_cast<A>(-g * std::expm1(logp) * slope)));
  out[label] = one[0];
}

template <typename A, typename T>
void run_tokens(const dpo::cpu::LogitsGradParams& p, int64_t begin, int64_t end) {
  const LogitTransform transform{p.logit_scale, p.logit_softcap};
  for (int64_t k = begin; k < end; ++k) {
    const int64_t token = p.tokens[k];
    const auto row = Row<A>::of(p.logits, token, p.seq_len, transform);
    T* out = static_cast<T*>(p.out) + (token / p.seq_len) * p.out_stride_b + (token % p.seq_len) * p.out_stride_t;
    grad_row<A, T>(row, out, p.vocab, p.labels[token], p.logps[token], p.lse[token], p.grad_logps[token], transform);
  }
}

}  // namespace

namespace dpo::cpu::DPO_ISA {

void logits_grad(const LogitsGradParams& params, int64_t begin, int64_t end) {
  switch (params.logits.dtype) {
    case DType::float32:
      return run_tokens<float, float>(params, begin, end);
    case DType::float64:
#ifdef DPO_FLOAT64
      run_tokens<double, double>(params, begin, end);
#endif
      return;
    case DType::bfloat16:
      return run_tokens<float, BFloat16>(params, begin, end);
    case DType::float16:
      return run_tokens<float, Half>(params, begin, end);
  }
}

}  // namespace dpo::cpu::DPO_ISA
