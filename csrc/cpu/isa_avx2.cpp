// The kernels for AVX2 with FMA.

#if defined(__x86_64__)

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "decode_attention_kernel.h"
#include "row_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace dynskip {

const Kernels kAvx2Kernels = {
    "avx2",
    {decode_attention_heads<float>, layer_norm_row<float>, add_row<float>, rotate_row<float>, activate_row<float>},
    {decode_attention_heads<BFloat16>, layer_norm_row<BFloat16>, add_row<BFloat16>, rotate_row<BFloat16>, activate_row<BFloat16>},
    {decode_attention_heads<Float16>, layer_norm_row<Float16>, add_row<Float16>, rotate_row<Float16>, activate_row<Float16>},
};

} // namespace dynskip

#endif
