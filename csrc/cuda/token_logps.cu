// Stage 1 on CUDA: selects the kernel of token_logps.cuh for the dtypes and requested statistics, and launches it.
//
// There is one translation unit per policy dtype (-DDPO_POLICY, the number of a DType), so that they compile in
// parallel; without DPO_POLICY, one unit has all of them.
#include "token_logps.cuh"

namespace dpo::cuda {
namespace {

template <typename Tr>
cudaError_t run(const TokenLogpsParams& p, const Device& device, cudaStream_t stream) {
  const int64_t rows = p.batch * p.tokens;
  const bool two_sided = p.reference.data != nullptr && !Tr::kKl;
  RowPlan plan = plan_rows(rows * (two_sided ? 2 : 1), p.vocab, Tr::kSize * kTileGroups, kRowThreads, device);
  if (plan.blocks > 1 && !has_cluster_code(token_logps_kernel<Tr>, device.index)) plan.blocks = 1;
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(rows * plan.blocks), two_sided ? 2 : 1);
  shape.threads = plan.threads / plan.blocks;
  shape.cluster = plan.blocks;
  return launch(token_logps_kernel<Tr>, shape, stream, p);
}

// With a softcap tanh costs more than the statistics, and a reference of another dtype is rare, so these cases have one
// variant with all statistics. log_sum_sq has variants without and with all other statistics.
template <typename T, typename R>
cudaError_t with_statistics(const TokenLogpsParams& p, const Device& device, cudaStream_t stream) {
  constexpr bool kAlone = std::is_same_v<R, NoReference>, kMixed = !kAlone && !std::is_same_v<R, T>;
  const bool entropy = p.rows[token_row::entropy] != nullptr, mean = p.rows[token_row::mean_logits] != nullptr,
             softcap = p.logit_softcap != 0.0f;
  if constexpr (!kMixed) {
    if (p.rows[token_row::log_sum_sq] == nullptr) {
      if (softcap) return run<Traits<T, R, true, true, false, true>>(p, device, stream);
      if (!entropy && !mean) return run<Traits<T, R, false, false, false, false>>(p, device, stream);
      if constexpr (kAlone) {
        if (!mean) return run<Traits<T, R, true, false, false, false>>(p, device, stream);
        if (!entropy) return run<Traits<T, R, false, true, false, false>>(p, device, stream);
      }
      return run<Traits<T, R, true, true, false, false>>(p, device, stream);
    }
  }
  if constexpr (kAlone) {
    if (!entropy && !mean && !softcap) return run<Traits<T, R, false, false, true, false>>(p, device, stream);
  }
  if (softcap) return run<Traits<T, R, true, true, true, true>>(p, device, stream);
  return run<Traits<T, R, true, true, true, false>>(p, device, stream);
}

template <typename T>
cudaError_t with_reference(const TokenLogpsParams& p, const Device& device, cudaStream_t stream) {
  // Two dtypes cannot use the kernel for single rows, so they use the kernel for pairs of rows, with kl or without.
  if (p.reference.data == nullptr || (p.rows[token_row::kl] == nullptr && p.reference.dtype == p.policy.dtype)) {
    return with_statistics<T, NoReference>(p, device, stream);
  }
  switch (p.reference.dtype) {
    case DType::float32:
      return with_statistics<T, float>(p, device, stream);
    case DType::bfloat16:
      return with_statistics<T, __nv_bfloat16>(p, device, stream);
    case DType::float16:
      return with_statistics<T, __half>(p, device, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

#define DPO_FOR_POLICY(name, type)                                                                            \
  cudaError_t token_logps_##name(const TokenLogpsParams& params, const Device& device, cudaStream_t stream) { \
    return with_reference<type>(params, device, stream);                                                      \
  }
#if !defined(DPO_POLICY) || DPO_POLICY == 0
DPO_FOR_POLICY(float32, float)
#endif
#if !defined(DPO_POLICY) || DPO_POLICY == 2
DPO_FOR_POLICY(bfloat16, __nv_bfloat16)
#endif
#if !defined(DPO_POLICY) || DPO_POLICY == 3
DPO_FOR_POLICY(float16, __half)
#endif

}  // namespace dpo::cuda
