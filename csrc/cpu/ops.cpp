// The operators of the CPU library: checks of labels, distribution of rows over threads, choice of the instruction set,
// and registration through PyTorch's stable ABI (one binary works with every torch >= 2.10 and needs no Python header).
//
// The caller allocates the outputs (dpo_kernels/backends/cpu.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>
#include <vector>

#include "../common/tensors.h"
#include "filtered_grad.h"
#include "preference_loss.h"
#include "products.h"
#include "stages.h"

namespace dpo::cpu {
namespace {

#if defined(__x86_64__) && defined(__GNUC__)
#define DPO_RUN(stage, wide, ...)   \
  do {                              \
    if (wide || isa() == 0) {       \
      baseline::stage(__VA_ARGS__); \
    } else if (isa() == 1) {        \
      avx2::stage(__VA_ARGS__);     \
    } else {                        \
      avx512::stage(__VA_ARGS__);   \
    }                               \
  } while (0)
#else
#define DPO_RUN(stage, wide, ...) baseline::stage(__VA_ARGS__)
#endif

// 0: baseline, 1: AVX2 and FMA, 2: AVX-512. DPO_KERNELS_ISA can lower it; tests run every set of the CPU.
int64_t isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const int64_t level = [] {
    int64_t best = 0;
    if (__builtin_cpu_supports("x86-64-v3")) best = 1;
    if (__builtin_cpu_supports("x86-64-v4")) best = 2;
    if (const char* wish = std::getenv("DPO_KERNELS_ISA")) {
      const std::string name = wish;
      if (name == "baseline") best = 0;
      if (name == "avx2") best = std::min<int64_t>(best, 1);
    }
    return best;
  }();
  return level;
#else
  return 0;
#endif
}

// Indices of the scored tokens. Threads share this list instead of the rows, which balances their load if a part of
// every sequence is prompt.
std::vector<int64_t> scored_tokens(const int64_t* labels, int64_t count, int64_t seq_len, int64_t vocab,
                                   int64_t ignore_index) {
  std::vector<int64_t> tokens;
  tokens.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    if (labels[i] == ignore_index) continue;
    if (labels[i] < 0 || labels[i] >= vocab) {
      throw std::runtime_error("label " + std::to_string(labels[i]) + " at row " + std::to_string(i / seq_len) +
                               ", position " + std::to_string(i % seq_len) + " is outside the vocabulary [0, " +
                               std::to_string(vocab) + ") and is not ignore_index (" + std::to_string(ignore_index) +
                               ")");
    }
    tokens.push_back(i);
  }
  return tokens;
}

// Smallest number of rows per thread. For less work than some tens of microseconds, waking a thread costs more than it
// saves.
int64_t grain_of(int64_t vocab) { return std::max<int64_t>(1, (int64_t{1} << 14) / std::max<int64_t>(vocab, 1)); }

void run_token_logps(TokenLogpsParams& p, int64_t count, int64_t ignore_index) {
  const auto tokens = scored_tokens(p.labels, count, p.seq_len, p.vocab, ignore_index);
  p.tokens = tokens.data();
  [[maybe_unused]] const bool wide = is_wide(p.policy, p.reference);
  torch::stable::parallel_for(0, static_cast<int64_t>(tokens.size()), grain_of(p.vocab),
                              [&](int64_t begin, int64_t end) { DPO_RUN(token_logps, wide, p, begin, end); });
}

TokenLogpsParams token_params(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& ref_logits,
                              double logit_scale, double logit_softcap, int64_t asked, const Tensor& tokens) {
  TokenLogpsParams p{};
  p.policy = logits_of(logits);
  if (ref_logits) p.reference = logits_of(*ref_logits);
  p.labels = labels_of(labels);
  p.seq_len = logits.size(1);
  p.vocab = logits.size(2);
  p.logit_scale = logit_scale;
  p.logit_softcap = logit_softcap;
  double* const first = out_of(tokens);
  if (tokens.numel() > 0) std::memset(first, 0, sizeof(double) * tokens.numel());  // results of unscored tokens are 0
  point_at_rows(p.rows, first, labels.numel(), asked);
  return p;
}

void token_logps_op(Tensor logits, Tensor labels, std::optional<Tensor> ref_logits, int64_t ignore_index,
                    double logit_scale, double logit_softcap, int64_t asked, Tensor tokens) {
  TokenLogpsParams p = token_params(logits, labels, ref_logits, logit_scale, logit_softcap, asked, tokens);
  run_token_logps(p, labels.numel(), ignore_index);
}

// Rows without gradient are set to 0 without being read.
void run_logits_grad(LogitsGradParams& p, int64_t count, int64_t ignore_index) {
  std::vector<int64_t> live, zero;
  live.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    const bool moves = p.grad_logps[i] != 0.0 || (p.grad_kl && p.grad_kl[i] != 0.0) ||
                       (p.grad_forward_kl && p.grad_forward_kl[i] != 0.0);
    (p.labels[i] != ignore_index && moves ? live : zero).push_back(i);
  }
  const int64_t size = p.logits.dtype == DType::float64 ? 8 : p.logits.dtype == DType::float32 ? 4 : 2;
  torch::stable::parallel_for(0, static_cast<int64_t>(zero.size()), grain_of(p.vocab), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t offset = (zero[k] / p.seq_len) * p.out_stride_b + (zero[k] % p.seq_len) * p.out_stride_t;
      std::memset(static_cast<char*>(p.out) + offset * size, 0, p.vocab * size);
    }
  });
  p.tokens = live.data();
  [[maybe_unused]] const bool wide = p.logits.dtype == DType::float64;
  torch::stable::parallel_for(0, static_cast<int64_t>(live.size()), grain_of(p.vocab),
                              [&](int64_t begin, int64_t end) { DPO_RUN(logits_grad, wide, p, begin, end); });
}

// `softmax` has the pointers logps, max and log_sum.
LogitsGradParams grad_params(const Tensor& logits, const Tensor& labels, const std::array<const double*, 3>& softmax,
                             const double* grad_logps, double logit_scale, double logit_softcap, const Tensor& out) {
  LogitsGradParams p{};
  p.logits = logits_of(logits);
  const Logits gradient = logits_of(out);
  p.out = out.mutable_data_ptr();
  p.out_stride_b = gradient.stride_b;
  p.out_stride_t = gradient.stride_t;
  p.labels = labels_of(labels);
  p.logps = softmax[0];
  p.max = softmax[1];
  p.log_sum = softmax[2];
  p.grad_logps = grad_logps;
  p.seq_len = logits.size(1);
  p.vocab = logits.size(2);
  p.logit_scale = logit_scale;
  p.logit_softcap = logit_softcap;
  return p;
}

void logits_grad_op(Tensor logits, Tensor labels, Tensor logps, Tensor max, Tensor log_sum, Tensor grad_logps,
                    int64_t ignore_index, double logit_scale, double logit_softcap, Tensor out,
                    std::optional<Tensor> ref_logits, std::optional<Tensor> ref_logps, std::optional<Tensor> ref_max,
                    std::optional<Tensor> ref_log_sum, std::optional<Tensor> kl, std::optional<Tensor> grad_kl,
                    std::optional<Tensor> grad_forward_kl) {
  LogitsGradParams p = grad_params(logits, labels, {in_of(logps), in_of(max), in_of(log_sum)}, in_of(grad_logps),
                                   logit_scale, logit_softcap, out);
  if (ref_logits) p.reference = logits_of(*ref_logits);
  p.ref_logps = in_of(ref_logps);
  p.ref_max = in_of(ref_max);
  p.ref_log_sum = in_of(ref_log_sum);
  p.kl = in_of(kl);
  p.grad_kl = in_of(grad_kl);
  p.grad_forward_kl = in_of(grad_forward_kl);
  run_logits_grad(p, labels.numel(), ignore_index);
}

Sequences sequences_of(const Tensor& tokens, const std::optional<Tensor>& cu_seqlens) {
  return {bounds_of(cu_seqlens), tokens.size(1)};
}

void sequence_sums_op(Tensor values, Tensor weights, std::optional<Tensor> cu_seqlens, Tensor sums) {
  const Sequences sequences = sequences_of(values, cu_seqlens);
  double* out = static_cast<double*>(sums.mutable_data_ptr());
  torch::stable::parallel_for(0, sums.numel(), 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = sequence_sum(in_of(values), in_of(weights), sequences, i);
  });
}

void preference_loss_op(Tensor logps, std::optional<Tensor> ref_logps, Tensor weights, std::optional<Tensor> cu_seqlens,
                        std::optional<Tensor> ref_sums, Tensor beta, Tensor label_smoothing, bool robust, Tensor losses,
                        Tensor sums, Tensor ref_sums_out, Tensor coef) {
  PreferenceLossParams p{};
  p.logps = in_of(logps);
  p.ref_logps = in_of(ref_logps);
  p.weights = in_of(weights);
  p.ref_sums = in_of(ref_sums);
  p.sequences = sequences_of(logps, cu_seqlens);
  p.beta = in_of(beta);
  p.label_smoothing = in_of(label_smoothing);
  p.robust = robust;
  p.pairs = losses.numel();
  p.losses = out_of(losses);
  p.sums = out_of(sums);
  p.ref_sums_out = out_of(ref_sums_out);
  p.coef = out_of(coef);
  torch::stable::parallel_for(0, p.pairs, 32, [&](int64_t begin, int64_t end) { preference_loss(p, begin, end); });
}

// ---- A whole call (interface and a version composed of the stages: dpo_kernels/backends/whole_call.py) ----

// The weight of every token; 0 where it is not scored.
std::vector<double> weights_of(const Tensor& labels, const double* given, int64_t ignore_index) {
  const int64_t* label = labels_of(labels);
  std::vector<double> weights(labels.numel());
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = label[i] == ignore_index ? 0.0 : given ? given[i] : 1.0;
  return weights;
}

std::vector<double> each_of(const std::optional<Tensor>& given, double value, int64_t pairs) {
  if (!given) return std::vector<double>(pairs, value);
  return std::vector<double>(in_of(*given), in_of(*given) + pairs);
}

void store_loss(const Tensor& loss, int64_t i, double value) {
  if (loss.scalar_type() == ScalarType::Double) {
    static_cast<double*>(loss.mutable_data_ptr())[i] = value;
  } else {
    static_cast<float*>(loss.mutable_data_ptr())[i] = static_cast<float>(value);
  }
}

double load_grad(const Tensor& grad, int64_t i) {
  return grad.scalar_type() == ScalarType::Double ? static_cast<const double*>(grad.const_data_ptr())[i]
                                                  : static_cast<const float*>(grad.const_data_ptr())[i];
}

void preference_forward_op(Tensor logits, Tensor labels, std::optional<Tensor> ref_logits, int64_t ignore_index,
                           double logit_scale, double logit_softcap, int64_t asked, std::optional<Tensor> token_weights,
                           std::optional<Tensor> cu_seqlens, std::optional<Tensor> pair_weights, int64_t reduction,
                           std::optional<Tensor> ref_sums, std::optional<Tensor> betas, double beta,
                           std::optional<Tensor> label_smoothings, double label_smoothing, bool robust, Tensor tokens,
                           Tensor sequences, Tensor losses, Tensor loss) {
  const int64_t count = labels.numel(), pairs = losses.numel();
  TokenLogpsParams p = token_params(logits, labels, ref_logits, logit_scale, logit_softcap, asked, tokens);
  run_token_logps(p, count, ignore_index);

  const std::vector<double> weights = weights_of(labels, in_of(token_weights), ignore_index);
  const std::vector<double> scored = token_weights ? weights_of(labels, nullptr, ignore_index) : weights;
  const std::vector<double> beta_of = each_of(betas, beta, pairs);
  const std::vector<double> smoothing_of = each_of(label_smoothings, label_smoothing, pairs);
  double* const results = out_of(sequences);
  const auto row = [&](int name) { return results + name * 2 * pairs; };
  double *sums = row(sequence_row::logps), *refs = row(sequence_row::ref_logps), *rewards = row(sequence_row::rewards);
  double *counts = row(sequence_row::counts), *means = row(sequence_row::means);
  PreferenceLossParams q{};
  q.logps = p.rows[token_row::logps];
  q.ref_logps = p.rows[token_row::ref_logps];
  q.weights = weights.data();
  q.ref_sums = in_of(ref_sums);
  q.sequences = sequences_of(labels, cu_seqlens);
  q.beta = beta_of.data();
  q.label_smoothing = smoothing_of.data();
  q.robust = robust;
  q.pairs = pairs;
  q.losses = out_of(losses);
  q.sums = sums;
  q.ref_sums_out = refs;
  q.coef = row(sequence_row::coef);
  preference_loss(q, 0, pairs);
  // The rows of the statistics are the last ones.
  const int64_t statistics = sequences.size(0) - sequence_row::means;
  const double* first = in_of(tokens) + (tokens.size(0) - statistics) * count;
  for (int64_t s = 0; s < 2 * pairs; ++s) {
    rewards[s] = beta_of[s % pairs] * (sums[s] - refs[s]);
    counts[s] = sequence_sum(scored.data(), scored.data(), q.sequences, s);
    for (int64_t k = 0; k < statistics; ++k) {
      means[2 * pairs * k + s] =
          sequence_sum(first + k * count, scored.data(), q.sequences, s) / std::max(counts[s], 1.0);
    }
  }
  const double* share = in_of(pair_weights);
  double total = 0.0;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const double weighted = share ? q.losses[pair] * share[pair] : q.losses[pair];
    if (reduction == kNone) store_loss(loss, pair, weighted);
    total += weighted;
  }
  if (reduction != kNone) store_loss(loss, 0, reduction == kMean ? total / std::max<int64_t>(pairs, 1) : total);
}

void preference_backward_op(Tensor logits, Tensor labels, Tensor tokens, Tensor sequences, Tensor grad_loss,
                            int64_t ignore_index, double logit_scale, double logit_softcap,
                            std::optional<Tensor> token_weights, std::optional<Tensor> cu_seqlens,
                            std::optional<Tensor> pair_weights, int64_t reduction, Tensor out) {
  const int64_t count = labels.numel(), pairs = sequences.size(1) / 2;
  const std::vector<double> weights = weights_of(labels, in_of(token_weights), ignore_index);
  const Sequences places = sequences_of(labels, cu_seqlens);
  const double* coef = in_of(sequences) + sequence_row::coef * 2 * pairs;
  const double* share = in_of(pair_weights);
  std::vector<double> grad_logps(count, 0.0);
  for (int64_t s = 0; s < 2 * pairs; ++s) {
    const int64_t pair = s % pairs;
    double grad = load_grad(grad_loss, reduction == kNone ? pair : 0);
    if (reduction == kMean) grad /= static_cast<double>(pairs);
    if (share) grad *= share[pair];
    spread(coef[s] * grad, weights.data(), places, s, grad_logps.data());
  }
  const double* rows = in_of(tokens);
  LogitsGradParams p = grad_params(logits, labels, {rows, rows + count, rows + 2 * count}, grad_logps.data(),
                                   logit_scale, logit_softcap, out);
  run_logits_grad(p, count, ignore_index);
}

Logits matrix_of(const Tensor& t) { return {t.const_data_ptr(), dtype_of(t), 0, t.stride(0)}; }

int64_t* int64_of(const Tensor& t) { return static_cast<int64_t*>(t.mutable_data_ptr()); }

FilterParams filter_of(const Tensor& logits, const Tensor& labels, const Tensor& max, const Tensor& log_sum, double eps,
                       double logit_scale, double logit_softcap) {
  FilterParams p{};
  p.logits = matrix_of(logits);
  p.labels = labels_of(labels);
  p.max = in_of(max);
  p.log_sum = in_of(log_sum);
  p.log_eps = std::log(eps);
  p.vocab = logits.size(1);
  p.logit_scale = logit_scale;
  p.logit_softcap = logit_softcap;
  return p;
}

void filter_count_op(Tensor logits, Tensor labels, Tensor max, Tensor log_sum, double eps, double logit_scale,
                     double logit_softcap, Tensor counts) {
  FilterParams p = filter_of(logits, labels, max, log_sum, eps, logit_scale, logit_softcap);
  p.counts = int64_of(counts);
  [[maybe_unused]] const bool wide = p.logits.dtype == DType::float64;
  torch::stable::parallel_for(0, logits.size(0), 1,
                              [&](int64_t begin, int64_t end) { DPO_RUN(filter_count, wide, p, begin, end); });
}

void filter_fill_op(Tensor logits, Tensor labels, Tensor logps, Tensor max, Tensor log_sum, double eps,
                    double logit_scale, double logit_softcap, Tensor row_ptr, Tensor index, Tensor value, Tensor tail,
                    Tensor dropped) {
  FilterParams p = filter_of(logits, labels, max, log_sum, eps, logit_scale, logit_softcap);
  p.logps = in_of(logps);
  p.row_ptr = int64_of(row_ptr);
  p.index = static_cast<int32_t*>(index.mutable_data_ptr());
  p.value = value.mutable_data_ptr();
  p.tail = static_cast<double*>(tail.mutable_data_ptr());
  p.dropped = static_cast<double*>(dropped.mutable_data_ptr());
  [[maybe_unused]] const bool wide = p.logits.dtype == DType::float64;
  torch::stable::parallel_for(0, logits.size(0), 1,
                              [&](int64_t begin, int64_t end) { DPO_RUN(filter_fill, wide, p, begin, end); });
}

void filtered_grad_hidden_op(Tensor index, Tensor value, Tensor row_ptr, Tensor tail, Tensor grad, Tensor weight,
                             Tensor mean_row, Tensor out) {
  FilteredHiddenParams p{};
  p.index = static_cast<const int32_t*>(index.const_data_ptr());
  p.value = value.const_data_ptr();
  p.row_ptr = static_cast<const int64_t*>(row_ptr.const_data_ptr());
  p.tail = in_of(tail);
  p.grad = in_of(grad);
  p.weight = matrix_of(weight);
  p.mean_row = in_of(mean_row);
  p.vocab = weight.size(0);
  p.hidden_size = weight.size(1);
  p.out = out.mutable_data_ptr();
  [[maybe_unused]] const bool wide = p.weight.dtype == DType::float64;
  torch::stable::parallel_for(0, out.size(0), 1,
                              [&](int64_t begin, int64_t end) { DPO_RUN(filtered_grad_hidden, wide, p, begin, end); });
}

void filtered_grad_weight_op(Tensor index, Tensor value, Tensor row_ptr, Tensor grad, Tensor hidden, Tensor tail_row,
                             bool accumulate, Tensor out) {
  FilteredWeightParams p{};
  p.index = static_cast<const int32_t*>(index.const_data_ptr());
  p.value = value.const_data_ptr();
  p.row_ptr = static_cast<const int64_t*>(row_ptr.const_data_ptr());
  p.grad = in_of(grad);
  p.rows = hidden.size(0);
  p.hidden = matrix_of(hidden);
  p.tail_row = in_of(tail_row);
  p.hidden_size = hidden.size(1);
  p.accumulate = accumulate;
  p.out = out.mutable_data_ptr();
  [[maybe_unused]] const bool wide = p.hidden.dtype == DType::float64;
  torch::stable::parallel_for(0, out.size(0), 1024,
                              [&](int64_t begin, int64_t end) { DPO_RUN(filtered_grad_weight, wide, p, begin, end); });
}

Matrix matrix_by_strides(const Tensor& t) {
  require(t.dim() == 2, "a matrix has two dimensions");
  // The stride of a dimension of size 1 is not used.
  const int64_t row = t.size(0) <= 1 ? 1 : t.stride(0), column = t.size(1) <= 1 ? 1 : t.stride(1);
  require(row == 1 || column == 1, "a matrix must have a unit stride");
  const DType dtype = dtype_of(t);
  require(dtype != DType::float64, "products are in float32 arithmetic");
  return {t.const_data_ptr(), dtype, row, column};
}

// Number of parts into which the rows of [rows, columns] are split, so that each of `threads` parts reads as little as
// possible; the columns are split into threads / result parts.
int64_t threads_down(int64_t rows, int64_t columns, int64_t threads) {
  int64_t best = 1;
  for (int64_t down = 2; down <= threads; ++down) {
    if (threads % down == 0 && rows / down + columns * down / threads < rows / best + columns * best / threads)
      best = down;
  }
  return best;
}

void product_op(Tensor a, Tensor b, std::optional<Tensor> bias, bool add, Tensor out) {
  const int64_t rows = out.size(0), columns = out.size(1);
  ProductParams p{};
  p.a = matrix_by_strides(a);
  p.b = matrix_by_strides(b);
  p.depth = a.size(1);
  require(a.size(0) == rows && b.size(0) == p.depth && b.size(1) == columns, "shapes of a product do not match");
  require(columns <= 1 || out.stride(1) == 1, "a product must have unit stride along its rows");
  p.out = out.mutable_data_ptr();
  p.out_dtype = dtype_of(out);
  p.out_row = out.stride(0);
  p.add = add;
  require(p.out_dtype == DType::float32 || (p.out_dtype != DType::float64 && !add), "sums are in float32");
  if (bias) {
    require(!add && dtype_of(*bias) == DType::float32 && bias->is_contiguous() && bias->numel() == columns,
            "a bias must be float32, one per column");
    p.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  if (rows == 0 || columns == 0) return;
  const bool small = rows * columns * p.depth < (int64_t{1} << 20);
  const int64_t threads = small ? 1 : torch::stable::get_num_threads();
  const int64_t down = threads_down(rows, columns, threads), across = threads / down;
  // Parts are multiples of the tile of every instruction set: 42 rows, 32 columns.
  const auto edge = [](int64_t size, int64_t i, int64_t count, int64_t step) {
    return std::min(size, (size * i / count + step - 1) / step * step);
  };
  // The exception is kept here, because torch 2.10 replaces an exception of a thread by one without its message.
  std::exception_ptr failure;
  std::mutex holds_failure;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t top = edge(rows, i / across, down, 42), bottom = edge(rows, i / across + 1, down, 42);
      const int64_t left = edge(columns, i % across, across, 32), right = edge(columns, i % across + 1, across, 32);
      if (top == bottom || left == right) continue;
      const Rectangle part{top, bottom - top, left, right - left};
      try {
        DPO_RUN(product, false, p, part);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(holds_failure);
        failure = std::current_exception();
      }
    }
  });
  if (failure) std::rethrow_exception(failure);
}

// Asks the operating system to use 2 MB pages for new memory. Otherwise a tensor of hundreds of megabytes is mapped in
// pages of 4 KB at its first write, and the page faults take several times as long as writing. Only whole pages inside
// the tensor are named, so no more memory is used. If the system refuses, nothing changes.
void prefer_huge_pages_op([[maybe_unused]] Tensor fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = 2 << 20;
  const auto begin = reinterpret_cast<std::uintptr_t>(fresh.mutable_data_ptr());
  const std::uintptr_t first = (begin + page - 1) / page * page;
  const std::uintptr_t last = (begin + fresh.numel() * fresh.element_size()) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace dpo::cpu

#ifndef DPO_LIBRARY  // the operators' namespace, which dpo_kernels/_build.py chooses
#define DPO_LIBRARY dpo_kernels_cpu
#endif

STABLE_TORCH_LIBRARY(DPO_LIBRARY, m) {
  m.def(
      "token_logps(Tensor logits, Tensor labels, Tensor? ref_logits, int ignore_index, float logit_scale, "
      "float logit_softcap, int asked, Tensor(a!) tokens) -> ()");
  m.def(
      "logits_grad(Tensor logits, Tensor labels, Tensor logps, Tensor max, Tensor log_sum, Tensor grad_logps, "
      "int ignore_index, float logit_scale, float logit_softcap, Tensor(a!) out, Tensor? ref_logits, "
      "Tensor? ref_logps, Tensor? ref_max, Tensor? ref_log_sum, Tensor? kl, Tensor? grad_kl, Tensor? grad_forward_kl) "
      "-> ()");
  m.def("sequence_sums(Tensor values, Tensor weights, Tensor? cu_seqlens, Tensor(a!) sums) -> ()");
  m.def(
      "preference_loss(Tensor logps, Tensor? ref_logps, Tensor weights, Tensor? cu_seqlens, Tensor? ref_sums, "
      "Tensor beta, Tensor label_smoothing, bool robust, Tensor(a!) losses, Tensor(b!) sums, Tensor(c!) ref_sums_out, "
      "Tensor(d!) coef) -> ()");
  m.def(
      "preference_forward(Tensor logits, Tensor labels, Tensor? ref_logits, int ignore_index, float logit_scale, "
      "float logit_softcap, int asked, Tensor? token_weights, Tensor? cu_seqlens, Tensor? pair_weights, int reduction, "
      "Tensor? ref_sums, Tensor? betas, float beta, Tensor? label_smoothings, float label_smoothing, bool robust, "
      "Tensor(a!) tokens, Tensor(b!) sequences, Tensor(c!) losses, Tensor(d!) loss) -> ()");
  m.def(
      "preference_backward(Tensor logits, Tensor labels, Tensor tokens, Tensor sequences, Tensor grad_loss, "
      "int ignore_index, float logit_scale, float logit_softcap, Tensor? token_weights, Tensor? cu_seqlens, "
      "Tensor? pair_weights, int reduction, Tensor(a!) out) -> ()");
  m.def(
      "filter_count(Tensor logits, Tensor labels, Tensor max, Tensor log_sum, float eps, float logit_scale, float "
      "logit_softcap, "
      "Tensor(a!) counts) -> ()");
  m.def(
      "filter_fill(Tensor logits, Tensor labels, Tensor logps, Tensor max, Tensor log_sum, float eps, float "
      "logit_scale, "
      "float logit_softcap, Tensor row_ptr, Tensor(a!) index, Tensor(b!) value, Tensor(c!) tail, Tensor(d!) dropped) "
      "-> ()");
  m.def(
      "filtered_grad_hidden(Tensor index, Tensor value, Tensor row_ptr, Tensor tail, Tensor grad, Tensor weight, "
      "Tensor mean_row, Tensor(a!) out) -> ()");
  m.def(
      "filtered_grad_weight(Tensor index, Tensor value, Tensor row_ptr, Tensor grad, Tensor hidden, Tensor tail_row, "
      "bool accumulate, Tensor(a!) out) -> ()");
  m.def("product(Tensor a, Tensor b, Tensor? bias, bool add, Tensor(a!) out) -> ()");
  m.def("prefer_huge_pages(Tensor(a!) fresh) -> ()");
  m.def("isa() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(DPO_LIBRARY, CPU, m) {
  m.impl("token_logps", TORCH_BOX(&dpo::cpu::token_logps_op));
  m.impl("logits_grad", TORCH_BOX(&dpo::cpu::logits_grad_op));
  m.impl("sequence_sums", TORCH_BOX(&dpo::cpu::sequence_sums_op));
  m.impl("preference_loss", TORCH_BOX(&dpo::cpu::preference_loss_op));
  m.impl("preference_forward", TORCH_BOX(&dpo::cpu::preference_forward_op));
  m.impl("preference_backward", TORCH_BOX(&dpo::cpu::preference_backward_op));
  m.impl("filter_count", TORCH_BOX(&dpo::cpu::filter_count_op));
  m.impl("filter_fill", TORCH_BOX(&dpo::cpu::filter_fill_op));
  m.impl("filtered_grad_hidden", TORCH_BOX(&dpo::cpu::filtered_grad_hidden_op));
  m.impl("filtered_grad_weight", TORCH_BOX(&dpo::cpu::filtered_grad_weight_op));
  m.impl("product", TORCH_BOX(&dpo::cpu::product_op));
  m.impl("prefer_huge_pages", TORCH_BOX(&dpo::cpu::prefer_huge_pages_op));
}

STABLE_TORCH_LIBRARY_IMPL(DPO_LIBRARY, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&dpo::cpu::isa)); }
