// Products of a few rows with a bfloat16 matrix in oneDNN's packed layout.
//
// The layout: panels of 64 outputs, one after another; in a panel, for each pair of inputs, the 64 pairs of weights. So
// a panel is read from front to back, and every 64 bytes of it are one operand of vdpbf16ps. Each result is summed over
// the inputs in order, whatever the number of rows: its bits depend on its own row alone.

#include "ops.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "element.h"

#if defined(__x86_64__)
#include <immintrin.h>

// GCC 12 sees uninitialised operands in its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace dynskip {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPanelOutputs = 64;
constexpr int64_t kInputBlock = 32; // the layout pads the inputs to a multiple of this
constexpr int64_t kPairElements = 2 * kPanelOutputs; // of one pair of inputs in a panel
// Rows whose sums fit into registers beside the operands: 6 x 4 vectors.
constexpr int64_t kMaxBlockRows = 6;
// Pairs of inputs whose part of a panel stays in the first cache while all rows pass over it.
constexpr int64_t kChunkPairs = 64;
constexpr int64_t kMaxChunkPairs = 112;
constexpr int64_t kPrefetchBytes = 16 * 1024;
// Groups of panels for each thread, so that a thread on a busy core does not hold up the others.
constexpr int64_t kGroupsPerThread = 8;
constexpr int64_t kSampledBlocks = 16;
constexpr int64_t kMinParallelBytes = 64 * 1024;

struct Product {
  const BFloat16* x; // [num_rows, inputs], an even number of inputs
  int64_t x_stride;
  const BFloat16* weight;
  const BFloat16* bias; // [num_outputs] or null
  BFloat16* y; // [num_rows, num_outputs]
  int64_t num_rows;
  int64_t num_pairs; // of inputs
  int64_t panel_stride;
  int64_t num_outputs;
  bool relu;
};

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(                                                                                         \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

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
      total[row][j] = begin ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + row * kPanelOutputs + j * 16);
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
      _mm512_storeu_ps(sums + row * kPanelOutputs + j * 16, total[row][j]);
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

void finish_panel(const Product& product, int64_t panel, const float* sums) {
  const int64_t first = panel * kPanelOutputs;
  for (int64_t j = 0; j < kPanelOutputs && first + j < product.num_outputs; j += 16) {
    const int64_t left = product.num_outputs - first - j;
    const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
    __m512 bias = _mm512_setzero_ps();
    if (product.bias != nullptr) {
      const __m256i bits = _mm256_maskz_loadu_epi16(mask, product.bias + first + j);
      bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    for (int64_t row = 0; row < product.num_rows; ++row) {
      __m512 y = _mm512_add_ps(_mm512_loadu_ps(sums + row * kPanelOutputs + j), bias);
      if (product.relu) {
        // The second operand is the one returned for NaN.
        y = _mm512_max_ps(_mm512_setzero_ps(), y);
      }
      _mm256_mask_storeu_epi16(product.y + row * product.num_outputs + first + j, mask, (__m256i)_mm512_cvtneps_pbh(y));
    }
  }
}

void multiply_panel(const Product& product, int64_t panel, float* sums) {
  const BFloat16* weight = product.weight + panel * product.panel_stride;
  const int64_t num_blocks = (product.num_rows + kMaxBlockRows - 1) / kMaxBlockRows;
  if (num_blocks == 1) {
    const char* ahead = reinterpret_cast<const char*>(weight) + kPrefetchBytes;
    multiply_rows<4>(product.num_rows, product.x, product.x_stride, weight, product.num_pairs, true, ahead, sums);
    finish_panel(product, panel, sums);
    return;
  }
  const int64_t chunk_pairs = product.num_pairs <= kMaxChunkPairs ? product.num_pairs : kChunkPairs;
  for (int64_t pair = 0; pair < product.num_pairs; pair += chunk_pairs) {
    const int64_t num_pairs = std::min(chunk_pairs, product.num_pairs - pair);
    const BFloat16* chunk = weight + pair * kPairElements;
    // The blocks share the prefetching of the next chunk: four lines for each pair, in all.
    const char* next = reinterpret_cast<const char*>(chunk + num_pairs * kPairElements);
    int64_t lines_left = 4;
    for (int64_t block = 0, row = 0; block < num_blocks; ++block) {
      const int64_t num_rows = (product.num_rows - row + num_blocks - block - 1) / (num_blocks - block);
      const int64_t lines = (lines_left + num_blocks - block - 1) / (num_blocks - block);
      const BFloat16* x = product.x + row * product.x_stride + 2 * pair;
      float* block_sums = sums + row * kPanelOutputs;
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

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

bool is_supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#else

void multiply_panel(const Product&, int64_t, float*) {}

bool is_supported() {
  return false;
}

#endif

} // namespace

bool has_packed_linear() {
  static const bool supported = is_supported();
  return supported;
}

bool is_packed_linear_layout(const Tensor& weight, int64_t packed_data, int64_t packed_bytes) {
  DYNSKIP_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.scalar_type() == ScalarType::BFloat16,
      "is_packed_linear_layout: weight must be contiguous [out, in] bfloat16, got ", shape_of(weight), ".");
  const int64_t num_outputs = weight.size(0);
  const int64_t num_inputs = weight.size(1);
  const int64_t padded_inputs = (num_inputs + kInputBlock - 1) / kInputBlock * kInputBlock;
  const int64_t num_panels = (num_outputs + kPanelOutputs - 1) / kPanelOutputs;
  const int64_t num_bytes = num_panels * kPanelOutputs * padded_inputs * static_cast<int64_t>(sizeof(BFloat16));
  if (num_bytes != packed_bytes) {
    return false;
  }
  const auto* dense = static_cast<const uint16_t*>(weight.data_ptr());
  const auto* packed = reinterpret_cast<const uint16_t*>(packed_data);
  std::atomic<bool> same{true};
  torch::stable::parallel_for(0, num_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const uint16_t* part = packed + panel * kPanelOutputs * padded_inputs;
      for (int64_t column = 0; column < kPanelOutputs; ++column) {
        const int64_t output = panel * kPanelOutputs + column;
        // One block of inputs in kSampledBlocks, another one in each panel: a foreign layout differs in all of them.
        for (int64_t input = 0; input < padded_inputs; ++input) {
          const int64_t block = input / kInputBlock;
          if (input % kInputBlock == 0 && block % kSampledBlocks != panel % kSampledBlocks && block != 0) {
            input += kInputBlock - 1;
            continue;
          }
          const bool inside = output < num_outputs && input < num_inputs;
          const uint16_t expected = inside ? dense[output * num_inputs + input] : 0;
          if (part[input / 2 * kPairElements + column * 2 + input % 2] != expected) {
            same = false;
            return;
          }
        }
      }
    }
  });
  return same;
}

Tensor packed_linear(
    const Tensor& x, int64_t packed_data, int64_t num_outputs, const std::optional<Tensor>& bias, bool relu) {
  DYNSKIP_CHECK(has_packed_linear(), "packed_linear: the CPU must have AVX-512 BF16. Use the dense weight.");
  DYNSKIP_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16 && x.stride(1) == 1,
      "packed_linear: x must be [R, in] bfloat16 with contiguous rows, got ", shape_of(x), ".");
  DYNSKIP_CHECK(
      !bias.has_value() || (bias->numel() == num_outputs && bias->is_contiguous() && bias->scalar_type() == ScalarType::BFloat16),
      "packed_linear: bias must be contiguous [", num_outputs, "] bfloat16.");
  const int64_t num_rows = x.size(0);
  const int64_t num_inputs = x.size(1);
  const int64_t padded_inputs = (num_inputs + kInputBlock - 1) / kInputBlock * kInputBlock;
  Tensor y = torch::stable::empty({num_rows, num_outputs}, ScalarType::BFloat16);
  if (num_rows == 0) {
    return y;
  }

  Product product;
  product.x = static_cast<const BFloat16*>(x.data_ptr());
  product.x_stride = x.stride(0);
  product.weight = reinterpret_cast<const BFloat16*>(packed_data);
  product.bias = bias.has_value() ? static_cast<const BFloat16*>(bias->data_ptr()) : nullptr;
  product.y = static_cast<BFloat16*>(y.data_ptr());
  product.num_rows = num_rows;
  product.num_pairs = (num_inputs + 1) / 2;
  product.panel_stride = padded_inputs * kPanelOutputs;
  product.num_outputs = num_outputs;
  product.relu = relu;

  thread_local std::vector<BFloat16> copy;
  if (num_rows > kMaxBlockRows || num_inputs % 2 != 0) {
    // Rows a power of two apart would fall on the same lines of the cache; an odd last input needs a zero beside it.
    const int64_t stride = padded_inputs + kInputBlock;
    copy.resize(num_rows * stride);
    for (int64_t row = 0; row < num_rows; ++row) {
      std::memcpy(&copy[row * stride], product.x + row * product.x_stride, num_inputs * sizeof(BFloat16));
      copy[row * stride + num_inputs] = 0.0f;
    }
    product.x = copy.data();
    product.x_stride = stride;
  }

  const int64_t num_panels = (num_outputs + kPanelOutputs - 1) / kPanelOutputs;
  const int64_t num_bytes = num_panels * product.panel_stride * static_cast<int64_t>(sizeof(BFloat16));
  const int64_t num_threads = num_bytes < kMinParallelBytes ? 1 : torch::stable::get_num_threads();
  const int64_t group = std::max<int64_t>(1, num_panels / (num_threads * kGroupsPerThread));
  std::atomic<int64_t> next_panel{0};
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t, int64_t) {
    thread_local std::vector<float> sums;
    sums.resize(num_rows * kPanelOutputs);
    for (int64_t begin = next_panel.fetch_add(group); begin < num_panels; begin = next_panel.fetch_add(group)) {
      for (int64_t panel = begin; panel < std::min(begin + group, num_panels); ++panel) {
        multiply_panel(product, panel, sums.data());
      }
    }
  });
  return y;
}

} // namespace dynskip
