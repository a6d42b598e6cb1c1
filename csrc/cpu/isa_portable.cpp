// The kernels for any machine: the compiler's baseline instruction set.

#include "kernels.h"

#include "decode_attention_kernel.h"

namespace dynskip {

const Kernels kPortableKernels = {
    "portable",
    decode_attention_heads<float>,
    decode_attention_heads<BFloat16>,
    decode_attention_heads<Float16>,
};

} // namespace dynskip
