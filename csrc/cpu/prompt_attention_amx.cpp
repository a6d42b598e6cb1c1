// Attention of prompts in blocks by the tiles of AMX.

#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)

#include <immintrin.h>

#include <cstdint>

#include "amx_target.h"
#include "amx_tiles.h"
#include "prompt_attention_kernel.h"

namespace dynskip {

namespace {

// Sums in tiles 0..3, two blocks of rows by two halves of lanes; the left side in 4 and 5, the right one in 6 and 7.
class AmxProducts {
 public:
  AmxProducts() {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = kTileRows;
    }
    load_config(config);
  }

  ~AmxProducts() {
    _tile_release();
  }

  void multiply(
      const BFloat16* left,
      int64_t left_stride,
      const Pairs* right,
      int64_t num_pairs,
      int64_t num_rows,
      bool begins,
      float* out) const {
    for (int64_t row = 0; row < num_rows; row += 2 * kTileRows) {
      const auto block = row + kTileRows < num_rows ? multiply_block<true> : multiply_block<false>;
      block(left + row * left_stride, left_stride, right, num_pairs, begins, out + row * kPromptRows);
    }
  }

 private:
  static constexpr int64_t kRowBytes = kPromptRows * 4; // of sums and pairs

  template <bool two_blocks>
  static void multiply_block(
      const BFloat16* left, int64_t left_stride, const Pairs* right, int64_t num_pairs, bool begins, float* out) {
    const int64_t left_bytes = left_stride * static_cast<int64_t>(sizeof(BFloat16));
    float* lower = out + kTileRows * kPromptRows;
    if (begins) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, out, kRowBytes);
      _tile_loadd(1, out + kNumLanes, kRowBytes);
      if (two_blocks) {
        _tile_loadd(2, lower, kRowBytes);
        _tile_loadd(3, lower + kNumLanes, kRowBytes);
      }
    }
    for (int64_t pair = 0; pair < num_pairs; pair += kTileInputs / 2) {
      const Pairs* pairs = right + pair * kPromptRows;
      _tile_loadd(4, left + 2 * pair, left_bytes);
      _tile_loadd(6, pairs, kRowBytes);
      _tile_loadd(7, pairs + kNumLanes, kRowBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (two_blocks) {
        _tile_loadd(5, left + kTileRows * left_stride + 2 * pair, left_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, out, kRowBytes);
    _tile_stored(1, out + kNumLanes, kRowBytes);
    if (two_blocks) {
      _tile_stored(2, lower, kRowBytes);
      _tile_stored(3, lower + kNumLanes, kRowBytes);
    }
  }
};

} // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

AttendPrompt attend_prompt_amx(int64_t head_size) {
  return takes_heads(head_size) && multiply_panels_amx() != nullptr ? attend_prompt_by<AmxProducts> : nullptr;
}

} // namespace dynskip

#else

namespace dynskip {

AttendPrompt attend_prompt_amx(int64_t) {
  return nullptr;
}

} // namespace dynskip

#endif
