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

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace dynskip {

const Kernels kAvx2Kernels = {
    "avx2",
    decode_attention_heads<float>,
    decode_attention_heads<BFloat16>,
    decode_attention_heads<Float16>,
};

} // namespace dynskip

#endif
