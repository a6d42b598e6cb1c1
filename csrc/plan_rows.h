// Active masks to row lists, counts and slots, as dynskip.ops.row_reference.plan_rows specifies; one body for CPU and GPU.
//
// The work is cut into phases. In a phase every thread does its share and reads nothing that another thread writes in
// it; between phases all threads wait for each other. A GPU runs the phases with the threads of one block, a CPU takes
// the threads of a phase one after the other.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DYNSKIP_HOST_DEVICE __host__ __device__
#else
#define DYNSKIP_HOST_DEVICE
#endif

namespace dynskip {

// The values of dynskip.ops.row_reference's policies.
enum class KVPolicy : int32_t { kAbsent, kEvict, kPropagate, kShare };

enum class PlanFailure : int32_t { kNone, kTableFull, kNoSuchSequence, kNoFreeSlot };

// The arguments of the op. Pointers of layers begin at the first layer planned; a stride counts elements.
struct RowPlan {
  int32_t num_layers;
  int32_t num_rows;
  int32_t num_seqs;
  int32_t max_context_len;
  int32_t num_slots;
  KVPolicy kv_policy;
  bool starts_step; // No row has run a layer of the step before.

  const uint8_t* active;
  const int32_t* cache_ids;
  int32_t* context_lens;
  int32_t* slot_tables;
  const int32_t* free_slots;
  int32_t* slot_cursor;
  int32_t* row_slots;
  int32_t* run_ids;
  int32_t* num_run;
  int32_t* kv_ids;
  int32_t* num_kv;
  int32_t* slots;
  int32_t* key_limits;

  int64_t active_stride;
  int64_t context_lens_stride;
  int64_t slot_tables_layer_stride;
  int64_t slot_tables_seq_stride;
  int64_t run_ids_stride;
  int64_t kv_ids_stride;
  int64_t slots_stride;
  int64_t key_limits_stride;
};

// What the threads share, in memory of num_bytes(): one bit a row, its lowest bit first, padded to whole words.
struct PlanScratch {
  uint64_t* run; // [num_layers, num_words]: the rows that run a layer.
  uint64_t* kv; // [num_layers, num_words]: the rows that compute a key and a value there.
  uint64_t* takes_part; // [num_words]: the rows with a sequence.
  uint64_t* has_slot; // [num_words]: the rows that have run an earlier layer of the step.
  int32_t* first_places; // [num_layers + 1]: where the first new key of a layer finds its slot; last, the next cursor.
  int32_t* num_run; // [num_layers]: how many rows run a layer.
  int32_t* cursor; // [1]: the place of the next free slot, as the call found it.
  int32_t num_words;

  DYNSKIP_HOST_DEVICE static int32_t words_for(int32_t num_rows) {
    return (num_rows + 63) / 64;
  }

  DYNSKIP_HOST_DEVICE static int64_t num_bytes(int32_t num_layers, int32_t num_rows) {
    return (2 * int64_t{num_layers} + 2) * words_for(num_rows) * 8 + (2 * int64_t{num_layers} + 2) * 4;
  }

  DYNSKIP_HOST_DEVICE PlanScratch(uint64_t* memory, int32_t num_layers, int32_t num_rows)
      : num_words(words_for(num_rows)) {
    const int64_t layer_words = int64_t{num_layers} * num_words;
    run = memory;
    kv = run + layer_words;
    takes_part = kv + layer_words;
    has_slot = takes_part + num_words;
    first_places = reinterpret_cast<int32_t*>(has_slot + num_words);
    num_run = first_places + num_layers + 1;
    cursor = num_run + num_layers;
  }
};

DYNSKIP_HOST_DEVICE inline int32_t num_bits(uint64_t word) {
#ifdef __CUDA_ARCH__
  return __popcll(word);
#else
  return __builtin_popcountll(word);
#endif
}

DYNSKIP_HOST_DEVICE inline bool has_bit(const uint64_t* words, int32_t row) {
  return (words[row / 64] >> (row % 64)) & 1;
}

// How many of the rows before this one are in the set.
DYNSKIP_HOST_DEVICE inline int32_t rank(const uint64_t* words, int32_t row) {
  int32_t count = 0;
  for (int32_t word = 0; word < row / 64; ++word) {
    count += num_bits(words[word]);
  }
  return count + num_bits(words[row / 64] & ((uint64_t{1} << (row % 64)) - 1));
}

// The bits of 8 rows for which contains(row) holds.
template <typename Contains>
DYNSKIP_HOST_DEVICE inline uint8_t bits_of(int32_t first_row, int32_t num_rows, const Contains& contains) {
  uint32_t bits = 0;
  for (int32_t i = 0; i < 8; ++i) {
    const int32_t row = first_row + i;
    if (row < num_rows && contains(row)) {
      bits |= 1u << i;
    }
  }
  return static_cast<uint8_t>(bits);
}

// Reads what the caller gave as sets of rows, 8 rows of a set at a time.
DYNSKIP_HOST_DEVICE inline void read_masks(
    const RowPlan& plan, const PlanScratch& scratch, int32_t thread, int32_t num_threads) {
  if (thread == 0) {
    *scratch.cursor = *plan.slot_cursor;
  }
  const int32_t num_groups = scratch.num_words * 8;
  for (int32_t unit = thread; unit < (plan.num_layers + 2) * num_groups; unit += num_threads) {
    const int32_t set = unit / num_groups;
    const int32_t group = unit % num_groups;
    if (set < plan.num_layers) {
      const uint8_t* mask = plan.active + set * plan.active_stride;
      reinterpret_cast<uint8_t*>(scratch.run)[unit] =
          bits_of(group * 8, plan.num_rows, [&](int32_t row) { return mask[row] != 0; });
    } else if (set == plan.num_layers) {
      reinterpret_cast<uint8_t*>(scratch.takes_part)[group] =
          bits_of(group * 8, plan.num_rows, [&](int32_t row) { return plan.cache_ids[row] >= 0; });
    } else {
      reinterpret_cast<uint8_t*>(scratch.has_slot)[group] =
          bits_of(group * 8, plan.num_rows, [&](int32_t row) { return !plan.starts_step && plan.row_slots[row] >= 0; });
    }
  }
}

// Decides who computes a key and a value, 8 rows at a time through the layers in order.
DYNSKIP_HOST_DEVICE inline void decide(
    const RowPlan& plan, const PlanScratch& scratch, int32_t thread, int32_t num_threads) {
  const int32_t num_groups = scratch.num_words * 8;
  uint8_t* runs = reinterpret_cast<uint8_t*>(scratch.run);
  uint8_t* kvs = reinterpret_cast<uint8_t*>(scratch.kv);
  for (int32_t group = thread; group < num_groups; group += num_threads) {
    const uint8_t takes_part = reinterpret_cast<const uint8_t*>(scratch.takes_part)[group];
    uint8_t has_slot = reinterpret_cast<const uint8_t*>(scratch.has_slot)[group];
    for (int32_t layer = 0; layer < plan.num_layers; ++layer) {
      const int32_t place = layer * num_groups + group;
      const uint8_t run = runs[place] & takes_part;
      uint8_t kv = run;
      if (plan.kv_policy == KVPolicy::kPropagate) {
        kv = takes_part;
      } else if (plan.kv_policy == KVPolicy::kShare) {
        kv = takes_part & (run | ~has_slot);
      }
      runs[place] = run;
      kvs[place] = kv;
      has_slot |= run;
    }
  }
}

// Counts the rows of each layer, and from the keys of all layers before finds the place of its first slot.
DYNSKIP_HOST_DEVICE inline void count(
    const RowPlan& plan, const PlanScratch& scratch, int32_t thread, int32_t num_threads) {
  const int32_t num_words = scratch.num_words;
  for (int32_t layer = thread; layer <= plan.num_layers; layer += num_threads) {
    int32_t first_place = *scratch.cursor;
    for (int32_t word = 0; word < layer * num_words; ++word) {
      first_place += num_bits(scratch.kv[word]);
    }
    scratch.first_places[layer] = first_place;
    if (layer < plan.num_layers) {
      int32_t num_run = 0;
      int32_t num_kv = 0;
      for (int32_t word = layer * num_words; word < (layer + 1) * num_words; ++word) {
        num_run += num_bits(scratch.run[word]);
        num_kv += num_bits(scratch.kv[word]);
      }
      scratch.num_run[layer] = plan.num_run[layer] = num_run;
      plan.num_kv[layer] = num_kv;
    }
  }
}

// The slot of the key with this rank among the new keys of a layer, or -1 where no slot is free for it.
DYNSKIP_HOST_DEVICE inline int32_t new_slot(
    const RowPlan& plan, const PlanScratch& scratch, int32_t layer, int32_t key_rank) {
  const int32_t place = scratch.first_places[layer] + key_rank;
  return static_cast<uint32_t>(place) < static_cast<uint32_t>(plan.num_slots) ? plan.free_slots[place] : -1;
}

// The slot of the last layer before this one that the row ran in this step, or -1.
DYNSKIP_HOST_DEVICE inline int32_t last_slot(
    const RowPlan& plan, const PlanScratch& scratch, int32_t layer, int32_t row) {
  for (int32_t earlier = layer - 1; earlier >= 0; --earlier) {
    if (has_bit(scratch.run + earlier * scratch.num_words, row)) {
      return new_slot(plan, scratch, earlier, rank(scratch.kv + earlier * scratch.num_words, row));
    }
  }
  return plan.starts_step ? -1 : plan.row_slots[row];
}

// Writes the lists, and appends to the tables: one row of one layer at a time, and as many places of the lists.
DYNSKIP_HOST_DEVICE inline PlanFailure append(
    const RowPlan& plan, const PlanScratch& scratch, int32_t thread, int32_t num_threads) {
  PlanFailure failure = PlanFailure::kNone;
  for (int32_t pair = thread; pair < plan.num_layers * plan.num_rows; pair += num_threads) {
    const int32_t layer = pair / plan.num_rows;
    const int32_t row = pair % plan.num_rows;
    const uint64_t* run = scratch.run + layer * scratch.num_words;
    const uint64_t* kv = scratch.kv + layer * scratch.num_words;
    int32_t slot = -1;
    int32_t key_limit = 0;
    int32_t* run_ids = plan.run_ids + layer * plan.run_ids_stride;
    int32_t* kv_ids = plan.kv_ids + layer * plan.kv_ids_stride;
    // No row has a place of this number or a higher one: the end of the list, which kernels look for.
    if (row >= scratch.num_run[layer]) {
      run_ids[row] = -1;
    }
    if (row >= scratch.first_places[layer + 1] - scratch.first_places[layer]) {
      kv_ids[row] = -1;
    }
    if (has_bit(run, row)) {
      run_ids[rank(run, row)] = row;
    }
    if (has_bit(kv, row)) {
      const int32_t place = rank(kv, row);
      kv_ids[place] = row;
      slot = new_slot(plan, scratch, layer, place);
      // Such a key is neither stored nor appended, and reported: a wrong bound never reads or writes other memory.
      failure = slot < 0 ? PlanFailure::kNoFreeSlot : failure;
    }
    if (has_bit(scratch.takes_part, row)) {
      const int32_t seq = plan.cache_ids[row];
      const bool all_get_entries = plan.kv_policy == KVPolicy::kShare;
      const int32_t entry = !has_bit(kv, row) && all_get_entries ? last_slot(plan, scratch, layer, row) : slot;
      if (seq >= plan.num_seqs) {
        failure = PlanFailure::kNoSuchSequence;
      } else {
        key_limit = plan.context_lens[layer * plan.context_lens_stride + seq];
        for (int32_t before = row - 1; before >= 0 && plan.cache_ids[before] == seq; --before) {
          key_limit += all_get_entries || has_bit(kv, before) ? 1 : 0;
        }
        // Nor is an entry that does not fit.
        if (entry >= 0 && static_cast<uint32_t>(key_limit) >= static_cast<uint32_t>(plan.max_context_len)) {
          failure = PlanFailure::kTableFull;
        } else if (entry >= 0) {
          int32_t* table =
              plan.slot_tables + layer * plan.slot_tables_layer_stride + seq * plan.slot_tables_seq_stride;
          table[key_limit] = entry;
          ++key_limit;
        }
      }
    }
    plan.slots[layer * plan.slots_stride + row] = slot;
    plan.key_limits[layer * plan.key_limits_stride + row] = key_limit;
  }
  return failure;
}

// Leaves to the next call what it starts from: the last row of a sequence has seen all its entries.
DYNSKIP_HOST_DEVICE inline void hand_over(
    const RowPlan& plan, const PlanScratch& scratch, int32_t thread, int32_t num_threads) {
  for (int32_t row = thread; row < plan.num_rows; row += num_threads) {
    plan.row_slots[row] = last_slot(plan, scratch, plan.num_layers, row);
    const int32_t seq = plan.cache_ids[row];
    const bool is_last = row + 1 == plan.num_rows || plan.cache_ids[row + 1] != seq;
    if (is_last && seq >= 0 && seq < plan.num_seqs) {
      for (int32_t layer = 0; layer < plan.num_layers; ++layer) {
        plan.context_lens[layer * plan.context_lens_stride + seq] = plan.key_limits[layer * plan.key_limits_stride + row];
      }
    }
  }
  if (thread == 0) {
    const int32_t next_place = scratch.first_places[plan.num_layers];
    *plan.slot_cursor = next_place < plan.num_slots ? next_place : plan.num_slots;
  }
}

constexpr int32_t kNumPlanPhases = 5;

// The share of one thread in one phase, or what it could not do.
DYNSKIP_HOST_DEVICE inline PlanFailure run_phase(
    int32_t phase, const RowPlan& plan, const PlanScratch& scratch, int32_t thread, int32_t num_threads) {
  switch (phase) {
    case 0:
      read_masks(plan, scratch, thread, num_threads);
      break;
    case 1:
      decide(plan, scratch, thread, num_threads);
      break;
    case 2:
      count(plan, scratch, thread, num_threads);
      break;
    case 3:
      return append(plan, scratch, thread, num_threads);
    default:
      hand_over(plan, scratch, thread, num_threads);
  }
  return PlanFailure::kNone;
}

// Runs the phases on the calling thread, which takes the part of each of num_threads in turn.
PlanFailure plan_rows_on_cpu(const RowPlan& plan, int32_t num_threads);

// Launches one block on torch's current stream; 0 threads: as many as there is work for. A PlanFailure is an assertion
// on the device. overlaps, carveout: see ops.h.
void plan_rows_on_cuda(
    const RowPlan& plan, int32_t num_threads, int32_t device_index, bool overlaps = true, int32_t carveout = -1);

} // namespace dynskip
