// The sigmoid family of pair losses and their derivative, for one pair.
//
// DPO (Rafailov et al. 2023, eq. 7):        l(x) = -log sigmoid(x)
// conservative DPO (label smoothing e):     l(x) = -(1 - e) log sigmoid(x) - e log sigmoid(-x)
// robust DPO (Chowdhury et al. 2024):       l(x) = (-(1 - e) log sigmoid(x) + e log sigmoid(-x)) / (1 - 2 e)
// with x = beta * ((S_c - R_c) - (S_r - R_r)).
#pragma once

#include <math.h>

#include "hd.h"

namespace dpo {

struct PairLoss {
  double loss;
  double slope;  // dl/dx
};

// log(1 + exp(x)) without overflow; exactly log 2 at 0.
DPO_HD_CALLED double softplus(double x) { return x > 0.0 ? x + log1p(exp(-x)) : log1p(exp(x)); }

DPO_HD_CALLED double sigmoid(double x) {
  if (x >= 0.0) return 1.0 / (1.0 + exp(-x));
  const double e = exp(x);
  return e / (1.0 + e);
}

DPO_HD PairLoss sigmoid_family(double x, double label_smoothing, bool robust) {
  const double e = label_smoothing;
  PairLoss out;
  if (robust) {
    const double scale = 1.0 / (1.0 - 2.0 * e);
    out.loss = ((1.0 - e) * softplus(-x) - e * softplus(x)) * scale;
    out.slope = (-(1.0 - e) * sigmoid(-x) - e * sigmoid(x)) * scale;
  } else if (e == 0.0) {
    // A separate case, so that an infinite margin gives 0 or inf instead of 0 * inf.
    out.loss = softplus(-x);
    out.slope = -sigmoid(-x);
  } else {
    // At e = 1 the first term is left out: it could be 0 * inf, which is NaN.
    out.loss = (e < 1.0 ? (1.0 - e) * softplus(-x) : 0.0) + e * softplus(x);
    out.slope = -(1.0 - e) * sigmoid(-x) + e * sigmoid(x);
  }
  return out;
}

}  // namespace dpo
