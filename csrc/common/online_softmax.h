// Online softmax of one row without its label: the running state, its merge, and how a row is finished.
//
// The label's own term is kept out of the running sum. With S = sum_{v != y} exp(z_v - m), m = max_{v != y} z_v,
//     logp = -log1p(S exp(m - z_y)),
// so a policy that is almost sure of the label (S exp(m - z_y) ~ 1e-9) keeps full relative precision in logp and in
// the label's gradient 1 - p = -expm1(logp). Adding 1 to S first would round that information away.
//
// Extra accumulators are first moments under the unnormalised weights e_v = exp(z_v - m), and their squares:
//     entropy: sum e_v (z_v - m)       kl: sum e_v (z_v - z'_v)       log sum p^2: sum e_v^2
// The likeliest entry's e_v is 1, so the sum of squares loses nothing that the sum keeps.
//
// A finished row keeps its maximum and log sum_v exp(z_v - max) apart: of z_v = 1e17 their sum would keep nothing of
// the log, and where z_y is the lowest finite number z_y - logp says nothing about the other logits.
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

// Moves the state's origin up to new_max (>= state.max). e_v and z_v - m both change with the origin.
template <typename T>
DPO_HD void raise_max(OnlineSoftmax<T>& state, T new_max) {
  if (state.max == new_max) return;
  if (state.max > static_cast<T>(-INFINITY)) {
    const double delta = static_cast<double>(state.max) - static_cast<double>(new_max);
    const double factor = exp(delta);
    if (factor == 0.0) {
      // What no longer has mass leaves nothing behind: its moments may be infinite, and 0 * inf is NaN.
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

// Associative; callers fix the order so that results are bitwise reproducible.
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
  double max;      // of the state and the label
  double log_sum;  // log sum_v exp(z_v - max)
  double entropy;
  double drift;  // sum_v p_v (z_v - z'_v) over all but the label
  double p_others, p_label;
  double log_sum_sq;  // log sum_v p_v^2
};

// log p(label) from the state of all other logits and the label's logit.
template <typename T>
DPO_HD double label_logp(const OnlineSoftmax<T>& others, T z_label) {
  const double gap = static_cast<double>(others.max) - static_cast<double>(z_label);
  if (z_label == static_cast<T>(INFINITY)) return NAN;  // inf - inf, as log_softmax has it
  if (others.max == static_cast<T>(-INFINITY) && others.sum == 0.0) {
    // Nothing else has mass: the label has it all, unless it is -inf (or NaN) itself.
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
  // Of a label that is almost certain the sum is 1 and a hair; its log-probability has the hair in full.
  row.log_sum = shift == 0.0 ? -row.logp : log(sum);
  row.entropy = row.log_sum - shifted / sum;
  row.drift = state.drift / sum;
  row.p_others = state.sum / sum;
  row.p_label = weight / sum;
  row.log_sum_sq = log((state.squares + weight * weight) / (sum * sum));
  return row;
}

// Where float32 sums say that gaps of policy and reference are as large as this on average, they are added up again in
// float64: stage 3 subtracts their mean from single gaps, and where p is near 1 little more than its rounding is left.
constexpr double kSmallGap = 4.0;

// KL(policy || reference) = sum p (d - log_sum + log_sum'), d = (z - max) - (z' - max'). The drift counts from 0, and
// is moved to the maxima by itself: of a label at 1e20 a sum with it would keep nothing of the others.
DPO_HD double kl_of(const FinishedRow& policy, const FinishedRow& reference, double z_label, double ref_label) {
  const double others = policy.p_others > 0.0 ? policy.drift - policy.p_others * (policy.max - reference.max) : 0.0;
  const double gap = (z_label - policy.max) - (ref_label - reference.max);
  const double at_label = policy.p_label > 0.0 ? policy.p_label * gap : 0.0;
  return (others + at_label) - (policy.log_sum - reference.log_sum);
}

}  // namespace dpo
