// All kernels of one instruction set; included by each isa_*.cpp after it has set its target.

#pragma once

#include "choose_kernel.h"
#include "decode_attention_kernel.h"
#include "product_kernels.h"
#include "row_kernels.h"

namespace dynskip {
namespace {

template <typename Element>
constexpr ElementKernels<Element> kernels_of() {
  ElementKernels<Element> kernels = {};
  kernels.decode_attention = decode_attention_heads<Element>;
  kernels.layer_norm = layer_norm_row<Element>;
  kernels.add = add_row<Element>;
  kernels.rotate = rotate_row<Element>;
  kernels.activate = activate_row<Element>;
  kernels.largest_logit = largest_logit<Element>;
  kernels.choose_token = choose_token<Element>;
  kernels.dot = dot_row<Element>;
  kernels.multiply_dense = multiply_dense<Element>;
  if constexpr (!std::is_same_v<Element, BFloat16>) {
    kernels.multiply_packed = multiply_packed<Element>;
  }
  return kernels;
}

} // namespace
} // namespace dynskip
