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
#include "kernels.h"

namespace dynskip {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Groups of panels for each thread, so that a thread on a busy core does not hold up the others.
constexpr int64_t kGroupsPerThread = 8;
constexpr int64_t kSampledBlocks = 16;
constexpr int64_t kMinParallelBytes = 64 * 1024;

} // namespace

bool has_packed_linear() {
  return multiply_panels() != nullptr;
}

bool is_packed_linear_layout(const Tensor& weight, int64_t packed_data, int64_t packed_bytes) {
  DYNSKIP_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.scalar_type() == ScalarType::BFloat16,
      "is_packed_linear_layout: weight must be contiguous [out, in] bfloat16, got ", shape_of(weight), ".");
  const int64_t num_outputs = weight.size(0);
  const int64_t num_inputs = weight.size(1);
  const int64_t padded_inputs = packed_inputs(num_inputs);
  const int64_t num_panels = num_panels_of(num_outputs);
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
    const Tensor& x, int64_t packed_data, int64_t num_outputs, const std::optional<Tensor>& bias, int64_t activation) {
  DYNSKIP_CHECK(has_packed_linear(), "packed_linear: the CPU must have AVX-512 BF16. Use the dense weight.");
  DYNSKIP_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16 && x.stride(1) == 1,
      "packed_linear: x must be [R, in] bfloat16 with contiguous rows, got ", shape_of(x), ".");
  DYNSKIP_CHECK(
      !bias.has_value() || (bias->numel() == num_outputs && bias->is_contiguous() && bias->scalar_type() == ScalarType::BFloat16),
      "packed_linear: bias must be contiguous [", num_outputs, "] bfloat16.");
  DYNSKIP_CHECK(
      activation >= 0 && activation < static_cast<int64_t>(Activation::kEnd),
      "packed_linear: activation must be one of the numbers of dynskip.ops.reference.ACTIVATIONS, got ", activation, ".");
  const int64_t num_rows = x.size(0);
  const int64_t num_inputs = x.size(1);
  const int64_t padded_inputs = packed_inputs(num_inputs);
  Tensor y = torch::stable::empty({num_rows, num_outputs}, ScalarType::BFloat16);
  if (num_rows == 0) {
    return y;
  }

  PackedProduct product;
  product.x = static_cast<const BFloat16*>(x.data_ptr());
  product.x_stride = x.stride(0);
  product.weight = reinterpret_cast<const BFloat16*>(packed_data);
  product.bias = bias.has_value() ? static_cast<const BFloat16*>(bias->data_ptr()) : nullptr;
  product.y = static_cast<BFloat16*>(y.data_ptr());
  product.num_rows = num_rows;
  product.num_pairs = (num_inputs + 1) / 2;
  product.panel_stride = padded_inputs * kPanelOutputs;
  product.num_outputs = num_outputs;
  product.activation = static_cast<Activation>(activation);

  thread_local std::vector<BFloat16> copy;
  if (copies_packed_rows(num_rows, num_inputs)) {
    const int64_t stride = packed_row_stride(num_inputs);
    copy.resize(num_rows * stride);
    for (int64_t row = 0; row < num_rows; ++row) {
      std::memcpy(&copy[row * stride], product.x + row * product.x_stride, num_inputs * sizeof(BFloat16));
      copy[row * stride + num_inputs] = 0.0f;
    }
    product.x = copy.data();
    product.x_stride = stride;
  }

  const int64_t num_panels = num_panels_of(num_outputs);
  const int64_t num_bytes = num_panels * product.panel_stride * static_cast<int64_t>(sizeof(BFloat16));
  const int64_t num_threads = num_bytes < kMinParallelBytes ? 1 : torch::stable::get_num_threads();
  const int64_t group = std::max<int64_t>(1, num_panels / (num_threads * kGroupsPerThread));
  const MultiplyPanels multiply = multiply_panels();
  std::atomic<int64_t> next_panel{0};
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t, int64_t) {
    thread_local std::vector<float> sums;
    sums.resize(num_rows * kPanelOutputs);
    for (int64_t begin = next_panel.fetch_add(group); begin < num_panels; begin = next_panel.fetch_add(group)) {
      multiply(product, begin, std::min(begin + group, num_panels), sums.data());
    }
  });
  return y;
}

} // namespace dynskip
