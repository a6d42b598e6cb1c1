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

#if defined(__clang__)
#pragma clang attribute push(                                                                                         \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,amx-tile,amx-bf16")
#endif

#define DYNSKIP_HAS_AVX512
#include "product_kernels.h"

namespace dynskip {

namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kAmxPanelOutputs = 32;
constexpr int64_t kTileInputs = 32;
constexpr int64_t kBlockElements = kTileInputs * kAmxPanelOutputs; // of a panel, for the inputs of one tile
constexpr int64_t kBlockBytes = kBlockElements * 2;
constexpr int64_t kAheadBytes = 8 * 1024;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Sums in tiles 0..3: two blocks of rows by two of outputs; rows in 4 and 5, weights in 6 and 7.
void configure(int64_t upper_rows, int64_t lower_rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    const bool is_lower = tile == 2 || tile == 3 || tile == 5;
    config.rows[tile] = static_cast<uint8_t>(tile >= 6 ? kTileRows : is_lower ? std::max<int64_t>(lower_rows, 1) : upper_rows);
  }
  _tile_loadconfig(&config);
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

void multiply_amx(const Product<BFloat16>& product, int64_t begin_panel, int64_t end_panel, float* sums) {
  const int64_t num_blocks = packed_inputs<BFloat16>(product.num_inputs) / kTileInputs;
  int64_t configured = 0;
  for (int64_t panel = begin_panel; panel < end_panel; ++panel) {
    const BFloat16* weight = product.weight + panel * num_blocks * kBlockElements;
    for (int64_t row = 0; row < product.num_rows; row += 2 * kTileRows) {
      const int64_t num_rows = std::min(2 * kTileRows, product.num_rows - row);
      if (num_rows != configured) {
        configure(std::min(num_rows, kTileRows), num_rows - kTileRows);
        configured = num_rows;
      }
      const BFloat16* x = product.x + row * product.x_stride;
      if (num_rows > kTileRows) {
        multiply_panel<true>(x, product.x_stride, weight, num_blocks, sums + row * kAmxPanelOutputs);
      } else {
        multiply_panel<false>(x, product.x_stride, weight, num_blocks, sums + row * kAmxPanelOutputs);
      }
    }
    const int64_t first = panel * kAmxPanelOutputs;
    finish_rows(product, first, sums, kAmxPanelOutputs, std::min(kAmxPanelOutputs, product.num_outputs - first));
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
