#include "ops.h"

#include <atomic>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "dispatch.h"
#include "kernels.h"

namespace dynskip {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many cached bytes a second thread costs more than it saves.
constexpr int64_t kMinParallelBytes = 128 * 1024;
// Tasks for each thread, so that threads which meet short rows, or a busy core, do not hold up the others.
constexpr int64_t kTasksPerThread = 4;

// What scores depend on beside queries and keys.
struct Bias {
  const float* slopes;
  int64_t window;
  const int64_t* positions;
  const int32_t* slot_positions;
};

template <typename Element>
void attend(
    const Tensor& q,
    const Tensor& k_cache,
    const Tensor& v_cache,
    const Tensor& slot_table,
    const Tensor& seq_ids,
    const Tensor& context_lens,
    float scale,
    const Bias& bias,
    Tensor& out) {
  const auto kernel = kernels().of<Element>().decode_attention;
  const int64_t num_rows = q.size(0);
  const int64_t num_heads = q.size(1);
  const int64_t head_size = q.size(2);
  const int64_t num_kv_heads = k_cache.size(1);
  const int64_t group_size = num_heads / num_kv_heads;
  const int64_t slot_stride = num_kv_heads * head_size;
  const int64_t num_slots = k_cache.size(0);
  const int64_t num_sequences = slot_table.size(0);
  const int64_t table_size = slot_table.size(1);
  const int64_t query_stride = q.stride(0);
  const auto* query = static_cast<const Element*>(q.data_ptr());
  const auto* keys = static_cast<const Element*>(k_cache.data_ptr());
  const auto* values = static_cast<const Element*>(v_cache.data_ptr());
  const auto* table = static_cast<const int32_t*>(slot_table.data_ptr());
  const auto* sequences = static_cast<const int32_t*>(seq_ids.data_ptr());
  const auto* lengths = static_cast<const int32_t*>(context_lens.data_ptr());
  auto* result = static_cast<Element*>(out.data_ptr());

  // A wrong entry here would read foreign memory, and checking them costs less than a thousandth of the reads.
  int64_t num_tokens = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    DYNSKIP_CHECK(
        sequences[row] >= 0 && sequences[row] < num_sequences && lengths[row] >= 0 && lengths[row] <= table_size,
        "decode_attention: seq_ids and context_lens must lie within slot_table [",
        num_sequences, ", ", table_size, "], got sequence ", sequences[row], " of length ", lengths[row], " in row ", row, ".");
    const int32_t* slots = table + sequences[row] * table_size;
    for (int64_t token = 0; token < lengths[row]; ++token) {
      DYNSKIP_CHECK(
          slots[token] >= 0 && slots[token] < num_slots,
          "decode_attention: slot_table must hold slots 0..", num_slots - 1, " below context_lens, got ", slots[token],
          " for token ", token, " of row ", row, ".");
    }
    num_tokens += lengths[row];
  }

  const int64_t num_bytes = num_tokens * slot_stride * 2 * static_cast<int64_t>(sizeof(Element));
  const int64_t num_threads = num_bytes < kMinParallelBytes ? 1 : torch::stable::get_num_threads();
  const int64_t blocks_wanted = num_threads == 1 ? 1 : (kTasksPerThread * num_threads + num_rows - 1) / num_rows;
  int64_t block_heads = (num_heads + blocks_wanted - 1) / blocks_wanted;
  if (num_rows * num_kv_heads >= num_threads) {
    block_heads = (block_heads + group_size - 1) / group_size * group_size;
  }
  const int64_t num_blocks = (num_heads + block_heads - 1) / block_heads;
  const int64_t num_tasks = num_rows * num_blocks;

  std::atomic<int64_t> next_task{0};
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t, int64_t) {
    thread_local std::vector<float> scratch;
    scratch.resize(decode_attention_scratch_floats(block_heads, head_size));
    for (int64_t i = next_task++; i < num_tasks; i = next_task++) {
      const int64_t row = i / num_blocks;
      const int64_t first_head = i % num_blocks * block_heads;
      DecodeAttentionTask<Element> task;
      task.query = query + row * query_stride;
      task.k_cache = keys;
      task.v_cache = values;
      task.slots = table + sequences[row] * table_size;
      task.out = result + row * num_heads * head_size;
      task.scratch = scratch.data();
      task.num_tokens = lengths[row];
      task.slot_stride = slot_stride;
      task.first_head = first_head;
      task.num_heads = first_head + block_heads <= num_heads ? block_heads : num_heads - first_head;
      task.head_size = head_size;
      task.group_size = group_size;
      task.scale = scale;
      task.slopes = bias.slopes;
      task.window = bias.window;
      task.position = bias.positions != nullptr ? bias.positions[row] : 0;
      task.slot_positions = bias.slot_positions;
      kernel(task);
    }
  });
}

} // namespace

Tensor decode_attention(
    const Tensor& q,
    const Tensor& k_cache,
    const Tensor& v_cache,
    const Tensor& slot_table,
    const Tensor& seq_ids,
    const Tensor& context_lens,
    double scale,
    const std::optional<Tensor>& slopes,
    int64_t window,
    const std::optional<Tensor>& position_ids,
    const std::optional<Tensor>& slot_positions) {
  const int64_t num_rows = q.size(0);
  DYNSKIP_CHECK(q.dim() == 3, "decode_attention: q must be [R, H, D], got ", shape_of(q), ".");
  DYNSKIP_CHECK(q.stride(2) == 1 && q.stride(1) == q.size(2),
      "decode_attention: q must have contiguous heads. Use q.contiguous().");
  for (const Tensor* cache : {&k_cache, &v_cache}) {
    DYNSKIP_CHECK(
        cache->dim() == 3 && cache->size(2) == q.size(2) && cache->is_contiguous() &&
            cache->scalar_type() == q.scalar_type(),
        "decode_attention: k_cache and v_cache must be contiguous [num_slots, G, ", q.size(2), "] of q's dtype, got ",
        shape_of(*cache), ".");
    DYNSKIP_CHECK(
        cache->size(1) == k_cache.size(1) && cache->size(1) > 0 && q.size(1) % cache->size(1) == 0,
        "decode_attention: the heads of k_cache and v_cache must be equally many and divide the ", q.size(1),
        " heads of q, got ", cache->size(1), ".");
  }
  DYNSKIP_CHECK(k_cache.size(0) == v_cache.size(0), "decode_attention: k_cache and v_cache must have equally many slots.");
  DYNSKIP_CHECK(
      !slopes.has_value() ||
          (slopes->numel() == q.size(1) && slopes->is_contiguous() && slopes->scalar_type() == ScalarType::Float),
      "decode_attention: slopes must be contiguous [", q.size(1), "] float32.");
  DYNSKIP_CHECK(window >= 0, "decode_attention: window must be at least 0, got ", window, ".");
  const bool needs_positions = slopes.has_value() || window > 0;
  DYNSKIP_CHECK(
      !needs_positions ||
          (position_ids.has_value() && position_ids->numel() == num_rows && position_ids->is_contiguous() &&
           position_ids->scalar_type() == ScalarType::Long),
      "decode_attention: position_ids must be contiguous [", num_rows, "] int64 with slopes or a window.");
  DYNSKIP_CHECK(
      !needs_positions ||
          (slot_positions.has_value() && slot_positions->numel() == k_cache.size(0) && is_int32_contiguous(*slot_positions)),
      "decode_attention: slot_positions must be contiguous [", k_cache.size(0), "] int32 with slopes or a window.");
  DYNSKIP_CHECK(slot_table.dim() == 2 && is_int32_contiguous(slot_table),
      "decode_attention: slot_table must be contiguous [B, S_max] int32.");
  DYNSKIP_CHECK(is_int32_contiguous(seq_ids) && seq_ids.numel() == num_rows,
      "decode_attention: seq_ids must be contiguous [", num_rows, "] int32.");
  DYNSKIP_CHECK(is_int32_contiguous(context_lens) && context_lens.numel() == num_rows,
      "decode_attention: context_lens must be contiguous [", num_rows, "] int32.");

  Tensor out = torch::stable::empty({num_rows, q.size(1), q.size(2)}, q.scalar_type());
  if (out.numel() == 0) {
    return out;
  }
  Bias bias = {};
  if (needs_positions) {
    bias.slopes = slopes.has_value() ? static_cast<const float*>(slopes->data_ptr()) : nullptr;
    bias.window = window;
    bias.positions = static_cast<const int64_t*>(position_ids->data_ptr());
    bias.slot_positions = static_cast<const int32_t*>(slot_positions->data_ptr());
  }
  for_element_type(q.scalar_type(), "decode_attention", [&](auto element) {
    attend<decltype(element)>(
        q, k_cache, v_cache, slot_table, seq_ids, context_lens, static_cast<float>(scale), bias, out);
  });
  return out;
}

} // namespace dynskip
