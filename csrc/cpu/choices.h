// The choices of some rows, from the columns that callers hand over.

#pragma once

#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "choose.h"

namespace dynskip {

// The columns are [num_rows], float64 or int64, as choose_tokens takes them; raises, naming the op, where they are not.
std::vector<Choice> checked_choices(
    const char* op,
    const torch::stable::Tensor& temperature,
    const torch::stable::Tensor& top_k,
    const torch::stable::Tensor& top_p,
    const torch::stable::Tensor& min_p,
    const torch::stable::Tensor& seed,
    const torch::stable::Tensor& output,
    const torch::stable::Tensor& position,
    int64_t num_rows);

// The same of callers that hand over all seven columns in this order, or none for the most likely tokens.
std::vector<Choice> checked_choices(
    const char* op, const std::vector<torch::stable::Tensor>& columns, int64_t num_rows);

} // namespace dynskip
