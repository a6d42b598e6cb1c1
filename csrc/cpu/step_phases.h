// The phases of a decode step, from embedding to head, as the threads of a team go through them; included by the source
// that runs steps.
//
// All threads go through the phases of a layer together; in a phase each takes tasks that no other has. What is done to one
// row of the residual stream after the other, from the end of a layer to the products of the next, is one phase.

#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "decode_step.h"
#include "decoder.h"
#include "kernels.h"
#include "plan_rows.h"
#include "team.h"

namespace dynskip {
namespace {

// Groups of panels, and tasks of attention, for each thread: one on a busy core does not hold up the others for long.
constexpr int64_t kGroupsPerThread = 8;
constexpr int64_t kAttentionTasksPerThread = 4;
// Rows of one task of a product: they stay in the second cache while panels pass by.
constexpr int64_t kBlockRows = 256;
// Rows of which half may be a task: fewer wait for memory, and more have not gained by it.
constexpr int64_t kLeastHalvedRows = 32, kMostHalvedRows = 48;

// The rows of each layer, planned for all layers at once or, where a gate decides, one by one.
struct StepPlan {
  std::vector<uint8_t> active; // [L, N]; of a gate's layers filled in on the way
  std::vector<int32_t> cache_ids, row_slots, run_ids, kv_ids, slots, key_limits;
  PlanFailure failure = PlanFailure::kNone;

  void plan(int64_t first_layer, int64_t num_layers, int64_t num_rows, int32_t* counts, int64_t all_layers,
      const RowPlan& whole) {
    RowPlan part = whole;
    part.num_layers = static_cast<int32_t>(num_layers);
    part.starts_step = first_layer == 0;
    part.active = active.data() + first_layer * num_rows;
    part.context_lens += first_layer * whole.context_lens_stride;
    part.slot_tables += first_layer * whole.slot_tables_layer_stride;
    part.run_ids = run_ids.data() + first_layer * num_rows;
    part.kv_ids = kv_ids.data() + first_layer * num_rows;
    part.slots = slots.data() + first_layer * num_rows;
    part.key_limits = key_limits.data() + first_layer * num_rows;
    part.num_run = counts + first_layer;
    part.num_kv = counts + all_layers + first_layer;
    const PlanFailure failed = plan_rows_on_cpu(part, 1);
    failure = failed != PlanFailure::kNone ? failed : failure;
  }
};

template <typename Element>
struct Norm {
  bool exists;
  const Element* weight;
  const Element* bias;
  bool rms;
  float eps;
};

template <typename Element>
class Step {
 public:
  Step(Decoder& decoder, int64_t num_rows, StepPlan& plan, const RowPlan& whole, const Gate& gate, int32_t* counts)
      : decoder_(decoder),
        kernels_(kernels().of<Element>()),
        team_(*decoder.team),
        num_rows_(num_rows),
        plan_(plan),
        whole_(whole),
        gate_(gate),
        counts_(counts) {
    const int64_t heads = decoder.num_heads * decoder.head_size;
    const int64_t keys = decoder.num_kv_heads * decoder.head_size;
    const int64_t inner = decoder.ffn_size * (decoder.gated ? 2 : 1);
    int64_t offset = 0;
    const auto reserve = [&](Rows& rows, int64_t size) {
      rows.stride = padded_row_stride(size);
      rows.offset = offset;
      offset += decoder.max_rows * rows.stride;
    };
    reserve(hidden_, decoder.hidden_size);
    reserve(normed_, decoder.hidden_size);
    reserve(run_normed_, decoder.hidden_size);
    reserve(ffn_normed_, decoder.hidden_size);
    reserve(query_, heads);
    reserve(key_, keys);
    reserve(value_, keys);
    reserve(attention_, heads);
    reserve(delta_, decoder.hidden_size);
    reserve(ffn_delta_, decoder.hidden_size);
    reserve(inner_, inner);
    activated_ = inner_;
    if (decoder.gated && decoder.ffn_size % kInputBlock<Element> != 0) {
      reserve(activated_, decoder.ffn_size); // in place factors would stand where a product wants zeros
    }
    reserve(embedded_, decoder.embedding_size);
    num_elements_ = offset;
  }

  int64_t num_bytes() const {
    return num_elements_ * static_cast<int64_t>(sizeof(Element));
  }

  // The step's inputs and what it changes; called before run. Without a head the last states are the result.
  void begin(const StepCache& cache, const StepRows& rows, Element* result, int64_t* tokens) {
    const bool with_head = rows.with_head;
    head_rows_ = rows.head_rows;
    num_head_rows_ = rows.num_head_rows;
    choices_ = rows.choices;
    tokens_ = tokens;
    token_ids_ = rows.token_ids;
    position_ids_ = rows.position_ids;
    k_cache_ = static_cast<Element*>(cache.k_cache.data_ptr());
    v_cache_ = static_cast<Element*>(cache.v_cache.data_ptr());
    slot_positions_ = cache.slot_positions.has_value() ? static_cast<int32_t*>(cache.slot_positions->data_ptr()) : nullptr;
    is_prompt_ = rows.is_prompt;
    is_timed_ = rows.is_timed;
    begun_ = rows.begun;
    kept_ = rows.kept;
    memory_ = reinterpret_cast<Element*>(decoder_.memory.get());
    logits_ = with_head ? result : nullptr;
    hidden_states_ = with_head ? row(hidden_, 0) : result;
    hidden_stride_ = with_head ? hidden_.stride : decoder_.hidden_size;
    if (gate_.asks == nullptr) {
      plan_all(0, decoder_.layers.size());
    }
  }

  void run(Team::Member& member) {
    Clock clock(*this, member.index);
    if (is_projected()) {
      project_tokens(member);
    }
    Between between = {kEmbedding, 0, 0};
    for (size_t index = 0; index < decoder_.layers.size(); ++index) {
      between.keep_end = index + 1;
      if (gate_.asks != nullptr) {
        decide(member, index, between);
      }
      run_layer(member, index, between, clock);
    }
    between.keep_end = decoder_.layers.size() + 1;
    for_parts(member, num_rows_, [&](const Part& part) {
      pass(part, between);
      if (logits_ != nullptr) {
        begin_head(part);
      }
    });
    clock.lap(kOther);
    if (logits_ != nullptr) {
      head(member, clock);
    }
    clock.lap(kOther);
  }

 private:
  struct Rows {
    int64_t offset;
    int64_t stride;
  };

  enum { kProducts, kAttention, kOther };

  // Rows that one task has.
  struct Part {
    int64_t index;
    int64_t count;

    bool has(int64_t row) const {
      return row % count == index;
    }
  };

  // What rows have yet to go through behind the last phase: the embedding, the end of a layer or nothing; then those are
  // handed out that a caller wants in front of the layers keep_begin..keep_end - 1.
  static constexpr int64_t kEmbedding = -1, kNothing = -2;
  struct Between {
    int64_t open;
    size_t keep_begin, keep_end;
  };

  // The first thread's time.
  class Clock {
   public:
    Clock(Step& step, int64_t member) : times_(step.is_timed_ && member == 0 ? step.decoder_.times_ns : nullptr) {
      if (times_ != nullptr) {
        before_ = std::chrono::steady_clock::now();
      }
    }

    void lap(int kind) {
      if (times_ != nullptr) {
        const auto now = std::chrono::steady_clock::now();
        times_[kind] += std::chrono::duration_cast<std::chrono::nanoseconds>(now - before_).count();
        before_ = now;
      }
    }

   private:
    int64_t* times_;
    std::chrono::steady_clock::time_point before_;
  };

  // Of one thread, at the beginning of a line of the cache.
  float* scratch(int64_t member) const {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(decoder_.scratch[member].data()) + 63) / 64 * 64);
  }

  Element* row(const Rows& rows, int64_t index) const {
    return memory_ + rows.offset + index * rows.stride;
  }

  Element* hidden(int64_t index) const {
    return hidden_states_ + index * hidden_stride_;
  }

  // Deals out num_rows rows to a task for each thread.
  template <typename Run>
  void for_parts(Team::Member& member, int64_t num_rows, const Run& run) {
    const int64_t count = std::min(team_.size(), num_rows);
    team_.for_each_task(member, count, [&](int64_t index) { run(Part{index, count}); });
  }

  const Element* element(int64_t place) const {
    return static_cast<const Element*>(decoder_.data(place));
  }

  Norm<Element> norm(const NormSpec& spec) const {
    return {spec.exists, element(spec.weight), element(spec.bias), spec.rms, spec.eps};
  }

  void apply(const Norm<Element>& norm, const Element* x, Element* out, int64_t size) const {
    LayerNormRow<Element> task;
    task.x = x;
    task.weight = norm.weight;
    task.bias = norm.bias;
    task.out = out;
    task.size = size;
    task.eps = norm.eps;
    task.rms = norm.rms;
    kernels_.layer_norm(task);
  }

  // The norm of a row, or where norms stand behind what they normalise the row itself.
  void input(const Norm<Element>& norm, const Element* x, Element* out) const {
    if (decoder_.norm_first) {
      apply(norm, x, out, decoder_.hidden_size);
    } else {
      copy(x, out, decoder_.hidden_size);
    }
  }

  static void copy(const Element* x, Element* out, int64_t size) {
    std::memcpy(static_cast<void*>(out), x, size * sizeof(Element));
  }

  void add(Element* x, const Element* delta, const Norm<Element>& norm) const {
    kernels_.add(x, delta, decoder_.hidden_size);
    if (!decoder_.norm_first) {
      apply(norm, x, x, decoder_.hidden_size);
    }
  }

  Product<Element> product(
      const MatrixSpec& matrix, const Element* x, int64_t x_stride, Element* y, int64_t y_stride, int64_t num_rows,
      Activation activation = Activation::kNone) const {
    Product<Element> product;
    product.x = x;
    product.x_stride = x_stride;
    product.weight = matrix.panel_outputs > 0 ? reinterpret_cast<const Element*>(matrix.address) : element(matrix.address);
    product.bias = element(matrix.bias);
    product.y = y;
    product.y_stride = y_stride;
    product.num_rows = num_rows;
    product.num_inputs = matrix.num_inputs;
    product.num_outputs = matrix.num_outputs;
    product.panel_outputs = matrix.panel_outputs;
    product.activation = activation;
    return product;
  }

  // Rows of a task where a thread would wait for the last of few panels: half of them, or all where that is too few.
  static int64_t rows_of_halves(const Product<Element>& product) {
    const bool is_few = product.num_rows >= kLeastHalvedRows && product.num_rows <= kMostHalvedRows;
    return is_few && product.panel_outputs == 64 ? (product.num_rows + 1) / 2 : kBlockRows;
  }

  // Products of one phase.
  template <size_t size>
  void multiply(Team::Member& member, const std::array<Product<Element>, size>& products) {
    std::array<int64_t, size> panels;
    int64_t all_panels = 0;
    for (size_t i = 0; i < size; ++i) {
      panels[i] = products[i].num_rows == 0 ? 0 : num_panels(products[i]);
      all_panels += panels[i];
    }
    const int64_t group = std::max<int64_t>(1, all_panels / (team_.size() * kGroupsPerThread));
    const auto num_groups = [&](size_t i) { return (panels[i] + group - 1) / group; };
    const auto num_tasks = [&](size_t i, int64_t block_rows) {
      return num_groups(i) * ((products[i].num_rows + block_rows - 1) / block_rows);
    };
    int64_t all_tasks = 0;
    for (size_t i = 0; i < size; ++i) {
      all_tasks += num_tasks(i, kBlockRows);
    }
    const bool is_uneven = all_tasks < kGroupsPerThread * team_.size() && all_tasks % team_.size() != 0;
    std::array<int64_t, size> block_rows, ends; // behind the last task of each product
    all_tasks = 0;
    for (size_t i = 0; i < size; ++i) {
      block_rows[i] = is_uneven ? rows_of_halves(products[i]) : kBlockRows;
      ends[i] = all_tasks += num_tasks(i, block_rows[i]);
    }
    float* scratch = this->scratch(member.index);
    size_t i = 0; // tasks come in their order
    team_.for_each_task(member, all_tasks, [&](int64_t task) {
      while (task >= ends[i]) {
        ++i;
      }
      task -= i == 0 ? 0 : ends[i - 1];
      const int64_t first_row = task / num_groups(i) * block_rows[i];
      const int64_t begin = task % num_groups(i) * group;
      Product<Element> block = products[i];
      block.x += first_row * block.x_stride;
      block.y += first_row * block.y_stride;
      block.num_rows = std::min(block_rows[i], block.num_rows - first_row);
      multiply_panels<Element>(block.panel_outputs)(block, begin, std::min(begin + group, panels[i]), scratch);
    });
  }

  bool is_projected() const {
    return decoder_.project_in.num_outputs > 0;
  }

  void project_tokens(Team::Member& member) {
    const auto* tokens = element(decoder_.embed_tokens);
    const int64_t size = decoder_.embedding_size;
    for_parts(member, num_rows_, [&](const Part& part) {
      for (int64_t index = part.index; index < num_rows_; index += part.count) {
        copy(tokens + token_ids_[index] * size, row(embedded_, index), size);
      }
    });
    multiply<1>(
        member, {product(decoder_.project_in, row(embedded_, 0), embedded_.stride, hidden(0), hidden_stride_, num_rows_)});
  }

  void embed(const Part& part) {
    const auto* tokens = element(decoder_.embed_tokens);
    const auto* positions = element(decoder_.embed_positions);
    const Norm<Element> embed_norm = norm(decoder_.embed_norm);
    for (int64_t index = part.index; index < num_rows_; index += part.count) {
      Element* x = hidden(index);
      if (begun_ != nullptr && begun_[index] != nullptr) {
        copy(static_cast<const Element*>(begun_[index]), x, decoder_.hidden_size);
        continue;
      }
      if (!is_projected()) {
        copy(tokens + token_ids_[index] * decoder_.embedding_size, x, decoder_.embedding_size);
      }
      if (positions != nullptr) {
        const int64_t position = position_ids_[index] + decoder_.position_offset;
        kernels_.add(x, positions + position * decoder_.hidden_size, decoder_.hidden_size);
      }
      if (embed_norm.exists) {
        apply(embed_norm, x, x, decoder_.hidden_size);
      }
    }
  }

  void pass(const Part& part, const Between& between) {
    if (between.open == kEmbedding) {
      embed(part);
    } else if (between.open != kNothing) {
      end_layer(part, between.open);
    }
    for (int64_t index = part.index; kept_ != nullptr && index < num_rows_; index += part.count) {
      const KeptState& kept = kept_[index];
      const auto layer = static_cast<size_t>(kept.layer);
      if (kept.out != nullptr && layer >= between.keep_begin && layer < between.keep_end) {
        copy(hidden(index), static_cast<Element*>(kept.out), decoder_.hidden_size);
      }
    }
  }

  // Asks the gate, and plans the layer.
  void decide(Team::Member& member, size_t layer, Between& between) {
    const int64_t size = decoder_.hidden_size;
    if (gate_.asks[layer]) {
      for_parts(member, num_rows_, [&](const Part& part) {
        pass(part, between);
        const float* skip = gate_.weight + 2 * layer * size;
        const float* bias = gate_.bias == nullptr ? nullptr : gate_.bias + 2 * layer;
        for (int64_t index = part.index; index < num_rows_; index += part.count) {
          const float no = kernels_.dot(hidden(index), skip, size) + (bias == nullptr ? 0.0f : bias[0]);
          const float yes = kernels_.dot(hidden(index), skip + size, size) + (bias == nullptr ? 0.0f : bias[1]);
          plan_.active[layer * num_rows_ + index] = yes >= no;
        }
      });
      between = {kNothing, layer + 1, layer + 1};
    }
    team_.for_each_task(member, 1, [&](int64_t) { plan_all(layer, 1); });
  }

  void plan_all(size_t first_layer, size_t num_layers) {
    plan_.plan(first_layer, num_layers, num_rows_, counts_, decoder_.layers.size(), whole_);
  }

  void run_layer(Team::Member& member, size_t index, Between& between, Clock& clock) {
    const LayerSpec& layer = decoder_.layers[index];
    const int64_t num_run = counts_[index];
    const int64_t num_kv = counts_[decoder_.layers.size() + index];
    if (num_kv == 0) {
      return;
    }
    const int32_t* run_ids = plan_.run_ids.data() + index * num_rows_;
    const int32_t* kv_ids = plan_.kv_ids.data() + index * num_rows_;
    const int32_t* slots = plan_.slots.data() + index * num_rows_;
    const Norm<Element> attention_norm = norm(layer.attention_norm);
    const Norm<Element> ffn_norm = norm(layer.ffn_norm);
    const bool same_rows = num_run == num_kv; // who runs computes a key and a value
    const bool same_norm = decoder_.shared_norm;

    for_parts(member, num_rows_, [&](const Part& part) {
      pass(part, between);
      for (int64_t i = 0; i < num_kv; ++i) {
        if (part.has(kv_ids[i])) {
          input(attention_norm, hidden(kv_ids[i]), row(normed_, i));
        }
      }
      for (int64_t i = 0; i < num_run; ++i) {
        if (!part.has(run_ids[i])) {
          continue;
        }
        if (!same_rows) {
          input(attention_norm, hidden(run_ids[i]), row(run_normed_, i));
        }
        if (decoder_.parallel && !same_norm) {
          input(ffn_norm, hidden(run_ids[i]), row(ffn_normed_, i));
        }
      }
    });
    between = {num_run > 0 ? static_cast<int64_t>(index) : kNothing, index + 1, index + 1};
    clock.lap(kOther);

    const Rows& run_rows = same_rows ? normed_ : run_normed_;
    const Rows& parallel_rows = same_norm ? run_rows : ffn_normed_;
    const Activation in_product = decoder_.gated ? Activation::kNone : decoder_.activation;
    multiply<4>(
        member,
        {product(layer.q_proj, row(run_rows, 0), run_rows.stride, row(query_, 0), query_.stride, num_run),
         product(layer.k_proj, row(normed_, 0), normed_.stride, row(key_, 0), key_.stride, num_kv),
         product(layer.v_proj, row(normed_, 0), normed_.stride, row(value_, 0), value_.stride, num_kv),
         product(
             layer.fc1, row(parallel_rows, 0), parallel_rows.stride, row(inner_, 0), inner_.stride,
             decoder_.parallel ? num_run : 0, in_product)});
    clock.lap(kProducts);

    place(member, layer, run_ids, num_run, kv_ids, num_kv, slots);
    clock.lap(kOther);
    if (num_run == 0) {
      return;
    }
    if (is_prompt_ && attend_prompt_ != nullptr) {
      attend_prompts(member, layer, index, run_ids, num_run);
    } else {
      attend(member, layer, index, run_ids, num_run);
    }
    clock.lap(kAttention);

    if (!decoder_.parallel) {
      multiply<1>(
          member,
          {product(layer.out_proj, row(attention_, 0), attention_.stride, row(delta_, 0), delta_.stride, num_run)});
      clock.lap(kProducts);
      for_parts(member, num_run, [&](const Part& part) {
        for (int64_t i = part.index; i < num_run; i += part.count) {
          Element* x = hidden(run_ids[i]);
          add(x, row(delta_, i), attention_norm);
          input(ffn_norm, x, row(ffn_normed_, i));
        }
      });
      clock.lap(kOther);
      multiply<1>(
          member,
          {product(
              layer.fc1, row(ffn_normed_, 0), ffn_normed_.stride, row(inner_, 0), inner_.stride, num_run, in_product)});
      clock.lap(kProducts);
    }
    if (decoder_.gated) {
      activate(member, num_run);
      clock.lap(kOther);
    }
    const Rows& last = decoder_.gated ? activated_ : inner_;
    const Product<Element> fc2 =
        product(layer.fc2, row(last, 0), last.stride, row(ffn_delta_, 0), ffn_delta_.stride, num_run);
    if (decoder_.parallel) {
      multiply<2>(
          member,
          {fc2, product(layer.out_proj, row(attention_, 0), attention_.stride, row(delta_, 0), delta_.stride, num_run)});
    } else {
      multiply<1>(member, {fc2});
    }
    clock.lap(kProducts);
  }

  // Adds what a layer's products have left to the rows that ran it.
  void end_layer(const Part& part, size_t index) {
    const LayerSpec& layer = decoder_.layers[index];
    const int32_t* run_ids = plan_.run_ids.data() + index * num_rows_;
    const Norm<Element> attention_norm = norm(layer.attention_norm);
    const Norm<Element> ffn_norm = norm(layer.ffn_norm);
    for (int64_t i = 0; i < counts_[index]; ++i) {
      if (part.has(run_ids[i])) {
        Element* x = hidden(run_ids[i]);
        if (decoder_.parallel) {
          add(x, row(delta_, i), attention_norm);
        }
        add(x, row(ffn_delta_, i), ffn_norm);
      }
    }
  }

  // Turns queries and keys to their positions, and puts keys and values into their slots.
  void place(
      Team::Member& member, const LayerSpec& layer, const int32_t* run_ids, int64_t num_run, const int32_t* kv_ids,
      int64_t num_kv, const int32_t* slots) {
    const auto* cos_sin = static_cast<const float*>(decoder_.data(decoder_.cos_sin));
    const int64_t rotary_size = cos_sin == nullptr ? 0 : decoder_.tensors[decoder_.cos_sin].size(1);
    const auto rotate = [&](Element* x, int64_t index, const NormSpec& spec, int64_t num_heads) {
      RotateRow<Element> task;
      task.x = x;
      task.cos_sin = cos_sin + position_ids_[index] * rotary_size;
      task.weight = element(spec.weight);
      task.num_heads = num_heads;
      task.head_size = decoder_.head_size;
      task.rotary_size = rotary_size;
      task.eps = spec.eps;
      kernels_.rotate(task);
    };
    const int64_t size = decoder_.num_kv_heads * decoder_.head_size;
    // The key of a single row is another task than its query.
    const int64_t first_key = cos_sin == nullptr ? 0 : 1;
    for_parts(member, num_kv + first_key, [&](const Part& part) {
      for (int64_t i = 0; cos_sin != nullptr && i < num_run; ++i) {
        if (part.has(i)) {
          rotate(row(query_, i), run_ids[i], layer.q_norm, decoder_.num_heads);
        }
      }
      for (int64_t i = 0; i < num_kv; ++i) {
        const int32_t index = kv_ids[i];
        const int64_t slot = slots[index];
        if (!part.has(i + first_key) || slot < 0) {
          continue;
        }
        if (cos_sin != nullptr) {
          rotate(row(key_, i), index, layer.k_norm, decoder_.num_kv_heads);
        }
        copy(row(key_, i), k_cache_ + slot * size, size);
        copy(row(value_, i), v_cache_ + slot * size, size);
        if (slot_positions_ != nullptr) {
          slot_positions_[slot] = static_cast<int32_t>(position_ids_[index]);
        }
      }
    });
  }

  void attend(Team::Member& member, const LayerSpec& layer, size_t index, const int32_t* run_ids, int64_t num_run) {
    const int64_t num_heads = decoder_.num_heads;
    const int64_t group_size = num_heads / decoder_.num_kv_heads;
    const int64_t blocks_wanted =
        team_.size() == 1 ? 1 : (kAttentionTasksPerThread * team_.size() + num_run - 1) / num_run;
    int64_t block_heads = (num_heads + blocks_wanted - 1) / blocks_wanted;
    if (num_run * decoder_.num_kv_heads >= team_.size()) {
      block_heads = (block_heads + group_size - 1) / group_size * group_size;
    }
    const int64_t num_blocks = (num_heads + block_heads - 1) / block_heads;
    const int32_t* key_limits = plan_.key_limits.data() + index * num_rows_;
    const auto* slopes = static_cast<const float*>(decoder_.data(decoder_.slopes));
    team_.for_each_task(member, num_run * num_blocks, [&](int64_t i) {
      const int64_t place = i / num_blocks;
      const int32_t id = run_ids[place];
      DecodeAttentionTask<Element> task;
      task.query = row(query_, place);
      task.k_cache = k_cache_;
      task.v_cache = v_cache_;
      task.slots = whole_.slot_tables + index * whole_.slot_tables_layer_stride +
          plan_.cache_ids[id] * whole_.slot_tables_seq_stride;
      task.out = row(attention_, place);
      task.scratch = scratch(member.index);
      task.num_tokens = key_limits[id];
      task.slot_stride = decoder_.num_kv_heads * decoder_.head_size;
      task.first_head = i % num_blocks * block_heads;
      task.num_heads = std::min(block_heads, num_heads - task.first_head);
      task.head_size = decoder_.head_size;
      task.group_size = group_size;
      task.scale = layer.scale;
      task.slopes = slopes;
      task.window = layer.window;
      task.position = position_ids_[id];
      task.slot_positions = slot_positions_;
      kernels_.decode_attention(task);
    });
  }

  // Blocks of rows of one prompt each, and the query heads of one key-value head.
  void attend_prompts(
      Team::Member& member, const LayerSpec& layer, size_t index, const int32_t* run_ids, int64_t num_run) {
    if constexpr (std::is_same_v<Element, BFloat16>) {
      const int64_t group_size = decoder_.num_heads / decoder_.num_kv_heads;
      const int64_t parts = (group_size + kMostPromptHeads - 1) / kMostPromptHeads;
      const int64_t part_heads = (group_size + parts - 1) / parts;
      const int64_t num_tasks = decoder_.num_kv_heads * parts; // of a block
      const int32_t* key_limits = plan_.key_limits.data() + index * num_rows_;
      const auto end_of_block = [&](int64_t begin) {
        int64_t end = begin + 1;
        while (end < std::min(num_run, begin + kPromptRows) &&
               plan_.cache_ids[run_ids[end]] == plan_.cache_ids[run_ids[begin]]) {
          ++end;
        }
        return end;
      };
      int64_t num_blocks = 0;
      for (int64_t begin = 0; begin < num_run; begin = end_of_block(begin)) {
        ++num_blocks;
      }
      int64_t block = 0, begin = 0, end = end_of_block(0); // tasks come in their order
      team_.for_each_task(member, num_blocks * num_tasks, [&](int64_t i) {
        for (; block < i / num_tasks; ++block) {
          begin = end;
          end = end_of_block(begin);
        }
        const int64_t kv_head = i % num_tasks / parts;
        const int64_t first_head = i % parts * part_heads;
        PromptAttentionTask task;
        task.query = row(query_, begin);
        task.k_cache = k_cache_;
        task.v_cache = v_cache_;
        task.slots = whole_.slot_tables + index * whole_.slot_tables_layer_stride +
            plan_.cache_ids[run_ids[begin]] * whole_.slot_tables_seq_stride;
        task.out = row(attention_, begin);
        task.scratch = scratch(member.index);
        for (int64_t place = 0; place < kPromptRows; ++place) {
          const int32_t id = run_ids[std::min(begin + place, end - 1)];
          task.key_limits[place] = key_limits[id];
          task.positions[place] = static_cast<int32_t>(position_ids_[id]);
        }
        task.num_rows = end - begin;
        task.query_stride = query_.stride;
        task.out_stride = attention_.stride;
        task.slot_stride = decoder_.num_kv_heads * decoder_.head_size;
        task.kv_head = kv_head;
        task.first_head = kv_head * group_size + first_head;
        task.num_heads = std::min(part_heads, group_size - first_head);
        task.head_size = decoder_.head_size;
        task.scale = layer.scale;
        task.slopes = static_cast<const float*>(decoder_.data(decoder_.slopes));
        task.window = layer.window;
        task.slot_positions = slot_positions_;
        attend_prompt_(task);
      });
    }
  }

  // Gates times what they let through, in parts of rows.
  void activate(Team::Member& member, int64_t num_run) {
    const int64_t size = decoder_.ffn_size;
    const int64_t parts = std::max<int64_t>(1, team_.size() / num_run);
    const int64_t part_size = (size / parts + 15) / 16 * 16;
    team_.for_each_task(member, num_run * parts, [&](int64_t i) {
      const int64_t first = i % parts * part_size;
      ActivateRow<Element> task;
      task.x = row(inner_, i / parts) + first;
      task.factors = task.x + size;
      task.out = row(activated_, i / parts) + first;
      task.size = std::min(part_size, size - first);
      task.activation = decoder_.activation;
      if (task.size > 0) {
        kernels_.activate(task);
      }
    });
  }

  void begin_head(const Part& part) {
    const Norm<Element> final_norm = norm(decoder_.final_norm);
    for (int64_t i = 0; i < num_head_rows_; ++i) {
      const int64_t index = head_rows_ == nullptr ? i : head_rows_[i];
      if (!part.has(index)) {
        continue;
      }
      if (final_norm.exists) {
        apply(final_norm, hidden(index), row(normed_, i), decoder_.hidden_size);
      } else {
        copy(hidden(index), row(normed_, i), decoder_.hidden_size);
      }
    }
  }

  void head(Team::Member& member, Clock& clock) {
    const bool is_projected = decoder_.project_out.num_outputs > 0;
    if (is_projected) {
      multiply<1>(
          member,
          {product(
              decoder_.project_out, row(normed_, 0), normed_.stride, row(embedded_, 0), embedded_.stride, num_head_rows_)});
    }
    const Rows& rows = is_projected ? embedded_ : normed_;
    const int64_t vocab_size = decoder_.vocab_size;
    multiply<1>(member, {product(decoder_.lm_head, row(rows, 0), rows.stride, logits_, vocab_size, num_head_rows_)});
    clock.lap(kProducts);
    team_.for_each_task(member, num_head_rows_, [&](int64_t i) { tokens_[i] = choose(member.index, i); });
  }

  int64_t choose(int64_t member, int64_t index) const {
    ChoiceRow<Element> row;
    row.logits = logits_ + index * decoder_.vocab_size;
    row.num_logits = decoder_.vocab_size;
    if (choices_ == nullptr) {
      const LargestLogit largest = kernels_.largest_logit(row.logits, row.num_logits);
      return std::isfinite(largest.value) ? largest.token : kNoToken;
    }
    row.choice = choices_[index];
    row.maxima = decoder_.choice_scratch[member].maxima.data();
    row.keys = decoder_.choice_scratch[member].keys.data();
    return kernels_.choose_token(row);
  }

  Decoder& decoder_;
  const ElementKernels<Element>& kernels_;
  Team& team_;
  int64_t num_rows_;
  StepPlan& plan_;
  const RowPlan& whole_;
  const Gate& gate_;
  int32_t* counts_;
  Rows hidden_, normed_, run_normed_, ffn_normed_, query_, key_, value_, attention_, delta_, ffn_delta_, inner_, activated_, embedded_;
  int64_t num_elements_;
  Element* memory_ = nullptr;
  const int64_t* head_rows_ = nullptr; // null for all
  int64_t num_head_rows_ = 0;
  const Choice* choices_ = nullptr; // null for the most likely tokens
  int64_t* tokens_ = nullptr;
  const int64_t* token_ids_ = nullptr;
  const int64_t* position_ids_ = nullptr;
  Element* k_cache_ = nullptr;
  Element* v_cache_ = nullptr;
  int32_t* slot_positions_ = nullptr;
  Element* hidden_states_ = nullptr;
  int64_t hidden_stride_ = 0;
  Element* logits_ = nullptr;
  bool is_prompt_ = false;
  bool is_timed_ = false;
  const void* const* begun_ = nullptr;
  const KeptState* kept_ = nullptr;
  // Long prompts attend in blocks where there is a function for it.
  AttendPrompt attend_prompt_ = std::is_same_v<Element, BFloat16> ? attend_prompt(decoder_.head_size) : nullptr;
};

} // namespace
} // namespace dynskip
