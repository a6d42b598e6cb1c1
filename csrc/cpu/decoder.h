// A decoder as a decode step needs it: its tensors and sizes, the threads that run it and the memory that it works in.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "choose.h"
#include "kernels.h"
#include "team.h"

namespace dynskip {

// Places in Decoder::tensors; -1 where there is none.
struct NormSpec {
  bool exists;
  int64_t weight;
  int64_t bias;
  bool rms;
  float eps;
};

// panel_outputs, address: of a packed matrix; a dense one has 0 and a place in Decoder::tensors.
struct MatrixSpec {
  int64_t panel_outputs;
  int64_t address;
  int64_t num_outputs; // 0 where there is no matrix
  int64_t num_inputs;
  int64_t bias;
};

struct LayerSpec {
  NormSpec attention_norm, ffn_norm, q_norm, k_norm;
  MatrixSpec q_proj, k_proj, v_proj, out_proj, fc1, fc2;
  float scale;
  int64_t window;
};

// What a thread chooses tokens with: see ChoiceRow.
struct ChoiceScratch {
  std::vector<float> maxima;
  std::vector<uint64_t> keys;

  void make_room(int64_t num_logits) {
    maxima.resize(std::max<size_t>(maxima.size(), num_choice_maxima(num_logits)));
    keys.resize(std::max<size_t>(keys.size(), num_choice_keys(num_logits)));
  }
};

using Memory = std::unique_ptr<char, void (*)(void*)>;

// Zeros at the beginning of a line of the cache; many of them in huge pages where Linux has some to give.
Memory zeroed_memory(int64_t num_bytes);

struct Decoder {
  std::vector<torch::stable::Tensor> tensors;
  std::vector<const void*> addresses; // of the tensors, during a step
  int64_t hidden_size, num_heads, num_kv_heads, head_size, embedding_size, ffn_size, vocab_size, position_offset;
  bool norm_first, parallel, shared_norm, gated;
  Activation activation;
  int64_t embed_tokens, embed_positions, cos_sin, slopes; // places
  NormSpec embed_norm, final_norm;
  MatrixSpec project_in, project_out, lm_head;
  std::vector<LayerSpec> layers;

  torch::headeronly::ScalarType dtype() const {
    return tensors[embed_tokens].scalar_type();
  }

  const void* data(int64_t place) const {
    return place < 0 ? nullptr : addresses[place];
  }

  // Asks PyTorch where each tensor is. Each step asks once: Python may set another storage between two of them.
  void find_addresses() {
    addresses.resize(tensors.size());
    std::transform(tensors.begin(), tensors.end(), addresses.begin(), [](const auto& each) { return each.data_ptr(); });
  }

  // One step at a time.
  std::mutex mutex;
  std::unique_ptr<Team, EndTeam> team;

  // What steps of up to max_rows rows work in. Rows are padded_row_stride() apart, with zeros behind each.
  int64_t max_rows = 0;
  Memory memory{nullptr, std::free};
  std::vector<std::vector<float>> scratch; // of each thread
  std::vector<ChoiceScratch> choice_scratch; // of each thread

  // Nanoseconds in matrix products, in attention and in the rest, of all steps that were timed.
  int64_t times_ns[3] = {};
};

// Gives a decoder the threads of a step, as many as torch has.
void make_team(Decoder& decoder);

// The decoder that new_decoder made.
std::shared_ptr<Decoder> decoder_at(int64_t handle);

} // namespace dynskip
