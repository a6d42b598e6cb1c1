// A decode step as the ops that run one or several of them describe it: the cache, the rows, and what comes of them.

#pragma once

#include <cstdint>
#include <optional>

#include <torch/csrc/stable/tensor.h>

#include "choose.h"
#include "decoder.h"
#include "plan_rows.h"

namespace dynskip {

// The tensors of dynskip.execution.kv_cache.KVCache.
struct StepCache {
  const torch::stable::Tensor& k_cache;
  const torch::stable::Tensor& v_cache;
  const std::optional<torch::stable::Tensor>& slot_positions;
  const torch::stable::Tensor& context_lens;
  const torch::stable::Tensor& slot_tables;
  const torch::stable::Tensor& free_slots;
  const torch::stable::Tensor& slot_cursor;

  int64_t num_seqs() const {
    return slot_tables.size(1);
  }
};

// What a gate reads: see dynskip.controllers.HiddenStateGate.
struct Gate {
  const float* weight = nullptr; // [L, 2, C]
  const float* bias = nullptr; // [L, 2]
  const bool* asks = nullptr; // [L]; null without a gate
};

// The state of a row in front of a layer, L for the last states, is written to out, [C]; nowhere where that is null.
struct KeptState {
  int64_t layer;
  void* out;
};

struct StepRows {
  int64_t num_rows;
  const int64_t* token_ids; // [num_rows]
  const int64_t* position_ids; // [num_rows]
  const int64_t* cache_ids; // [num_rows]
  const uint8_t* active; // [L, num_rows]
  KVPolicy kv_policy = KVPolicy::kAbsent;
  Gate gate;
  bool is_prompt = false;
  bool is_timed = false;

  // [num_rows], each null for a row that begins with its embedding, else the state [C] that it begins with; or null for
  // no such row.
  const void* const* begun = nullptr;
  const KeptState* kept = nullptr; // [num_rows], or null for none

  bool with_head = true;
  const int64_t* head_rows = nullptr; // [num_head_rows], or null for all
  int64_t num_head_rows = 0;
  const Choice* choices = nullptr; // [num_head_rows], or null for the most likely tokens
};

// How many positions the decoder's tables have.
int64_t num_positions(const Decoder& decoder);

// Raise, naming the op, where a caller's tensors are not what a step of the decoder reads and writes.
void check_cache(const char* op, const Decoder& decoder, const StepCache& cache);

// The same of one int64 column, [num_rows], of numbers in 0..end - 1; returns it.
const int64_t* checked_ids(
    const char* op, const char* name, const torch::stable::Tensor& ids, int64_t num_rows, int64_t end);

// The same of the rows; returns them without gate and head.
StepRows checked_rows(
    const char* op,
    const Decoder& decoder,
    const StepCache& cache,
    const torch::stable::Tensor& token_ids,
    const torch::stable::Tensor& position_ids,
    const torch::stable::Tensor& cache_ids,
    const torch::stable::Tensor& active);

// The counts to which steps add, [2, L].
int64_t* checked_counts(const char* op, const Decoder& decoder, const torch::stable::Tensor& counts);

// Runs a step; the decoder's mutex is held. With a head, result gets the logits [num_head_rows, V] and tokens
// [num_head_rows] what is chosen from them; without, result gets the last states [num_rows, C]. Raises, naming the op,
// where the cache is full.
void run_step(
    const char* op, Decoder& decoder, const StepCache& cache, const StepRows& rows, void* result, int64_t* tokens,
    int64_t* counts);

} // namespace dynskip
