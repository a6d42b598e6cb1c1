// The product with a packed bfloat16 matrix for AMX: tiles of 16 rows, 32 inputs and 16 outputs.

#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cpuid.h>
#include <cstdint>
#include <cstring>

#include "amx_target.h"
#include "amx_tiles.h"
#include "product_kernels.h"

namespace dynskip {

namespace {

constexpr int64_t kAmxPanelOutputs = 32;
constexpr int64_t kBlockElements = kTileInputs * kAmxPanelOutputs; // of a panel, for the inputs of one tile
constexpr int64_t kBlockBytes = kBlockElements * 2;
constexpr int64_t kAheadBytes = 8 * 1024;
// Where many rows pass over a panel, the part of it that stays in the first cache meanwhile, in blocks of inputs at most.
constexpr int64_t kMostChunkBlocks = 9;

// Sums in tiles 0..3: two blocks of rows by two of outputs; rows in 4 and 5, weights in 6 and 7.
void configure(int64_t upper_rows, int64_t lower_rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    const bool is_lower = tile == 2 || tile == 3 || tile == 5;
    config.rows[tile] = static_cast<uint8_t>(tile >= 6 ? kTileRows : is_lower ? std::max<int64_t>(lower_rows, 1) : upper_rows);
  }
  load_config(config);
}

// sums [num_rows, 32] = x times a panel; x: 16 rows at most, or with two_blocks 32.
template <bool two_blocks>
void multiply_panel(const BFloat16* x, int64_t x_stride, const BFloat16* panel, int64_t num_blocks, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  if (two_blocks) {
    _tile_zero(2);
    _tile_zero(3);
  }
  const int64_t row_bytes = x_stride * static_cast<int64_t>(sizeof(BFloat16));
  for (int64_t block = 0; block < num_blocks; ++block) {
    const BFloat16* weight = panel + block * kBlockElements;
    for (int64_t byte = 0; byte < kBlockBytes; byte += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(weight) + kAheadBytes + byte, _MM_HINT_T0);
    }
    _tile_loadd(4, x + block * kTileInputs, row_bytes);
    _tile_loadd(6, weight, 128);
    _tile_loadd(7, weight + 32, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (two_blocks) {
      _tile_loadd(5, x + kTileRows * x_stride + block * kTileInputs, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  constexpr int64_t kSumBytes = kAmxPanelOutputs * sizeof(float);
  _tile_stored(0, sums, kSumBytes);
  _tile_stored(1, sums + 16, kSumBytes);
  if (two_blocks) {
    float* lower = sums + kTileRows * kAmxPanelOutputs;
    _tile_stored(2, lower, kSumBytes);
    _tile_stored(3, lower + 16, kSumBytes);
  }
}

// sums [num_rows, 32] (+)= part of x times part of a panel; x as above. Meanwhile num_ahead bytes a block are fetched.
template <bool two_blocks>
void multiply_chunk(
    const BFloat16* x, int64_t x_stride, const BFloat16* weight, int64_t num_blocks, bool begins, const char* ahead,
    int64_t num_ahead, float* sums) {
  constexpr int64_t kSumBytes = kAmxPanelOutputs * sizeof(float);
  float* lower = sums + kTileRows * kAmxPanelOutputs;
  if (begins) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kSumBytes);
    _tile_loadd(1, sums + 16, kSumBytes);
    if (two_blocks) {
      _tile_loadd(2, lower, kSumBytes);
      _tile_loadd(3, lower + 16, kSumBytes);
    }
  }
  const int64_t row_bytes = x_stride * static_cast<int64_t>(sizeof(BFloat16));
  for (int64_t block = 0; block < num_blocks; ++block) {
    for (const char* end = ahead + num_ahead; ahead < end; ahead += 64) {
      _mm_prefetch(ahead, _MM_HINT_T1);
    }
    _tile_loadd(4, x + block * kTileInputs, row_bytes);
    _tile_loadd(6, weight + block * kBlockElements, 128);
    _tile_loadd(7, weight + block * kBlockElements + 32, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (two_blocks) {
      _tile_loadd(5, x + kTileRows * x_stride + block * kTileInputs, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kSumBytes);
  _tile_stored(1, sums + 16, kSumBytes);
  if (two_blocks) {
    _tile_stored(2, lower, kSumBytes);
    _tile_stored(3, lower + 16, kSumBytes);
  }
}

// Sums of a few panels over many rows, panel by panel: chunk by chunk of the inputs, so that the rows' part of a chunk is
// read from the second cache, and the panel's from the first. Storing sums between chunks changes no bit.
void multiply_chunks(const Product<BFloat16>& product, int64_t begin_panel, int64_t end_panel, float* sums) {
  const int64_t num_blocks = packed_inputs<BFloat16>(product.num_inputs) / kTileInputs;
  const int64_t num_chunks = (num_blocks + kMostChunkBlocks - 1) / kMostChunkBlocks;
  const int64_t chunk_blocks = (num_blocks + num_chunks - 1) / num_chunks; // a short last chunk moves as many sums
  const int64_t num_passes = (product.num_rows + 2 * kTileRows - 1) / (2 * kTileRows);
  const int64_t num_ahead = (kBlockBytes / num_passes + 63) / 64 * 64;
  const auto weight_at = [&](int64_t panel, int64_t block) {
    return product.weight + (panel * num_blocks + block) * kBlockElements;
  };
  for (int64_t block = 0; block < num_blocks; block += chunk_blocks) {
    const int64_t count = std::min(chunk_blocks, num_blocks - block);
    for (int64_t panel = begin_panel; panel < end_panel; ++panel) {
      const BFloat16* next =
          panel + 1 < end_panel ? weight_at(panel + 1, block) : weight_at(begin_panel, block + chunk_blocks);
      const char* ahead = reinterpret_cast<const char*>(next);
      float* panel_sums = sums + (panel - begin_panel) * product.num_rows * kAmxPanelOutputs;
      configure(kTileRows, kTileRows);
      for (int64_t row = 0; row < product.num_rows; row += 2 * kTileRows) {
        const int64_t num_rows = std::min(2 * kTileRows, product.num_rows - row);
        if (num_rows < 2 * kTileRows) {
          configure(std::min(num_rows, kTileRows), num_rows - kTileRows);
        }
        const BFloat16* x = product.x + row * product.x_stride + block * kTileInputs;
        const auto multiply = num_rows > kTileRows ? multiply_chunk<true> : multiply_chunk<false>;
        multiply(
            x, product.x_stride, weight_at(panel, block), count, block == 0, ahead, num_ahead,
            panel_sums + row * kAmxPanelOutputs);
        ahead += count * num_ahead;
      }
    }
  }
}

void multiply_amx(const Product<BFloat16>& product, int64_t begin_panel, int64_t end_panel, float* sums) {
  const int64_t num_blocks = packed_inputs<BFloat16>(product.num_inputs) / kTileInputs;
  const int64_t most_panels = product.num_rows > 2 * kTileRows ? kChunkPanels : 1;
  if (most_panels == 1) {
    configure(std::min(product.num_rows, kTileRows), product.num_rows - kTileRows);
  }
  for (int64_t first = begin_panel; first < end_panel; first += most_panels) {
    const int64_t end = std::min(first + most_panels, end_panel);
    const BFloat16* weight = product.weight + first * num_blocks * kBlockElements;
    if (most_panels > 1) {
      multiply_chunks(product, first, end, sums);
    } else if (product.num_rows > kTileRows) {
      multiply_panel<true>(product.x, product.x_stride, weight, num_blocks, sums);
    } else {
      multiply_panel<false>(product.x, product.x_stride, weight, num_blocks, sums);
    }
    for (int64_t panel = first; panel < end; ++panel) {
      const int64_t output = panel * kAmxPanelOutputs;
      finish_rows(
          product, output, sums + (panel - first) * product.num_rows * kAmxPanelOutputs, kAmxPanelOutputs,
          std::min(kAmxPanelOutputs, product.num_outputs - output));
    }
  }
  _tile_release();
}

} // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace {

// Whether the CPU has AMX for bfloat16, and Linux lets this process have its registers.
bool is_supported() {
  constexpr unsigned kAmxBf16 = 1u << 22;
  constexpr unsigned kAmxTile = 1u << 24;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023; // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

} // namespace

MultiplyPanels<BFloat16> multiply_panels_amx() {
  static const MultiplyPanels<BFloat16> supported = is_supported() ? multiply_amx : nullptr;
  return supported;
}

} // namespace dynskip

#else

namespace dynskip {

MultiplyPanels<BFloat16> multiply_panels_amx() {
  return nullptr;
}

} // namespace dynskip

#endif
