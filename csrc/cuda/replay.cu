#include <cstdint>
#include <vector>

#include "cuda/launch.h"

namespace dynskip {

void replay(std::vector<int64_t> graph_execs, int64_t device_index) {
  const OnDevice guard(static_cast<int32_t>(device_index));
  cudaStream_t stream = current_stream("replay", static_cast<int32_t>(device_index));
  for (size_t i = 0; i < graph_execs.size(); ++i) {
    const cudaError_t error = cudaGraphLaunch(reinterpret_cast<cudaGraphExec_t>(graph_execs[i]), stream);
    if (error != cudaSuccess) {
      cudaGetLastError(); // Or the next caller would be told of it.
      STD_TORCH_CHECK(
          false, "replay: graph_execs[", i, "] of ", graph_execs.size(), " must launch on device ", device_index,
          ", got CUDA error '", cudaGetErrorString(error),
          "'; the graphs before it were launched. Keep every captured graph alive, and do not replay while capturing.");
    }
  }
}

} // namespace dynskip
