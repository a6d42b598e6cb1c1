// From a tensor's dtype to the element type of a template.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "element.h"

namespace dynskip {

// Calls run(Element{}) for the element type of dtype; only the type of the argument counts.
template <typename Run>
void for_element_type(torch::headeronly::ScalarType dtype, const char* op, const Run& run) {
  switch (dtype) {
    case torch::headeronly::ScalarType::Float:
      return run(float{});
    case torch::headeronly::ScalarType::BFloat16:
      return run(BFloat16{});
    case torch::headeronly::ScalarType::Half:
      return run(Float16{});
    default:
      DYNSKIP_CHECK(false, op, ": tensors must be float32, bfloat16 or float16. Use the torch backend for others.");
  }
}

} // namespace dynskip
