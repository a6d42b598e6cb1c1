// The product with a packed bfloat16 matrix for AVX-512 BF16, a set of its own: not every machine with AVX-512 has it.

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <unistd.h>

#include "avx512_bf16_target.h"
#include "lanes.h"

namespace dynskip {

namespace {

constexpr int64_t kPairElements = 2 * kMaxPanelOutputs; // of one pair of inputs in a panel
// Rows whose sums fit into registers beside the operands: 6 x 4 vectors.
constexpr int64_t kMaxBlockRows = 6;
// Pairs of inputs whose part of a panel stays in the first cache while all rows pass over it.
constexpr int64_t kChunkPairs = 64;
constexpr int64_t kMaxChunkPairs = 112;
constexpr int64_t kPrefetchBytes = 16 * 1024;
// Rows from which a panel comes whole from the second cache where the first one is small: it cannot hold a chunk, the
// next one, rows and sums, and sums that stay in registers save more than that costs.
constexpr int64_t kStreamedRows = 32;
constexpr int64_t kSmallFirstCache = 32 * 1024;

bool has_small_first_cache() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const bool is_small = [] {
    const long size = sysconf(_SC_LEVEL1_DCACHE_SIZE);
    return size > 0 && size <= kSmallFirstCache;
  }();
  return is_small;
#else
  return false;
#endif
}

// sums [num_rows, 64] (+)= x [num_rows, 2 * num_pairs] times a part of a panel; meanwhile some lines are prefetched.
template <int num_rows, int lines_each_pair>
inline void multiply_block(
    const BFloat16* x,
    int64_t x_stride,
    const BFloat16* weight,
    int64_t num_pairs,
    bool begin,
    const char* prefetch,
    float* sums) {
  __m512 total[num_rows][4];
  for (int row = 0; row < num_rows; ++row) {
    for (int j = 0; j < 4; ++j) {
      total[row][j] = begin ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + row * kMaxPanelOutputs + j * 16);
    }
  }
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    __m512bh w[4];
    for (int j = 0; j < 4; ++j) {
      w[j] = (__m512bh)_mm512_loadu_si512(weight + pair * kPairElements + j * 32);
    }
    for (int line = 0; line < lines_each_pair; ++line) {
      _mm_prefetch(prefetch + (pair * lines_each_pair + line) * 64, _MM_HINT_T0);
    }
    for (int row = 0; row < num_rows; ++row) {
      int32_t two;
      std::memcpy(&two, x + row * x_stride + 2 * pair, sizeof(two));
      const __m512bh inputs = (__m512bh)_mm512_set1_epi32(two);
      for (int j = 0; j < 4; ++j) {
        total[row][j] = _mm512_dpbf16_ps(total[row][j], inputs, w[j]);
      }
    }
  }
  for (int row = 0; row < num_rows; ++row) {
    for (int j = 0; j < 4; ++j) {
      _mm512_storeu_ps(sums + row * kMaxPanelOutputs + j * 16, total[row][j]);
    }
  }
}

template <int lines_each_pair>
inline void multiply_rows(
    int64_t num_rows,
    const BFloat16* x,
    int64_t x_stride,
    const BFloat16* weight,
    int64_t num_pairs,
    bool begin,
    const char* prefetch,
    float* sums) {
  switch (num_rows) {
    case 1:
      return multiply_block<1, lines_each_pair>(x, x_stride, weight, num_pairs, begin, prefetch, sums);
    case 2:
      return multiply_block<2, lines_each_pair>(x, x_stride, weight, num_pairs, begin, prefetch, sums);
    case 3:
      return multiply_block<3, lines_each_pair>(x, x_stride, weight, num_pairs, begin, prefetch, sums);
    case 4:
      return multiply_block<4, lines_each_pair>(x, x_stride, weight, num_pairs, begin, prefetch, sums);
    case 5:
      return multiply_block<5, lines_each_pair>(x, x_stride, weight, num_pairs, begin, prefetch, sums);
    default:
      return multiply_block<6, lines_each_pair>(x, x_stride, weight, num_pairs, begin, prefetch, sums);
  }
}

template <Activation activation>
inline void finish_panel_by(const Product<BFloat16>& product, int64_t panel, const float* sums) {
  const int64_t first = panel * kMaxPanelOutputs;
  for (int64_t j = 0; j < kMaxPanelOutputs && first + j < product.num_outputs; j += 16) {
    const int64_t left = product.num_outputs - first - j;
    const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
    __m512 bias = _mm512_setzero_ps();
    if (product.bias != nullptr) {
      const __m256i bits = _mm256_maskz_loadu_epi16(mask, product.bias + first + j);
      bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    for (int64_t row = 0; row < product.num_rows; ++row) {
      __m512 y = _mm512_add_ps(_mm512_loadu_ps(sums + row * kMaxPanelOutputs + j), bias);
      y = (__m512)activated<activation>((Lanes)y);
      _mm256_mask_storeu_epi16(product.y + row * product.y_stride + first + j, mask, (__m256i)_mm512_cvtneps_pbh(y));
    }
  }
}

void finish_panel(const Product<BFloat16>& product, int64_t panel, const float* sums) {
  switch (product.activation) {
    case Activation::kRelu:
      return finish_panel_by<Activation::kRelu>(product, panel, sums);
    case Activation::kGelu:
      return finish_panel_by<Activation::kGelu>(product, panel, sums);
    case Activation::kGeluTanh:
      return finish_panel_by<Activation::kGeluTanh>(product, panel, sums);
    case Activation::kSilu:
      return finish_panel_by<Activation::kSilu>(product, panel, sums);
    default:
      return finish_panel_by<Activation::kNone>(product, panel, sums);
  }
}

void multiply_panel(const Product<BFloat16>& product, int64_t panel, float* sums) {
  const int64_t all_pairs = (product.num_inputs + 1) / 2;
  const BFloat16* weight = product.weight + panel * packed_inputs<BFloat16>(product.num_inputs) * kMaxPanelOutputs;
  const int64_t num_blocks = (product.num_rows + kMaxBlockRows - 1) / kMaxBlockRows;
  if (num_blocks == 1) {
    const char* ahead = reinterpret_cast<const char*>(weight) + kPrefetchBytes;
    multiply_rows<4>(product.num_rows, product.x, product.x_stride, weight, all_pairs, true, ahead, sums);
    finish_panel(product, panel, sums);
    return;
  }
  const bool is_whole = all_pairs <= kMaxChunkPairs || (product.num_rows >= kStreamedRows && has_small_first_cache());
  const int64_t chunk_pairs = is_whole ? all_pairs : kChunkPairs;
  for (int64_t pair = 0; pair < all_pairs; pair += chunk_pairs) {
    const int64_t num_pairs = std::min(chunk_pairs, all_pairs - pair);
    const BFloat16* chunk = weight + pair * kPairElements;
    // The blocks share the prefetching of the next chunk: four lines for each pair, in all.
    const char* next = reinterpret_cast<const char*>(chunk + num_pairs * kPairElements);
    int64_t lines_left = 4;
    for (int64_t block = 0, row = 0; block < num_blocks; ++block) {
      const int64_t num_rows = (product.num_rows - row + num_blocks - block - 1) / (num_blocks - block);
      const int64_t lines = (lines_left + num_blocks - block - 1) / (num_blocks - block);
      const BFloat16* x = product.x + row * product.x_stride + 2 * pair;
      float* block_sums = sums + row * kMaxPanelOutputs;
      if (lines == 2) {
        multiply_rows<2>(num_rows, x, product.x_stride, chunk, num_pairs, pair == 0, next, block_sums);
      } else if (lines == 1) {
        multiply_rows<1>(num_rows, x, product.x_stride, chunk, num_pairs, pair == 0, next, block_sums);
      } else {
        multiply_rows<0>(num_rows, x, product.x_stride, chunk, num_pairs, pair == 0, next, block_sums);
      }
      next += lines * 64 * num_pairs;
      lines_left -= lines;
      row += num_rows;
    }
  }
  finish_panel(product, panel, sums);
}

void multiply_panels_avx512(const Product<BFloat16>& product, int64_t begin_panel, int64_t end_panel, float* sums) {
  for (int64_t panel = begin_panel; panel < end_panel; ++panel) {
    multiply_panel(product, panel, sums);
  }
}

} // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace {

bool is_supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

} // namespace

MultiplyPanels<BFloat16> multiply_panels_avx512_bf16() {
  static const MultiplyPanels<BFloat16> supported = is_supported() ? multiply_panels_avx512 : nullptr;
  return supported;
}

bool streams_panels_avx512_bf16() {
  return multiply_panels_avx512_bf16() != nullptr && has_small_first_cache();
}

} // namespace dynskip

#else

namespace dynskip {

MultiplyPanels<BFloat16> multiply_panels_avx512_bf16() {
  return nullptr;
}

bool streams_panels_avx512_bf16() {
  return false;
}

} // namespace dynskip

#endif
