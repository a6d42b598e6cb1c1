// Attention of prompts in blocks by the dot products of AVX-512 BF16.

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "avx512_bf16_target.h"
#include "prompt_attention_kernel.h"

namespace dynskip {

namespace {

class DotProducts {
 public:
  void multiply(
      const BFloat16* left,
      int64_t left_stride,
      const Pairs* right,
      int64_t num_pairs,
      int64_t num_rows,
      bool begins,
      float* out) const {
    for (int64_t row = 0; row < num_rows; row += kRows) {
      multiply_block(left + row * left_stride, left_stride, right, num_pairs, begins, out + row * kPromptRows);
    }
  }

 private:
  static constexpr int kRows = 8; // whose sums stay in registers
  static constexpr int kVectors = kPromptRows / kNumLanes;

  static void multiply_block(
      const BFloat16* left, int64_t left_stride, const Pairs* right, int64_t num_pairs, bool begins, float* out) {
    __m512 sums[kRows][kVectors];
    for (int row = 0; row < kRows; ++row) {
      for (int j = 0; j < kVectors; ++j) {
        sums[row][j] = begins ? _mm512_setzero_ps() : _mm512_loadu_ps(out + row * kPromptRows + j * kNumLanes);
      }
    }
    for (int64_t pair = 0; pair < num_pairs; ++pair) {
      __m512bh factors[kVectors];
      for (int j = 0; j < kVectors; ++j) {
        factors[j] = (__m512bh)_mm512_loadu_si512(right + pair * kPromptRows + j * kNumLanes);
      }
      for (int row = 0; row < kRows; ++row) {
        int32_t two;
        std::memcpy(&two, left + row * left_stride + 2 * pair, sizeof(two));
        const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
        for (int j = 0; j < kVectors; ++j) {
          sums[row][j] = _mm512_dpbf16_ps(sums[row][j], both, factors[j]);
        }
      }
    }
    for (int row = 0; row < kRows; ++row) {
      for (int j = 0; j < kVectors; ++j) {
        _mm512_storeu_ps(out + row * kPromptRows + j * kNumLanes, sums[row][j]);
      }
    }
  }
};

} // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

AttendPrompt attend_prompt_avx512_bf16(int64_t head_size) {
  const bool is_there = multiply_panels_avx512_bf16() != nullptr;
  return takes_heads(head_size) && is_there ? attend_prompt_by<DotProducts> : nullptr;
}

} // namespace dynskip

#else

namespace dynskip {

AttendPrompt attend_prompt_avx512_bf16(int64_t) {
  return nullptr;
}

} // namespace dynskip

#endif
