// The kernels for any machine: the compiler's baseline instruction set.

#include "kernels.h"

#include "kernel_set.h"

namespace dynskip {

const Kernels kPortableKernels = {
    "portable",
    kernels_of<float>(),
    kernels_of<BFloat16>(),
    kernels_of<Float16>(),
};

} // namespace dynskip
