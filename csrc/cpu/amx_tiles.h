// Tiles of AMX; included by each file that uses them, after it has set its target.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace dynskip {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileInputs = 32; // bfloat16 elements of a row

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

inline __attribute__((always_inline)) void load_config(const TileConfig& config) {
  // The intrinsic reads 64 bytes and tells the compiler of 8.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

} // namespace
} // namespace dynskip
