// A whole decode step of a decoder in one call: what it reads and writes is checked, and all threads run its phases.

#include "decode_step.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "choices.h"
#include "dispatch.h"
#include "ops.h"
#include "step_phases.h"

namespace dynskip {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// For each row the state that it begins with; empty where all begin with their embeddings.
std::vector<const void*> checked_begun(
    const Decoder& decoder, int64_t num_rows, const std::optional<Tensor>& rows, const std::optional<Tensor>& states) {
  if (!rows.has_value()) {
    return {};
  }
  const int64_t count = rows->numel();
  const int64_t* ids = checked_ids("decode_step", "begun_rows", *rows, count, num_rows);
  DYNSKIP_CHECK(
      states.has_value() && states->dim() == 2 && states->size(0) == count && states->size(1) == decoder.hidden_size &&
          states->is_contiguous() && states->scalar_type() == decoder.dtype(),
      "decode_step: begun_states must be contiguous [", count, ", ", decoder.hidden_size, "] of the decoder's dtype.");
  std::vector<const void*> begun(num_rows);
  const int64_t row_bytes = decoder.hidden_size * states->element_size();
  for (int64_t i = 0; i < count; ++i) {
    begun[ids[i]] = static_cast<const char*>(states->data_ptr()) + i * row_bytes;
  }
  return begun;
}

// Before the slots are planned, and with what is planned then.
StepPlan new_plan(const Decoder& decoder, const StepRows& rows) {
  const size_t num_pairs = decoder.layers.size() * rows.num_rows;
  StepPlan plan;
  plan.active.assign(rows.active, rows.active + num_pairs);
  plan.cache_ids.assign(rows.cache_ids, rows.cache_ids + rows.num_rows);
  plan.row_slots.resize(rows.num_rows);
  for (std::vector<int32_t>* lists : {&plan.run_ids, &plan.kv_ids, &plan.slots, &plan.key_limits}) {
    lists->resize(num_pairs);
  }
  return plan;
}

RowPlan row_plan(const StepCache& cache, const StepRows& rows, StepPlan& plan) {
  RowPlan whole = {};
  whole.num_rows = static_cast<int32_t>(rows.num_rows);
  whole.num_seqs = static_cast<int32_t>(cache.num_seqs());
  whole.max_context_len = static_cast<int32_t>(cache.slot_tables.size(2));
  whole.num_slots = static_cast<int32_t>(cache.free_slots.numel());
  whole.kv_policy = rows.kv_policy;
  whole.cache_ids = plan.cache_ids.data();
  whole.context_lens = static_cast<int32_t*>(cache.context_lens.data_ptr());
  whole.slot_tables = static_cast<int32_t*>(cache.slot_tables.data_ptr());
  whole.free_slots = static_cast<const int32_t*>(cache.free_slots.data_ptr());
  whole.slot_cursor = static_cast<int32_t*>(cache.slot_cursor.data_ptr());
  whole.row_slots = plan.row_slots.data();
  whole.active_stride = whole.run_ids_stride = whole.kv_ids_stride = whole.slots_stride = whole.key_limits_stride =
      rows.num_rows;
  whole.context_lens_stride = cache.num_seqs();
  whole.slot_tables_layer_stride = cache.num_seqs() * cache.slot_tables.size(2);
  whole.slot_tables_seq_stride = cache.slot_tables.size(2);
  return whole;
}

} // namespace

int64_t num_positions(const Decoder& decoder) {
  int64_t count = INT32_MAX;
  if (decoder.embed_positions >= 0) {
    count = decoder.tensors[decoder.embed_positions].size(0) - decoder.position_offset;
  }
  if (decoder.cos_sin >= 0) {
    count = std::min(count, decoder.tensors[decoder.cos_sin].size(0));
  }
  return count;
}

const int64_t* checked_ids(const char* op, const char* name, const Tensor& ids, int64_t num_rows, int64_t end) {
  DYNSKIP_CHECK(
      ids.dim() == 1 && ids.size(0) == num_rows && ids.is_contiguous() && ids.scalar_type() == ScalarType::Long,
      op, ": ", name, " must be contiguous [", num_rows, "] int64, got ", shape_of(ids), ".");
  const auto* values = static_cast<const int64_t*>(ids.data_ptr());
  for (int64_t row = 0; row < num_rows; ++row) {
    DYNSKIP_CHECK(
        values[row] >= 0 && values[row] < end, op, ": ", name, " must lie in 0..", end - 1, ", got ", values[row],
        " in row ", row, ".");
  }
  return values;
}

void check_cache(const char* op, const Decoder& decoder, const StepCache& cache) {
  const int64_t num_layers = decoder.layers.size();
  DYNSKIP_CHECK(
      cache.slot_tables.dim() == 3 && cache.slot_tables.size(0) == num_layers && is_int32_contiguous(cache.slot_tables),
      op, ": slot_tables must be contiguous [", num_layers, ", B, S_max] int32, got ", shape_of(cache.slot_tables), ".");
  DYNSKIP_CHECK(
      cache.context_lens.dim() == 2 && cache.context_lens.size(0) == num_layers &&
          cache.context_lens.size(1) == cache.num_seqs() && is_int32_contiguous(cache.context_lens),
      op, ": context_lens must be contiguous [", num_layers, ", ", cache.num_seqs(), "] int32.");
  for (const Tensor* entries : {&cache.k_cache, &cache.v_cache}) {
    DYNSKIP_CHECK(
        entries->dim() == 3 && entries->size(0) == cache.free_slots.numel() &&
            entries->size(1) == decoder.num_kv_heads && entries->size(2) == decoder.head_size &&
            entries->is_contiguous() && entries->scalar_type() == decoder.dtype(),
        op, ": k_cache and v_cache must be contiguous [", cache.free_slots.numel(), ", ", decoder.num_kv_heads, ", ",
        decoder.head_size, "] of the decoder's dtype, got ", shape_of(*entries), ".");
  }
  DYNSKIP_CHECK(
      !cache.slot_positions.has_value() ||
          (is_int32_contiguous(*cache.slot_positions) && cache.slot_positions->numel() == cache.k_cache.size(0)),
      op, ": slot_positions must be contiguous [num_slots] int32.");
  bool asks_positions = decoder.slopes >= 0;
  for (const LayerSpec& layer : decoder.layers) {
    asks_positions |= layer.window > 0;
  }
  DYNSKIP_CHECK(
      !asks_positions || cache.slot_positions.has_value(),
      op, ": slot_positions must be given with slopes or a window.");
  DYNSKIP_CHECK(
      is_int32_contiguous(cache.free_slots) && is_int32_contiguous(cache.slot_cursor) && cache.slot_cursor.numel() == 1,
      op, ": free_slots and slot_cursor must be contiguous int32.");
}

StepRows checked_rows(
    const char* op,
    const Decoder& decoder,
    const StepCache& cache,
    const Tensor& token_ids,
    const Tensor& position_ids,
    const Tensor& cache_ids,
    const Tensor& active) {
  StepRows rows = {};
  rows.num_rows = token_ids.numel();
  const int64_t num_layers = decoder.layers.size();
  DYNSKIP_CHECK(
      rows.num_rows > 0 && rows.num_rows <= 65536, op, ": token_ids must hold 1..65536 tokens, got ", rows.num_rows, ".");
  rows.token_ids = checked_ids(op, "token_ids", token_ids, rows.num_rows, decoder.vocab_size);
  rows.position_ids = checked_ids(op, "position_ids", position_ids, rows.num_rows, num_positions(decoder));
  rows.cache_ids = checked_ids(op, "cache_ids", cache_ids, rows.num_rows, cache.num_seqs());
  DYNSKIP_CHECK(
      active.dim() == 2 && active.size(0) == num_layers && active.size(1) == rows.num_rows && active.is_contiguous() &&
          active.scalar_type() == ScalarType::Bool,
      op, ": active must be contiguous [", num_layers, ", ", rows.num_rows, "] bool, got ", shape_of(active), ".");
  rows.active = static_cast<const uint8_t*>(active.data_ptr());
  return rows;
}

int64_t* checked_counts(const char* op, const Decoder& decoder, const Tensor& counts) {
  const int64_t num_layers = decoder.layers.size();
  DYNSKIP_CHECK(
      counts.scalar_type() == ScalarType::Long && counts.is_contiguous() && counts.numel() == 2 * num_layers,
      op, ": counts must be contiguous [2, ", num_layers, "] int64.");
  return static_cast<int64_t*>(counts.data_ptr());
}

void run_step(
    const char* op, Decoder& decoder, const StepCache& cache, const StepRows& rows, void* result, int64_t* tokens,
    int64_t* counts) {
  make_team(decoder);
  decoder.find_addresses();
  StepPlan plan = new_plan(decoder, rows);
  const RowPlan whole = row_plan(cache, rows, plan);
  std::vector<int32_t> of_layers(2 * decoder.layers.size());
  for_element_type(decoder.dtype(), op, [&](auto element) {
    using Element = decltype(element);
    const bool is_larger = rows.num_rows > decoder.max_rows;
    if (is_larger) {
      decoder.max_rows = std::max(rows.num_rows, std::min(2 * decoder.max_rows, decoder.max_rows + kBlockRows));
    }
    Step<Element> step(decoder, rows.num_rows, plan, whole, rows.gate, of_layers.data());
    if (is_larger) {
      decoder.memory.reset();
      decoder.memory = zeroed_memory(step.num_bytes());
    }
    const int64_t most_inputs = std::max({decoder.hidden_size, decoder.ffn_size, decoder.num_heads * decoder.head_size,
                                          decoder.embedding_size});
    for (std::vector<float>& scratch : decoder.scratch) {
      scratch.resize(
          std::max({product_scratch_floats<Element>(std::min(decoder.max_rows, kBlockRows), most_inputs),
                    decode_attention_scratch_floats(decoder.num_heads, decoder.head_size),
                    prompt_attention_scratch_floats(
                        std::min(decoder.num_heads / decoder.num_kv_heads, kMostPromptHeads), decoder.head_size)}) +
          16);
    }
    if (rows.choices != nullptr) {
      for (ChoiceScratch& scratch : decoder.choice_scratch) {
        scratch.make_room(decoder.vocab_size);
      }
    }
    step.begin(cache, rows, static_cast<Element*>(result), tokens);
    if (plan.failure == PlanFailure::kNone) {
      decoder.team->run([&](Team::Member& member) { step.run(member); });
    }
  });
  DYNSKIP_CHECK(
      plan.failure != PlanFailure::kTableFull, op, ": slot_tables must have room for one more entry of each row, got a "
      "full table of ", whole.max_context_len, " entries. Create the cache for longer contexts.");
  DYNSKIP_CHECK(
      plan.failure != PlanFailure::kNoFreeSlot,
      op, ": free_slots must have a slot for each new key from slot_cursor on, got too few of ", whole.num_slots,
      ". Create the cache with more slots.");
  for (size_t i = 0; i < of_layers.size(); ++i) {
    counts[i] += of_layers[i];
  }
}

std::tuple<Tensor, Tensor> decode_step(
    int64_t handle,
    const Tensor& token_ids,
    const Tensor& position_ids,
    const Tensor& cache_ids,
    const Tensor& active,
    int64_t kv_policy,
    const Tensor& k_cache,
    const Tensor& v_cache,
    const std::optional<Tensor>& slot_positions,
    const Tensor& context_lens,
    const Tensor& slot_tables,
    const Tensor& free_slots,
    const Tensor& slot_cursor,
    const Tensor& counts,
    const std::optional<Tensor>& gate_weight,
    const std::optional<Tensor>& gate_bias,
    const std::optional<Tensor>& gate_asks,
    bool with_head,
    const std::optional<Tensor>& head_rows,
    bool is_prompt,
    bool is_timed,
    const std::optional<Tensor>& begun_rows,
    const std::optional<Tensor>& begun_states,
    std::vector<Tensor> choice_columns) {
  const std::shared_ptr<Decoder> held = decoder_at(handle);
  Decoder& decoder = *held;
  const std::lock_guard<std::mutex> lock(decoder.mutex);
  const int64_t num_layers = decoder.layers.size();
  const StepCache cache = {k_cache, v_cache, slot_positions, context_lens, slot_tables, free_slots, slot_cursor};
  check_cache("decode_step", decoder, cache);
  StepRows rows = checked_rows("decode_step", decoder, cache, token_ids, position_ids, cache_ids, active);
  DYNSKIP_CHECK(kv_policy >= 0 && kv_policy <= 3, "decode_step: kv_policy must be 0..3, got ", kv_policy, ".");
  rows.kv_policy = static_cast<KVPolicy>(kv_policy);
  rows.is_prompt = is_prompt;
  rows.is_timed = is_timed;
  if (gate_weight.has_value()) {
    DYNSKIP_CHECK(
        gate_weight->numel() == num_layers * 2 * decoder.hidden_size && gate_weight->is_contiguous() &&
            gate_weight->scalar_type() == ScalarType::Float && gate_asks.has_value() &&
            gate_asks->numel() == num_layers && gate_asks->scalar_type() == ScalarType::Bool && gate_asks->is_contiguous(),
        "decode_step: gate_weight must be contiguous [", num_layers, ", 2, ", decoder.hidden_size,
        "] float32, and gate_asks [", num_layers, "] bool.");
    DYNSKIP_CHECK(
        !gate_bias.has_value() || (gate_bias->numel() == num_layers * 2 && gate_bias->is_contiguous() &&
                                   gate_bias->scalar_type() == ScalarType::Float),
        "decode_step: gate_bias must be contiguous [", num_layers, ", 2] float32.");
    rows.gate.weight = static_cast<const float*>(gate_weight->data_ptr());
    rows.gate.bias = gate_bias.has_value() ? static_cast<const float*>(gate_bias->data_ptr()) : nullptr;
    rows.gate.asks = static_cast<const bool*>(gate_asks->data_ptr());
  }
  rows.with_head = with_head;
  rows.num_head_rows = rows.num_rows;
  if (head_rows.has_value()) {
    rows.num_head_rows = head_rows->numel();
    DYNSKIP_CHECK(
        rows.num_head_rows <= rows.num_rows, "decode_step: head_rows must be at most ", rows.num_rows, " rows.");
    rows.head_rows = checked_ids("decode_step", "head_rows", *head_rows, rows.num_head_rows, rows.num_rows);
  }
  DYNSKIP_CHECK(with_head || choice_columns.empty(), "decode_step: choices must be none without a head.");
  const std::vector<Choice> choices = checked_choices("decode_step", choice_columns, rows.num_head_rows);
  rows.choices = choices.empty() ? nullptr : choices.data();
  const std::vector<const void*> begun = checked_begun(decoder, rows.num_rows, begun_rows, begun_states);
  rows.begun = begun.empty() ? nullptr : begun.data();
  int64_t* counted = checked_counts("decode_step", decoder, counts);

  Tensor result = with_head ? torch::stable::empty({rows.num_head_rows, decoder.vocab_size}, decoder.dtype())
                            : torch::stable::empty({rows.num_rows, decoder.hidden_size}, decoder.dtype());
  Tensor tokens = torch::stable::empty({with_head ? rows.num_head_rows : 0}, ScalarType::Long);
  run_step(
      "decode_step", decoder, cache, rows, result.data_ptr(), static_cast<int64_t*>(tokens.data_ptr()), counted);
  return {result, tokens};
}

} // namespace dynskip
