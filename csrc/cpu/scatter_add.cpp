#include "dispatch.h"
#include "kernels.h"
#include "ops.h"
#include "rows.h"

namespace dynskip {

using torch::stable::Tensor;

void scatter_add(const Tensor& x, const std::optional<Tensor>& row_ids, const Tensor& y) {
  DYNSKIP_CHECK(
      x.dim() == 2 && (x.size(1) == 1 || x.stride(1) == 1),
      "scatter_add: x must be [N, C] with contiguous rows, got ", shape_of(x), ".");
  const int32_t* ids = checked_row_ids("scatter_add", row_ids, x.size(0));
  const int64_t num_rows = row_ids.has_value() ? row_ids->numel() : x.size(0);
  const int64_t size = x.size(1);
  DYNSKIP_CHECK(
      y.dim() == 2 && y.size(0) == num_rows && y.size(1) == size && (size == 1 || y.stride(1) == 1) &&
          y.scalar_type() == x.scalar_type(),
      "scatter_add: y must be [", num_rows, ", ", size, "] of x's dtype with contiguous rows, got ", shape_of(y), ".");
  for_element_type(x.scalar_type(), "scatter_add", [&](auto element) {
    using Element = decltype(element);
    const auto kernel = kernels().of<Element>().add;
    auto* sums = static_cast<Element*>(x.data_ptr());
    const auto* addends = static_cast<const Element*>(y.data_ptr());
    const int64_t sum_stride = x.stride(0);
    const int64_t addend_stride = y.stride(0);
    for_each_row(num_rows, size, [&](int64_t row) {
      kernel(sums + (ids != nullptr ? ids[row] : row) * sum_stride, addends + row * addend_stride, size);
    });
  });
}

} // namespace dynskip
