// Parameters of the filtered gradient on a CPU; filtered_grad.cpp describes the data flow.
#pragma once

#include <cstdint>

#include "stages.h"

namespace dpo::cpu {

// Selection of the kept entries of each row of logits: p > eps, and the label. Two passes: count, then fill.
struct FilterParams {
  Logits logits;  // [1, rows, V]
  const int64_t* labels;
  const double* logps;  // nullptr while counting
  const double* max;
  const double* log_sum;
  double log_eps;
  int64_t vocab;
  double logit_scale;
  double logit_softcap;
  int64_t* counts;         // [rows], written by filter_count
  const int64_t* row_ptr;  // [rows + 1], bounds of each row's entries
  int32_t* index;          // [kept], ascending within a row
  void* value;             // [kept] float (double for float64 logits): (onehot - p) dz/dx, for grad_logps = 1
  double* tail;            // [rows], sum of p dz/dx over the dropped entries
  double* dropped;         // [rows], sum of p over the dropped entries
};

// Both sparse products compute out[r] += sum of coefficient * source[index] over the entries of row r.
struct FilteredHiddenParams {
  const int32_t* index;
  const void* value;
  const int64_t* row_ptr;  // [rows + 1]
  const double* tail;      // [rows]
  const double* grad;      // [rows], d loss / d log-probability of each token
  Logits weight;           // [1, V, H], contiguous
  const double* mean_row;  // [H], mean of the weight's rows
  int64_t vocab;
  int64_t hidden_size;
  void* out;  // [rows, H] float or double
};

struct FilteredWeightParams {
  const int32_t* index;
  const void* value;
  const int64_t* row_ptr;
  const double* grad;
  int64_t rows;
  Logits hidden;           // [1, rows, H], contiguous
  const double* tail_row;  // [H], added to every row of dW
  int64_t hidden_size;
  bool accumulate;  // add to out instead of overwriting it
  void* out;        // [V, H] float or double
};

DPO_IN_EVERY_ISA(void filter_count(const FilterParams& params, int64_t begin, int64_t end);
                 void filter_fill(const FilterParams& params, int64_t begin, int64_t end);
                 void filtered_grad_hidden(const FilteredHiddenParams& params, int64_t begin, int64_t end);
                 void filtered_grad_weight(const FilteredWeightParams& params, int64_t begin, int64_t end);)

}  // namespace dpo::cpu
