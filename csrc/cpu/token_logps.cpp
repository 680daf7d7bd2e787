// Stage 1 on a CPU: log-probability of the label and statistics, with one read of each row of logits.
//
// Data flow per scored token: the row is processed in blocks of 2,048 logits. A block is read from memory once, to find
// its maximum (16-bit logits without conversion: two instructions per register). Then exponentials and the requested
// moments are summed from the L1 cache. Lanes accumulate in float32 only within a block (32 to 128 additions) and are
// added to the row's float64 state, so a vocabulary of 200k costs no accuracy. Nothing of size V is written.
//
// With kl, blocks of policy and reference are processed together, and sum p (z - z') is computed in the same pass.
#include <cmath>
#include <cstring>

#include "../common/online_softmax.h"
#include "blocks.h"

#ifndef DPO_ISA
#define DPO_ISA baseline
#endif

namespace {

namespace token_row = dpo::token_row;

// Logits and their differences are scaled by this factor before they are summed, so that sums of the lowest finite
// logits, which masks use, do not overflow. A power of two, so that scaling does not round.
constexpr double kTiny = 1.0 / (INT64_C(1) << 40);

// kTiny ((z - max) - (z' - max')).
DPO_INLINE double tiny_gap(double z, double max, double ref_z, double ref_max) {
  return (z * kTiny - max * kTiny) - (ref_z * kTiny - ref_max * kTiny);
}

template <typename A>
DPO_INLINE A horizontal_max(typename Vec<A>::type v) {
  A m = -INFINITY;
  for (int i = 0; i < Vec<A>::lanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

template <typename A>
DPO_INLINE double horizontal_sum(typename Vec<A>::type v) {
  double s = 0.0;
  for (int i = 0; i < Vec<A>::lanes; ++i) s += static_cast<double>(v[i]);
  return s;
}

template <typename A>
DPO_INLINE A block_max(const A* z, int64_t n) {
  constexpr int lanes = Vec<A>::lanes;
  auto a = splat<A>(-INFINITY), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    a = vmax(a, load<A>(z + i));
    b = vmax(b, load<A>(z + i + lanes));
    c = vmax(c, load<A>(z + i + 2 * lanes));
    d = vmax(d, load<A>(z + i + 3 * lanes));
  }
  for (; i < n; i += lanes) a = vmax(a, load<A>(z + i));
  return horizontal_max<A>(vmax(vmax(a, b), vmax(c, d)));
}

// If the maxima of policy and reference differ by more, float32 sums of logit differences are too inaccurate.
constexpr double kNearMaxima = 256.0;

// The moments that are summed in the pass of the exponentials.
template <typename A>
struct Moments {
  Two<A> sum = {}, shifted = {}, drift = {}, squares = {};
};

// e x, but 0 if e is 0: x may be infinite there, and 0 * inf is NaN.
template <typename A>
DPO_INLINE Two<A> carried(Two<A> e, Two<A> x) {
  return {e.first > 0 ? e.first * x.first : e.first, e.second > 0 ? e.second * x.second : e.second};
}

template <bool kEntropy, bool kKl, bool kSquares, typename A>
DPO_INLINE void add_two(Moments<A>& m, Two<A> logit, Two<A> ref, Two<A> minus_max) {
  const auto x = logit + minus_max;
  const auto e = exp_nonpositive(x);
  m.sum = m.sum + e;
  if (kEntropy) m.shifted = m.shifted + carried(e, x);
  if (kKl) m.drift = m.drift + carried(e, logit - ref);
  if (kSquares) m.squares = m.squares + e * e;
}

template <typename A>
DPO_INLINE double total(Two<A> a, Two<A> b) {
  const auto sum = a + b;
  return horizontal_sum<A>(sum.first + sum.second);
}

// Adds z[0] .. z[n - 1] to the row's state; `ref` is read only with kKl.
//
// The pass of the exponentials reads from the L1 cache, so it prefetches the next block, which would otherwise have to
// wait for memory.
template <bool kEntropy, bool kKl, bool kSquares, typename A, typename S>
DPO_INLINE void absorb(dpo::OnlineSoftmax<A>& state, const S* z, const S* ref, int64_t n, Ahead ahead) {
  constexpr int lanes = Vec<A>::lanes;
  A top;
  if constexpr (sizeof(S) == 2) {
    top = narrow_max(z, n);
  } else {
    top = block_max(z, n);
  }
  if (top > state.max) dpo::raise_max(state, top);
  // If all logits so far are -inf, 0 is subtracted instead of the maximum, because -inf - (-inf) is NaN.
  const A minus_max = state.max > -INFINITY ? -state.max : A(0);
  const Two<A> shift{splat<A>(minus_max), splat<A>(minus_max)};
  // Four dependency chains hide the latency of the additions; the order of additions is fixed.
  Moments<A> a, b;
  const auto add = [&](Moments<A>& to, int64_t i) __attribute__((always_inline)) {
    const Two<A> logits = load_two(z + i);
    add_two<kEntropy, kKl, kSquares>(to, logits, kKl ? load_two(ref + i) : logits, shift);
  };
  int64_t i = 0;
  // One prefetch per 64 bytes of S. For 16-bit logits that are converted to floats, that is two per cache line.
  constexpr int lines = std::max<int>(1, 4 * lanes * sizeof(S) / 64);
  const int64_t hop = 4 * lanes / lines * ahead.entry_bytes;
  const char* next = ahead.data;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    for (int line = 0; line < lines; ++line, next += hop) __builtin_prefetch(next);
    add(a, i);
    add(b, i + 2 * lanes);
  }
  for (; i < n; i += 2 * lanes) add(a, i);
  state.sum += total(a.sum, b.sum);
  if (kEntropy) state.shifted += total(a.shifted, b.shifted);
  if (kKl) state.drift += total(a.drift, b.drift);
  if (kSquares) state.squares += total(a.squares, b.squares);
}

// kTiny times the sum.
template <typename A, typename S>
DPO_INLINE double tiny_sum(const S* z, int64_t n) {
  constexpr int lanes = Vec<A>::lanes;
  constexpr A tiny = static_cast<A>(kTiny);
  Two<A> a = {}, b = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    a = a + load_two(z + i) * tiny;
    b = b + load_two(z + i + 2 * lanes) * tiny;
  }
  double s = total(a, b);
  for (; i < n; ++i) s += kTiny * static_cast<double>(Convert<A, S>::scalar(z + i));
  return s;
}

// A copy of the block with -inf as the label's logit, which is added to the row at the end, in float64
// (online_softmax.h).
template <typename S>
DPO_INLINE const S* without(int64_t position, const S* z, int64_t n, S* buffer) {
  if (z != buffer) std::memcpy(buffer, z, n * sizeof(S));
  buffer[position] = kMinusInfinity<S>;
  return buffer;
}

// Whether the label is the first maximum of the row. The stored logits are compared, because rounding in scale and
// softcap can make unequal logits equal.
template <typename A>
bool is_likeliest(Row<A> row, int64_t vocab, int64_t label) {
  const A sign = row.transform.scale > 0.0 ? A(1) : A(-1);
  if (row.transform.scale == 0.0) return label == 0;
  row.transform = {1.0, 0.0};
  const A own = sign * row.at(label);
  A buffer[kBlock];
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = vocab - start < kBlock ? vocab - start : kBlock;
    const A* x = row.block(start, n, buffer);
    for (int64_t i = 0; i < n; ++i) {
      const A other = sign * x[i];
      if (other > own || (other == own && start + i < label)) return false;
    }
  }
  return true;
}

struct RowResult {
  dpo::FinishedRow policy;
  dpo::FinishedRow reference;
  double kl;
  double accuracy;
  double mean;
};

// KL(policy || reference) in float64, relative to both maxima. It reads both rows again. It is used if the float32 sums
// overflow, or are inaccurate because the logits differ too much from the reference's or the divergence is large.
template <typename A>
double careful_kl(const Row<A>& policy, const Row<A>& reference, int64_t vocab, const RowResult& row) {
  A buffer[kBlock], ref_buffer[kBlock];
  double mass = 0.0, drift = 0.0;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = vocab - start < kBlock ? vocab - start : kBlock;
    const A* z = policy.block(start, n, buffer);
    const A* ref = reference.block(start, n, ref_buffer);
    for (int64_t i = 0; i < n; ++i) {
      const double e = std::exp(static_cast<double>(z[i]) - row.policy.max);
      if (!(e > 0.0)) continue;
      mass += e;
      drift += e * tiny_gap(static_cast<double>(z[i]), row.policy.max, static_cast<double>(ref[i]), row.reference.max);
    }
  }
  return drift / mass / kTiny - row.policy.log_sum + row.reference.log_sum;
}

// S is the type in which blocks are read: A, or the 16-bit type of the rows.
template <bool kEntropy, bool kKl, bool kSquares, typename A, typename S>
RowResult run_row_of(const Row<A>& policy, const Row<A>& reference, int64_t vocab, int64_t label, bool accuracy,
                     bool mean) {
  alignas(64) S buffer[kBlock];
  alignas(64) S ref_buffer[kBlock];
  auto state = dpo::empty_softmax<A>();
  auto ref_state = dpo::empty_softmax<A>();
  double total = 0.0;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = vocab - start < kBlock ? vocab - start : kBlock;
    const S* z = policy.block(start, n, buffer);
    if (mean) total += tiny_sum<A>(z, n);
    const bool holds_label = label >= start && label < start + n;
    if (holds_label) z = without(label - start, z, n, buffer);
    const S* ref = z;
    if (kKl) {
      ref = reference.block(start, n, ref_buffer);
      if (holds_label) ref = without(label - start, ref, n, ref_buffer);
      absorb<false, false, false, A>(ref_state, ref, ref, n, reference.ahead(start + n));
    }
    absorb<kEntropy, kKl, kSquares, A>(state, z, ref, n, policy.ahead(start + n));
  }
  RowResult out{};
  const A z_label = policy.at(label);
  out.policy = dpo::finish_row(state, z_label);
  if (kKl) {
    const A ref_label = reference.at(label);
    out.reference = dpo::finish_row(ref_state, ref_label);
    out.kl = dpo::kl_of(out.policy, out.reference, static_cast<double>(z_label), static_cast<double>(ref_label));
    const bool near = std::abs(out.policy.max - out.reference.max) < kNearMaxima;
    const bool sound = near && std::abs(out.kl) < dpo::kSmallGap;
    const bool defined = out.policy.logp == out.policy.logp && out.reference.log_sum == out.reference.log_sum;
    if (!sound && defined) out.kl = careful_kl(policy, reference, vocab, out);
  }
  if (mean) out.mean = total / static_cast<double>(vocab) / kTiny;
  if (accuracy) {
    // If the difference from the maximum exceeds the transform's rounding error, the row need not be read again.
    const double slack = policy.transform.identity() ? 0.0 : std::abs(static_cast<double>(state.max)) * 0x1p-20;
    const double ahead = static_cast<double>(z_label) - static_cast<double>(state.max);
    out.accuracy = std::isnan(out.policy.logp) ? NAN
                   : ahead > slack             ? 1.0
                   : ahead < -slack            ? 0.0
                                               : is_likeliest<A>(policy, vocab, label);
  }
  return out;
}

template <bool kEntropy, bool kKl, bool kSquares, typename A>
RowResult run_row(const Row<A>& policy, const Row<A>& reference, int64_t vocab, int64_t label, bool accuracy,
                  bool mean) {
  auto run = run_row_of<kEntropy, kKl, kSquares, A, A>;
  if constexpr (sizeof(A) == 4) {
    if (policy.template stores<BFloat16>() && reference.template stores<BFloat16>())
      run = run_row_of<kEntropy, kKl, kSquares, A, BFloat16>;
    if constexpr (kQuick<Half>) {
      if (policy.template stores<Half>() && reference.template stores<Half>())
        run = run_row_of<kEntropy, kKl, kSquares, A, Half>;
    }
  }
  return run(policy, reference, vocab, label, accuracy, mean);
}

template <bool kEntropy, bool kKl, bool kSquares, typename A>
void run_tokens(const dpo::cpu::TokenLogpsParams& p, int64_t begin, int64_t end) {
  const LogitTransform transform{p.logit_scale, p.logit_softcap};
  for (int64_t k = begin; k < end; ++k) {
    const int64_t token = p.tokens[k];
    const int64_t label = p.labels[token];
    const auto policy = Row<A>::of(p.policy, token, p.seq_len, transform);
    const auto reference = p.reference.data ? Row<A>::of(p.reference, token, p.seq_len, transform) : policy;
    const auto row = run_row<kEntropy, kKl, kSquares, A>(policy, kKl ? reference : policy, p.vocab, label,
                                                         p.rows[token_row::accuracy] != nullptr,
                                                         p.rows[token_row::mean_logits] != nullptr);
    p.rows[token_row::logps][token] = row.policy.logp;
    p.rows[token_row::max][token] = row.policy.max;
    p.rows[token_row::log_sum][token] = row.policy.log_sum;
    if (p.rows[token_row::accuracy]) p.rows[token_row::accuracy][token] = row.accuracy;
    if (p.rows[token_row::mean_logits]) p.rows[token_row::mean_logits][token] = row.mean;
    if (kEntropy) p.rows[token_row::entropy][token] = row.policy.entropy;
    if (kSquares) p.rows[token_row::log_sum_sq][token] = row.policy.log_sum_sq;
    if (kKl) {
      p.rows[token_row::kl][token] = row.kl;
      p.rows[token_row::ref_logps][token] = row.reference.logp;
      p.rows[token_row::ref_max][token] = row.reference.max;
      p.rows[token_row::ref_log_sum][token] = row.reference.log_sum;
    } else if (p.reference.data) {
      p.rows[token_row::ref_logps][token] =
          run_row<false, false, false, A>(reference, reference, p.vocab, label, false, false).policy.logp;
    }
  }
}

template <bool kEntropy, bool kKl, typename A>
void with_squares(const dpo::cpu::TokenLogpsParams& p, int64_t begin, int64_t end) {
  p.rows[token_row::log_sum_sq] ? run_tokens<kEntropy, kKl, true, A>(p, begin, end)
                                : run_tokens<kEntropy, kKl, false, A>(p, begin, end);
}

template <typename A>
void dispatch(const dpo::cpu::TokenLogpsParams& p, int64_t begin, int64_t end) {
  if (p.rows[token_row::kl]) {
    p.rows[token_row::entropy] ? with_squares<true, true, A>(p, begin, end)
                               : with_squares<false, true, A>(p, begin, end);
  } else {
    p.rows[token_row::entropy] ? with_squares<true, false, A>(p, begin, end)
                               : with_squares<false, false, A>(p, begin, end);
  }
}

}  // namespace

namespace dpo::cpu::DPO_ISA {

void token_logps(const TokenLogpsParams& params, int64_t begin, int64_t end) {
#ifdef DPO_FLOAT64
  if (is_wide(params.policy, params.reference)) return dispatch<double>(params, begin, end);
#endif
  dispatch<float>(params, begin, end);
}

}  // namespace dpo::cpu::DPO_ISA
