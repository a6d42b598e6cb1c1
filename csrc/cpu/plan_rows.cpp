#include "plan_rows.h"

#include <vector>

namespace dynskip {

PlanFailure plan_rows_on_cpu(const RowPlan& plan, int32_t num_threads) {
  std::vector<uint64_t> memory(PlanScratch::num_bytes(plan.num_layers, plan.num_rows) / sizeof(uint64_t) + 1);
  const PlanScratch scratch(memory.data(), plan.num_layers, plan.num_rows);
  PlanFailure failure = PlanFailure::kNone;
  for (int32_t phase = 0; phase < kNumPlanPhases; ++phase) {
    // Descending: a phase that relied on threads running in order would be wrong here, not only on a GPU.
    for (int32_t thread = num_threads - 1; thread >= 0; --thread) {
      const PlanFailure of_thread = run_phase(phase, plan, scratch, thread, num_threads);
      failure = of_thread != PlanFailure::kNone ? of_thread : failure;
    }
  }
  return failure;
}

} // namespace dynskip
