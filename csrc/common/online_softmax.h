// Online softmax of one row without its label: the running state, the merge of two states, and the results of a row.
//
// The running sum does not include the label's own term. With S = sum_{v != y} exp(z_v - m), m = max_{v != y} z_v,
//     logp = -log1p(S exp(m - z_y)),
// so if p(label) is near 1 (S exp(m - z_y) ~ 1e-9), logp and the label's gradient 1 - p = -expm1(logp) keep full
// relative precision. Adding the label's term to S would lose it to rounding.
//
// The other accumulators are first moments with the unnormalized weights e_v = exp(z_v - m), and the sum of squares:
//     entropy: sum e_v (z_v - m)       kl: sum e_v (z_v - z'_v)       log sum p^2: sum e_v^2
// The largest e_v is 1, so the sum of squares has the same relative precision as the sum.
//
// A finished row stores its maximum and log sum_v exp(z_v - max) separately: if z_v is 1e17, their sum loses the log to
// rounding, and if z_y is the lowest finite number, they cannot be computed from z_y - logp.
#pragma once

#include <math.h>
#include <stdint.h>

#include "hd.h"

namespace dpo {

template <typename T>
struct OnlineSoftmax {
  T max;           // m, -inf while no finite logit has been seen
  double sum;      // S
  double shifted;  // sum e_v (z_v - m), for the entropy
  double drift;    // sum e_v (z_v - z'_v), for the KL divergence
  double squares;  // sum e_v^2, for log sum p^2
};

template <typename T>
DPO_HD OnlineSoftmax<T> empty_softmax() {
  return {static_cast<T>(-INFINITY), 0.0, 0.0, 0.0, 0.0};
}

// Raises the state's maximum to new_max (>= state.max) and rescales its sums.
template <typename T>
DPO_HD void raise_max(OnlineSoftmax<T>& state, T new_max) {
  if (state.max == new_max) return;
  if (state.max > static_cast<T>(-INFINITY)) {
    const double delta = static_cast<double>(state.max) - static_cast<double>(new_max);
    const double factor = exp(delta);
    if (factor == 0.0) {
      // The old sums become 0. They are not multiplied, because a moment may be infinite, and 0 * inf is NaN.
      state = empty_softmax<T>();
    } else {
      state.shifted = factor * (state.shifted + delta * state.sum);
      state.sum *= factor;
      state.drift *= factor;
      state.squares *= factor * factor;
    }
  }
  state.max = new_max;
}

// Associative up to rounding; callers use a fixed order, so results are bitwise reproducible.
template <typename T>
DPO_HD void merge(OnlineSoftmax<T>& into, OnlineSoftmax<T> other) {
  const T top = other.max > into.max ? other.max : into.max;
  raise_max(into, top);
  raise_max(other, top);
  into.sum += other.sum;
  into.shifted += other.shifted;
  into.drift += other.drift;
  into.squares += other.squares;
}

struct FinishedRow {
  double logp;
  double max;      // maximum of the state and the label
  double log_sum;  // log sum_v exp(z_v - max)
  double entropy;
  double drift;  // sum_v p_v (z_v - z'_v) over all v except the label
  double p_others, p_label;
  double log_sum_sq;  // log sum_v p_v^2
};

// log p(label) from the state of all other logits and the label's logit.
template <typename T>
DPO_HD double label_logp(const OnlineSoftmax<T>& others, T z_label) {
  const double gap = static_cast<double>(others.max) - static_cast<double>(z_label);
  if (z_label == static_cast<T>(INFINITY)) return NAN;  // as log_softmax, which computes inf - inf
  if (others.max == static_cast<T>(-INFINITY) && others.sum == 0.0) {
    // All other probabilities are 0, so that of the label is 1, unless its logit is -inf or NaN.
    return z_label > static_cast<T>(-INFINITY) ? 0.0 : NAN;
  }
  if (gap > 0.0) return -(gap + log(others.sum + exp(-gap)));  // exp(gap) could overflow
  return -log1p(others.sum * exp(gap));
}

template <typename T>
DPO_HD FinishedRow finish_row(OnlineSoftmax<T> state, T z_label) {
  FinishedRow row;
  row.logp = label_logp(state, z_label);
  raise_max(state, z_label > state.max ? z_label : state.max);
  row.max = row.logp == row.logp ? static_cast<double>(state.max) : NAN;
  const double shift = static_cast<double>(z_label) - static_cast<double>(state.max);
  const double weight = exp(shift);
  const double sum = state.sum + weight;
  const double shifted = state.shifted + (weight > 0.0 ? weight * shift : 0.0);
  // If the label is the maximum, the sum may be 1 plus a tiny term; -logp has that term with full precision.
  row.log_sum = shift == 0.0 ? -row.logp : log(sum);
  row.entropy = row.log_sum - shifted / sum;
  row.drift = state.drift / sum;
  row.p_others = state.sum / sum;
  row.p_label = weight / sum;
  row.log_sum_sq = log((state.squares + weight * weight) / (sum * sum));
  return row;
}

// If the mean gap between policy and reference is at least this by float32 sums, it is computed again in float64:
// stage 3 subtracts the mean from single gaps, and where p is near 1 the difference is mostly rounding error.
constexpr double kSmallGap = 4.0;

// KL(policy || reference) = sum p (d - log_sum + log_sum'), d = (z - max) - (z' - max'). The drift is relative to 0. It
// is made relative to the maxima separately from the label's term: if the label's logit is 1e20, a common correction of
// their sum would lose the drift to rounding.
DPO_HD double kl_of(const FinishedRow& policy, const FinishedRow& reference, double z_label, double ref_label) {
  const double others = policy.p_others > 0.0 ? policy.drift - policy.p_others * (policy.max - reference.max) : 0.0;
  const double gap = (z_label - policy.max) - (ref_label - reference.max);
  const double at_label = policy.p_label > 0.0 ? policy.p_label * gap : 0.0;
  return (others + at_label) - (policy.log_sum - reference.log_sum);
}

}  // namespace dpo
