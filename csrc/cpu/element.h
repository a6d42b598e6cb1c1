// The element types of the tensors that the kernels read and write.

#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace dynskip {

using BFloat16 = c10::BFloat16;
using Float16 = c10::Half;

} // namespace dynskip
