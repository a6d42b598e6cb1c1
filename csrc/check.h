// Checks of what a caller can get wrong; a failed one reaches Python as a RuntimeError with the message.

#pragma once

#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define DYNSKIP_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

namespace dynskip {

inline std::string shape_of(const torch::stable::Tensor& tensor) {
  std::string shape = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    shape += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  }
  return shape + "]";
}

inline bool is_int32_contiguous(const torch::stable::Tensor& tensor) {
  return tensor.scalar_type() == torch::headeronly::ScalarType::Int && tensor.is_contiguous();
}

} // namespace dynskip
