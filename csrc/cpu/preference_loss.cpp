// Stage 2 on a CPU: weighted sequence sums, the losses of the sigmoid family, and dL/dS for every sequence.
//
// One pass over [tokens] vectors, which are small compared with the logits. Sums are float64 and add the weighted
// tokens in token order, so padding anywhere in a sequence does not change a bit of the result.
#include "preference_loss.h"

#include "../common/sigmoid_family.h"

namespace dpo::cpu {

namespace {

struct Span {
  int64_t begin;
  int64_t end;
};

Span span_of(const Sequences& s, int64_t i) {
  if (s.cu_seqlens) return {s.cu_seqlens[i], s.cu_seqlens[i + 1]};
  return {i * s.seq_len, (i + 1) * s.seq_len};
}

}  // namespace

double sequence_sum(const double* values, const double* weights, const Sequences& sequences, int64_t i) {
  const Span span = span_of(sequences, i);
  double sum = 0.0;
  for (int64_t t = span.begin; t < span.end; ++t) {
    // Tokens of weight 0 are skipped, not multiplied by 0, because their value may be NaN.
    if (weights[t] != 0.0) sum += weights[t] * values[t];
  }
  return sum;
}

void spread(double value, const double* weights, const Sequences& sequences, int64_t i, double* tokens) {
  const Span span = span_of(sequences, i);
  for (int64_t t = span.begin; t < span.end; ++t) {
    if (weights[t] != 0.0) tokens[t] = weights[t] * value;
  }
}

void preference_loss(const PreferenceLossParams& p, int64_t begin, int64_t end) {
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t sides[2] = {pair, pair + p.pairs};
    double margin[2];
    for (int side = 0; side < 2; ++side) {
      const int64_t s = sides[side];
      p.sums[s] = sequence_sum(p.logps, p.weights, p.sequences, s);
      if (p.ref_logps) {
        p.ref_sums_out[s] = sequence_sum(p.ref_logps, p.weights, p.sequences, s);
      } else {
        p.ref_sums_out[s] = p.ref_sums ? p.ref_sums[s] : 0.0;
      }
      margin[side] = p.sums[s] - p.ref_sums_out[s];
    }
    const double beta = p.beta[pair];
    const PairLoss out = sigmoid_family(beta * (margin[0] - margin[1]), p.label_smoothing[pair], p.robust);
    p.losses[pair] = out.loss;
    p.coef[sides[0]] = beta * out.slope;
    p.coef[sides[1]] = -beta * out.slope;
  }
}

}  // namespace dpo::cpu
