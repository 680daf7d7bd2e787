// The CUDA library's torch-facing side: fills the parameter structs from tensors, sets the device, finds the stream,
// and registers the operators through PyTorch's stable ABI. No kernel is here and no synchronisation: a call costs its
// launch.
//
// Outputs are allocated by the caller (dpo_kernels/backends/cuda.py); an empty output means "not asked for".
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "params.h"
#include "stream.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace dpo::cuda {
namespace {

void check(cudaError_t error, const char* stage) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("dpo_kernels: ") + stage + ": " + error_text(error));
}

void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(std::string("dpo_kernels: ") + message);
}

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      throw std::runtime_error("dpo_kernels: the CUDA kernels take float32, bfloat16 or float16 logits");
  }
}

// Rows of unit stride; kernels index a row with 32-bit integers and the rows themselves with 64-bit ones.
Logits logits_of(const Tensor& t) {
  require(t.dim() == 3, "logits must be [B, T, V]");
  require(t.size(2) <= 1 || t.stride(2) == 1, "logits must have unit stride along the vocabulary");
  require(t.size(2) <= (int64_t{1} << 30), "a vocabulary of at most 2^30 is supported");
  return {t.const_data_ptr(), t.stride(0), t.stride(1), dtype_of(t)};
}

double* out_of(const Tensor& t) { return t.numel() ? static_cast<double*>(t.mutable_data_ptr()) : nullptr; }

const double* in_of(const Tensor& t) {
  require(t.scalar_type() == ScalarType::Double && t.is_contiguous(), "token values must be contiguous float64");
  return static_cast<const double*>(t.const_data_ptr());
}

const double* in_of(const std::optional<Tensor>& t) { return t ? in_of(*t) : nullptr; }

const int64_t* labels_of(const Tensor& t) {
  require(t.scalar_type() == ScalarType::Long && t.is_contiguous(), "labels must be contiguous int64");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

const int64_t* bounds_of(const std::optional<Tensor>& t) { return t ? labels_of(*t) : nullptr; }

float softcap_of(double logit_scale, double logit_softcap) {
  require(logit_scale > 0.0, "the CUDA kernels need a positive logit_scale");
  require(logit_softcap >= 0.0, "logit_softcap must not be negative");
  return static_cast<float>(logit_softcap);
}

PreferenceParams preference_of(const Tensor& weights, const std::optional<Tensor>& cu_seqlens,
                               const std::optional<Tensor>& ref_sums, const Tensor& beta, const Tensor& label_smoothing,
                               bool robust, const Tensor& losses, const Tensor& sums, const Tensor& ref_sums_out,
                               const Tensor& coef) {
  PreferenceParams p{};
  p.weights = in_of(weights);
  p.cu_seqlens = bounds_of(cu_seqlens);
  p.given_ref_sums = in_of(ref_sums);
  p.beta = in_of(beta);
  p.label_smoothing = in_of(label_smoothing);
  p.losses = out_of(losses);
  p.sums = out_of(sums);
  p.ref_sums = out_of(ref_sums_out);
  p.coef = out_of(coef);
  p.pairs = losses.numel();
  p.robust = robust;
  return p;
}

TokenLogpsParams token_params(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& ref_logits,
                              int64_t ignore_index, double logit_scale, double logit_softcap, const Tensor& logps,
                              const Tensor& lse, const Tensor& ref_logps, const Tensor& entropy, const Tensor& kl,
                              const Tensor& accuracy, const Tensor& mean_logits, const Tensor& log_sum_sq) {
  TokenLogpsParams p{};
  p.policy = logits_of(logits);
  if (ref_logits) p.reference = logits_of(*ref_logits);
  p.labels = labels_of(labels);
  p.logps = out_of(logps);
  p.lse = out_of(lse);
  p.ref_logps = out_of(ref_logps);
  p.entropy = out_of(entropy);
  p.kl = out_of(kl);
  p.accuracy = out_of(accuracy);
  p.mean_logits = out_of(mean_logits);
  p.log_sum_sq = out_of(log_sum_sq);
  p.batch = logits.size(0);
  p.tokens = logits.size(1);
  p.vocab = logits.size(2);
  p.ignore_index = ignore_index;
  p.logit_scale = static_cast<float>(logit_scale);
  p.logit_softcap = softcap_of(logit_scale, logit_softcap);
  return p;
}

void token_logps_op(Tensor logits, Tensor labels, std::optional<Tensor> ref_logits, int64_t ignore_index,
                    double logit_scale, double logit_softcap, Tensor logps, Tensor lse, Tensor ref_logps,
                    Tensor entropy, Tensor kl, Tensor accuracy, Tensor mean_logits, Tensor log_sum_sq) {
  const OnDevice here(logits);
  const TokenLogpsParams p = token_params(logits, labels, ref_logits, ignore_index, logit_scale, logit_softcap, logps,
                                          lse, ref_logps, entropy, kl, accuracy, mean_logits, log_sum_sq);
  check(token_logps(p, here.device(), here.stream()), "token_logps");
}

void fused_forward_op(Tensor logits, Tensor labels, std::optional<Tensor> ref_logits, int64_t ignore_index,
                      double logit_scale, double logit_softcap, Tensor logps, Tensor lse, Tensor ref_logps,
                      Tensor entropy, Tensor kl, Tensor accuracy, Tensor mean_logits, Tensor log_sum_sq, Tensor weights,
                      std::optional<Tensor> cu_seqlens, std::optional<Tensor> ref_sums, Tensor beta,
                      Tensor label_smoothing, bool robust, Tensor losses, Tensor sums, Tensor ref_sums_out, Tensor coef,
                      Tensor counters) {
  const OnDevice here(logits);
  TokenLogpsParams p = token_params(logits, labels, ref_logits, ignore_index, logit_scale, logit_softcap, logps, lse,
                                    ref_logps, entropy, kl, accuracy, mean_logits, log_sum_sq);
  p.preference =
      preference_of(weights, cu_seqlens, ref_sums, beta, label_smoothing, robust, losses, sums, ref_sums_out, coef);
  require(counters.scalar_type() == ScalarType::Int && counters.numel() >= 3 * p.preference.pairs,
          "counters must be int32, three for each pair");
  p.preference.counters = static_cast<int*>(counters.mutable_data_ptr());
  check(token_logps(p, here.device(), here.stream()), "fused_forward");
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
  p.preference =
      preference_of(weights, cu_seqlens, ref_sums, beta, label_smoothing, robust, losses, sums, ref_sums_out, coef);
  check(preference_loss(p, here.stream()), "preference_loss");
}

void logits_grad_op(Tensor logits, Tensor labels, Tensor logps, Tensor lse, Tensor grad_logps, int64_t ignore_index,
                    double logit_scale, double logit_softcap, Tensor out, std::optional<Tensor> ref_logits,
                    std::optional<Tensor> ref_logps, std::optional<Tensor> kl, std::optional<Tensor> grad_kl,
                    std::optional<Tensor> grad_forward_kl) {
  const OnDevice here(logits);
  LogitsGradParams p{};
  if (ref_logits) {
    require(ref_logps && kl, "the gradient of a divergence needs ref_logps and kl");
    p.reference = logits_of(*ref_logits);
  }
  p.ref_logps = in_of(ref_logps);
  p.kl = in_of(kl);
  p.grad_kl = in_of(grad_kl);
  p.grad_forward_kl = in_of(grad_forward_kl);
  p.logits = logits_of(logits);
  require(logits_of(out).dtype == p.logits.dtype, "the gradient has the dtype of the logits");
  p.out = out.mutable_data_ptr();
  p.out_stride_b = out.stride(0);
  p.out_stride_t = out.stride(1);
  p.labels = labels_of(labels);
  p.logps = in_of(logps);
  p.lse = in_of(lse);
  p.grad_logps = in_of(grad_logps);
  p.batch = logits.size(0);
  p.tokens = logits.size(1);
  p.vocab = logits.size(2);
  p.ignore_index = ignore_index;
  p.logit_scale = static_cast<float>(logit_scale);
  p.logit_softcap = softcap_of(logit_scale, logit_softcap);
  check(logits_grad(p, here.device(), here.stream()), "logits_grad");
}

}  // namespace
}  // namespace dpo::cuda

STABLE_TORCH_LIBRARY(DPO_LIBRARY, m) {
  m.def(
      "token_logps(Tensor logits, Tensor labels, Tensor? ref_logits, int ignore_index, float logit_scale, "
      "float logit_softcap, Tensor(a!) logps, Tensor(b!) lse, Tensor(c!) ref_logps, Tensor(d!) entropy, Tensor(e!) kl, "
      "Tensor(f!) accuracy, Tensor(g!) mean_logits, Tensor(h!) log_sum_sq) -> ()");
  m.def(
      "fused_forward(Tensor logits, Tensor labels, Tensor? ref_logits, int ignore_index, float logit_scale, "
      "float logit_softcap, Tensor(a!) logps, Tensor(b!) lse, Tensor(c!) ref_logps, Tensor(d!) entropy, Tensor(e!) kl, "
      "Tensor(f!) accuracy, Tensor(g!) mean_logits, Tensor(h!) log_sum_sq, Tensor weights, Tensor? cu_seqlens, "
      "Tensor? ref_sums, Tensor beta, Tensor label_smoothing, bool robust, Tensor(i!) losses, Tensor(j!) sums, "
      "Tensor(k!) ref_sums_out, Tensor(l!) coef, Tensor(m!) counters) -> ()");
  m.def("sequence_sums(Tensor values, Tensor weights, Tensor? cu_seqlens, Tensor(a!) sums) -> ()");
  m.def(
      "preference_loss(Tensor logps, Tensor? ref_logps, Tensor weights, Tensor? cu_seqlens, Tensor? ref_sums, "
      "Tensor beta, Tensor label_smoothing, bool robust, Tensor(a!) losses, Tensor(b!) sums, Tensor(c!) ref_sums_out, "
      "Tensor(d!) coef) -> ()");
  m.def(
      "logits_grad(Tensor logits, Tensor labels, Tensor logps, Tensor lse, Tensor grad_logps, int ignore_index, "
      "float logit_scale, float logit_softcap, Tensor(a!) out, Tensor? ref_logits, Tensor? ref_logps, Tensor? kl, "
      "Tensor? grad_kl, Tensor? grad_forward_kl) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(DPO_LIBRARY, DPO_DISPATCH_KEY, m) {
  m.impl("token_logps", TORCH_BOX(&dpo::cuda::token_logps_op));
  m.impl("fused_forward", TORCH_BOX(&dpo::cuda::fused_forward_op));
  m.impl("sequence_sums", TORCH_BOX(&dpo::cuda::sequence_sums_op));
  m.impl("preference_loss", TORCH_BOX(&dpo::cuda::preference_loss_op));
  m.impl("logits_grad", TORCH_BOX(&dpo::cuda::logits_grad_op));
}
