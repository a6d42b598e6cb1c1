// Loops over the rows of a matrix.

#pragma once

#include <algorithm>
#include <optional>

#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace dynskip {

// Elements below which a second thread costs more than it saves.
constexpr int64_t kMinElementsPerThread = 32 * 1024;

template <typename Run>
void for_each_row(int64_t num_rows, int64_t row_size, const Run& run) {
  const auto run_some = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      run(row);
    }
  };
  const int64_t grain = std::max<int64_t>(1, kMinElementsPerThread / std::max<int64_t>(1, row_size));
  if (num_rows <= grain) {
    run_some(0, num_rows);
  } else {
    torch::stable::parallel_for(0, num_rows, grain, run_some);
  }
}

// The row numbers, or null for all rows.
inline const int32_t* checked_row_ids(
    const char* op, const std::optional<torch::stable::Tensor>& row_ids, int64_t num_rows) {
  if (!row_ids.has_value()) {
    return nullptr;
  }
  DYNSKIP_CHECK(is_int32_contiguous(*row_ids), op, ": row_ids must be contiguous [R] int32. Use row_ids.int().");
  const auto* ids = static_cast<const int32_t*>(row_ids->data_ptr());
  for (int64_t i = 0; i < row_ids->numel(); ++i) {
    DYNSKIP_CHECK(
        ids[i] >= 0 && ids[i] < num_rows, op, ": row_ids must lie in 0..", num_rows - 1, ", got ", ids[i], ".");
  }
  return ids;
}

} // namespace dynskip
