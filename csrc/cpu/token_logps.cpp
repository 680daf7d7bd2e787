// Stage 1 on CPU: log-softmax gather and its statistics, one read of each logits row.
//
// Data flow, per scored token: the row streams through in blocks of 2,048 logits. Each block is read from memory once;
// its maximum is taken, then exp and the requested moments are summed from the first-level cache. Lanes accumulate in
// float32 over one block only (32 to 128 additions) and join the row's float64 state, so a vocabulary of 200k costs no
// accuracy. Nothing of size V is written.
//
// With kl, policy and reference blocks are read side by side and sum p (z - z') is formed on the way.
#include <cstring>

#include "../common/online_softmax.h"
#include "blocks.h"

#ifndef DPO_ISA
#define DPO_ISA baseline
#endif

namespace {

namespace token_row = dpo::token_row;

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

// The statistics that ride along in the exponential pass.
template <typename A>
struct Moments {
  typename Vec<A>::type sum = {};
  typename Vec<A>::type shifted = {};
  typename Vec<A>::type drift = {};
  typename Vec<A>::type squares = {};
};

template <bool kEntropy, bool kKl, bool kSquares, typename A>
DPO_INLINE void add_vector(Moments<A>& m, const A* z, const A* ref, typename Vec<A>::type max) {
  const auto logit = load<A>(z);
  const auto x = logit - max;
  const auto e = exp_nonpositive(x);
  m.sum += e;
  // Where e is 0, x or z - z' may be infinite: those entries carry no mass and must not make 0 * inf.
  if (kEntropy) m.shifted += e > 0 ? e * x : e;
  if (kKl) m.drift += e > 0 ? e * (logit - load<A>(ref)) : e;
  if (kSquares) m.squares += e * e;
}

// Adds z[0 .. n) to the row's state. `ref` is read only with kKl.
//
// The exponential pass works from the first-level cache and would leave the memory bus idle, to be waited for by the
// next block's first pass: it asks for the next block meanwhile.
template <bool kEntropy, bool kKl, bool kSquares, typename A>
DPO_INLINE void absorb(dpo::OnlineSoftmax<A>& state, const A* z, const A* ref, int64_t n, Ahead ahead) {
  constexpr int lanes = Vec<A>::lanes;
  const A top = block_max<A>(z, n);
  if (top > state.max) dpo::raise_max(state, top);
  // While everything is -inf there is no origin to subtract (and -inf - -inf would be NaN).
  const auto max = splat<A>(state.max > -INFINITY ? state.max : A(0));
  // Four chains hide the latency of the additions; their order is fixed.
  Moments<A> a, b, c, d;
  int64_t i = 0;
  // One request for each 64 bytes of A: for 16-bit logits that is two a cache line, and no branch.
  const int64_t hop = 64 / sizeof(A) * ahead.entry_bytes;
  const char* next = ahead.data;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    for (int line = 0; line < 4 * lanes * static_cast<int>(sizeof(A)) / 64; ++line, next += hop)
      __builtin_prefetch(next);
    add_vector<kEntropy, kKl, kSquares, A>(a, z + i, ref + i, max);
    add_vector<kEntropy, kKl, kSquares, A>(b, z + i + lanes, ref + i + lanes, max);
    add_vector<kEntropy, kKl, kSquares, A>(c, z + i + 2 * lanes, ref + i + 2 * lanes, max);
    add_vector<kEntropy, kKl, kSquares, A>(d, z + i + 3 * lanes, ref + i + 3 * lanes, max);
  }
  for (; i < n; i += lanes) add_vector<kEntropy, kKl, kSquares, A>(a, z + i, ref + i, max);
  state.sum += horizontal_sum<A>((a.sum + b.sum) + (c.sum + d.sum));
  if (kEntropy) state.shifted += horizontal_sum<A>((a.shifted + b.shifted) + (c.shifted + d.shifted));
  if (kKl) state.drift += horizontal_sum<A>((a.drift + b.drift) + (c.drift + d.drift));
  if (kSquares) state.squares += horizontal_sum<A>((a.squares + b.squares) + (c.squares + d.squares));
}

template <typename A>
DPO_INLINE double plain_sum(const A* z, int64_t n) {
  constexpr int lanes = Vec<A>::lanes;
  typename Vec<A>::type a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    a += load<A>(z + i);
    b += load<A>(z + i + lanes);
    c += load<A>(z + i + 2 * lanes);
    d += load<A>(z + i + 3 * lanes);
  }
  double s = horizontal_sum<A>((a + b) + (c + d));
  for (; i < n; ++i) s += static_cast<double>(z[i]);
  return s;
}

// A copy of the block in which the label's logit is -inf: the label joins the row last, in float64 (online_softmax.h).
template <typename A>
DPO_INLINE const A* without(int64_t position, const A* z, int64_t n, A* buffer) {
  if (z != buffer) std::memcpy(buffer, z, n * sizeof(A));
  buffer[position] = -INFINITY;
  return buffer;
}

template <typename A>
bool appears_before(const Row<A>& row, A value, int64_t end) {
  A buffer[kBlock];
  for (int64_t start = 0; start < end; start += kBlock) {
    const int64_t n = end - start < kBlock ? end - start : kBlock;
    const A* z = row.block(start, n, buffer);
    for (int64_t i = 0; i < n; ++i) {
      if (z[i] == value) return true;
    }
  }
  return false;
}

struct RowResult {
  dpo::FinishedRow policy;
  dpo::FinishedRow reference;
  double accuracy;
  double mean;
};

template <bool kEntropy, bool kKl, bool kSquares, typename A>
RowResult run_row(const Row<A>& policy, const Row<A>& reference, int64_t vocab, int64_t label, bool accuracy,
                  bool mean) {
  alignas(64) A buffer[kBlock];
  alignas(64) A ref_buffer[kBlock];
  auto state = dpo::empty_softmax<A>();
  auto ref_state = dpo::empty_softmax<A>();
  double total = 0.0;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = vocab - start < kBlock ? vocab - start : kBlock;
    const A* z = policy.block(start, n, buffer);
    if (mean) total += plain_sum<A>(z, n);
    const bool holds_label = label >= start && label < start + n;
    if (holds_label) z = without<A>(label - start, z, n, buffer);
    const A* ref = z;
    if (kKl) {
      ref = reference.block(start, n, ref_buffer);
      if (holds_label) ref = without<A>(label - start, ref, n, ref_buffer);
      absorb<false, false, false, A>(ref_state, ref, ref, n, reference.ahead(start + n));
    }
    absorb<kEntropy, kKl, kSquares, A>(state, z, ref, n, policy.ahead(start + n));
  }
  RowResult out{};
  const A z_label = policy.at(label);
  double gap = 0.0;
  if (kKl) {
    const A ref_label = reference.at(label);
    gap = static_cast<double>(z_label) - static_cast<double>(ref_label);
    out.reference = dpo::finish_row(ref_state, ref_label, 0.0);
  }
  out.policy = dpo::finish_row(state, z_label, gap);
  if (mean) out.mean = total / static_cast<double>(vocab);
  if (accuracy) {
    // argmax takes the first of equals, so an equal logit beats the label only from an earlier place.
    const bool tied = z_label == state.max && vocab > 1;
    out.accuracy = z_label > state.max || vocab == 1 || (tied && !appears_before<A>(policy, z_label, label));
  }
  return out;
}

template <bool kEntropy, bool kKl, bool kSquares, typename A>
void run_tokens(const dpo::cpu::TokenLogpsParams& p, int64_t begin, int64_t end) {
  const LogitTransform transform{p.logit_scale, p.logit_softcap};
  for (int64_t k = begin; k < end; ++k) {
    const int64_t token = p.tokens[k];
    const int64_t label = p.labels[token];
    const auto policy = Row<A>::of(p.policy, token, p.seq_len, transform);
    const auto reference = p.reference.data ? Row<A>::of(p.reference, token, p.seq_len, transform) : policy;
    const auto row =
        run_row<kEntropy, kKl, kSquares, A>(policy, reference, p.vocab, label, p.rows[token_row::accuracy] != nullptr,
                                            p.rows[token_row::mean_logits] != nullptr);
    p.rows[token_row::logps][token] = row.policy.logp;
    p.rows[token_row::lse][token] = row.policy.lse;
    if (p.rows[token_row::accuracy]) p.rows[token_row::accuracy][token] = row.accuracy;
    if (p.rows[token_row::mean_logits]) p.rows[token_row::mean_logits][token] = row.mean;
    if (kEntropy) p.rows[token_row::entropy][token] = row.policy.entropy;
    if (kSquares) p.rows[token_row::log_sum_sq][token] = row.policy.log_sum_sq;
    if (kKl) {
      p.rows[token_row::kl][token] = row.policy.kl_mean - row.policy.lse + row.reference.lse;
      p.rows[token_row::ref_logps][token] = row.reference.logp;
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
