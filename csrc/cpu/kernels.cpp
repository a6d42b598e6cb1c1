#include "kernels.h"

#include <atomic>

#include "check.h"
#include "ops.h"

namespace dynskip {

namespace {

bool is_supported(const std::string& name) {
  if (name == "portable") {
    return true;
  }
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_fma = __builtin_cpu_supports("fma");
  if (name == "avx2") {
    return has_fma && __builtin_cpu_supports("avx2");
  }
  if (name == "avx512") {
    return has_fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return false;
}

const Kernels* find(const std::string& name) {
#if defined(__x86_64__)
  for (const Kernels* kernels : {&kAvx512Kernels, &kAvx2Kernels}) {
    if (is_supported(kernels->name) && (name == kernels->name || name == "best")) {
      return kernels;
    }
  }
#endif
  return name == "portable" || name == "best" ? &kPortableKernels : nullptr;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{find("best")};
  return kernels;
}

} // namespace

const Kernels& kernels() {
  return *current().load(std::memory_order_relaxed);
}

template <typename Element>
MultiplyPanels<Element> multiply_panels(int64_t panel_outputs) {
  if (panel_outputs == 0) {
    return kernels().of<Element>().multiply_dense;
  }
  if constexpr (std::is_same_v<Element, BFloat16>) {
    return panel_outputs == 32 ? multiply_panels_amx() : panel_outputs == 64 ? multiply_panels_avx512_bf16() : nullptr;
  } else {
    return panel_outputs == 64 ? kernels().of<Element>().multiply_packed : nullptr;
  }
}

template MultiplyPanels<float> multiply_panels<float>(int64_t);
template MultiplyPanels<BFloat16> multiply_panels<BFloat16>(int64_t);
template MultiplyPanels<Float16> multiply_panels<Float16>(int64_t);

bool multiplies_many_rows(int64_t panel_outputs) {
  return panel_outputs == 32 ? multiply_panels_amx() != nullptr : panel_outputs == 64 && streams_panels_avx512_bf16();
}

AttendPrompt attend_prompt(int64_t head_size) {
  const AttendPrompt by_tiles = attend_prompt_amx(head_size);
  return by_tiles != nullptr ? by_tiles : attend_prompt_avx512_bf16(head_size);
}

std::string instruction_set() {
  return kernels().name;
}

void use_instruction_set(std::string name) {
  const Kernels* found = find(name);
  DYNSKIP_CHECK(
      found != nullptr,
      "use_instruction_set: name must be best, portable, avx2 or avx512, and this machine must have it, got ",
      name, ".");
  current() = found;
}

} // namespace dynskip
