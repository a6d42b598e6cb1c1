#include "plan_rows.h"

#include "check.h"
#include "ops.h"

namespace dynskip {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

bool has_cuda() {
#ifdef DYNSKIP_WITH_CUDA
  return true;
#else
  return false;
#endif
}

namespace {

// One row a layer, of elements side by side: of the layers planned.
template <typename Element = int32_t>
Element* rows_of_layers(const Tensor& tensor, int64_t first_layer) {
  return static_cast<Element*>(tensor.data_ptr()) + first_layer * tensor.stride(0);
}

void check_vector(const char* name, const Tensor& tensor, int64_t size, int32_t device_index) {
  DYNSKIP_CHECK(
      tensor.dim() == 1 && tensor.size(0) == size && is_int32_contiguous(tensor) &&
          tensor.get_device_index() == device_index,
      "plan_rows: ", name, " must be contiguous [", size, "] int32 on the device of active, got ", shape_of(tensor),
      ". Create it so.");
}

void check_layers(const char* name, const Tensor& tensor, int64_t num_layers, int64_t num_rows, int32_t device_index) {
  DYNSKIP_CHECK(
      tensor.dim() == 2 && tensor.size(0) == num_layers && tensor.size(1) == num_rows &&
          (num_rows <= 1 || tensor.stride(1) == 1) && tensor.scalar_type() == ScalarType::Int &&
          tensor.get_device_index() == device_index,
      "plan_rows: ", name, " must be [", num_layers, ", ", num_rows,
      "] int32 with contiguous rows on the device of active, got ", shape_of(tensor), ". Create it so.");
}

} // namespace

void plan_rows(
    const Tensor& active,
    int64_t first_layer,
    int64_t kv_policy,
    const Tensor& cache_ids,
    const Tensor& context_lens,
    const Tensor& slot_tables,
    const Tensor& free_slots,
    const Tensor& slot_cursor,
    const Tensor& row_slots,
    const Tensor& run_ids,
    const Tensor& num_run,
    const Tensor& kv_ids,
    const Tensor& num_kv,
    const Tensor& slots,
    const Tensor& key_limits,
    int64_t num_threads,
    bool overlaps,
    int64_t carveout) {
  DYNSKIP_CHECK(
      active.dim() == 2 && active.scalar_type() == ScalarType::Bool && (active.size(1) <= 1 || active.stride(1) == 1),
      "plan_rows: active must be [n, M] bool with contiguous rows, got ", shape_of(active),
      ". Use active.contiguous().");
  const int64_t num_layers = active.size(0);
  const int64_t num_rows = active.size(1);
  const int64_t all_layers = num_run.numel();
  const int32_t device = active.get_device_index();
  DYNSKIP_CHECK(
      first_layer >= 0 && first_layer + num_layers <= all_layers,
      "plan_rows: first_layer must leave room for the ", num_layers, " layers of active below ", all_layers, ", got ",
      first_layer, ". Plan fewer layers.");
  DYNSKIP_CHECK(
      num_layers <= 4096 && num_rows <= 65536,
      "plan_rows: active must have at most 4096 layers and 65536 rows, got ", shape_of(active), ". Split the batch.");
  DYNSKIP_CHECK(
      kv_policy >= 0 && kv_policy <= 3,
      "plan_rows: kv_policy must be 0 (absent), 1 (evict), 2 (propagate) or 3 (share), got ", kv_policy,
      ". Use the constants of dynskip.ops.row_reference.");
  DYNSKIP_CHECK(
      num_threads >= 0 && num_threads <= 1024,
      "plan_rows: num_threads must be 1..1024, or 0 for the device's own choice, got ", num_threads, ". Leave it out.");
  DYNSKIP_CHECK(
      carveout >= -1 && carveout <= 100,
      "plan_rows: carveout must be 0..100, or -1 for the driver's own choice, got ", carveout, ". Leave it out.");
  check_vector("cache_ids", cache_ids, num_rows, device);
  check_vector("free_slots", free_slots, free_slots.numel(), device);
  DYNSKIP_CHECK(
      free_slots.numel() <= INT32_MAX, "plan_rows: free_slots must have at most ", INT32_MAX, " slots, got ",
      free_slots.numel(), ". Create a smaller cache.");
  check_vector("slot_cursor", slot_cursor, 1, device);
  check_vector("row_slots", row_slots, num_rows, device);
  check_vector("num_run", num_run, all_layers, device);
  check_vector("num_kv", num_kv, all_layers, device);
  check_layers("run_ids", run_ids, all_layers, num_rows, device);
  check_layers("kv_ids", kv_ids, all_layers, num_rows, device);
  check_layers("slots", slots, all_layers, num_rows, device);
  check_layers("key_limits", key_limits, all_layers, num_rows, device);
  DYNSKIP_CHECK(
      slot_tables.dim() == 3 && slot_tables.size(0) == all_layers && slot_tables.scalar_type() == ScalarType::Int &&
          slot_tables.size(2) <= INT32_MAX && (slot_tables.size(2) <= 1 || slot_tables.stride(2) == 1) &&
          slot_tables.get_device_index() == device,
      "plan_rows: slot_tables must be [", all_layers,
      ", B, S_max] int32 with contiguous tables on the device of active, got ", shape_of(slot_tables),
      ". Create them so.");
  check_layers("context_lens", context_lens, all_layers, slot_tables.size(1), device);

  const RowPlan plan = {
      static_cast<int32_t>(num_layers),
      static_cast<int32_t>(num_rows),
      static_cast<int32_t>(slot_tables.size(1)),
      static_cast<int32_t>(slot_tables.size(2)),
      static_cast<int32_t>(free_slots.numel()),
      static_cast<KVPolicy>(kv_policy),
      first_layer == 0,
      rows_of_layers<uint8_t>(active, 0),
      rows_of_layers(cache_ids, 0),
      rows_of_layers(context_lens, first_layer),
      rows_of_layers(slot_tables, first_layer),
      rows_of_layers(free_slots, 0),
      rows_of_layers(slot_cursor, 0),
      rows_of_layers(row_slots, 0),
      rows_of_layers(run_ids, first_layer),
      rows_of_layers(num_run, first_layer),
      rows_of_layers(kv_ids, first_layer),
      rows_of_layers(num_kv, first_layer),
      rows_of_layers(slots, first_layer),
      rows_of_layers(key_limits, first_layer),
      active.stride(0),
      context_lens.stride(0),
      slot_tables.stride(0),
      slot_tables.stride(1),
      run_ids.stride(0),
      kv_ids.stride(0),
      slots.stride(0),
      key_limits.stride(0)};
#ifdef DYNSKIP_WITH_CUDA
  if (active.is_cuda()) {
    plan_rows_on_cuda(plan, static_cast<int32_t>(num_threads), device, overlaps, static_cast<int32_t>(carveout));
    return;
  }
#endif
  const PlanFailure failure = plan_rows_on_cpu(plan, num_threads == 0 ? 1 : static_cast<int32_t>(num_threads));
  DYNSKIP_CHECK(
      failure != PlanFailure::kTableFull,
      "plan_rows: slot_tables must have room for one more entry of each row, got a full table of ",
      plan.max_context_len, " entries. Create the cache for longer contexts.");
  DYNSKIP_CHECK(
      failure != PlanFailure::kNoSuchSequence,
      "plan_rows: cache_ids must be -1 or below ", plan.num_seqs, ", got more. Name sequences of the cache.");
  DYNSKIP_CHECK(
      failure != PlanFailure::kNoFreeSlot,
      "plan_rows: free_slots must have a slot for each new key from slot_cursor on, got too few of ", plan.num_slots,
      ". Create the cache with more slots.");
}

} // namespace dynskip
