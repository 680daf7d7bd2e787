// The filtered gradient on a CPU: matrix products over the entries of each softmax row that exceed eps.
//
// Data flow
//   filter_count, filter_fill   each read a chunk's logits once. An entry is kept if and only if its logit exceeds
//                               max + log_sum + log(eps), so exponentials are computed only for kept entries. The
//                               result is lists of (index, value), a few KB per token.
//   filtered_grad_hidden        dH[t] = g_t (sum_v d_tv W[v] - tail_t mean(W)); threads own tokens.
//   filtered_grad_weight        dW[v] = sum_t g_t d_tv h_t + tail row; threads own ranges of the vocabulary, so there
//                               are no atomic operations, and the order of additions is fixed.
//
// Both products use tiles of 1,024 source rows by 8 vectors: 512 KB with AVX-512, which stay in the L2 cache during a
// pass over all destination rows. Without tiles each kept entry would read its row of W from memory.
#include "filtered_grad.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "blocks.h"

#ifndef DPO_ISA
#define DPO_ISA baseline
#endif

namespace {

constexpr int64_t kTileRows = 1024;
constexpr int kStripVectors = 8;

template <typename A>
A cut_of(double max, double log_sum, double log_eps) {
  const A cut = static_cast<A>(max + (log_sum + log_eps)), top = static_cast<A>(max);
  // If the maximum is so large that the sum is rounded to it, the cut is set below it, so the maximum is kept.
  return log_sum + log_eps < 0.0 && !(cut < top) ? std::nextafter(top, static_cast<A>(-INFINITY)) : cut;
}

template <typename A>
int64_t count_row(const Row<A>& row, int64_t vocab, int64_t label, A cut) {
  constexpr int lanes = Vec<A>::lanes;
  alignas(64) A buffer[kBlock];
  int64_t count = 0;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, vocab - start);
    const A* z = row.block(start, n, buffer);
    typename Vec<A>::integer kept = {};
    for (int64_t i = 0; i < n; i += lanes) kept -= load<A>(z + i) > cut;  // true is -1; the padding is -inf
    for (int i = 0; i < lanes; ++i) count += kept[i];
    if (label >= start && label < start + n && !(z[label - start] > cut)) ++count;
  }
  return count;
}

// Sum of exp(z - m) times the softcap's derivative, over the dropped entries of a block.
template <typename A>
double dropped_slopes(const A* z, int64_t n, int64_t label, A cut, A m, A cap) {
  constexpr int lanes = Vec<A>::lanes;
  typename Vec<A>::type sum = {};
  double label_part = 0.0;
  for (int64_t i = 0; i < n; i += lanes) {
    const auto logit = load<A>(z + i);
    const auto t = logit * (A(1) / cap);
    const auto term = exp_nonpositive(logit - m) * (A(1) - t * t);
    const auto part = logit > cut ? splat<A>(A(0)) : (logit > splat<A>(-INFINITY) ? term : splat<A>(A(0)));
    sum += part;
    if (label >= i && label < i + lanes) label_part = static_cast<double>(part[label - i]);
  }
  double total = -label_part;
  for (int i = 0; i < lanes; ++i) total += static_cast<double>(sum[i]);
  return total;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each subset of eight lanes, the indices of its lanes, consecutive. AVX2 has no compress instruction, but can
// permute by such indices.
struct FrontLanes {
  uint8_t of[256][8];
};

constexpr FrontLanes kFront = [] {
  FrontLanes front{};
  for (int set = 0; set < 256; ++set) {
    int k = 0;
    for (int lane = 0; lane < 8; ++lane) {
      if (set >> lane & 1) front.of[set][k++] = static_cast<uint8_t>(lane);
    }
  }
  return front;
}();
#endif

// Writes logits and vocabulary indices of a block's kept entries, in order, and returns their number. Branch-free: a
// few per cent of the entries are kept, in an unpredictable pattern.
template <typename A>
DPO_INLINE int64_t compact(const A* z, int64_t n, int64_t start, int64_t label, A cut, A* found, int32_t* place) {
  int64_t i = 0, k = 0;
#ifdef __AVX512F__
  if constexpr (std::is_same_v<A, float>) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + 16 <= n; i += 16) {
      const __m512 logit = _mm512_loadu_ps(z + i);
      __mmask16 kept = _mm512_cmp_ps_mask(logit, _mm512_set1_ps(cut), _CMP_GT_OQ);
      if (label >= i && label < i + 16) kept |= static_cast<__mmask16>(1u << (label - i));
      // Compressed in registers, because a compressing store is microcoded, and slow, on some processors.
      _mm512_storeu_ps(found + k, _mm512_maskz_compress_ps(kept, logit));
      const __m512i ids = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(start + i)), lane);
      _mm512_storeu_si512(place + k, _mm512_maskz_compress_epi32(kept, ids));
      k += __builtin_popcount(kept);
    }
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<A, float>) {
    for (; i + 8 <= n; i += 8) {
      const __m256 logit = _mm256_loadu_ps(z + i);
      int kept = _mm256_movemask_ps(_mm256_cmp_ps(logit, _mm256_set1_ps(cut), _CMP_GT_OQ));
      if (label >= i && label < i + 8) kept |= 1 << (label - i);
      // The indices of the kept lanes permute the logits, and give the vocabulary indices.
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kFront.of[kept]));
      const __m256i lanes = _mm256_cvtepu8_epi32(bytes);
      _mm256_storeu_ps(found + k, _mm256_permutevar8x32_ps(logit, lanes));
      const __m256i ids = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int32_t>(start + i)), lanes);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(place + k), ids);
      k += __builtin_popcount(kept);
    }
  }
#endif
  for (; i < n; ++i) {
    place[k] = static_cast<int32_t>(start + i);
    found[k] = z[i];
    k += (z[i] > cut) | (i == label);
  }
  return k;
}

template <typename A>
void fill_row(const dpo::cpu::FilterParams& p, int64_t r, LogitTransform transform) {
  constexpr int lanes = Vec<A>::lanes;
  const auto row = Row<A>::of(p.logits, r, INT64_MAX, transform);
  const int64_t label = p.labels[r];
  const double logp = p.logps[r];
  const A cut = cut_of<A>(p.max[r], p.log_sum[r], p.log_eps), m = static_cast<A>(p.max[r]);
  const A cap = static_cast<A>(transform.softcap);
  const double factor = std::exp(-p.log_sum[r]);
  int32_t* index = p.index + p.row_ptr[r];
  A* value = static_cast<A*>(p.value) + p.row_ptr[r];
  alignas(64) A buffer[kBlock];
  alignas(64) A found[kBlock + lanes];
  int32_t place[kBlock + 1];
  double kept_mass = 0.0, slopes = 0.0;
  for (int64_t start = 0; start < p.vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, p.vocab - start);
    const A* z = row.block(start, n, buffer);
    const int64_t label_at = label >= start && label < start + n ? label - start : -1;
    const int64_t k = compact<A>(z, n, start, label_at, cut, found, place);
    for (int64_t i = 0; i < k; i += lanes) store<A>(found + i, exp_nonpositive(load<A>(found + i) - m));
    for (int64_t i = 0; i < k; ++i) {
      const int64_t v = place[i];
      double slope = transform.scale;
      if (cap != A(0)) {
        const double t = static_cast<double>(z[v - start]) / transform.softcap;
        slope *= 1.0 - t * t;
      }
      const double prob = static_cast<double>(found[i]) * factor;
      // The label's 1 - p is computed by expm1, because a subtraction would cancel (see logits_grad.cpp).
      if (v != label) kept_mass += prob;
      index[i] = static_cast<int32_t>(v);
      value[i] = static_cast<A>((v == label ? -std::expm1(logp) : -prob) * slope);
    }
    index += k;
    value += k;
    if (cap != A(0)) slopes += dropped_slopes<A>(z, n, label_at, cut, m, cap);
  }
  // All entries except the label have the mass 1 - p(label). Rounding can make the difference slightly negative.
  const double dropped = std::max(0.0, -std::expm1(logp) - kept_mass);
  p.dropped[r] = dropped;
  p.tail[r] = transform.scale * (cap != A(0) ? slopes * factor : dropped);
}

// out[strip] += sum_e coefficient[e] * source[index[e]][strip]; the strip stays in registers.
template <int kVectors, typename A, typename T>
DPO_INLINE void add_rows(A* out, const T* source, int64_t stride, const int32_t* index, const A* coefficient,
                         int64_t n) {
  constexpr int lanes = Vec<A>::lanes;
  typename Vec<A>::type sum[kVectors];
  for (int i = 0; i < kVectors; ++i) sum[i] = load<A>(out + i * lanes);
  for (int64_t e = 0; e < n; ++e) {
    const T* from = source + static_cast<int64_t>(index[e]) * stride;
    const auto c = splat<A>(coefficient[e]);
    for (int i = 0; i < kVectors; ++i) sum[i] += c * Convert<A, T>::vector(from + i * lanes);
  }
  for (int i = 0; i < kVectors; ++i) store<A>(out + i * lanes, sum[i]);
}

// A strip of any width up to kStripVectors vectors.
template <typename A, typename T>
void add_strip(A* out, const T* source, int64_t stride, int64_t width, const int32_t* index, const A* coefficient,
               int64_t n) {
  constexpr int lanes = Vec<A>::lanes;
  if (width == kStripVectors * lanes) return add_rows<kStripVectors>(out, source, stride, index, coefficient, n);
  int64_t at = 0;
  for (; at + 4 * lanes <= width; at += 4 * lanes) add_rows<4>(out + at, source + at, stride, index, coefficient, n);
  for (; at + lanes <= width; at += lanes) add_rows<1>(out + at, source + at, stride, index, coefficient, n);
  for (; at < width; ++at) {
    A sum = out[at];
    for (int64_t e = 0; e < n; ++e) {
      sum += coefficient[e] * Convert<A, T>::scalar(source + static_cast<int64_t>(index[e]) * stride + at);
    }
    out[at] = sum;
  }
}

template <typename A, typename T>
void grad_hidden(const dpo::cpu::FilteredHiddenParams& p, int64_t begin, int64_t end) {
  constexpr int64_t strip = kStripVectors * Vec<A>::lanes;
  const int64_t width = p.hidden_size;
  const T* weight = static_cast<const T*>(p.weight.data);
  const A* value = static_cast<const A*>(p.value);
  A* out = static_cast<A*>(p.out);
  std::fill(out + begin * width, out + end * width, A(0));
  std::vector<int64_t> first(end - begin), last(end - begin);
  for (int64_t t = begin; t < end; ++t) last[t - begin] = p.row_ptr[t];
  for (int64_t tile = 0; tile < p.vocab; tile += kTileRows) {
    for (int64_t t = begin; t < end; ++t) {
      int64_t e = first[t - begin] = last[t - begin];
      while (e < p.row_ptr[t + 1] && p.index[e] < tile + kTileRows) ++e;
      last[t - begin] = e;
    }
    for (int64_t column = 0; column < width; column += strip) {
      const int64_t wide = std::min(strip, width - column);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t e = first[t - begin], n = last[t - begin] - e;
        if (n == 0 || p.grad[t] == 0.0) continue;
        add_strip<A, T>(out + t * width + column, weight + column, width, wide, p.index + e, value + e, n);
      }
    }
  }
  for (int64_t t = begin; t < end; ++t) {
    if (p.grad[t] == 0.0) continue;
    const A g = static_cast<A>(p.grad[t]), tail = static_cast<A>(p.grad[t] * p.tail[t]);
    for (int64_t i = 0; i < width; ++i) {
      out[t * width + i] = g * out[t * width + i] - tail * static_cast<A>(p.mean_row[i]);
    }
  }
}

// Rows begin .. end - 1 of dW.
template <typename A, typename T>
void grad_weight(const dpo::cpu::FilteredWeightParams& p, int64_t begin, int64_t end) {
  constexpr int64_t strip = kStripVectors * Vec<A>::lanes;
  const int64_t width = p.hidden_size;
  const T* hidden = static_cast<const T*>(p.hidden.data);
  const A* value = static_cast<const A*>(p.value);
  A* out = static_cast<A*>(p.out);
  std::vector<A> tail_row(p.tail_row, p.tail_row + width);
  std::vector<int64_t> cursor(p.rows), starts, place;
  std::vector<int32_t> token;
  std::vector<A> coefficient;
  for (int64_t t = 0; t < p.rows; ++t) {
    const int32_t* row = p.index + p.row_ptr[t];
    const int64_t n = p.row_ptr[t + 1] - p.row_ptr[t];
    cursor[t] = p.row_ptr[t] + (std::lower_bound(row, row + n, static_cast<int32_t>(begin)) - row);
  }
  for (int64_t low = begin; low < end; low += kTileRows) {
    const int64_t high = std::min(low + kTileRows, end), rows = high - low;
    // Source tiles: the hidden states of 1,024 tokens.
    for (int64_t t0 = 0; t0 == 0 || t0 < p.rows; t0 += kTileRows) {
      const int64_t t1 = std::min(t0 + kTileRows, p.rows);
      // The tile's entries, sorted by vocabulary row and then by token.
      starts.assign(rows + 1, 0);
      for (int64_t t = t0; t < t1; ++t) {
        for (int64_t e = cursor[t]; e < p.row_ptr[t + 1] && p.index[e] < high; ++e) {
          if (p.grad[t] != 0.0) ++starts[p.index[e] - low + 1];
        }
      }
      for (int64_t v = 0; v < rows; ++v) starts[v + 1] += starts[v];
      place.assign(starts.begin(), starts.end() - 1);
      token.resize(starts[rows]);
      coefficient.resize(starts[rows]);
      for (int64_t t = t0; t < t1; ++t) {
        const A g = static_cast<A>(p.grad[t]);
        int64_t e = cursor[t];
        for (; e < p.row_ptr[t + 1] && p.index[e] < high; ++e) {
          if (p.grad[t] == 0.0) continue;
          const int64_t at = place[p.index[e] - low]++;
          token[at] = static_cast<int32_t>(t - t0);
          coefficient[at] = g * value[e];
        }
        cursor[t] = e;
      }
      for (int64_t column = 0; column < width; column += strip) {
        const int64_t wide = std::min(strip, width - column);
        const T* source = hidden + t0 * width + column;
        for (int64_t v = 0; v < rows; ++v) {
          const int64_t e = starts[v], n = starts[v + 1] - e;
          A* to = out + (low + v) * width + column;
          // The tail is added in the same pass as the first tile, so dW is not written an additional time.
          if (t0 == 0 && p.accumulate) {
            for (int64_t i = 0; i < wide; ++i) to[i] += tail_row[column + i];
          } else if (t0 == 0) {
            std::copy_n(tail_row.data() + column, wide, to);
          }
          if (n > 0) add_strip<A, T>(to, source, width, wide, token.data() + e, coefficient.data() + e, n);
        }
      }
    }
  }
}

}  // namespace

namespace dpo::cpu::DPO_ISA {

template <typename A>
static void count_rows(const FilterParams& p, int64_t begin, int64_t end) {
  const LogitTransform transform{p.logit_scale, p.logit_softcap};
  for (int64_t r = begin; r < end; ++r) {
    const auto row = Row<A>::of(p.logits, r, INT64_MAX, transform);
    p.counts[r] = count_row<A>(row, p.vocab, p.labels[r], cut_of<A>(p.max[r], p.log_sum[r], p.log_eps));
  }
}

void filter_count(const FilterParams& p, int64_t begin, int64_t end) {
#ifdef DPO_FLOAT64
  if (p.logits.dtype == DType::float64) return count_rows<double>(p, begin, end);
#endif
  count_rows<float>(p, begin, end);
}

void filter_fill(const FilterParams& p, int64_t begin, int64_t end) {
  const LogitTransform transform{p.logit_scale, p.logit_softcap};
#ifdef DPO_FLOAT64
  if (p.logits.dtype == DType::float64) {
    for (int64_t r = begin; r < end; ++r) fill_row<double>(p, r, transform);
    return;
  }
#endif
  for (int64_t r = begin; r < end; ++r) fill_row<float>(p, r, transform);
}

void filtered_grad_hidden(const FilteredHiddenParams& p, int64_t begin, int64_t end) {
  switch (p.weight.dtype) {
    case DType::float32:
      return grad_hidden<float, float>(p, begin, end);
    case DType::float64:
#ifdef DPO_FLOAT64
      grad_hidden<double, double>(p, begin, end);
#endif
      return;
    case DType::bfloat16:
      return grad_hidden<float, BFloat16>(p, begin, end);
    case DType::float16:
      return grad_hidden<float, Half>(p, begin, end);
  }
}

void filtered_grad_weight(const FilteredWeightParams& p, int64_t begin, int64_t end) {
  switch (p.hidden.dtype) {
    case DType::float32:
      return grad_weight<float, float>(p, begin, end);
    case DType::float64:
#ifdef DPO_FLOAT64
      grad_weight<double, double>(p, begin, end);
#endif
      return;
    case DType::bfloat16:
      return grad_weight<float, BFloat16>(p, begin, end);
    case DType::float16:
      return grad_weight<float, Half>(p, begin, end);
  }
}

}  // namespace dpo::cpu::DPO_ISA
