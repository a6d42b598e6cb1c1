// What stands behind this header is compiled for AVX-512 BF16, up to the pop in the source that includes it. Behind all
// headers with code that any machine runs.

#pragma once

// GCC 12 sees uninitialised operands in its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#if defined(__clang__)
#pragma clang attribute push(                                                                                         \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#endif

#define DYNSKIP_HAS_AVX512
