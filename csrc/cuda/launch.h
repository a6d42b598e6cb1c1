// What every launch of the extension needs of torch: the device, and the stream that torch uses there.

#pragma once

#include <cuda_runtime.h>

#ifndef USE_CUDA
#error "Compile with -DUSE_CUDA: torch's headers declare what concerns streams only then."
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

namespace dynskip {

// Makes a device current, and at the end the one that was.
using OnDevice = torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const char* op, int32_t device_index) {
  void* stream = nullptr;
  STD_TORCH_CHECK(
      aoti_torch_get_current_cuda_stream(device_index, &stream) == 0,
      op, ": device must have a current stream, got none for device ", device_index,
      ". Name a device of this machine.");
  return static_cast<cudaStream_t>(stream);
}

} // namespace dynskip
