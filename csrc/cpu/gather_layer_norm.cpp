#include <torch/csrc/stable/ops.h>

#include "dispatch.h"
#include "kernels.h"
#include "ops.h"
#include "rows.h"

namespace dynskip {

using torch::stable::Tensor;

Tensor gather_layer_norm(
    const Tensor& x,
    const std::optional<Tensor>& row_ids,
    const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias,
    double eps,
    bool rms) {
  DYNSKIP_CHECK(
      x.dim() == 2 && (x.size(1) == 1 || x.stride(1) == 1),
      "gather_layer_norm: x must be [N, C] with contiguous rows, got ", shape_of(x), ".");
  const int64_t size = x.size(1);
  for (const std::optional<Tensor>* parameter : {&weight, &bias}) {
    DYNSKIP_CHECK(
        !parameter->has_value() ||
            ((*parameter)->numel() == size && (*parameter)->is_contiguous() &&
             (*parameter)->scalar_type() == x.scalar_type()),
        "gather_layer_norm: weight and bias must be contiguous [", size, "] of x's dtype.");
  }
  const int32_t* ids = checked_row_ids("gather_layer_norm", row_ids, x.size(0));
  const int64_t num_rows = row_ids.has_value() ? row_ids->numel() : x.size(0);
  Tensor out = torch::stable::empty({num_rows, size}, x.scalar_type());
  for_element_type(x.scalar_type(), "gather_layer_norm", [&](auto element) {
    using Element = decltype(element);
    const auto kernel = kernels().of<Element>().layer_norm;
    LayerNormRow<Element> common;
    common.x = static_cast<const Element*>(x.data_ptr());
    common.weight = weight.has_value() ? static_cast<const Element*>(weight->data_ptr()) : nullptr;
    common.bias = bias.has_value() ? static_cast<const Element*>(bias->data_ptr()) : nullptr;
    common.out = static_cast<Element*>(out.data_ptr());
    common.size = size;
    const int64_t stride = x.stride(0);
    common.eps = static_cast<float>(eps);
    common.rms = rms;
    for_each_row(num_rows, size, [&](int64_t row) {
      LayerNormRow<Element> task = common;
      task.x += (ids != nullptr ? ids[row] : row) * stride;
      task.out += row * size;
      kernel(task);
    });
  });
  return out;
}

} // namespace dynskip
