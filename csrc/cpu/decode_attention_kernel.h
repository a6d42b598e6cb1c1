// Attention of one query row over cached tokens; compiled once for each instruction set.
//
// A head's result depends on its own query, keys and values alone, and they are always added in the same order: tokens
// in the order of the table, in chunks of kChunkTokens, those outside of a window left out.

#pragma once

#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "lanes.h"

namespace dynskip {
namespace {

constexpr int kPairLanes = 2 * kNumLanes;

// A tile is four tokens of four heads: their sixteen scores fill a vector, and the rows of four slots are read side by
// side. Sixteen rows of a power-of-two stride would share too few ways of the first cache.
constexpr int kTileTokens = 4;
constexpr int kTileHeads = kNumLanes / kTileTokens;

// Fetches a part of the rows that are read next; slots lie scattered, so the hardware cannot guess them.
template <typename Element>
DYNSKIP_INLINE void prefetch(const Element* const next_rows[kTileTokens], int64_t begin, int64_t end) {
  constexpr int64_t kLineElements = 64 / sizeof(Element);
  for (int64_t d = begin; d < end; d += kLineElements) {
#pragma GCC unroll 4
    for (int i = 0; i < kTileTokens; ++i) {
      __builtin_prefetch(next_rows[i] + d);
    }
  }
}

// Scores of four tokens for every head.
template <typename Element>
DYNSKIP_INLINE void score_tile(
    int64_t num_heads,
    int64_t head_size,
    float scale,
    const Element* const rows[kTileTokens],
    const Element* const next_rows[kTileTokens],
    const float* query,
    float* scores) {
  for (int64_t head = 0; head < num_heads; head += kTileHeads) {
    Lanes sums[kNumLanes] = {};
#pragma GCC unroll 4
    for (int h = 0; h < kTileHeads; ++h) {
      int64_t d = (head + h < num_heads ? head + h : num_heads - 1) * head_size;
      const int64_t end = d + head_size;
      for (; d + kPairLanes <= end; d += kPairLanes) {
        const Lanes query_a = load(query + d);
        const Lanes query_b = load(query + d + kNumLanes);
#pragma GCC unroll 4
        for (int i = 0; i < kTileTokens; ++i) {
          const Pair key = load_pair(rows[i] + d);
          sums[h * kTileTokens + i] += query_a * key.a;
          sums[h * kTileTokens + i] += query_b * key.b;
        }
      }
      if (d < end) {
        const Lanes q = load(query + d);
#pragma GCC unroll 4
        for (int i = 0; i < kTileTokens; ++i) {
          sums[h * kTileTokens + i] += q * load(rows[i] + d);
        }
      }
    }
    const int64_t end_head = head + kTileHeads < num_heads ? head + kTileHeads : num_heads;
    prefetch(next_rows, head * head_size, end_head * head_size);
    float tile[kNumLanes];
    store(tile, sum_each(sums) * scale);
    for (int64_t h = head; h < end_head; ++h) {
      std::memcpy(scores + h * kChunkTokens, tile + (h - head) * kTileTokens, kTileTokens * sizeof(float));
    }
  }
}

// Adds weights[head][i] * rows[i] for every head.
template <int num_rows, typename Element>
DYNSKIP_INLINE void add_values(
    int64_t num_heads,
    int64_t head_size,
    const Element* const rows[num_rows],
    const Element* const next_rows[kTileTokens],
    const float* weights,
    float* accumulator) {
  for (int64_t head = 0; head < num_heads; ++head) {
    if (num_rows == kTileTokens) {
      prefetch(next_rows, head * head_size, (head + 1) * head_size);
    }
    const float* w = weights + head * kChunkTokens;
    int64_t d = head * head_size;
    const int64_t end = d + head_size;
    for (; d + 2 * kPairLanes <= end; d += 2 * kPairLanes) {
      Lanes total[4];
      for (int j = 0; j < 4; ++j) {
        total[j] = load(accumulator + d + j * kNumLanes);
      }
#pragma GCC unroll 4
      for (int i = 0; i < num_rows; ++i) {
        const Pair first = load_pair(rows[i] + d);
        const Pair second = load_pair(rows[i] + d + kPairLanes);
        const Lanes weight = broadcast(w[i]);
        total[0] += weight * first.a;
        total[1] += weight * first.b;
        total[2] += weight * second.a;
        total[3] += weight * second.b;
      }
      for (int j = 0; j < 4; ++j) {
        store(accumulator + d + j * kNumLanes, total[j]);
      }
    }
    for (; d + kPairLanes <= end; d += kPairLanes) {
      Pair total = load_pair(accumulator + d);
#pragma GCC unroll 4
      for (int i = 0; i < num_rows; ++i) {
        const Pair value = load_pair(rows[i] + d);
        total.a += w[i] * value.a;
        total.b += w[i] * value.b;
      }
      store_pair(accumulator + d, total);
    }
    if (d < end) {
      Lanes total = load(accumulator + d);
#pragma GCC unroll 4
      for (int i = 0; i < num_rows; ++i) {
        total += w[i] * load(rows[i] + d);
      }
      store(accumulator + d, total);
    }
  }
}

// The same for up to four query heads that share a key-value head, whose elements are then read and converted once.
template <int num_heads, typename Element>
DYNSKIP_INLINE void score_shared_tile(
    int64_t head_size, float scale, const Element* const rows[kTileTokens], const float* query, float* scores) {
  Lanes sums[kNumLanes] = {};
  int64_t d = 0;
  for (; d + kPairLanes <= head_size; d += kPairLanes) {
    Pair keys[kTileTokens];
#pragma GCC unroll 4
    for (int i = 0; i < kTileTokens; ++i) {
      keys[i] = load_pair(rows[i] + d);
    }
#pragma GCC unroll 4
    for (int h = 0; h < num_heads; ++h) {
      const Lanes query_a = load(query + h * head_size + d);
      const Lanes query_b = load(query + h * head_size + d + kNumLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kTileTokens; ++i) {
        sums[h * kTileTokens + i] += query_a * keys[i].a;
        sums[h * kTileTokens + i] += query_b * keys[i].b;
      }
    }
  }
  if (d < head_size) {
#pragma GCC unroll 4
    for (int h = 0; h < num_heads; ++h) {
      const Lanes q = load(query + h * head_size + d);
#pragma GCC unroll 4
      for (int i = 0; i < kTileTokens; ++i) {
        sums[h * kTileTokens + i] += q * load(rows[i] + d);
      }
    }
  }
  float tile[kNumLanes];
  store(tile, sum_each(sums) * scale);
  for (int h = 0; h < num_heads; ++h) {
    std::memcpy(scores + h * kChunkTokens, tile + h * kTileTokens, kTileTokens * sizeof(float));
  }
}

template <typename Element>
DYNSKIP_INLINE void score_shared(
    int64_t num_heads,
    int64_t head_size,
    float scale,
    const Element* const rows[kTileTokens],
    const float* query,
    float* scores) {
  for (int64_t head = 0; head < num_heads; head += kTileHeads) {
    const float* q = query + head * head_size;
    float* s = scores + head * kChunkTokens;
    switch (num_heads - head) {
      case 1:
        score_shared_tile<1>(head_size, scale, rows, q, s);
        break;
      case 2:
        score_shared_tile<2>(head_size, scale, rows, q, s);
        break;
      case 3:
        score_shared_tile<3>(head_size, scale, rows, q, s);
        break;
      default:
        score_shared_tile<kTileHeads>(head_size, scale, rows, q, s);
    }
  }
}

// Adds weights[head][i] * rows[i] for every query head that shares the key-value head of these rows.
template <int num_rows, typename Element>
DYNSKIP_INLINE void add_shared_values(
    int64_t num_heads, int64_t head_size, const Element* const rows[num_rows], const float* weights, float* accumulator) {
  int64_t d = 0;
  for (; d + kPairLanes <= head_size; d += kPairLanes) {
    Pair values[num_rows];
#pragma GCC unroll 4
    for (int i = 0; i < num_rows; ++i) {
      values[i] = load_pair(rows[i] + d);
    }
    for (int64_t head = 0; head < num_heads; ++head) {
      const float* w = weights + head * kChunkTokens;
      Pair total = load_pair(accumulator + head * head_size + d);
#pragma GCC unroll 4
      for (int i = 0; i < num_rows; ++i) {
        total.a += w[i] * values[i].a;
        total.b += w[i] * values[i].b;
      }
      store_pair(accumulator + head * head_size + d, total);
    }
  }
  if (d < head_size) {
    for (int64_t head = 0; head < num_heads; ++head) {
      const float* w = weights + head * kChunkTokens;
      Lanes total = load(accumulator + head * head_size + d);
#pragma GCC unroll 4
      for (int i = 0; i < num_rows; ++i) {
        total += w[i] * load(rows[i] + d);
      }
      store(accumulator + head * head_size + d, total);
    }
  }
}

// Tokens that the query attends to, up to kChunkTokens: their slots and, with slopes or a window, how many positions they
// stand before the query.
struct Chunk {
  const int32_t* slots;
  int64_t num_tokens;
  int32_t kept[kChunkTokens];
  float distances[kChunkTokens] = {};
};

// Reads the next chunk of a task from token on, and moves token behind it; the chunk is empty where no token is left.
template <typename Element>
DYNSKIP_INLINE void read_chunk(const DecodeAttentionTask<Element>& task, int64_t& token, Chunk& chunk) {
  if (task.slopes == nullptr && task.window == 0) {
    chunk.slots = task.slots + token;
    chunk.num_tokens = task.num_tokens - token < kChunkTokens ? task.num_tokens - token : kChunkTokens;
    token += chunk.num_tokens;
    return;
  }
  chunk.slots = chunk.kept;
  chunk.num_tokens = 0;
  for (; token < task.num_tokens && chunk.num_tokens < kChunkTokens; ++token) {
    const int64_t distance = task.position - task.slot_positions[task.slots[token]];
    if (task.window == 0 || distance < task.window) {
      chunk.kept[chunk.num_tokens] = task.slots[token];
      chunk.distances[chunk.num_tokens++] = static_cast<float>(distance);
    }
  }
}

DYNSKIP_INLINE void lessen_scores(float* scores, int64_t num_tokens, float slope, const float* distances) {
  for (int64_t t = 0; t < num_tokens; t += kNumLanes) {
    store(scores + t, load(scores + t) - slope * load(distances + t));
  }
}

// Turns the scores of a chunk into weights, which the maximum so far is taken from. Returns the factor by which sums over
// earlier chunks shrink, and has shrunk their total; without earlier chunks it is 1.
DYNSKIP_INLINE float weigh_chunk(float* s, int64_t num_tokens, bool is_first, float& largest, float& total) {
  const int64_t num_whole = num_tokens / kNumLanes * kNumLanes;
  if (num_whole < num_tokens) {
    const IntLanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const IntLanes present = lane < (int32_t)(num_tokens - num_whole);
    store(s + num_whole, select(present, load(s + num_whole), broadcast(-INFINITY)));
  }
  Lanes lane_largest = broadcast(largest);
  for (int64_t t = 0; t < num_tokens; t += kNumLanes) {
    lane_largest = maximum(lane_largest, load(s + t));
  }
  const float new_largest = maximum(lane_largest);
  Lanes lane_total = {};
  for (int64_t t = 0; t < num_tokens; t += kNumLanes) {
    const Lanes weight = exp_nonpositive(load(s + t) - new_largest);
    store(s + t, weight);
    lane_total += weight;
  }
  float shrink = 1.0f;
  if (!is_first) {
    shrink = exp_nonpositive(broadcast(largest - new_largest))[0];
    total *= shrink;
  }
  total += sum(lane_total);
  largest = new_largest;
  return shrink;
}

template <typename Element>
DYNSKIP_INLINE void attend_heads(const DecodeAttentionTask<Element>& task, int64_t head_size) {
  const int64_t num_floats = task.num_heads * head_size;
  const int64_t offset = task.first_head * head_size;
  const int64_t first_kv_head = task.first_head / task.group_size;
  const int64_t end_kv_head = (task.first_head + task.num_heads - 1) / task.group_size + 1;
  const int64_t kv_offset = first_kv_head * head_size;
  float* scores = task.scratch;
  float* accumulator = scores + task.num_heads * kChunkTokens;
  float* query = accumulator + num_floats;
  float* largest = query + num_floats;
  float* total = largest + task.num_heads;

  for (int64_t head = 0; head < task.num_heads; ++head) {
    int64_t d = head * head_size;
    const int64_t end = d + head_size;
    for (; d + kPairLanes <= end; d += kPairLanes) {
      store_pair(query + d, load_pair(task.query + offset + d));
    }
    if (d < end) {
      store(query + d, load(task.query + offset + d));
    }
  }
  for (int64_t d = 0; d < num_floats; d += kNumLanes) {
    store(accumulator + d, Lanes{});
  }
  for (int64_t head = 0; head < task.num_heads; ++head) {
    largest[head] = -INFINITY;
    total[head] = 0.0f;
  }

  const Element* rows[kTileTokens];
  const Element* next_rows[kTileTokens];
  // Places without a token of their own repeat the last one.
  const auto locate = [&](const Element* cache, const int32_t* slots, int64_t first, int64_t end, const Element* found[]) {
    for (int64_t i = 0; i < kTileTokens; ++i) {
      const int64_t token = first + i < end ? first + i : end - 1;
      found[i] = cache + slots[token] * task.slot_stride + kv_offset;
    }
  };
  // Calls run(head, num_heads, offset) for the query heads of each key-value head.
  const auto for_each_group = [&](const auto& run) {
    for (int64_t head = 0, kv_head = first_kv_head; kv_head < end_kv_head; ++kv_head) {
      const int64_t behind = (kv_head + 1) * task.group_size - task.first_head;
      const int64_t end_head = behind < task.num_heads ? behind : task.num_heads;
      run(head, end_head - head, (kv_head - first_kv_head) * head_size);
      head = end_head;
    }
  };
  const auto shift = [&](const Element* const all_rows[], int64_t by, const Element* shifted[]) {
    for (int64_t i = 0; i < kTileTokens; ++i) {
      shifted[i] = all_rows[i] + by;
    }
  };
  Chunk chunk;
  int64_t token = 0;
  bool is_first = true;
  for (read_chunk(task, token, chunk); chunk.num_tokens > 0; read_chunk(task, token, chunk)) {
    const int32_t* slots = chunk.slots;
    const int64_t num_tokens = chunk.num_tokens;

    for (int64_t t = 0; t < num_tokens; t += kTileTokens) {
      locate(task.k_cache, slots, t, num_tokens, rows);
      if (t + kTileTokens < num_tokens) {
        locate(task.k_cache, slots, t + kTileTokens, num_tokens, next_rows);
      } else {
        locate(task.v_cache, slots, 0, num_tokens, next_rows);
      }
      if (task.group_size == 1) {
        score_tile(task.num_heads, head_size, task.scale, rows, next_rows, query, scores + t);
        continue;
      }
      for_each_group([&](int64_t head, int64_t num_heads, int64_t row_offset) {
        const Element* group_rows[kTileTokens];
        shift(rows, row_offset, group_rows);
        prefetch(next_rows, row_offset, row_offset + head_size);
        score_shared(
            num_heads, head_size, task.scale, group_rows, query + head * head_size, scores + head * kChunkTokens + t);
      });
    }

    for (int64_t head = 0; head < task.num_heads; ++head) {
      if (task.slopes != nullptr) {
        lessen_scores(scores + head * kChunkTokens, num_tokens, task.slopes[task.first_head + head], chunk.distances);
      }
      const float shrink = weigh_chunk(scores + head * kChunkTokens, num_tokens, is_first, largest[head], total[head]);
      if (!is_first) {
        for (int64_t d = head * head_size; d < (head + 1) * head_size; d += kNumLanes) {
          store(accumulator + d, load(accumulator + d) * shrink);
        }
      }
    }

    const auto locate_next = [&](int64_t t) {
      if (t + kTileTokens < num_tokens || token == task.num_tokens) {
        locate(task.v_cache, slots, t + kTileTokens, num_tokens, next_rows);
      } else {
        // Some of these may lie outside of the window: they are fetched in vain.
        locate(task.k_cache, task.slots, token, task.num_tokens, next_rows);
      }
    };
    int64_t t = 0;
    for (; t + kTileTokens <= num_tokens; t += kTileTokens) {
      locate(task.v_cache, slots, t, num_tokens, rows);
      locate_next(t);
      if (task.group_size == 1) {
        add_values<kTileTokens>(task.num_heads, head_size, rows, next_rows, scores + t, accumulator);
        continue;
      }
      for_each_group([&](int64_t head, int64_t num_heads, int64_t row_offset) {
        const Element* group_rows[kTileTokens];
        shift(rows, row_offset, group_rows);
        prefetch(next_rows, row_offset, row_offset + head_size);
        add_shared_values<kTileTokens>(
            num_heads, head_size, group_rows, scores + head * kChunkTokens + t, accumulator + head * head_size);
      });
    }
    for (; t < num_tokens; ++t) {
      locate(task.v_cache, slots, t, num_tokens, rows);
      if (task.group_size == 1) {
        add_values<1>(task.num_heads, head_size, rows, rows, scores + t, accumulator);
        continue;
      }
      for_each_group([&](int64_t head, int64_t num_heads, int64_t row_offset) {
        const Element* group_row[1] = {rows[0] + row_offset};
        add_shared_values<1>(
            num_heads, head_size, group_row, scores + head * kChunkTokens + t, accumulator + head * head_size);
      });
    }
    is_first = false;
  }

  for (int64_t head = 0; head < task.num_heads; ++head) {
    const float factor = is_first ? 0.0f : 1.0f / total[head];
    int64_t d = head * head_size;
    const int64_t end = d + head_size;
    for (; d + kPairLanes <= end; d += kPairLanes) {
      const Pair x = load_pair(accumulator + d);
      store_pair(task.out + offset + d, Pair{x.a * factor, x.b * factor});
    }
    if (d < end) {
      store(task.out + offset + d, load(accumulator + d) * factor);
    }
  }
}

// The same for head sizes that end within a vector: a head after the other, a token after the other.
template <typename Element>
DYNSKIP_INLINE void attend_heads_of_any_size(const DecodeAttentionTask<Element>& task) {
  const int64_t head_size = task.head_size;
  const int64_t whole = head_size / kNumLanes * kNumLanes;
  const int64_t rest = head_size - whole;
  float* scores = task.scratch;
  float* query = scores + kChunkTokens;
  float* accumulator = query + whole + kNumLanes;

  for (int64_t head = task.first_head; head < task.first_head + task.num_heads; ++head) {
    const int64_t offset = head * head_size;
    const int64_t kv_offset = head / task.group_size * head_size;
    for (int64_t d = 0; d < whole; d += kNumLanes) {
      store(query + d, load(task.query + offset + d));
    }
    store(query + whole, load_some(task.query + offset + whole, rest));
    for (int64_t d = 0; d < head_size; d += kNumLanes) {
      store(accumulator + d, Lanes{});
    }
    float largest = -INFINITY;
    float total = 0.0f;
    Chunk chunk;
    int64_t token = 0;
    bool is_first = true;
    for (read_chunk(task, token, chunk); chunk.num_tokens > 0; read_chunk(task, token, chunk)) {
      const int64_t num_tokens = chunk.num_tokens;
      for (int64_t t = 0; t < num_tokens; ++t) {
        const Element* key = task.k_cache + chunk.slots[t] * task.slot_stride + kv_offset;
        Lanes products = load(query + whole) * load_some(key + whole, rest);
        for (int64_t d = 0; d < whole; d += kNumLanes) {
          products += load(query + d) * load(key + d);
        }
        scores[t] = sum(products) * task.scale;
      }
      if (task.slopes != nullptr) {
        lessen_scores(scores, num_tokens, task.slopes[head], chunk.distances);
      }
      const float shrink = weigh_chunk(scores, num_tokens, is_first, largest, total);
      is_first = false;
      for (int64_t d = 0; d < head_size; d += kNumLanes) {
        store(accumulator + d, load(accumulator + d) * shrink);
      }
      for (int64_t t = 0; t < num_tokens; ++t) {
        const Element* value = task.v_cache + chunk.slots[t] * task.slot_stride + kv_offset;
        for (int64_t d = 0; d < whole; d += kNumLanes) {
          store(accumulator + d, load(accumulator + d) + scores[t] * load(value + d));
        }
        store(accumulator + whole, load(accumulator + whole) + scores[t] * load_some(value + whole, rest));
      }
    }
    const float factor = is_first ? 0.0f : 1.0f / total;
    for (int64_t d = 0; d < whole; d += kNumLanes) {
      store(task.out + offset + d, load(accumulator + d) * factor);
    }
    store_some(task.out + offset + whole, load(accumulator + whole) * factor, rest);
  }
}

// A head size that the compiler knows is worth a version of its own.
template <typename Element>
void decode_attention_heads(const DecodeAttentionTask<Element>& task) {
  switch (task.head_size) {
    case 64:
      return attend_heads(task, 64);
    case 128:
      return attend_heads(task, 128);
    default:
      if (task.head_size % kNumLanes != 0) {
        return attend_heads_of_any_size(task);
      }
      return attend_heads(task, task.head_size);
  }
}

} // namespace
} // namespace dynskip
