// Products of a few rows with a matrix; compiled once for each instruction set.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "lanes.h"

namespace dynskip {
namespace {

// Sums that fit into registers beside the operands, as rows and vectors of outputs.
#if defined(DYNSKIP_HAS_AVX512)
constexpr int kPackedRows = 6;
constexpr int kPackedVectors = 4;
constexpr int kDenseRows = 4;
constexpr int kDenseOutputs = 4;
#else
constexpr int kPackedRows = 2;
constexpr int kPackedVectors = 2;
constexpr int kDenseRows = 2;
constexpr int kDenseOutputs = 2;
#endif
// Inputs whose part of a panel stays in the first cache while all rows pass over it.
constexpr int64_t kChunkInputs = 64;
// Inputs that are summed on their own, a multiple of it: the error grows with the length of a sum.
constexpr int64_t kSumInputs = 512;
constexpr int64_t kPrefetchAhead = 16 * 1024; // bytes

// Bias, activation and rounding of one row of sums.
template <Activation activation, typename Element>
DYNSKIP_INLINE void finish_sums(
    const Product<Element>& product, int64_t row, int64_t first_output, const float* sums, int64_t num_outputs) {
  Element* y = product.y + row * product.y_stride + first_output;
  for (int64_t i = 0; i < num_outputs; i += kNumLanes) {
    const int64_t count = num_outputs - i;
    Lanes values = load(sums + i);
    if (product.bias != nullptr) {
      const Element* bias = product.bias + first_output + i;
      values += count >= kNumLanes ? load(bias) : load_some(bias, count);
    }
    values = activated<activation>(values);
    if (count >= kNumLanes) {
      store(y + i, values);
    } else {
      store_some(y + i, values, count);
    }
  }
}

// sums: [num_rows, stride].
template <typename Element>
void finish_rows(const Product<Element>& product, int64_t first_output, const float* sums, int64_t stride, int64_t num_outputs) {
  const auto by = [&]<Activation activation>() {
    for (int64_t row = 0; row < product.num_rows; ++row) {
      finish_sums<activation>(product, row, first_output, sums + row * stride, num_outputs);
    }
  };
  switch (product.activation) {
    case Activation::kRelu:
      return by.template operator()<Activation::kRelu>();
    case Activation::kGelu:
      return by.template operator()<Activation::kGelu>();
    case Activation::kGeluTanh:
      return by.template operator()<Activation::kGeluTanh>();
    case Activation::kSilu:
      return by.template operator()<Activation::kSilu>();
    default:
      return by.template operator()<Activation::kNone>();
  }
}

// sums [rows, kMaxPanelOutputs] (+)= x [rows, num_inputs] times some vectors of outputs of a panel.
template <int rows, typename Element>
DYNSKIP_INLINE void multiply_packed_block(
    const float* x, int64_t x_stride, const Element* weight, int64_t num_inputs, bool begins, bool prefetches, float* sums) {
  Lanes total[rows][kPackedVectors];
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int j = 0; j < kPackedVectors; ++j) {
      total[row][j] = begins ? Lanes{} : load(sums + row * kMaxPanelOutputs + j * kNumLanes);
    }
  }
  for (int64_t input = 0; input < num_inputs; ++input) {
    const Element* w = weight + input * kMaxPanelOutputs;
    if (prefetches) {
      for (size_t byte = 0; byte < kPackedVectors * kNumLanes * sizeof(Element); byte += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(w) + kPrefetchAhead + byte);
      }
    }
    Lanes weights[kPackedVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kPackedVectors; ++j) {
      weights[j] = load(w + j * kNumLanes);
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row) {
      const Lanes value = broadcast(x[row * x_stride + input]);
#pragma GCC unroll 4
      for (int j = 0; j < kPackedVectors; ++j) {
        total[row][j] += value * weights[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int j = 0; j < kPackedVectors; ++j) {
      store(sums + row * kMaxPanelOutputs + j * kNumLanes, total[row][j]);
    }
  }
}

template <typename Element>
DYNSKIP_INLINE void multiply_packed_rows(
    int64_t rows, const float* x, int64_t x_stride, const Element* weight, int64_t num_inputs, bool begins, bool prefetches,
    float* sums) {
  switch (rows) {
    case 1:
      return multiply_packed_block<1>(x, x_stride, weight, num_inputs, begins, prefetches, sums);
#if defined(DYNSKIP_HAS_AVX512)
    case 2:
      return multiply_packed_block<2>(x, x_stride, weight, num_inputs, begins, prefetches, sums);
    case 3:
      return multiply_packed_block<3>(x, x_stride, weight, num_inputs, begins, prefetches, sums);
    case 4:
      return multiply_packed_block<4>(x, x_stride, weight, num_inputs, begins, prefetches, sums);
    case 5:
      return multiply_packed_block<5>(x, x_stride, weight, num_inputs, begins, prefetches, sums);
#endif
    default:
      return multiply_packed_block<kPackedRows>(x, x_stride, weight, num_inputs, begins, prefetches, sums);
  }
}

template <typename Element>
void multiply_packed(const Product<Element>& product, int64_t begin_panel, int64_t end_panel, float* sums) {
  float* parts = sums + product.num_rows * kMaxPanelOutputs;
  const float* x = nullptr;
  int64_t x_stride = product.x_stride;
  if constexpr (std::is_same_v<Element, float>) {
    x = product.x;
  } else {
    float* values = parts + product.num_rows * kMaxPanelOutputs;
    x_stride = padded_row_stride(product.num_inputs);
    for (int64_t row = 0; row < product.num_rows; ++row) {
      const Element* given = product.x + row * product.x_stride;
      for (int64_t i = 0; i < product.num_inputs; i += kNumLanes) {
        const int64_t count = product.num_inputs - i;
        store(values + row * x_stride + i, count >= kNumLanes ? load(given + i) : load_some(given + i, count));
      }
    }
    x = values;
  }
  const int64_t panel_stride = packed_inputs<Element>(product.num_inputs) * kMaxPanelOutputs;
  const int64_t num_blocks = (product.num_rows + kPackedRows - 1) / kPackedRows;
  for (int64_t panel = begin_panel; panel < end_panel; ++panel) {
    const Element* weight = product.weight + panel * panel_stride;
    for (int64_t begin = 0; begin < product.num_inputs; begin += kSumInputs) {
      const int64_t end = std::min(begin + kSumInputs, product.num_inputs);
      float* part = begin == 0 ? sums : parts;
      const int64_t chunk = num_blocks == 1 ? kSumInputs : kChunkInputs;
      for (int64_t input = begin; input < end; input += chunk) {
        for (int64_t block = 0, row = 0; block < num_blocks; ++block) {
          const int64_t rows = (product.num_rows - row + num_blocks - block - 1) / (num_blocks - block);
          for (int64_t output = 0; output < kMaxPanelOutputs; output += kPackedVectors * kNumLanes) {
            multiply_packed_rows(
                rows, x + row * x_stride + input, x_stride, weight + input * kMaxPanelOutputs + output,
                std::min(chunk, end - input), input == begin, block == 0, part + row * kMaxPanelOutputs + output);
          }
          row += rows;
        }
      }
      for (int64_t i = 0; begin > 0 && i < product.num_rows * kMaxPanelOutputs; i += kNumLanes) {
        store(sums + i, load(sums + i) + load(parts + i));
      }
    }
    const int64_t first = panel * kMaxPanelOutputs;
    finish_rows(product, first, sums, kMaxPanelOutputs, std::min(kMaxPanelOutputs, product.num_outputs - first));
  }
}

// sums [rows, kMaxPanelOutputs] = x [rows, num_inputs] times some rows of a dense matrix.
template <int rows, int outputs, typename Element>
DYNSKIP_INLINE void multiply_dense_block(
    const Element* x, int64_t x_stride, const Element* weight, int64_t num_inputs, float* sums) {
  Lanes total[rows][outputs] = {};
  for (int64_t input = 0; input < num_inputs; input += kNumLanes) {
    const int64_t count = num_inputs - input;
    const auto some = [&](const Element* p) { return count >= kNumLanes ? load(p + input) : load_some(p + input, count); };
    Lanes weights[outputs];
#pragma GCC unroll 4
    for (int j = 0; j < outputs; ++j) {
      weights[j] = some(weight + j * num_inputs);
    }
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
      const Lanes values = some(x + row * x_stride);
#pragma GCC unroll 4
      for (int j = 0; j < outputs; ++j) {
        total[row][j] += values * weights[j];
      }
    }
  }
  for (int row = 0; row < rows; ++row) {
    for (int j = 0; j < outputs; ++j) {
      sums[row * kMaxPanelOutputs + j] = sum(total[row][j]);
    }
  }
}

template <int outputs, typename Element>
DYNSKIP_INLINE void multiply_dense_rows(
    const Product<Element>& product, const Element* weight, float* sums) {
  for (int64_t row = 0; row < product.num_rows;) {
    const Element* x = product.x + row * product.x_stride;
    float* block = sums + row * kMaxPanelOutputs;
    if (product.num_rows - row >= kDenseRows) {
      multiply_dense_block<kDenseRows, outputs>(x, product.x_stride, weight, product.num_inputs, block);
      row += kDenseRows;
    } else {
      multiply_dense_block<1, outputs>(x, product.x_stride, weight, product.num_inputs, block);
      ++row;
    }
  }
}

template <typename Element>
void multiply_dense(const Product<Element>& product, int64_t begin_panel, int64_t end_panel, float* sums) {
  for (int64_t panel = begin_panel; panel < end_panel; ++panel) {
    const int64_t first = panel * kDensePanelOutputs;
    const int64_t num_outputs = std::min(kDensePanelOutputs, product.num_outputs - first);
    for (int64_t output = 0; output < num_outputs;) {
      const Element* weight = product.weight + (first + output) * product.num_inputs;
      if (num_outputs - output >= kDenseOutputs) {
        multiply_dense_rows<kDenseOutputs>(product, weight, sums + output);
        output += kDenseOutputs;
      } else {
        multiply_dense_rows<1>(product, weight, sums + output);
        ++output;
      }
    }
    finish_rows(product, first, sums, kMaxPanelOutputs, num_outputs);
  }
}

} // namespace
} // namespace dynskip
