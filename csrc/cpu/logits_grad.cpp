// Stage 3 on a CPU: dz = g (onehot(label) - softmax(z)), with one read and one write of each row, in place or not.
//
// softmax(z) = exp(z - max) f with f = exp(-log_sum) in float64, which is multiplied with the row's factor g;
// subtracted from the logits, log_sum would lose precision to rounding. The label's entry is g (1 - p) = -g
// expm1(logp), which does not cancel if p is near 1.
//
// With token-level KL divergences the reference's row is read once, together with the policy's, and
//   dz += g_kl p (d - D) + g_forward (p - q),    d = (z - max) - (z' - max'), D = sum p d, q = softmax(z')
// If the probability of an entry is near 1, its d - D cancels. So D, which is known in float64, is subtracted in two
// parts: D rounded to float32, whose subtraction is exact where d is near it, and the remainder, as a part of by_p. For
// the label, D - d = kl - logp + logp' needs no subtraction of logits.
#include <algorithm>
#include <cmath>

#include "blocks.h"

#ifndef DPO_ISA
#define DPO_ISA baseline
#endif

namespace {

// The values of a token, in float64.
struct Token {
  int64_t label;
  double logp, max, log_sum, g;
  double ref_logp, ref_max, ref_log_sum, kl, g_kl, g_forward;  // used only with a reference
};

// The gradient of 16-bit logits without softcap, scale and reference. All entries except the label's are then powers of
// two of the same sign,
//   dz = -g p = -+2^y,    y = log2(e) z + (log2|g| - log2(e) lse),
// which are rounded to 8 or 11 bits. So one float is enough for y, and a polynomial of lower degree for the power.
// Within the limits on log2|g| and lse the error of y is below 4e-5 and that of the power below 3e-5; half an ulp is at
// least 2^-9 or 2^-12.
constexpr float kLog2E = 1.44269504088896341f, kLeastY = -126.0f;
constexpr double kMostLog2G = 64.0, kMostLog2Lse = 256.0;

// Whether log2(e) z + offset >= kLeastY for all entries of a block; false if one is NaN or -inf.
template <typename T>
DPO_INLINE bool within(const T* z, int64_t n, float offset) {
  return narrow_min(z, n) * kLog2E + offset >= kLeastY;
}

// (2^f - 1) / f for 0 <= f < 1; the relative error of the power is below 3e-6.
DPO_INLINE vf power_slope(vf f) {
  vf p = f * 1.3426684774458408e-2f + 5.2242472767829895e-2f;
  p = p * f + 2.41280198097229e-1f;
  return p * f + 6.930448412895203e-1f;
}

template <typename T>
struct Powers;

// As an integer, a bfloat16 with sign bit s, exponent n and mantissa 1 + m is 128 (256 s + n + 127 + m). If the sum in
// brackets is added to 1.5 * 2^16, where an ulp of a float is 1/128, the lower half of the float is this integer; the
// addition rounds it to nearest even. The upper half is always 0x47c0. Numbers at odd positions are shifted up and
// added, so an offset of -128 * 143.5 in them cancels it.
template <>
struct Powers<BFloat16> {
  float even, odd;
  explicit Powers(bool negative) : even(98304.0f + 127.0f + (negative ? 256.0f : 0.0f)), odd(even - 143.5f) {}
  static DPO_INLINE Vec<float>::bits number(vf y, float base) {
    const vf n = round_down(y), f = y - n, sum = power_slope(f) * f + (n + base);
    return reinterpret_cast<const Vec<float>::bits&>(sum);
  }
  DPO_INLINE void put(BFloat16* p, Two<float> y) const {
    *reinterpret_cast<Vec<float>::pairs*>(p) = number(y.first, even) + (number(y.second, odd) << 16);
  }
};

template <>
struct Powers<Half> {
  float base;
  explicit Powers(bool negative) : base(12582912.0f + 127.0f + (negative ? 256.0f : 0.0f)) {}
  DPO_INLINE void put_one(Half* p, vf y) const {
    const vf n = round_down(y), f = y - n, sum = n + base;
    const auto power = reinterpret_cast<const Vec<float>::bits&>(sum) << 23;
    store_from_float(p, (power_slope(f) * f + 1.0f) * reinterpret_cast<const vf&>(power));
  }
  DPO_INLINE void put(Half* p, Two<float> y) const {
    put_one(p, y.first);
    put_one(p + Vec<float>::lanes, y.second);
  }
};

// Writes n entries, a multiple of a vector pair, and prefetches the next block (see token_logps.cpp).
template <typename T>
DPO_INLINE void put_powers(const T* z, int64_t n, float offset, bool negative, T* out) {
  constexpr int step = 2 * Vec<float>::lanes;
  const Powers<T> powers(negative);
  const auto put = [&](int64_t i) __attribute__((always_inline)) {
    powers.put(out + i, load_two(z + i) * kLog2E + Two<float>{splat(offset), splat(offset)});
  };
  int64_t i = 0;
  for (; i + 2 * step <= n; i += 2 * step) {
    __builtin_prefetch(z + n + i);
    put(i);
    put(i + step);
  }
  for (; i < n; i += step) put(i);
}

// The softmax of a row, p = exp(z - origin) factor. The origin is the maximum, unless a factor of p exceeds the range
// of A, for example IPO's coefficient, or a loss scale times a large gap. Then the excess is moved from the factor into
// the exponential, so that an entry with p = 0 gives 0 and not 0 * inf. `size` is the factor relative to the largest
// one without excess. If the maximum or the excess is too large for that, `saturated` keeps the factor finite.
template <typename A>
struct Softmax {
  A origin;
  double above, factor;  // above = max - origin
  Softmax(double max, double log_sum, double size) : origin(static_cast<A>(max)), above(0.0) {
    const double excess = std::log(size);
    if (excess > 0.0) {
      const A lower = static_cast<A>(max - excess);
      const double difference = max - static_cast<double>(lower);
      if (difference <= 88.0) {  // the largest argument of exp_nonpositive
        origin = lower;
        above = difference;
      }
    }
    factor = std::exp(-log_sum - above);
  }
};

// With factors of p up to 1 / kRoom, a sum of two products cannot overflow. The factor of a gap, which may be twice the
// largest A, is limited to 1 / kGapRoom.
template <typename A>
constexpr double kRoom = 8.0 / std::numeric_limits<A>::max();
constexpr double kGapRoom = 8.0;
// Nats from which a mean gap is large compared with differences between logits.
constexpr double kFar = 16.0;

// Conversion to A; finite numbers beyond its range become the largest finite number.
template <typename A>
A saturated(double x) {
  constexpr A most = std::numeric_limits<A>::max();
  const A y = static_cast<A>(x);
  return std::isinf(y) && std::isfinite(x) ? std::copysign(most, y) : y;
}

template <bool kReverse, bool kForward, typename A, typename T>
void grad_row(const Row<A>& row, const Row<A>& reference, T* out, int64_t vocab, const Token& token,
              LogitTransform transform) {
  constexpr int lanes = Vec<A>::lanes;
  alignas(64) A buffer[kBlock];
  alignas(64) A ref_buffer[kBlock];
  const A cap = static_cast<A>(transform.softcap);
  const A z_label = row.at(token.label);
  const double size =
      std::max(kRoom<A> * (std::abs(token.g) + std::abs(token.g_forward)), kGapRoom * std::abs(token.g_kl));
  const Softmax<A> own(token.max, token.log_sum, size * std::abs(transform.scale));
  // p = e f, so factors of p are multiplied with f.
  const double f = own.factor * transform.scale;
  const auto minus_origin = splat<A>(-own.origin);
  double by_p = -token.g, at_label = -token.g * std::expm1(token.logp);
  A ref_level = 0, mean_gap = 0, ref_origin = 0;
  auto by_gap = splat<A>(A(0)), by_q = by_gap;
  if (kReverse) {
    const double mean = token.kl + token.log_sum - token.ref_log_sum + own.above;
    // A large mean is subtracted from the reference's maximum: the subtraction of a logit near the result is exact.
    const double apart = std::abs(mean) > kFar ? mean : 0.0;
    ref_level = static_cast<A>(token.ref_max - apart);
    mean_gap = static_cast<A>(mean - apart);
    by_p -= token.g_kl * ((static_cast<double>(ref_level) - token.ref_max) + (mean - static_cast<double>(mean_gap)));
    by_gap = splat<A>(static_cast<A>(token.g_kl * f));
    const double p_label = std::exp(token.logp);
    if (p_label != 0.0) at_label -= token.g_kl * p_label * (token.kl - token.logp + token.ref_logp);
  }
  if (kForward) {
    by_p += token.g_forward;
    const double of_q = token.g_forward * transform.scale;
    const Softmax<A> other(token.ref_max, token.ref_log_sum, kRoom<A> * std::abs(of_q));
    ref_origin = other.origin;
    by_q = splat<A>(saturated<A>(of_q * other.factor));
    at_label += token.g_forward * (std::expm1(token.logp) - std::expm1(token.ref_logp));
  }
  const auto factor = splat<A>(saturated<A>(by_p * f));
  const auto minus_ref_origin = splat<A>(-ref_origin);
  const double log2_g = std::log2(std::abs(by_p)), log2_lse = (token.max + token.log_sum) / std::log(2.0);
  const float offset = static_cast<float>(log2_g - log2_lse);
  const bool powers = transform.identity() && std::abs(log2_g) < kMostLog2G && std::abs(log2_lse) < kMostLog2Lse;
  const auto center = splat<A>(mean_gap), minus_level = splat<A>(-ref_level);
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, vocab - start);
    if constexpr (sizeof(T) == 2 && kQuick<T> && !kReverse && !kForward) {
      const T* stored = reinterpret_cast<const T*>(row.data) + start;
      if (powers && n % (2 * lanes) == 0 && within(stored, n, offset)) {
        put_powers(stored, n, offset, by_p < 0, out + start);
        continue;
      }
    }
    const A* z = row.block(start, n, buffer);
    const A* ref = kReverse || kForward ? reference.block(start, n, ref_buffer) : z;
    T* to = out + start;
    const auto gradient = [&](int64_t i, auto capped) __attribute__((always_inline)) {
      const auto logit = load<A>(z + i), shifted = logit + minus_origin;
      const auto e = exp_nonpositive(shifted);
      auto dz = e * factor;
      if (kReverse) {
        const auto gap = (shifted - (load<A>(ref + i) + minus_level)) - center;
        // If e is 0 the entry contributes nothing, but its gap may be infinite.
        dz = e > 0 ? e * (gap * by_gap + factor) : dz;
      }
      if (kForward) dz -= exp_nonpositive(load<A>(ref + i) + minus_ref_origin) * by_q;
      if (capped) {
        const auto t = logit * (A(1) / cap);
        dz *= A(1) - t * t;
      }
      return dz;
    };
    const auto put_all = [&](auto capped) {
      int64_t i = 0;
      for (; i + lanes <= n; i += lanes) Convert<A, T>::put(to + i, gradient(i, capped));
      if (i < n) {
        T tail[lanes];
        Convert<A, T>::put(tail, gradient(i, capped));
        std::copy(tail, tail + (n - i), to + i);
      }
    };
    cap != A(0) ? put_all(std::true_type{}) : put_all(std::false_type{});
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
    Token token{p.labels[at], p.logps[at], p.max[at], p.log_sum[at], p.grad_logps[at], 0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
    if (!p.reference.data) {
      grad_row<false, false, A, T>(row, row, out, p.vocab, token, transform);
      continue;
    }
    const auto reference = Row<A>::of(p.reference, at, p.seq_len, transform);
    token.ref_logp = p.ref_logps[at];
    token.ref_max = p.ref_max[at];
    token.ref_log_sum = p.ref_log_sum[at];
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
