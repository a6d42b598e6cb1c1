// Some decode steps in one call: each but the first runs the tokens that the step before has chosen.

#include <algorithm>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "choices.h"
#include "decode_step.h"
#include "ops.h"

namespace dynskip {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A sequence that guesses. What it runs next is one row: `token` at `position`, in the layers of its last row in the first
// step.
struct Guesser {
  int64_t place; // among all sequences
  int64_t last_row; // in the first step
  int64_t num_left; // tokens that it still guesses
  int64_t position;
  int64_t token;
  int64_t num_common; // layers behind which its states are kept, 0 for none
};

// Those of a first step: rows side by side in the same place of the cache are one sequence's.
std::vector<Guesser> guessers_of(const Decoder& decoder, const StepRows& rows, const Tensor& num_guesses) {
  std::vector<Guesser> guessers;
  for (int64_t row = 0; row < rows.num_rows; ++row) {
    if (row + 1 == rows.num_rows || rows.cache_ids[row + 1] != rows.cache_ids[row]) {
      const int64_t place = guessers.size();
      guessers.push_back({place, row, 0, rows.position_ids[row], 0, 0});
    }
  }
  const int64_t* lengths = checked_ids("guess_tokens", "num_guesses", num_guesses, guessers.size(), INT32_MAX);
  const int64_t end = num_positions(decoder);
  for (Guesser& guesser : guessers) {
    guesser.num_left = lengths[guesser.place];
    DYNSKIP_CHECK(
        guesser.num_left >= 1 && guesser.num_left <= end - guesser.position, "guess_tokens: num_guesses must lie in 1..",
        end - guesser.position, ", the positions left from the last token on, got ", guesser.num_left, " of sequence ",
        guesser.place, ".");
  }
  return guessers;
}

// The rows of a step after the first, with the memory that they point to.
struct NextRows {
  std::vector<int64_t> token_ids, position_ids, cache_ids;
  std::vector<uint8_t> active;

  StepRows of(const std::vector<Guesser>& guessers, const StepRows& first, int64_t num_layers) {
    token_ids.clear();
    position_ids.clear();
    cache_ids.clear();
    active.clear();
    for (const Guesser& guesser : guessers) {
      token_ids.push_back(guesser.token);
      position_ids.push_back(guesser.position);
      cache_ids.push_back(first.cache_ids[guesser.last_row]);
    }
    for (int64_t layer = 0; layer < num_layers; ++layer) {
      for (const Guesser& guesser : guessers) {
        active.push_back(first.active[layer * first.num_rows + guesser.last_row]);
      }
    }
    StepRows rows = first;
    rows.num_rows = guessers.size();
    rows.token_ids = token_ids.data();
    rows.position_ids = position_ids.data();
    rows.cache_ids = cache_ids.data();
    rows.active = active.data();
    return rows;
  }
};

} // namespace

std::tuple<Tensor, Tensor> guess_tokens(
    int64_t handle,
    const Tensor& token_ids,
    const Tensor& position_ids,
    const Tensor& cache_ids,
    const Tensor& active,
    const Tensor& num_guesses,
    std::vector<Tensor> choice_columns,
    const std::optional<Tensor>& num_common,
    const Tensor& k_cache,
    const Tensor& v_cache,
    const std::optional<Tensor>& slot_positions,
    const Tensor& context_lens,
    const Tensor& slot_tables,
    const Tensor& free_slots,
    const Tensor& slot_cursor,
    const Tensor& counts,
    bool is_timed) {
  const std::shared_ptr<Decoder> held = decoder_at(handle);
  Decoder& decoder = *held;
  const std::lock_guard<std::mutex> lock(decoder.mutex);
  const StepCache cache = {k_cache, v_cache, slot_positions, context_lens, slot_tables, free_slots, slot_cursor};
  check_cache("guess_tokens", decoder, cache);
  StepRows first = checked_rows("guess_tokens", decoder, cache, token_ids, position_ids, cache_ids, active);
  first.is_timed = is_timed;
  std::vector<Guesser> guessers = guessers_of(decoder, first, num_guesses);
  const int64_t num_seqs = guessers.size();
  std::vector<Choice> choices = checked_choices("guess_tokens", choice_columns, num_seqs);
  if (num_common.has_value()) {
    const int64_t num_layers = decoder.layers.size();
    const int64_t* depths = checked_ids("guess_tokens", "num_common", *num_common, num_seqs, num_layers + 1);
    for (Guesser& guesser : guessers) {
      guesser.num_common = depths[guesser.place];
    }
  }
  int64_t* counted = checked_counts("guess_tokens", decoder, counts);

  int64_t num_steps = 0;
  for (const Guesser& guesser : guessers) {
    num_steps = std::max(num_steps, guesser.num_left);
  }
  Tensor guesses = torch::stable::empty({num_steps, num_seqs}, ScalarType::Long);
  auto* result = static_cast<int64_t*>(guesses.data_ptr());
  std::fill(result, result + num_steps * num_seqs, kNoToken);
  Tensor states = torch::stable::empty(
      {num_common.has_value() ? num_steps : 0, num_seqs, decoder.hidden_size}, decoder.dtype());
  const int64_t state_bytes = decoder.hidden_size * states.element_size();
  std::vector<KeptState> kept;
  const Tensor logits = torch::stable::empty({num_seqs, decoder.vocab_size}, decoder.dtype());
  std::vector<int64_t> head_rows(num_seqs), chosen(num_seqs);
  NextRows next;
  for (int64_t step = 0; !guessers.empty(); ++step) {
    const int64_t num_going = guessers.size();
    StepRows rows = first;
    if (step > 0) {
      rows = next.of(guessers, first, decoder.layers.size());
    } else {
      std::transform(guessers.begin(), guessers.end(), head_rows.begin(), [](const Guesser& each) { return each.last_row; });
      rows.head_rows = head_rows.data();
    }
    rows.num_head_rows = num_going;
    rows.choices = choices.empty() ? nullptr : choices.data();
    if (num_common.has_value()) {
      kept.assign(rows.num_rows, {0, nullptr});
      for (int64_t i = 0; i < num_going; ++i) {
        const Guesser& guesser = guessers[i];
        if (guesser.num_common > 0) {
          char* out = static_cast<char*>(states.data_ptr()) + (step * num_seqs + guesser.place) * state_bytes;
          kept[step == 0 ? guesser.last_row : i] = {guesser.num_common, out};
        }
      }
      rows.kept = kept.data();
    }
    run_step("guess_tokens", decoder, cache, rows, logits.data_ptr(), chosen.data(), counted);

    size_t num_left = 0;
    for (int64_t i = 0; i < num_going; ++i) {
      Guesser guesser = guessers[i];
      guesser.token = chosen[i];
      ++guesser.position;
      --guesser.num_left;
      result[step * num_seqs + guesser.place] = guesser.token;
      if (guesser.token != kNoToken && guesser.num_left > 0) {
        if (!choices.empty()) {
          choices[num_left] = choices[i];
          ++choices[num_left].position;
        }
        guessers[num_left++] = guesser;
      }
    }
    guessers.resize(num_left);
  }
  return {guesses, states};
}

} // namespace dynskip
