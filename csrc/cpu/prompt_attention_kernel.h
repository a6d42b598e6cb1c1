// Attention of rows of one prompt over its keys, in blocks of rows and keys; included behind the target of an instruction
// set that multiplies pairs of bfloat16 numbers, by each file with a class for its products.
//
// Scores stand key by key, a row of the prompt in each lane: maxima and sums go from key to key in every lane alike, so
// that a row's result depends on its own query, keys and values alone, added in the order of the table. Keys behind a
// row's last one weigh exactly zero.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "lanes.h"

namespace dynskip {

namespace {

constexpr int64_t kHalves = kPromptRows / kNumLanes;
constexpr int64_t kKeys = kChunkTokens;
constexpr int64_t kWholeKeys = 32; // keys come in multiples of it, as whole tiles do
constexpr float kLowest = -1e30f; // below all scores, and finite: the difference of two is a number

using Pairs = uint32_t; // two bfloat16 numbers

template <int step>
DYNSKIP_INLINE void exchange(Lanes& a, Lanes& b) {
  const Lanes low = a;
  if constexpr (step == 8) {
    a = __builtin_shufflevector(low, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    b = __builtin_shufflevector(low, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  } else if constexpr (step == 4) {
    a = __builtin_shufflevector(low, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    b = __builtin_shufflevector(low, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  } else if constexpr (step == 2) {
    a = __builtin_shufflevector(low, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    b = __builtin_shufflevector(low, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  } else {
    a = __builtin_shufflevector(low, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    b = __builtin_shufflevector(low, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
}

template <int step>
DYNSKIP_INLINE void exchange_all(Lanes v[kNumLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kNumLanes; ++i) {
    if ((i & step) == 0) {
      exchange<step>(v[i], v[i + step]);
    }
  }
}

// Lane j of vector i becomes lane i of vector j; nothing is computed with the lanes.
DYNSKIP_INLINE void transpose(Lanes v[kNumLanes]) {
  exchange_all<8>(v);
  exchange_all<4>(v);
  exchange_all<2>(v);
  exchange_all<1>(v);
}

// Where the parts of a task lie in its scratch.
struct Parts {
  int64_t size; // of a head, as whole tiles of inputs
  Pairs* queries; // [heads, size / 2, kPromptRows], pairs of elements
  float* sums; // [heads, head_size, kPromptRows]
  float* largest; // [heads, kPromptRows]
  float* totals; // [heads, kPromptRows]
  BFloat16* keys; // [kKeys, size]
  BFloat16* values; // [head_size, kKeys]
  float* scores; // [kKeys, kPromptRows]
  Pairs* weights; // [kKeys / 2, kPromptRows], of pairs of keys

  Parts(const PromptAttentionTask& task) : size((task.head_size + 31) / 32 * 32) {
    float* next = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(task.scratch) + 63) / 64 * 64);
    const auto take = [&](int64_t num_floats) {
      float* part = next;
      next += num_floats;
      return part;
    };
    queries = reinterpret_cast<Pairs*>(take(task.num_heads * size / 2 * kPromptRows));
    sums = take(task.num_heads * task.head_size * kPromptRows);
    largest = take(task.num_heads * kPromptRows);
    totals = take(task.num_heads * kPromptRows);
    keys = reinterpret_cast<BFloat16*>(take(kKeys * size / 2));
    values = reinterpret_cast<BFloat16*>(take(kKeys * task.head_size / 2));
    scores = take(kKeys * kPromptRows);
    weights = reinterpret_cast<Pairs*>(take(kKeys / 2 * kPromptRows));
  }
};

// Pairs of elements of the queries, row by row in the lanes; zeros where there is no row or no element.
void read_queries(const PromptAttentionTask& task, const Parts& parts) {
  for (int64_t head = 0; head < task.num_heads; ++head) {
    const BFloat16* query = task.query + (task.first_head + head) * task.head_size;
    for (int64_t half = 0; half < kHalves; ++half) {
      for (int64_t d = 0; d < parts.size; d += 2 * kNumLanes) {
        Lanes pairs[kNumLanes] = {};
        const int64_t count = std::min<int64_t>(2 * kNumLanes, task.head_size - d);
        for (int64_t i = 0; i < kNumLanes && half * kNumLanes + i < task.num_rows; ++i) {
          std::memcpy(&pairs[i], query + (half * kNumLanes + i) * task.query_stride + d, count * sizeof(BFloat16));
        }
        transpose(pairs);
        Pairs* out = parts.queries + (head * parts.size + d) / 2 * kPromptRows + half * kNumLanes;
        for (int64_t i = 0; i < kNumLanes; ++i) {
          std::memcpy(out + i * kPromptRows, &pairs[i], sizeof(Lanes));
        }
      }
    }
  }
}

// The keys of a chunk side by side, and its values turned; places behind the last key repeat it.
void read_chunk(const PromptAttentionTask& task, const Parts& parts, int64_t first, int64_t num_keys) {
  const int64_t num_whole = (num_keys + kWholeKeys - 1) / kWholeKeys * kWholeKeys;
  const int64_t offset = task.kv_head * task.head_size;
  const auto place = [&](int64_t key) {
    return task.slots[first + std::min(key, num_keys - 1)] * task.slot_stride + offset;
  };
  for (int64_t key = 0; key < num_whole; ++key) {
    BFloat16* out = parts.keys + key * parts.size;
    std::memcpy(static_cast<void*>(out), task.k_cache + place(key), task.head_size * sizeof(BFloat16));
    std::memset(
        static_cast<void*>(out + task.head_size), 0, (parts.size - task.head_size) * sizeof(BFloat16));
  }
  for (int64_t key = 0; key < num_whole; key += kWholeKeys) {
    for (int64_t d = 0; d < task.head_size; d += kNumLanes) {
      Lanes pairs[kNumLanes];
      for (int64_t i = 0; i < kNumLanes; ++i) {
        HalfBits even, odd;
        std::memcpy(&even, task.v_cache + place(key + 2 * i) + d, sizeof(even));
        std::memcpy(&odd, task.v_cache + place(key + 2 * i + 1) + d, sizeof(odd));
        pairs[i] = (Lanes)(__builtin_convertvector(even, BitLanes) | (__builtin_convertvector(odd, BitLanes) << 16));
      }
      transpose(pairs);
      for (int64_t i = 0; i < kNumLanes; ++i) {
        std::memcpy(static_cast<void*>(parts.values + (d + i) * kKeys + key), &pairs[i], sizeof(Lanes));
      }
    }
  }
}

// Turns the scores of a chunk into weights, rounded to bfloat16; the sums over earlier chunks shrink to the new maximum.
void weigh(const PromptAttentionTask& task, const Parts& parts, int64_t head, int64_t first, int64_t num_keys) {
  const int64_t num_whole = (num_keys + kWholeKeys - 1) / kWholeKeys * kWholeKeys;
  const bool by_position = task.slopes != nullptr || task.window > 0;
  const float slope = task.slopes == nullptr ? 0.0f : task.slopes[task.first_head + head];
  for (int64_t half = 0; half < kHalves; ++half) {
    float* scores = parts.scores + half * kNumLanes;
    float* largest = parts.largest + head * kPromptRows + half * kNumLanes;
    float* totals = parts.totals + head * kPromptRows + half * kNumLanes;
    IntLanes limits, positions;
    std::memcpy(&limits, task.key_limits + half * kNumLanes, sizeof(limits));
    std::memcpy(&positions, task.positions + half * kNumLanes, sizeof(positions));
    int64_t least = first + num_whole;
    for (int64_t lane = 0; lane < kNumLanes; ++lane) {
      least = std::min<int64_t>(least, limits[lane]);
    }
    const Lanes before = load(largest);
    Lanes now = before;
    for (int64_t key = 0; key < num_whole; ++key) {
      Lanes s = load(scores + key * kPromptRows) * task.scale;
      if (by_position && key < num_keys) {
        const IntLanes distance = positions - task.slot_positions[task.slots[first + key]];
        s -= slope * __builtin_convertvector(distance, Lanes);
        if (task.window > 0) {
          s = select(distance < static_cast<int32_t>(task.window), s, broadcast(-INFINITY));
        }
      }
      if (first + key >= least) {
        s = select(limits > static_cast<int32_t>(first + key), s, broadcast(-INFINITY));
      }
      store(scores + key * kPromptRows, s);
      now = maximum(now, s);
    }
    Lanes total = {};
    for (int64_t key = 0; key < num_whole; key += 2) {
      const Lanes even = exp_nonpositive(load(scores + key * kPromptRows) - now);
      const Lanes odd = exp_nonpositive(load(scores + (key + 1) * kPromptRows) - now);
      total += even;
      total += odd;
      const BitLanes pairs = rounded_bits(even) | (rounded_bits(odd) << 16);
      std::memcpy(parts.weights + key / 2 * kPromptRows + half * kNumLanes, &pairs, sizeof(pairs));
    }
    store(largest, now);
    if (first == 0) {
      store(totals, total);
      continue;
    }
    const Lanes shrink = exp_nonpositive(before - now);
    store(totals, load(totals) * shrink + total);
    float* sums = parts.sums + head * task.head_size * kPromptRows + half * kNumLanes;
    for (int64_t d = 0; d < task.head_size; ++d) {
      store(sums + d * kPromptRows, load(sums + d * kPromptRows) * shrink);
    }
  }
}

void write(const PromptAttentionTask& task, const Parts& parts, int64_t head) {
  for (int64_t half = 0; half < kHalves; ++half) {
    const Lanes total = load(parts.totals + head * kPromptRows + half * kNumLanes);
    for (int64_t d = 0; d < task.head_size; d += kNumLanes) {
      const float* sums = parts.sums + (head * task.head_size + d) * kPromptRows + half * kNumLanes;
      Lanes rows[kNumLanes];
      for (int64_t i = 0; i < kNumLanes; ++i) {
        rows[i] = load(sums + i * kPromptRows) / total;
      }
      transpose(rows);
      BFloat16* out = task.out + (task.first_head + head) * task.head_size + d;
      for (int64_t i = 0; i < kNumLanes && half * kNumLanes + i < task.num_rows; ++i) {
        store(out + (half * kNumLanes + i) * task.out_stride, rows[i]);
      }
    }
  }
}

// Whether no row of a task sees a key of the chunk.
bool is_out_of_window(const PromptAttentionTask& task, int64_t first, int64_t num_keys) {
  if (task.window == 0) {
    return false;
  }
  const int32_t position = *std::min_element(task.positions, task.positions + task.num_rows);
  for (int64_t key = 0; key < num_keys; ++key) {
    if (position - task.slot_positions[task.slots[first + key]] < task.window) {
      return false;
    }
  }
  return true;
}

// Products: `multiply(left, left_stride, right, num_pairs, num_rows, begins, out)` makes out [num_rows, kPromptRows] (+)=
// left [num_rows, 2 * num_pairs] times right [num_pairs, kPromptRows], of pairs of elements. num_pairs and num_rows are
// multiples of 16. Its constructor and destructor frame a task.
template <typename Products>
void attend_prompt_by(const PromptAttentionTask& task) {
  const Parts parts(task);
  const Products products;
  read_queries(task, parts);
  std::fill_n(parts.largest, task.num_heads * kPromptRows, kLowest);
  std::fill_n(parts.totals, task.num_heads * kPromptRows, 0.0f);
  std::fill_n(parts.sums, task.num_heads * task.head_size * kPromptRows, 0.0f);
  const int64_t end = *std::max_element(task.key_limits, task.key_limits + task.num_rows);
  for (int64_t first = 0; first < end; first += kKeys) {
    const int64_t num_keys = std::min(kKeys, end - first);
    if (is_out_of_window(task, first, num_keys)) {
      continue;
    }
    const int64_t num_whole = (num_keys + kWholeKeys - 1) / kWholeKeys * kWholeKeys;
    read_chunk(task, parts, first, num_keys);
    for (int64_t head = 0; head < task.num_heads; ++head) {
      const Pairs* queries = parts.queries + head * parts.size / 2 * kPromptRows;
      float* sums = parts.sums + head * task.head_size * kPromptRows;
      products.multiply(parts.keys, parts.size, queries, parts.size / 2, num_whole, true, parts.scores);
      weigh(task, parts, head, first, num_keys);
      products.multiply(parts.values, kKeys, parts.weights, num_whole / 2, task.head_size, first == 0, sums);
    }
  }
  for (int64_t head = 0; head < task.num_heads; ++head) {
    write(task, parts, head);
  }
}

constexpr bool takes_heads(int64_t head_size) {
  return head_size % 16 == 0 && head_size <= kMostPromptHeadSize;
}

} // namespace
} // namespace dynskip
