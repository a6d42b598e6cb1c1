#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "decoder_rows.h"
#include "dispatch.h"
#include "ops.h"

namespace dynskip {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor float_rows(const Tensor& logits, const Tensor& rows, int64_t decoder) {
  DYNSKIP_CHECK(
      logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
      "float_rows: logits must be [N, V] with contiguous rows, got ", shape_of(logits), ".");
  DYNSKIP_CHECK(
      rows.dim() == 1 && rows.is_contiguous() && rows.scalar_type() == ScalarType::Long,
      "float_rows: rows must be contiguous [R] int64, got ", shape_of(rows), ".");
  const auto* ids = static_cast<const int64_t*>(rows.data_ptr());
  for (int64_t i = 0; i < rows.numel(); ++i) {
    DYNSKIP_CHECK(
        ids[i] >= 0 && ids[i] < logits.size(0),
        "float_rows: rows must lie in 0..", logits.size(0) - 1, ", got ", ids[i], ".");
  }
  const int64_t size = logits.size(1);
  Tensor result = torch::stable::empty({rows.numel(), size}, ScalarType::Float);
  auto* values = static_cast<float*>(result.data_ptr());
  for_element_type(logits.scalar_type(), "float_rows", [&](auto element) {
    using Element = decltype(element);
    const auto* all = static_cast<const Element*>(logits.data_ptr());
    const int64_t stride = logits.stride(0);
    for_each_row_on(decoder, rows.numel(), 0, [&](int64_t row, ChoiceScratch&) {
      std::copy_n(all + ids[row] * stride, size, values + row * size);
    });
  });
  return result;
}

} // namespace dynskip
