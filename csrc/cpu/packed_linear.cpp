// Products of a few rows with a matrix in oneDNN's packed layout, which kernels.h describes.

#include "ops.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "dispatch.h"
#include "kernels.h"

namespace dynskip {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Groups of panels for each thread, so that a thread on a busy core does not hold up the others.
constexpr int64_t kGroupsPerThread = 8;
constexpr int64_t kSampledBlocks = 16;
constexpr int64_t kMinParallelBytes = 64 * 1024;

// Whether the bytes at packed are weight [num_outputs, num_inputs] in panels of so many outputs.
template <typename Element>
bool has_layout(const Tensor& weight, const void* packed, int64_t num_bytes, int64_t panel_outputs) {
  using Bits = std::conditional_t<sizeof(Element) == 4, uint32_t, uint16_t>;
  constexpr int64_t kBlock = kInputBlock<Element>;
  constexpr int64_t kGroup = std::is_same_v<Element, BFloat16> ? 2 : 1;
  const int64_t num_outputs = weight.size(0);
  const int64_t num_inputs = weight.size(1);
  const int64_t padded = packed_inputs<Element>(num_inputs);
  const int64_t num_panels = (num_outputs + panel_outputs - 1) / panel_outputs;
  if (num_panels * panel_outputs * padded * static_cast<int64_t>(sizeof(Element)) != num_bytes) {
    return false;
  }
  const auto* dense = static_cast<const Bits*>(weight.data_ptr());
  const auto* bits = static_cast<const Bits*>(packed);
  std::atomic<bool> same{true};
  torch::stable::parallel_for(0, num_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const Bits* part = bits + panel * panel_outputs * padded;
      // One block of inputs in kSampledBlocks, another one in each panel: a foreign layout differs in all of them.
      for (int64_t block = 0; block < padded / kBlock; ++block) {
        if (block % kSampledBlocks != panel % kSampledBlocks && block != 0) {
          continue;
        }
        for (int64_t input = block * kBlock; input < (block + 1) * kBlock; ++input) {
          for (int64_t column = 0; column < panel_outputs; ++column) {
            const int64_t output = panel * panel_outputs + column;
            const bool inside = output < num_outputs && input < num_inputs;
            const Bits expected = inside ? dense[output * num_inputs + input] : 0;
            if (part[(input / kGroup * panel_outputs + column) * kGroup + input % kGroup] != expected) {
              same = false;
              return;
            }
          }
        }
      }
    }
  });
  return same;
}

} // namespace

int64_t packed_panel_outputs(const Tensor& weight, int64_t packed_data, int64_t packed_bytes) {
  DYNSKIP_CHECK(
      weight.dim() == 2 && weight.is_contiguous(), "packed_panel_outputs: weight must be contiguous [out, in], got ",
      shape_of(weight), ".");
  int64_t found = 0;
  for_element_type(weight.scalar_type(), "packed_panel_outputs", [&](auto element) {
    using Element = decltype(element);
    for (const int64_t panel_outputs : {int64_t{64}, int64_t{32}}) {
      if (found == 0 && multiply_panels<Element>(panel_outputs) != nullptr &&
          has_layout<Element>(weight, reinterpret_cast<const void*>(packed_data), packed_bytes, panel_outputs)) {
        found = panel_outputs;
      }
    }
  });
  return found;
}

Tensor packed_linear(
    const Tensor& x,
    int64_t packed_data,
    int64_t panel_outputs,
    int64_t num_outputs,
    const std::optional<Tensor>& bias,
    int64_t activation) {
  DYNSKIP_CHECK(x.dim() == 2 && (x.size(1) == 1 || x.stride(1) == 1),
      "packed_linear: x must be [R, in] with contiguous rows, got ", shape_of(x), ".");
  DYNSKIP_CHECK(
      !bias.has_value() ||
          (bias->numel() == num_outputs && bias->is_contiguous() && bias->scalar_type() == x.scalar_type()),
      "packed_linear: bias must be contiguous [", num_outputs, "] of x's dtype.");
  DYNSKIP_CHECK(
      activation >= 0 && activation < static_cast<int64_t>(Activation::kEnd),
      "packed_linear: activation must be one of the numbers of dynskip.ops.reference.ACTIVATIONS, got ", activation, ".");
  const int64_t num_rows = x.size(0);
  const int64_t num_inputs = x.size(1);
  Tensor y = torch::stable::empty({num_rows, num_outputs}, x.scalar_type());
  if (num_rows == 0) {
    return y;
  }
  for_element_type(x.scalar_type(), "packed_linear", [&](auto element) {
    using Element = decltype(element);
    const MultiplyPanels<Element> multiply = multiply_panels<Element>(panel_outputs);
    DYNSKIP_CHECK(
        panel_outputs > 0 && multiply != nullptr,
        "packed_linear: panel_outputs must be what packed_panel_outputs found on this machine, got ", panel_outputs, ".");
    Product<Element> product;
    product.x = static_cast<const Element*>(x.data_ptr());
    product.x_stride = x.stride(0);
    product.weight = reinterpret_cast<const Element*>(packed_data);
    product.bias = bias.has_value() ? static_cast<const Element*>(bias->data_ptr()) : nullptr;
    product.y = static_cast<Element*>(y.data_ptr());
    product.y_stride = num_outputs;
    product.num_rows = num_rows;
    product.num_inputs = num_inputs;
    product.num_outputs = num_outputs;
    product.panel_outputs = panel_outputs;
    product.activation = static_cast<Activation>(activation);

    thread_local std::vector<Element> copy;
    if (num_rows > 1 || num_inputs % kInputBlock<Element> != 0) {
      const int64_t stride = padded_row_stride(num_inputs);
      copy.assign(num_rows * stride, Element(0.0f));
      for (int64_t row = 0; row < num_rows; ++row) {
        std::memcpy(
            static_cast<void*>(&copy[row * stride]), product.x + row * product.x_stride, num_inputs * sizeof(Element));
      }
      product.x = copy.data();
      product.x_stride = stride;
    }

    const int64_t panels = num_panels(product);
    const int64_t num_bytes = num_outputs * packed_inputs<Element>(num_inputs) * static_cast<int64_t>(sizeof(Element));
    const int64_t num_threads = num_bytes < kMinParallelBytes ? 1 : torch::stable::get_num_threads();
    const int64_t group = std::max<int64_t>(1, panels / (num_threads * kGroupsPerThread));
    std::atomic<int64_t> next_panel{0};
    torch::stable::parallel_for(0, num_threads, 1, [&](int64_t, int64_t) {
      thread_local std::vector<float> scratch;
      scratch.resize(product_scratch_floats<Element>(num_rows, num_inputs));
      for (int64_t begin = next_panel.fetch_add(group); begin < panels; begin = next_panel.fetch_add(group)) {
        multiply(product, begin, std::min(begin + group, panels), scratch.data());
      }
    });
  });
  return y;
}

} // namespace dynskip
