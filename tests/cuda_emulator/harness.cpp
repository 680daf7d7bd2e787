// Exports the launch functions of csrc/cuda for ctypes. The .cu files are separate translation units.
#include "../../csrc/cuda/params.h"
#include "../../csrc/cuda/plan.h"
#include "self_test.cuh"

extern "C" {

void emu_configure(int order, uint64_t seed, int resident, int code_arch) {
  emu::settings().order = static_cast<emu::Order>(order);
  emu::settings().seed = seed;
  emu::settings().resident = resident;
  emu::settings().code_arch = code_arch;
}

const char* emu_error() { return emu::settings().error.c_str(); }
int64_t emu_launches() { return emu::settings().launches; }
int64_t emu_memsets() { return emu::settings().memsets; }

int emu_token_logps(const dpo::cuda::TokenLogpsParams* params, int sm_count, int has_clusters) {
  return dpo::cuda::token_logps(*params, {sm_count, has_clusters, 0}, nullptr);
}

int emu_preference_loss(const dpo::cuda::PreferenceLossParams* params) {
  return dpo::cuda::preference_loss(*params, nullptr);
}

int emu_sequence_sums(const dpo::cuda::SequenceSumsParams* params) {
  return dpo::cuda::sequence_sums(*params, nullptr);
}

int emu_logits_grad(const dpo::cuda::LogitsGradParams* params, int sm_count, int has_clusters) {
  return dpo::cuda::logits_grad(*params, {sm_count, has_clusters, 0}, nullptr);
}

// Writes [threads per block, blocks] for each row to `out`.
void emu_plan_rows(int64_t rows, int64_t vocab, int logits_per_thread, int max_threads, int sm_count, int has_clusters,
                   int* out) {
  const auto plan = dpo::cuda::plan_rows(rows, vocab, logits_per_thread, max_threads, {sm_count, has_clusters, 0});
  out[0] = plan.threads;
  out[1] = plan.blocks;
}

int emu_self_test(int which, const float* in, float* out, int n) { return self_test::run(which, in, out, n); }
}
