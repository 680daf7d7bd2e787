// Stage 3 on CPU: dz = g (onehot(label) - softmax(z)), one read and one write of each logits row, in place or not.
//
// softmax(z) = exp(z - m) f with m = float32(lse) and f = exp(m - lse) in float64: f joins the row factor g, so
// rounding lse to float32 (up to 1e-6 relative at lse = 16) costs nothing. The label's entry is g (1 - p) = -g
// expm1(logp), which does not cancel when p is near 1.
//
// With token-level KL divergences the reference's row is read beside it, once, and
//   dz += g_kl p (d - D) + g_forward (p - q),    d = z - z', D = sum p d, q = softmax(z')
// Where one entry is nearly certain, d - D is a small difference of nearly equal numbers there. So D, known in float64,
// is subtracted in two parts: its float32, which leaves no rounding where d is near it, and the rest, which joins by_p.
// The label's own D - d = kl - logp + logp' needs no subtraction of logits at all.
#include <algorithm>
#include <cmath>

#include "blocks.h"

#ifndef DPO_ISA
#define DPO_ISA baseline
#endif

namespace {

// A token's numbers, in float64.
struct Token {
  int64_t label;
  double logp, lse, g;
  double ref_logp, kl, g_kl, g_forward;  // used with a reference only
};

template <bool kReverse, bool kForward, typename A, typename T>
void grad_row(const Row<A>& row, const Row<A>& reference, T* out, int64_t vocab, const Token& token,
              LogitTransform transform) {
  constexpr int lanes = Vec<A>::lanes;
  alignas(64) A buffer[kBlock];
  alignas(64) A ref_buffer[kBlock];
  const A origin = static_cast<A>(token.lse);
  const auto m = splat<A>(origin);
  // p = e f, so everything that multiplies p joins the exponential's factor.
  const double f = std::exp(static_cast<double>(origin) - token.lse) * transform.scale;
  const A cap = static_cast<A>(transform.softcap);
  const A z_label = row.at(token.label);
  double by_p = -token.g, at_label = -token.g * std::expm1(token.logp);
  A mean_gap = 0, ref_origin = 0;
  auto by_gap = splat<A>(A(0)), by_q = by_gap;
  if (kReverse || kForward) {
    const A ref_label = reference.at(token.label);
    const double ref_lse = static_cast<double>(ref_label) - token.ref_logp;
    if (kReverse) {
      const double beyond_label = token.kl - token.logp + token.ref_logp;
      const double mean = static_cast<double>(z_label) - static_cast<double>(ref_label) + beyond_label;
      mean_gap = static_cast<A>(mean);
      by_p -= token.g_kl * (mean - static_cast<double>(mean_gap));
      by_gap = splat<A>(static_cast<A>(token.g_kl * f));
      const double p_label = std::exp(token.logp);
      if (p_label != 0.0) at_label -= token.g_kl * p_label * beyond_label;
    }
    if (kForward) {
      ref_origin = static_cast<A>(ref_lse);
      by_p += token.g_forward;
      by_q = splat<A>(
          static_cast<A>(token.g_forward * std::exp(static_cast<double>(ref_origin) - ref_lse) * transform.scale));
      at_label += token.g_forward * (std::expm1(token.logp) - std::expm1(token.ref_logp));
    }
  }
  const auto factor = splat<A>(static_cast<A>(by_p * f));
  const auto ref_m = splat<A>(ref_origin);
  const auto center = splat<A>(mean_gap);
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, vocab - start);
    const A* z = row.block(start, n, buffer);
    const A* ref = kReverse || kForward ? reference.block(start, n, ref_buffer) : z;
    T* to = out + start;
    const auto gradient = [&](int64_t i) __attribute__((always_inline)) {
      const auto logit = load<A>(z + i);
      const auto e = exp_nonpositive(logit - m);
      auto dz = e * factor;
      if (kReverse) {
        const auto gap = (logit - load<A>(ref + i)) - center;
        // Where e is 0 the gap may be infinite; such entries carry no mass.
        dz = e > 0 ? e * (gap * by_gap + factor) : dz;
      }
      if (kForward) dz -= exp_nonpositive(load<A>(ref + i) - ref_m) * by_q;
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
  Convert<A, T>::put(one, splat<A>(static_cast<A>(at_label * slope)));
  out[token.label] = one[0];
}

template <typename A, typename T>
void run_tokens(const dpo::cpu::LogitsGradParams& p, int64_t begin, int64_t end) {
  const LogitTransform transform{p.logit_scale, p.logit_softcap};
  for (int64_t k = begin; k < end; ++k) {
    const int64_t at = p.tokens[k];
    const auto row = Row<A>::of(p.logits, at, p.seq_len, transform);
    T* out = static_cast<T*>(p.out) + (at / p.seq_len) * p.out_stride_b + (at % p.seq_len) * p.out_stride_t;
    Token token{p.labels[at], p.logps[at], p.lse[at], p.grad_logps[at], 0.0, 0.0, 0.0, 0.0};
    if (!p.reference.data) {
      grad_row<false, false, A, T>(row, row, out, p.vocab, token, transform);
      continue;
    }
    const auto reference = Row<A>::of(p.reference, at, p.seq_len, transform);
    token.ref_logp = p.ref_logps[at];
    token.kl = p.kl[at];
    if (p.grad_kl) token.g_kl = p.grad_kl[at];
    if (p.grad_forward_kl) token.g_forward = p.grad_forward_kl[at];
    const bool reverse = token.g_kl != 0.0, forward = token.g_forward != 0.0;
    const auto run = reverse ? (forward ? grad_row<true, true, A, T> : grad_row<true, false, A, T>)
                             : (forward ? grad_row<false, true, A, T> : grad_row<false, false, A, T>);
    run(row, reference, out, p.vocab, token, transform);
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
