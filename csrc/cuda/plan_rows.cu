// The assertions say what would otherwise be wrong results without a word: they stay, however this is compiled.
#undef NDEBUG
#include <cassert>

#include <algorithm>

#include "cuda/launch.h"
#include "plan_rows.h"

namespace dynskip {

namespace {

constexpr int32_t kMaxThreads = 1024;

__global__ void __launch_bounds__(kMaxThreads) plan_rows_kernel(const __grid_constant__ RowPlan plan) {
  extern __shared__ uint64_t memory[];
#if __CUDA_ARCH__ >= 900
  // The next kernel may load its weights while this one runs; nothing is read here before the last one is done.
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
  const PlanScratch scratch(memory, plan.num_layers, plan.num_rows);
  const int32_t thread = threadIdx.x;
  const int32_t num_threads = blockDim.x;
  PlanFailure failure = PlanFailure::kNone;
#pragma unroll
  for (int32_t phase = 0; phase < kNumPlanPhases; ++phase) {
    const PlanFailure of_phase = run_phase(phase, plan, scratch, thread, num_threads);
    failure = of_phase != PlanFailure::kNone ? of_phase : failure;
    __syncthreads();
  }
  assert(failure != PlanFailure::kTableFull && "plan_rows: slot_tables must have room for one more entry of each row");
  assert(failure != PlanFailure::kNoSuchSequence && "plan_rows: cache_ids must be -1 or a sequence of the cache");
  assert(
      failure != PlanFailure::kNoFreeSlot &&
      "plan_rows: free_slots must have a slot for each new key from slot_cursor on");
}

// One thread for each 8 rows that are read at a time, and for each row of each layer that is written.
int32_t threads_for(const RowPlan& plan) {
  const int64_t reads = (int64_t{plan.num_layers} + 2) * PlanScratch::words_for(plan.num_rows) * 8;
  const int64_t writes = int64_t{plan.num_layers} * plan.num_rows;
  const int64_t wanted = std::max(reads, writes);
  return static_cast<int32_t>(std::clamp<int64_t>((wanted + 31) / 32 * 32, 32, kMaxThreads));
}

} // namespace

void plan_rows_on_cuda(
    const RowPlan& plan, int32_t num_threads, int32_t device_index, bool overlaps, int32_t carveout) {
  const OnDevice guard(device_index);
  const int64_t shared_bytes = PlanScratch::num_bytes(plan.num_layers, plan.num_rows);
  STD_TORCH_CHECK(
      shared_bytes <= 48 * 1024,
      "plan_rows: active must be small enough for the 49152 bytes that a block shares, got ", plan.num_layers,
      " layers of ", plan.num_rows, " rows, which take ", shared_bytes, ". Plan fewer layers in a call.");

  int capability = 0;
  cudaError_t error = cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, device_index);
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(num_threads == 0 ? threads_for(plan) : num_threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = current_stream("plan_rows", device_index);
  config.attrs = &overlap;
  config.numAttrs = overlaps && capability >= 9 ? 1 : 0;
  if (error == cudaSuccess && carveout >= 0) {
    error = cudaFuncSetAttribute(plan_rows_kernel, cudaFuncAttributePreferredSharedMemoryCarveout, carveout);
  }
  if (error == cudaSuccess) {
    error = cudaLaunchKernelEx(&config, plan_rows_kernel, plan);
  }
  if (error != cudaSuccess) {
    cudaGetLastError(); // Or the next caller would be told of it.
    STD_TORCH_CHECK(
        false, "plan_rows: the kernel must launch on device ", device_index, ", got CUDA error '",
        cudaGetErrorString(error), "'. Look for an earlier failure of this process on the device.");
  }
}

} // namespace dynskip
