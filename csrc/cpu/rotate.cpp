#include <torch/csrc/stable/ops.h>

#include "dispatch.h"
#include "kernels.h"
#include "ops.h"
#include "rows.h"

namespace dynskip {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void rotate(
    const Tensor& x, const Tensor& position_ids, const Tensor& cos_sin, const std::optional<Tensor>& weight, double eps) {
  DYNSKIP_CHECK(
      x.dim() == 3 && (x.size(2) == 1 || x.stride(2) == 1) && (x.size(1) == 1 || x.stride(1) == x.size(2)),
      "rotate: x must be [R, H, D] with contiguous rows, got ", shape_of(x), ".");
  const int64_t num_rows = x.size(0);
  const int64_t num_heads = x.size(1);
  const int64_t head_size = x.size(2);
  DYNSKIP_CHECK(
      position_ids.numel() == num_rows && position_ids.is_contiguous() && position_ids.scalar_type() == ScalarType::Long,
      "rotate: position_ids must be contiguous [", num_rows, "] int64.");
  DYNSKIP_CHECK(
      cos_sin.dim() == 2 && cos_sin.is_contiguous() && cos_sin.scalar_type() == ScalarType::Float &&
          cos_sin.size(1) % 2 == 0 && cos_sin.size(1) <= head_size,
      "rotate: cos_sin must be contiguous [P, E] float32, E even and at most ", head_size, ", got ", shape_of(cos_sin), ".");
  DYNSKIP_CHECK(
      !weight.has_value() ||
          (weight->numel() == head_size && weight->is_contiguous() && weight->scalar_type() == x.scalar_type()),
      "rotate: weight must be contiguous [", head_size, "] of x's dtype.");
  const int64_t num_positions = cos_sin.size(0);
  const int64_t rotary_size = cos_sin.size(1);
  const auto* positions = static_cast<const int64_t*>(position_ids.data_ptr());
  for (int64_t row = 0; row < num_rows; ++row) {
    DYNSKIP_CHECK(
        positions[row] >= 0 && positions[row] < num_positions, "rotate: position_ids must lie in 0..", num_positions - 1,
        ", got ", positions[row], " in row ", row, ".");
  }
  for_element_type(x.scalar_type(), "rotate", [&](auto element) {
    using Element = decltype(element);
    const auto kernel = kernels().of<Element>().rotate;
    const auto* table = static_cast<const float*>(cos_sin.data_ptr());
    RotateRow<Element> common;
    common.x = static_cast<Element*>(x.data_ptr());
    common.weight = weight.has_value() ? static_cast<const Element*>(weight->data_ptr()) : nullptr;
    common.num_heads = num_heads;
    common.head_size = head_size;
    common.rotary_size = rotary_size;
    common.eps = static_cast<float>(eps);
    const int64_t stride = x.stride(0);
    for_each_row(num_rows, num_heads * head_size, [&](int64_t row) {
      RotateRow<Element> task = common;
      task.x += row * stride;
      task.cos_sin = table + positions[row] * rotary_size;
      kernel(task);
    });
  });
}

} // namespace dynskip
