// The kernels for AVX-512 (F, BW, DQ, VL).

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

#define DYNSKIP_HAS_AVX512
#include "kernel_set.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace dynskip {

const Kernels kAvx512Kernels = {
    "avx512",
    kernels_of<float>(),
    kernels_of<BFloat16>(),
    kernels_of<Float16>(),
};

} // namespace dynskip

#endif
