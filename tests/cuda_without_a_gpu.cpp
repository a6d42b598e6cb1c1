// Runs the host code of csrc/cuda where there is no GPU: its calls of CUDA and torch arrive here and are looked at, and
// a launch of plan_rows runs its phases on the host, in memory of exactly the size that the launch asked for.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "plan_rows.h"

namespace dynskip {
void replay(std::vector<int64_t> graph_execs, int64_t device_index);
}

namespace {

using namespace dynskip;

int num_checks = 0;

void check(bool holds, const char* what, int line) {
  ++num_checks;
  if (!holds) {
    std::printf("line %d: %s does not hold\n", line, what);
    std::exit(1);
  }
}
#define CHECK(condition) check(condition, #condition, __LINE__)

// What the code under test did, and how CUDA answers.
int current_device = 0;
int capability = 9;
cudaError_t answer = cudaSuccess;
size_t failing_graph = SIZE_MAX;
cudaError_t last_error = cudaSuccess;
std::vector<int64_t> graphs;
int num_kernels = 0;
bool may_overlap = true;
int carveout = -1; // as the kernel asked last

cudaStream_t stream_of(int32_t device) {
  return reinterpret_cast<cudaStream_t>(static_cast<intptr_t>(1000 + device));
}

template <typename Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

} // namespace

extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = stream_of(device);
  return device < 4 ? 0 : 1;
}

AOTITorchError aoti_torch_create_device_guard(int32_t device, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(new int(current_device));
  current_device = device;
  return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  std::unique_ptr<int> before(reinterpret_cast<int*>(guard));
  current_device = *before;
  return 0;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t) {
  return "a made-up error";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  CHECK(attribute == cudaDevAttrComputeCapabilityMajor && device == current_device);
  *value = capability;
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  CHECK(stream == stream_of(current_device));
  if (graphs.size() == failing_graph) {
    return last_error = cudaErrorInvalidValue;
  }
  graphs.push_back(reinterpret_cast<int64_t>(exec));
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  CHECK(attribute == cudaFuncAttributePreferredSharedMemoryCarveout);
  carveout = value;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void** arguments) {
  CHECK(config->gridDim.x == 1 && config->gridDim.y == 1 && config->gridDim.z == 1);
  CHECK(config->blockDim.x >= 1 && config->blockDim.x <= 1024 && config->blockDim.y == 1 && config->blockDim.z == 1);
  CHECK(config->dynamicSmemBytes <= 48 * 1024);
  CHECK(config->stream == stream_of(current_device));
  CHECK(config->numAttrs == (may_overlap && capability >= 9 ? 1u : 0u));
  if (config->numAttrs == 1) {
    CHECK(config->attrs[0].id == cudaLaunchAttributeProgrammaticStreamSerialization);
    CHECK(config->attrs[0].val.programmaticStreamSerializationAllowed == 1);
  }
  if (answer != cudaSuccess) {
    return last_error = answer;
  }
  const auto& plan = *static_cast<const RowPlan*>(arguments[0]);
  // Undefined, as shared memory is when a block begins.
  void* memory = std::malloc(config->dynamicSmemBytes);
  std::memset(memory, 0xa5, config->dynamicSmemBytes);
  const PlanScratch scratch(static_cast<uint64_t*>(memory), plan.num_layers, plan.num_rows);
  const auto num_threads = static_cast<int32_t>(config->blockDim.x);
  for (int32_t phase = 0; phase < kNumPlanPhases; ++phase) {
    for (int32_t thread = 0; thread < num_threads; ++thread) {
      CHECK(run_phase(phase, plan, scratch, thread, num_threads) == PlanFailure::kNone);
    }
  }
  std::free(memory);
  ++num_kernels;
  return cudaSuccess;
}

} // extern "C"

namespace {

// The buffers of a plan, filled from a seed; everything that is written is compared.
struct Case {
  int32_t num_layers;
  int32_t num_rows;
  std::vector<uint8_t> active;
  std::vector<int32_t> cache_ids, context_lens, slot_tables, free_slots, slot_cursor, row_slots;
  std::vector<int32_t> run_ids, num_run, kv_ids, num_kv, slots, key_limits;
  static constexpr int32_t kMaxContextLen = 3;

  Case(int32_t num_layers, int32_t num_rows, uint32_t seed) : num_layers(num_layers), num_rows(num_rows) {
    std::mt19937 random(seed);
    const size_t pairs = size_t(num_layers) * num_rows;
    active.resize(pairs);
    for (uint8_t& byte : active) {
      byte = random() % 2;
    }
    for (int32_t row = 0; row < num_rows; ++row) {
      cache_ids.push_back(random() % 8 == 0 ? -1 : num_rows - 1 - row);
    }
    context_lens.assign(pairs, 0);
    for (int32_t& length : context_lens) {
      length = random() % kMaxContextLen;
    }
    slot_tables.assign(pairs * kMaxContextLen, -7);
    slot_cursor.assign(1, 17);
    free_slots.resize(slot_cursor[0] + pairs);
    std::iota(free_slots.begin(), free_slots.end(), 0);
    std::shuffle(free_slots.begin(), free_slots.end(), random);
    row_slots.assign(num_rows, 5);
    num_run.assign(num_layers, -7);
    num_kv = num_run;
    run_ids.assign(pairs, -7);
    kv_ids = slots = key_limits = run_ids;
  }

  RowPlan plan(KVPolicy policy, bool starts_step) {
    const int64_t rows = num_rows;
    const int32_t num_slots = static_cast<int32_t>(free_slots.size());
    return {num_layers, num_rows, num_rows, kMaxContextLen, num_slots, policy, starts_step, active.data(),
        cache_ids.data(), context_lens.data(), slot_tables.data(), free_slots.data(), slot_cursor.data(),
        row_slots.data(), run_ids.data(), num_run.data(), kv_ids.data(), num_kv.data(), slots.data(),
        key_limits.data(), rows, rows, rows * kMaxContextLen, kMaxContextLen, rows, rows, rows, rows};
  }

  bool operator==(const Case& other) const {
    return context_lens == other.context_lens && slot_tables == other.slot_tables && slot_cursor == other.slot_cursor &&
        row_slots == other.row_slots && run_ids == other.run_ids && num_run == other.num_run &&
        kv_ids == other.kv_ids && num_kv == other.num_kv && slots == other.slots && key_limits == other.key_limits;
  }
};

void plan_rows_launches_one_block_and_equals_the_cpu() {
  for (const int major : {8, 9, 10}) {
    capability = major;
    for (const auto& [num_layers, num_rows] : std::vector<std::pair<int, int>>{
             {0, 0}, {0, 9}, {1, 0}, {1, 1}, {1, 64}, {24, 256}, {5, 65}, {96, 1024}, {3, 1000}}) {
      for (int policy = 0; policy < 4; ++policy) {
        for (const bool starts_step : {true, false}) {
          Case expected(num_layers, num_rows, policy);
          Case result = expected;
          CHECK(plan_rows_on_cpu(expected.plan(KVPolicy(policy), starts_step), 1) == PlanFailure::kNone);
          const int before = num_kernels;
          plan_rows_on_cuda(result.plan(KVPolicy(policy), starts_step), 0, 2);
          CHECK(num_kernels == before + 1 && current_device == 0);
          CHECK(result == expected);
        }
      }
    }
  }
}

void plan_rows_overlaps_and_asks_for_shared_memory_as_it_is_told() {
  capability = 9;
  carveout = -1;
  Case any(2, 3, 0);
  Case same = any;
  plan_rows_on_cuda(any.plan(KVPolicy::kEvict, true), 0, 0);
  CHECK(carveout == -1);
  may_overlap = false;
  plan_rows_on_cuda(same.plan(KVPolicy::kEvict, true), 0, 0, false, 100);
  CHECK(carveout == 100);
  may_overlap = true;
}

void plan_rows_says_what_it_cannot_launch() {
  const int before = num_kernels;
  Case large(400, 1024, 0);
  CHECK(contains(
      message_of([&] { plan_rows_on_cuda(large.plan(KVPolicy::kEvict, true), 0, 0); }),
      "active must be small enough for the 49152 bytes that a block shares, got 400 layers of 1024 rows"));
  Case small(2, 3, 0);
  CHECK(contains(
      message_of([&] { plan_rows_on_cuda(small.plan(KVPolicy::kEvict, true), 0, 9); }),
      "device must have a current stream, got none for device 9"));
  answer = cudaErrorLaunchFailure;
  CHECK(contains(
      message_of([&] { plan_rows_on_cuda(small.plan(KVPolicy::kEvict, true), 0, 1); }),
      "the kernel must launch on device 1, got CUDA error 'a made-up error'"));
  answer = cudaSuccess;
  CHECK(last_error == cudaSuccess && current_device == 0 && num_kernels == before);
}

void replay_launches_all_graphs_in_order() {
  replay({}, 1);
  CHECK(graphs.empty());
  replay({0x7f0000000011, 22, 33, 22}, 3);
  CHECK((graphs == std::vector<int64_t>{0x7f0000000011, 22, 33, 22}));
  CHECK(current_device == 0);
}

void replay_names_the_graph_that_fails() {
  graphs.clear();
  failing_graph = 2;
  const std::string message = message_of([] { replay({11, 22, 33, 44}, 1); });
  CHECK(contains(message, "replay: graph_execs[2] of 4 must launch on device 1, got CUDA error 'a made-up error'"));
  CHECK((graphs == std::vector<int64_t>{11, 22}));
  CHECK(last_error == cudaSuccess && current_device == 0);
}

} // namespace

int main() {
  plan_rows_launches_one_block_and_equals_the_cpu();
  plan_rows_overlaps_and_asks_for_shared_memory_as_it_is_told();
  plan_rows_says_what_it_cannot_launch();
  replay_launches_all_graphs_in_order();
  replay_names_the_graph_that_fails();
  std::printf("%d checks hold\n", num_checks);
}
