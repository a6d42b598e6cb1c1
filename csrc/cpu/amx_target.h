// What stands behind this header is compiled for AMX and AVX-512, up to the pop in the source that includes it. Behind all
// headers with code that any machine runs.

#pragma once

#if defined(__clang__)
#pragma clang attribute push(                                                                                         \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,amx-tile,amx-bf16")
#endif

#define DYNSKIP_HAS_AVX512
