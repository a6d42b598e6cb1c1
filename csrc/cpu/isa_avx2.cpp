// The kernels for AVX2 with FMA.

#if defined(__x86_64__)

#include <immintrin.h>

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

#define DYNSKIP_HAS_AVX2
#include "kernel_set.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace dynskip {

const Kernels kAvx2Kernels = {
    "avx2",
    kernels_of<float>(),
    kernels_of<BFloat16>(),
    kernels_of<Float16>(),
};

} // namespace dynskip

#endif
