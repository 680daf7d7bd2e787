// Stage 3 on CPU: dz = g (onehot(label) - softmax(z)), one read and one write of each logits row, in place or not.
//
// softmax(z) = exp(z - max) f with f = exp(-log_sum) in float64, which joins the row factor g: added to the logits,
// log_sum would be rounded with them. The label's entry is g (1 - p) = -g expm1(logp), which does not cancel when p is
// near 1.
//
// With token-level KL divergences the reference's row is read beside it, once, and
//   dz += g_kl p (d - D) + g_forward (p - q),    d = (z - max) - (z' - max'), D = sum p d, q = softmax(z')
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
  double logp, max, log_sum, g;
  double ref_logp, ref_max, ref_log_sum, kl, g_kl, g_forward;  // used with a reference only
};

// The plain gradient of 16-bit logits: no softcap, scale or reference. Every entry but the label's is then a power of
// two with one sign,
//   dz = -g p = -+2^y,    y = log2(e) z + (log2|g| - log2(e) lse),
// to be rounded to 8 or 11 digits: y needs no second float and the power no sixth degree. Within the limits on log2|g|
// and lse the error of y is under 4e-5, that of the power under 3e-5; half a last place is 2^-9 or 2^-12 at least.
constexpr float kLog2E = 1.44269504088896341f, kLeastY = -126.0f;
constexpr double kMostLog2G = 64.0, kMostLog2Lse = 256.0;

// log2(e) z + offset for all entries of a block is at least kLeastY. NaN and -inf are not.
template <typename T>
DPO_INLINE bool within(const T* z, int64_t n, float offset) {
  return narrow_min(z, n) * kLog2E + offset >= kLeastY;
}

// 2^f - 1 for 0 <= f < 1, over f; relative error of the power under 3e-6.
DPO_INLINE vf power_slope(vf f) {
  vf p = f * 1.3426684774458408e-2f + 5.2242472767829895e-2f;
  p = p * f + 2.41280198097229e-1f;
  return p * f + 6.930448412895203e-1f;
}

template <typename T>
struct Powers;

// A bfloat16 with sign bit s, exponent n and mantissa 1 + m is, as an integer, 128 (256 s + n + 127 + m). The sum in
// brackets added to 1.5 * 2^16, where a float's last place is 1/128, leaves this very integer in the float's lower
// half, rounded to nearest even by the addition. The upper half is 0x47c0 for all: an offset of -128 * 143.5 to the odd
// places, which are shifted up, takes that away again.
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

// n entries, a whole number of vector pairs. The next block is asked for meanwhile (see token_logps.cpp).
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

// A row's softmax p = exp(z - origin) factor. origin is the maximum, unless what multiplies p is beyond A: IPO's
// coefficient, or a loss scale times a large gap. The excess then moves from the factor into the exponential, so that
// an entry without mass is 0 and not 0 * inf. `size` is 1 for the largest multiplier that needs none. Where the maximum
// or the excess is so large that this cannot be, `saturated` keeps the factor finite.
template <typename A>
struct Softmax {
  A origin;
  double above, factor;  // above = max - origin
  Softmax(double max, double log_sum, double size) : origin(static_cast<A>(max)), above(0.0) {
    const double excess = std::log(size);
    if (excess > 0.0) {
      const A lower = static_cast<A>(max - excess);
      const double difference = max - static_cast<double>(lower);
      if (difference <= 88.0) {  // as far as exp_nonpositive goes
        origin = lower;
        above = difference;
      }
    }
    factor = std::exp(-log_sum - above);
  }
};

// A sum of two products leaves room for p's multiplier up to 1 / kRoom, and for a gap, itself up to twice the largest
// A, up to 1 / kGapRoom.
template <typename A>
constexpr double kRoom = 8.0 / std::numeric_limits<A>::max();
constexpr double kGapRoom = 8.0;
// Nats from which the mean gap is large beside what logits differ by.
constexpr double kFar = 16.0;

// As A; a finite number beyond it becomes the largest.
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
  // p = e f, so everything that multiplies p joins the exponential's factor.
  const double f = own.factor * transform.scale;
  const auto minus_origin = splat<A>(-own.origin);
  double by_p = -token.g, at_label = -token.g * std::expm1(token.logp);
  A ref_level = 0, mean_gap = 0, ref_origin = 0;
  auto by_gap = splat<A>(A(0)), by_q = by_gap;
  if (kReverse) {
    const double mean = token.kl + token.log_sum - token.ref_log_sum + own.above;
    // A large mean joins the reference's maximum: a logit near their difference leaves no rounding.
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
        // Where e is 0 the gap may be infinite; such entries carry no mass.
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
