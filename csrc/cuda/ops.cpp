// The operators of the CUDA library: they fill the parameter structs from tensors, set the device, get the stream, and
// are registered through PyTorch's stable ABI. They only launch kernels and do not synchronize.
//
// The caller allocates the outputs (dpo_kernels/backends/cuda.py).
#include <torch/csrc/stable/library.h>

#include <array>

#include "../common/tensors.h"
#include "params.h"
#include "stream.h"

namespace dpo::cuda {
namespace {

void check(cudaError_t error, const char* stage) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("dpo_kernels: ") + stage + ": " + error_text(error));
}

// Kernels use 32-bit indices within a row and 64-bit indices of rows.
Logits row_logits_of(const Tensor& t) {
  require(t.dim() != 3 || t.size(2) <= (int64_t{1} << 30), "a vocabulary of at most 2^30 is supported");
  require(t.scalar_type() != ScalarType::Double, "the CUDA kernels take float32, bfloat16 or float16 logits");
  return logits_of(t);
}

float softcap_of(double logit_scale, double logit_softcap) {
  require(logit_scale > 0.0, "the CUDA kernels need a positive logit_scale");
  require(logit_softcap >= 0.0, "logit_softcap must not be negative");
  return static_cast<float>(logit_softcap);
}

TokenLogpsParams token_params(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& ref_logits,
                              int64_t ignore_index, double logit_scale, double logit_softcap, int64_t asked,
                              const Tensor& tokens) {
  TokenLogpsParams p{};
  p.policy = row_logits_of(logits);
  if (ref_logits) p.reference = row_logits_of(*ref_logits);
  p.labels = labels_of(labels);
  point_at_rows(p.rows, out_of(tokens), labels.numel(), asked);
  p.batch = logits.size(0);
  p.tokens = logits.size(1);
  p.vocab = logits.size(2);
  p.ignore_index = ignore_index;
  p.logit_scale = static_cast<float>(logit_scale);
  p.logit_softcap = softcap_of(logit_scale, logit_softcap);
  return p;
}

void token_logps_op(Tensor logits, Tensor labels, std::optional<Tensor> ref_logits, int64_t ignore_index,
                    double logit_scale, double logit_softcap, int64_t asked, Tensor tokens) {
  const OnDevice here(logits);
  const TokenLogpsParams p =
      token_params(logits, labels, ref_logits, ignore_index, logit_scale, logit_softcap, asked, tokens);
  check(token_logps(p, here.device(), here.stream()), "token_logps");
}

void sequence_sums_op(Tensor values, Tensor weights, std::optional<Tensor> cu_seqlens, Tensor sums) {
  const OnDevice here(values);
  SequenceSumsParams p{};
  p.values = in_of(values);
  p.weights = in_of(weights);
  p.cu_seqlens = bounds_of(cu_seqlens);
  p.sums = out_of(sums);
  p.sequences = sums.numel();
  p.tokens = values.size(1);
  check(sequence_sums(p, here.stream()), "sequence_sums");
}

void preference_loss_op(Tensor logps, std::optional<Tensor> ref_logps, Tensor weights, std::optional<Tensor> cu_seqlens,
                        std::optional<Tensor> ref_sums, Tensor beta, Tensor label_smoothing, bool robust, Tensor losses,
                        Tensor sums, Tensor ref_sums_out, Tensor coef) {
  const OnDevice here(logps);
  PreferenceLossParams p{};
  p.logps = in_of(logps);
  p.ref_logps = in_of(ref_logps);
  p.tokens = logps.size(1);
  p.weights.given = in_of(weights);
  p.cu_seqlens = bounds_of(cu_seqlens);
  p.given_ref_sums = in_of(ref_sums);
  p.betas = in_of(beta);
  p.label_smoothings = in_of(label_smoothing);
  p.pairs = losses.numel();
  p.robust = robust;
  p.losses = out_of(losses);
  p.sums = out_of(sums);
  p.ref_sums = out_of(ref_sums_out);
  p.coef = out_of(coef);
  check(preference_loss(p, here.stream()), "preference_loss");
}

// `softmax` has the pointers logps, max and log_sum.
LogitsGradParams grad_params(const Tensor& logits, const Tensor& labels, const std::array<const double*, 3>& softmax,
                             int64_t ignore_index, double logit_scale, double logit_softcap, const Tensor& out) {
  LogitsGradParams p{};
  p.logits = row_logits_of(logits);
  const Logits gradient = row_logits_of(out);
  require(gradient.dtype == p.logits.dtype, "the gradient has the dtype of the logits");
  p.out = out.mutable_data_ptr();
  p.out_stride_b = gradient.stride_b;
  p.out_stride_t = gradient.stride_t;
  p.labels = labels_of(labels);
  p.logps = softmax[0];
  p.max = softmax[1];
  p.log_sum = softmax[2];
  p.batch = logits.size(0);
  p.tokens = logits.size(1);
  p.vocab = logits.size(2);
  p.ignore_index = ignore_index;
  p.logit_scale = static_cast<float>(logit_scale);
  p.logit_softcap = softcap_of(logit_scale, logit_softcap);
  return p;
}

void logits_grad_op(Tensor logits, Tensor labels, Tensor logps, Tensor max, Tensor log_sum, Tensor grad_logps,
                    int64_t ignore_index, double logit_scale, double logit_softcap, Tensor out,
                    std::optional<Tensor> ref_logits, std::optional<Tensor> ref_logps, std::optional<Tensor> ref_max,
                    std::optional<Tensor> ref_log_sum, std::optional<Tensor> kl, std::optional<Tensor> grad_kl,
                    std::optional<Tensor> grad_forward_kl) {
  const OnDevice here(logits);
  LogitsGradParams p = grad_params(logits, labels, {in_of(logps), in_of(max), in_of(log_sum)}, ignore_index,
                                   logit_scale, logit_softcap, out);
  p.grad_logps = in_of(grad_logps);
  if (ref_logits) {
    require(ref_logps && ref_max && ref_log_sum && kl,
            "the gradient of a divergence needs the reference's rows and kl");
    p.reference = row_logits_of(*ref_logits);
  }
  p.ref_logps = in_of(ref_logps);
  p.ref_max = in_of(ref_max);
  p.ref_log_sum = in_of(ref_log_sum);
  p.kl = in_of(kl);
  p.grad_kl = in_of(grad_kl);
  p.grad_forward_kl = in_of(grad_forward_kl);
  check(logits_grad(p, here.device(), here.stream()), "logits_grad");
}

// ---- A whole call (interface and a version composed of the stages: dpo_kernels/backends/whole_call.py) ----

double divisor_of(int64_t reduction, int64_t pairs) {
  return reduction == kMean && pairs > 0 ? static_cast<double>(pairs) : 1.0;
}

void preference_forward_op(Tensor logits, Tensor labels, std::optional<Tensor> ref_logits, int64_t ignore_index,
                           double logit_scale, double logit_softcap, int64_t asked, std::optional<Tensor> token_weights,
                           std::optional<Tensor> cu_seqlens, std::optional<Tensor> pair_weights, int64_t reduction,
                           std::optional<Tensor> ref_sums, std::optional<Tensor> betas, double beta,
                           std::optional<Tensor> label_smoothings, double label_smoothing, bool robust, Tensor tokens,
                           Tensor sequences, Tensor losses, Tensor loss, Tensor pairs_done) {
  const OnDevice here(logits);
  require(loss.scalar_type() == ScalarType::Float, "the loss must be float32");
  require(pairs_done.scalar_type() == ScalarType::Int && pairs_done.numel() == 1, "pairs_done must be one int32");
  TokenLogpsParams p =
      token_params(logits, labels, ref_logits, ignore_index, logit_scale, logit_softcap, asked, tokens);
  p.to_clear = static_cast<int*>(pairs_done.mutable_data_ptr());
  check(token_logps(p, here.device(), here.stream()), "token_logps");

  PreferenceLossParams q{};
  q.logps = p.rows[token_row::logps];
  q.ref_logps = p.rows[token_row::ref_logps];
  q.tokens = p.tokens;
  q.weights = {p.labels, ignore_index, in_of(token_weights)};
  q.cu_seqlens = bounds_of(cu_seqlens);
  q.given_ref_sums = in_of(ref_sums);
  q.betas = in_of(betas);
  q.beta = beta;
  q.label_smoothings = in_of(label_smoothings);
  q.label_smoothing = label_smoothing;
  q.pairs = losses.numel();
  q.robust = robust;
  q.losses = out_of(losses);
  double* const results = out_of(sequences);
  const int64_t width = 2 * q.pairs;
  q.sums = results + sequence_row::logps * width;
  q.ref_sums = results + sequence_row::ref_logps * width;
  q.rewards = results + sequence_row::rewards * width;
  q.coef = results + sequence_row::coef * width;
  q.counts = results + sequence_row::counts * width;
  q.means = results + sequence_row::means * width;
  q.statistics = static_cast<int>(sequences.size(0)) - sequence_row::means;
  q.values = labels.numel();
  q.first_values =
      in_of(tokens) + (tokens.size(0) - q.statistics) * q.values;  // the rows of the statistics are the last ones
  q.pair_weights = in_of(pair_weights);
  q.divisor = reduction == kNone ? 0.0 : divisor_of(reduction, q.pairs);
  q.loss = static_cast<float*>(loss.mutable_data_ptr());
  q.pairs_done = p.to_clear;
  check(preference_loss(q, here.stream()), "preference_loss");
}

void preference_backward_op(Tensor logits, Tensor labels, Tensor tokens, Tensor sequences, Tensor grad_loss,
                            int64_t ignore_index, double logit_scale, double logit_softcap,
                            std::optional<Tensor> token_weights, std::optional<Tensor> cu_seqlens,
                            std::optional<Tensor> pair_weights, int64_t reduction, Tensor out) {
  const OnDevice here(logits);
  require(grad_loss.scalar_type() == ScalarType::Float, "the loss and its gradient must be float32");
  const double* rows = in_of(tokens);
  LogitsGradParams p = grad_params(logits, labels, {rows, rows + labels.numel(), rows + 2 * labels.numel()},
                                   ignore_index, logit_scale, logit_softcap, out);
  SpreadParams& s = p.spread;
  s.weights = {p.labels, ignore_index, in_of(token_weights)};
  s.cu_seqlens = bounds_of(cu_seqlens);
  s.coef = in_of(sequences) + sequence_row::coef * sequences.size(1);
  s.grad_loss = static_cast<const float*>(grad_loss.const_data_ptr());
  s.grad_stride = grad_loss.dim() == 0 ? 0 : grad_loss.stride(0);
  s.pair_weights = in_of(pair_weights);
  s.pairs = sequences.size(1) / 2;
  s.divisor = divisor_of(reduction, s.pairs);
  check(logits_grad(p, here.device(), here.stream()), "logits_grad");
}

}  // namespace
}  // namespace dpo::cuda

STABLE_TORCH_LIBRARY(DPO_LIBRARY, m) {
  m.def(
      "token_logps(Tensor logits, Tensor labels, Tensor? ref_logits, int ignore_index, float logit_scale, "
      "float logit_softcap, int asked, Tensor(a!) tokens) -> ()");
  m.def("sequence_sums(Tensor values, Tensor weights, Tensor? cu_seqlens, Tensor(a!) sums) -> ()");
  m.def(
      "preference_loss(Tensor logps, Tensor? ref_logps, Tensor weights, Tensor? cu_seqlens, Tensor? ref_sums, "
      "Tensor beta, Tensor label_smoothing, bool robust, Tensor(a!) losses, Tensor(b!) sums, Tensor(c!) ref_sums_out, "
      "Tensor(d!) coef) -> ()");
  m.def(
      "logits_grad(Tensor logits, Tensor labels, Tensor logps, Tensor max, Tensor log_sum, Tensor grad_logps, "
      "int ignore_index, float logit_scale, float logit_softcap, Tensor(a!) out, Tensor? ref_logits, "
      "Tensor? ref_logps, Tensor? ref_max, Tensor? ref_log_sum, Tensor? kl, Tensor? grad_kl, Tensor? grad_forward_kl) "
      "-> ()");
  m.def(
      "preference_forward(Tensor logits, Tensor labels, Tensor? ref_logits, int ignore_index, float logit_scale, "
      "float logit_softcap, int asked, Tensor? token_weights, Tensor? cu_seqlens, Tensor? pair_weights, int reduction, "
      "Tensor? ref_sums, Tensor? betas, float beta, Tensor? label_smoothings, float label_smoothing, bool robust, "
      "Tensor(a!) tokens, Tensor(b!) sequences, Tensor(c!) losses, Tensor(d!) loss, Tensor(e!) pairs_done) -> ()");
  m.def(
      "preference_backward(Tensor logits, Tensor labels, Tensor tokens, Tensor sequences, Tensor grad_loss, "
      "int ignore_index, float logit_scale, float logit_softcap, Tensor? token_weights, Tensor? cu_seqlens, "
      "Tensor? pair_weights, int reduction, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(DPO_LIBRARY, DPO_DISPATCH_KEY, m) {
  m.impl("token_logps", TORCH_BOX(&dpo::cuda::token_logps_op));
  m.impl("sequence_sums", TORCH_BOX(&dpo::cuda::sequence_sums_op));
  m.impl("preference_loss", TORCH_BOX(&dpo::cuda::preference_loss_op));
  m.impl("logits_grad", TORCH_BOX(&dpo::cuda::logits_grad_op));
  m.impl("preference_forward", TORCH_BOX(&dpo::cuda::preference_forward_op));
  m.impl("preference_backward", TORCH_BOX(&dpo::cuda::preference_backward_op));
}
