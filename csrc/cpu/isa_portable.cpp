// The kernels for any machine: the compiler's baseline instruction set.

#include "kernels.h"

#include "decode_attention_kernel.h"
#include "row_kernels.h"

namespace dynskip {

const Kernels kPortableKernels = {
    "portable",
    {decode_attention_heads<float>, layer_norm_row<float>, add_row<float>, rotate_row<float>, activate_row<float>},
    {decode_attention_heads<BFloat16>, layer_norm_row<BFloat16>, add_row<BFloat16>, rotate_row<BFloat16>, activate_row<BFloat16>},
    {decode_attention_heads<Float16>, layer_norm_row<Float16>, add_row<Float16>, rotate_row<Float16>, activate_row<Float16>},
};

} // namespace dynskip
