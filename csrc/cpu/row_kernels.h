// Arithmetic on one row; compiled once for each instruction set.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "lanes.h"

namespace dynskip {
namespace {

template <typename Element>
void layer_norm_row(const LayerNormRow<Element>& row) {
  const int64_t whole = row.size / kNumLanes * kNumLanes;
  const int64_t rest = row.size - whole;
  const float per_element = 1.0f / static_cast<float>(row.size);

  Lanes sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kNumLanes <= whole; i += 4 * kNumLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      sums[j] += load(row.x + i + j * kNumLanes);
    }
  }
  for (; i < whole; i += kNumLanes) {
    sums[0] += load(row.x + i);
  }
  if (rest > 0) {
    sums[0] += load_some(row.x + whole, rest);
  }
  const float mean = sum((sums[0] + sums[1]) + (sums[2] + sums[3])) * per_element;

  Lanes squares[4] = {};
  for (i = 0; i + 4 * kNumLanes <= whole; i += 4 * kNumLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Lanes centered = load(row.x + i + j * kNumLanes) - mean;
      squares[j] += centered * centered;
    }
  }
  for (; i < whole; i += kNumLanes) {
    const Lanes centered = load(row.x + i) - mean;
    squares[0] += centered * centered;
  }
  if (rest > 0) {
    const IntLanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const IntLanes present = lane < (int32_t)rest;
    const Lanes centered = select(present, load_some(row.x + whole, rest) - mean, Lanes{});
    squares[0] += centered * centered;
  }
  const float variance = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) * per_element;
  const float factor = 1.0f / std::sqrt(variance + row.eps);

  if (row.weight != nullptr && row.bias != nullptr) {
    for (i = 0; i < whole; i += kNumLanes) {
      store(row.out + i, (load(row.x + i) - mean) * factor * load(row.weight + i) + load(row.bias + i));
    }
  } else {
    for (i = 0; i < whole; i += kNumLanes) {
      Lanes y = (load(row.x + i) - mean) * factor;
      y = row.weight != nullptr ? y * load(row.weight + i) : y;
      y = row.bias != nullptr ? y + load(row.bias + i) : y;
      store(row.out + i, y);
    }
  }
  if (rest > 0) {
    Lanes y = (load_some(row.x + whole, rest) - mean) * factor;
    if (row.weight != nullptr) {
      y *= load_some(row.weight + whole, rest);
    }
    if (row.bias != nullptr) {
      y += load_some(row.bias + whole, rest);
    }
    store_some(row.out + whole, y, rest);
  }
}

template <typename Element>
void add_row(Element* x, const Element* y, int64_t size) {
  const int64_t whole = size / kNumLanes * kNumLanes;
  for (int64_t i = 0; i < whole; i += kNumLanes) {
    store(x + i, load(x + i) + load(y + i));
  }
  if (whole < size) {
    store_some(x + whole, load_some(x + whole, size - whole) + load_some(y + whole, size - whole), size - whole);
  }
}

} // namespace
} // namespace dynskip
