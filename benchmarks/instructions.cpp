// Runs each CPU kernel once per case, so that callgrind can count its instructions: no torch, no threads, no clock.
//
// Linked by instructions.py against the kernels' objects of one instruction set (DPO_ISA). Prints one line a case, in
// the order of callgrind's dumps: stage, case, and how many of the stage's units (logits, products, tokens) it handled.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/cpu/filtered_grad.h"
#include "../csrc/cpu/preference_loss.h"
#include "../csrc/cpu/products.h"
#include "../csrc/cpu/stages.h"

using namespace dpo::cpu;

// callgrind writes one dump after each call of this function, found by its name.
extern "C" __attribute__((noinline)) void case_done(const char* stage, const char* name, long units) {
  std::printf("%s\t%s\t%ld\n", stage, name, units);
  std::fflush(stdout);
}

namespace {

// Calls f on all of [0, count). With DPO_THREADS each of as many threads takes a part, as ops.cpp shares work out; that
// is for ThreadSanitizer (tests/test_sanitizers.py). DPO_OVERLAP makes the parts overlap, which it must notice.
template <typename F>
void in_parts(int64_t count, F f) {
#ifdef DPO_THREADS
#ifndef DPO_OVERLAP
#define DPO_OVERLAP 0
#endif
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < DPO_THREADS; ++i) {
    const int64_t begin = count * i / DPO_THREADS, end = count * (i + 1) / DPO_THREADS;
    threads.emplace_back(f, begin, end < count ? end + DPO_OVERLAP : end);
  }
  for (auto& thread : threads) thread.join();
#else
  f(0, count);
#endif
}

constexpr int64_t kRows = 4;

// SmolLM2's vocabulary; GPT-2's, an odd number, makes every other row start off a vector's boundary.
constexpr int64_t kVocab = 49152, kOddVocab = 50257;

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x8000u) >> 16);
}

// Normal numbers of moderate size only, which is all that is needed here.
uint16_t to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::fabs(x) < 1e-4f) return 0;
  return static_cast<uint16_t>(((bits >> 16) & 0x8000u) | (((bits & 0x7fffffffu) - (112u << 23)) >> 13));
}

// Sums of twelve uniforms: close to normal, without libm, the same everywhere. A table of them repeats, because drawing
// each would cost more than the kernels; its length is prime, so that blocks and vectors never meet the same places.
std::vector<char> draw(DType dtype, int64_t count, uint64_t seed) {
  constexpr int64_t table_size = 8191;
  std::vector<double> table(table_size, -12.0);
  for (double& x : table) {
    for (int k = 0; k < 12; ++k) {
      seed = seed * 6364136223846793005ull + 1442695040888963407ull;
      x += 2.0 * static_cast<double>(seed >> 11) * 0x1p-53;
    }
  }
  const int64_t size = dtype == DType::float32 ? 4 : 2;
  std::vector<char> out(count * size);
  for (int64_t i = 0; i < count; ++i) {
    const float x = static_cast<float>(table[i % table_size]);
    const uint16_t half = dtype == DType::bfloat16 ? to_bfloat16(x) : to_half(x);
    std::memcpy(out.data() + i * size, size == 4 ? static_cast<const void*>(&x) : &half, size);
  }
  return out;
}

struct Case {
  const char* name;
  DType dtype;
  int64_t vocab = kVocab;
  bool reference = false, entropy = false, kl = false, accuracy = false, mean = false, squares = false;
  double softcap = 0.0;
};

void run_token_logps(const Case& c) {
  const auto policy = draw(c.dtype, kRows * c.vocab, 1), reference = draw(c.dtype, kRows * c.vocab, 2);
  std::vector<int64_t> labels, tokens;
  for (int64_t i = 0; i < kRows; ++i) labels.push_back((i * 12345) % c.vocab), tokens.push_back(i);
  std::vector<double> outputs[dpo::token_row::count];
  for (auto& output : outputs) output.resize(kRows);
  TokenLogpsParams p{};
  p.policy = {policy.data(), c.dtype, kRows * c.vocab, c.vocab};
  if (c.reference) p.reference = {reference.data(), c.dtype, kRows * c.vocab, c.vocab};
  p.labels = labels.data();
  p.tokens = tokens.data();
  p.seq_len = kRows;
  p.vocab = c.vocab;
  p.logit_scale = 1.0;
  p.logit_softcap = c.softcap;
  const auto ask = [&](int row, bool asked) { p.rows[row] = asked ? outputs[row].data() : nullptr; };
  for (int row : {dpo::token_row::logps, dpo::token_row::max, dpo::token_row::log_sum}) ask(row, true);
  ask(dpo::token_row::ref_logps, c.reference);
  ask(dpo::token_row::ref_max, c.kl);
  ask(dpo::token_row::ref_log_sum, c.kl);
  ask(dpo::token_row::entropy, c.entropy);
  ask(dpo::token_row::kl, c.kl);
  ask(dpo::token_row::accuracy, c.accuracy);
  ask(dpo::token_row::mean_logits, c.mean);
  ask(dpo::token_row::log_sum_sq, c.squares);
  in_parts(kRows, [&](int64_t begin, int64_t end) { DPO_ISA::token_logps(p, begin, end); });
  // With a reference two tensors are read; the count stays per logit of the policy.
  case_done("token_logps", c.name, kRows * c.vocab);
}

void run_logits_grad(const Case& c) {
  const auto reference = draw(c.dtype, kRows * c.vocab, 2);
  auto logits = draw(c.dtype, kRows * c.vocab, 1);
  std::vector<int64_t> labels, tokens;
  for (int64_t i = 0; i < kRows; ++i) labels.push_back((i * 12345) % c.vocab), tokens.push_back(i);
  const std::vector<double> logps(kRows, -9.0), max(kRows, 4.0), log_sum(kRows, 8.8), grad(kRows, 0.05), kl(kRows, 0.5);
  LogitsGradParams p{};
  p.logits = {logits.data(), c.dtype, kRows * c.vocab, c.vocab};
  p.out = logits.data();
  p.out_stride_b = kRows * c.vocab;
  p.out_stride_t = c.vocab;
  p.labels = labels.data();
  p.tokens = tokens.data();
  p.logps = logps.data();
  p.max = max.data();
  p.log_sum = log_sum.data();
  p.grad_logps = grad.data();
  p.seq_len = kRows;
  p.vocab = c.vocab;
  p.logit_scale = 1.0;
  p.logit_softcap = c.softcap;
  if (c.kl) {
    p.reference = {reference.data(), c.dtype, kRows * c.vocab, c.vocab};
    p.ref_logps = logps.data();
    p.ref_max = max.data();
    p.ref_log_sum = log_sum.data();
    p.kl = kl.data();
    p.grad_kl = grad.data();
  }
  in_parts(kRows, [&](int64_t begin, int64_t end) { DPO_ISA::logits_grad(p, begin, end); });
  case_done("logits_grad", c.name, kRows * c.vocab);
}

// The filtered gradient of as many rows as give the vocabulary's part something to sum, at a cut that keeps three
// entries in a hundred, as 2^-20 does in a trained model.
constexpr int64_t kFilterRows = 32, kFilterVocab = 8192, kHidden = 576;
constexpr double kLse = 11.0, kLogEps = -7.25;

void run_filtered(const char* name, DType dtype) {
  const auto logits = draw(dtype, kFilterRows * kFilterVocab, 1), hidden = draw(dtype, kFilterRows * kHidden, 2),
             weight = draw(dtype, kFilterVocab * kHidden, 3);
  std::vector<int64_t> labels, counts(kFilterRows), row_ptr(1, 0);
  for (int64_t i = 0; i < kFilterRows; ++i) labels.push_back((i * 12345) % kFilterVocab);
  const std::vector<double> logps(kFilterRows, -9.0), max(kFilterRows, 4.0), log_sum(kFilterRows, kLse - 4.0),
      grad(kFilterRows, 0.05), row(kHidden, 0.01);
  std::vector<double> tail(kFilterRows), dropped(kFilterRows);
  FilterParams f{};
  f.logits = {logits.data(), dtype, 0, kFilterVocab};
  f.labels = labels.data();
  f.max = max.data();
  f.log_sum = log_sum.data();
  f.log_eps = kLogEps;
  f.vocab = kFilterVocab;
  f.logit_scale = 1.0;
  f.counts = counts.data();
  in_parts(kFilterRows, [&](int64_t begin, int64_t end) { DPO_ISA::filter_count(f, begin, end); });
  case_done("filter_count", name, kFilterRows * kFilterVocab);
  for (const int64_t count : counts) row_ptr.push_back(row_ptr.back() + count);
  const int64_t kept = row_ptr.back();
  std::vector<int32_t> index(kept);
  std::vector<float> value(kept), grad_hidden(kFilterRows * kHidden), grad_weight(kFilterVocab * kHidden);
  f.logps = logps.data();
  f.row_ptr = row_ptr.data();
  f.index = index.data();
  f.value = value.data();
  f.tail = tail.data();
  f.dropped = dropped.data();
  in_parts(kFilterRows, [&](int64_t begin, int64_t end) { DPO_ISA::filter_fill(f, begin, end); });
  case_done("filter_fill", name, kFilterRows * kFilterVocab);
  const FilteredHiddenParams h{
      index.data(), value.data(), row_ptr.data(), tail.data(),       grad.data(), {weight.data(), dtype, 0, kHidden},
      row.data(),   kFilterVocab, kHidden,        grad_hidden.data()};
  in_parts(kFilterRows, [&](int64_t begin, int64_t end) { DPO_ISA::filtered_grad_hidden(h, begin, end); });
  case_done("filtered_grad_hidden", name, kept * kHidden);
  const FilteredWeightParams w{
      index.data(), value.data(), row_ptr.data(), grad.data(),       kFilterRows, {hidden.data(), dtype, 0, kHidden},
      row.data(),   kHidden,      false,          grad_weight.data()};
  in_parts(kFilterVocab, [&](int64_t begin, int64_t end) { DPO_ISA::filtered_grad_weight(w, begin, end); });
  case_done("filtered_grad_weight", name, kept * kHidden);
}

void run_preference_loss() {
  constexpr int64_t pairs = 4, length = 512, tokens = 2 * pairs * length;
  const std::vector<double> logps(tokens, -2.0), ref_logps(tokens, -2.1), weights(tokens, 1.0), beta(pairs, 0.1),
      smoothing(pairs, 0.1);
  std::vector<double> losses(pairs), sums(2 * pairs), ref_sums(2 * pairs), coef(2 * pairs);
  PreferenceLossParams p{};
  p.logps = logps.data();
  p.ref_logps = ref_logps.data();
  p.weights = weights.data();
  p.sequences = {nullptr, length};
  p.beta = beta.data();
  p.label_smoothing = smoothing.data();
  p.pairs = pairs;
  p.losses = losses.data();
  p.sums = sums.data();
  p.ref_sums_out = ref_sums.data();
  p.coef = coef.data();
  in_parts(pairs, [&](int64_t begin, int64_t end) { preference_loss(p, begin, end); });
  case_done("preference_loss", "float64", tokens);
}

// The linear path's three products, of as many tokens as fill five tiles of AVX2.
void run_products(const char* dtype_name, DType dtype) {
  constexpr int64_t tokens = 30, vocab = 2048;
  const auto rows = draw(dtype, tokens * kHidden, 1), weight = draw(dtype, vocab * kHidden, 2);
  auto logits = draw(dtype, tokens * vocab, 3), grad_rows = draw(dtype, tokens * kHidden, 4);
  std::vector<float> grad_weight(vocab * kHidden);
  const auto run = [&](const char* name, Matrix a, Matrix b, void* out, DType out_dtype, int64_t m, int64_t n,
                       int64_t depth) {
    ProductParams p{};
    p.a = a;
    p.b = b;
    p.out = out;
    p.out_dtype = out_dtype;
    p.out_row = n;
    p.depth = depth;
    if (n > m) {
      in_parts(n, [&](int64_t begin, int64_t end) { DPO_ISA::product(p, {0, m, begin, end - begin}); });
    } else {
      in_parts(m, [&](int64_t begin, int64_t end) { DPO_ISA::product(p, {begin, end - begin, 0, n}); });
    }
    case_done("product", (std::string(dtype_name) + ", " + name).c_str(), m * n * depth);
  };
  const auto matrix = [&](const auto& of, int64_t row, int64_t column) {
    return Matrix{of.data(), dtype, row, column};
  };
  run("logits", matrix(rows, kHidden, 1), matrix(weight, 1, kHidden), logits.data(), dtype, tokens, vocab, kHidden);
  run("dH", matrix(logits, vocab, 1), matrix(weight, kHidden, 1), grad_rows.data(), dtype, tokens, kHidden, vocab);
  run("dW", matrix(logits, 1, vocab), matrix(rows, kHidden, 1), grad_weight.data(), DType::float32, vocab, kHidden,
      tokens);
}

Case with(Case c, void (*change)(Case&)) {
  change(c);
  return c;
}

}  // namespace

int main() {
  const Case plain{"float32", DType::float32};
  for (const Case& c : {
           plain,
           Case{"bfloat16", DType::bfloat16},
           Case{"float16", DType::float16},
           with(plain, [](Case& c) { c.name = "float32, odd vocabulary", c.vocab = kOddVocab; }),
           with(plain, [](Case& c) { c.name = "float32, reference", c.reference = true; }),
           with(plain, [](Case& c) { c.name = "float32, entropy", c.entropy = true; }),
           with(plain, [](Case& c) { c.name = "float32, reference and kl", c.reference = c.kl = true; }),
           with(plain, [](Case& c) { c.name = "float32, accuracy", c.accuracy = true; }),
           with(plain, [](Case& c) { c.name = "float32, mean logits", c.mean = true; }),
           with(plain, [](Case& c) { c.name = "float32, log_sum_sq", c.squares = true; }),
           with(plain, [](Case& c) { c.name = "float32, softcap", c.softcap = 30.0; }),
           with(plain,
                [](Case& c) {
                  c.name = "float32, all statistics", c.reference = c.entropy = c.kl = c.accuracy = c.mean = true;
                }),
           with(plain,
                [](Case& c) {
                  c.name = "bfloat16, all statistics", c.dtype = DType::bfloat16;
                  c.reference = c.entropy = c.kl = c.accuracy = c.mean = true;
                }),
       }) {
    run_token_logps(c);
  }
  for (const Case& c : {
           plain,
           Case{"bfloat16", DType::bfloat16},
           Case{"float16", DType::float16},
           with(plain, [](Case& c) { c.name = "float32, odd vocabulary", c.vocab = kOddVocab; }),
           with(plain, [](Case& c) { c.name = "float32, softcap", c.softcap = 30.0; }),
           with(plain, [](Case& c) { c.name = "float32, kl", c.kl = true; }),
       }) {
    run_logits_grad(c);
  }
  run_filtered("float32", DType::float32);
  run_filtered("bfloat16", DType::bfloat16);
  run_products("float32", DType::float32);
  run_products("bfloat16", DType::bfloat16);
  run_products("float16", DType::float16);
  run_preference_loss();
}
