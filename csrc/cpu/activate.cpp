#include <torch/csrc/stable/ops.h>

#include "dispatch.h"
#include "kernels.h"
#include "ops.h"
#include "rows.h"

namespace dynskip {

using torch::stable::Tensor;

Tensor activate(const Tensor& x, int64_t activation, bool gated) {
  DYNSKIP_CHECK(
      x.dim() == 2 && (x.size(1) == 1 || x.stride(1) == 1),
      "activate: x must be [R, F] with contiguous rows, got ", shape_of(x), ".");
  DYNSKIP_CHECK(
      !gated || x.size(1) % 2 == 0, "activate: x must have an even number of columns with a gate, got ", x.size(1), ".");
  DYNSKIP_CHECK(
      activation >= 0 && activation < static_cast<int64_t>(Activation::kEnd),
      "activate: activation must be one of the numbers of dynskip.ops.reference.ACTIVATIONS, got ", activation, ".");
  const int64_t num_rows = x.size(0);
  const int64_t size = gated ? x.size(1) / 2 : x.size(1);
  Tensor out = torch::stable::empty({num_rows, size}, x.scalar_type());
  for_element_type(x.scalar_type(), "activate", [&](auto element) {
    using Element = decltype(element);
    const auto kernel = kernels().of<Element>().activate;
    const auto* values = static_cast<const Element*>(x.data_ptr());
    auto* results = static_cast<Element*>(out.data_ptr());
    const int64_t stride = x.stride(0);
    for_each_row(num_rows, x.size(1), [&](int64_t row) {
      ActivateRow<Element> task;
      task.x = values + row * stride;
      task.factors = gated ? task.x + size : nullptr;
      task.out = results + row * size;
      task.size = size;
      task.activation = static_cast<Activation>(activation);
      kernel(task);
    });
  });
  return out;
}

} // namespace dynskip
