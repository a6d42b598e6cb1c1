// Arithmetic on one row; compiled once for each instruction set.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "lanes.h"

namespace dynskip {
namespace {

DYNSKIP_INLINE IntLanes first_lanes(int64_t count) {
  const IntLanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lane < (int32_t)count;
}

template <bool rms, typename Element>
DYNSKIP_INLINE void norm_row(const LayerNormRow<Element>& row) {
  const int64_t whole = row.size / kNumLanes * kNumLanes;
  const int64_t rest = row.size - whole;
  const float per_element = 1.0f / static_cast<float>(row.size);

  int64_t i = 0;
  float mean = 0.0f;
  if (!rms) {
    Lanes sums[4] = {};
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
    mean = sum((sums[0] + sums[1]) + (sums[2] + sums[3])) * per_element;
  }

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
    const Lanes centered = select(first_lanes(rest), load_some(row.x + whole, rest) - mean, Lanes{});
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
void layer_norm_row(const LayerNormRow<Element>& row) {
  if (row.rms) {
    norm_row<true>(row);
  } else {
    norm_row<false>(row);
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

// A vector of a row, or its last elements with zeros behind them.
template <typename Element>
DYNSKIP_INLINE Lanes load_upto(const Element* p, int64_t count) {
  return count >= kNumLanes ? load(p) : load_some(p, count);
}

template <typename Element>
DYNSKIP_INLINE void store_upto(Element* p, Lanes x, int64_t count) {
  if (count >= kNumLanes) {
    store(p, x);
  } else {
    store_some(p, x, count);
  }
}

template <typename Element>
float dot_row(const Element* x, const float* y, int64_t size) {
  Lanes total = {};
  for (int64_t i = 0; i < size; i += kNumLanes) {
    total += load_upto(x + i, size - i) * load_upto(y + i, size - i);
  }
  return sum(total);
}

template <bool has_weight, typename Element>
DYNSKIP_INLINE void rotate_heads(const RotateRow<Element>& row) {
  const int64_t half = row.rotary_size / 2;
  const float* cosines = row.cos_sin;
  const float* sines = row.cos_sin + half;
  for (int64_t head = 0; head < row.num_heads; ++head) {
    Element* x = row.x + head * row.head_size;
    float factor = 1.0f;
    if (has_weight) {
      Lanes squares = {};
      for (int64_t i = 0; i < row.head_size; i += kNumLanes) {
        const Lanes values = load_upto(x + i, row.head_size - i);
        squares += values * values;
      }
      factor = 1.0f / std::sqrt(sum(squares) / static_cast<float>(row.head_size) + row.eps);
    }
    const auto value = [&](int64_t i, int64_t count) {
      const Lanes values = load_upto(x + i, count);
      return has_weight ? values * factor * load_upto(row.weight + i, count) : values;
    };
    for (int64_t i = 0; i < half; i += kNumLanes) {
      const int64_t count = half - i;
      const Lanes one = value(i, count);
      const Lanes other = value(half + i, count);
      const Lanes cosine = load_upto(cosines + i, count);
      const Lanes sine = load_upto(sines + i, count);
      store_upto(x + i, one * cosine - other * sine, count);
      store_upto(x + half + i, other * cosine + one * sine, count);
    }
    if (has_weight) {
      for (int64_t i = 2 * half; i < row.head_size; i += kNumLanes) {
        store_upto(x + i, value(i, row.head_size - i), row.head_size - i);
      }
    }
  }
}

template <typename Element>
void rotate_row(const RotateRow<Element>& row) {
  if (row.weight != nullptr) {
    rotate_heads<true>(row);
  } else {
    rotate_heads<false>(row);
  }
}

template <Activation activation, typename Element>
DYNSKIP_INLINE void activate_values(const ActivateRow<Element>& row) {
  for (int64_t i = 0; i < row.size; i += kNumLanes) {
    const int64_t count = row.size - i;
    Lanes y = activated<activation>(load_upto(row.x + i, count));
    if (row.factors != nullptr) {
      y *= load_upto(row.factors + i, count);
    }
    store_upto(row.out + i, y, count);
  }
}

template <typename Element>
void activate_row(const ActivateRow<Element>& row) {
  switch (row.activation) {
    case Activation::kRelu:
      return activate_values<Activation::kRelu>(row);
    case Activation::kGelu:
      return activate_values<Activation::kGelu>(row);
    case Activation::kGeluTanh:
      return activate_values<Activation::kGeluTanh>(row);
    case Activation::kSilu:
      return activate_values<Activation::kSilu>(row);
    default:
      return activate_values<Activation::kNone>(row);
  }
}

} // namespace
} // namespace dynskip
