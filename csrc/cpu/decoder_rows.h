// Loops over rows of logits, on the threads of the decoder that made them.

#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

#include "decoder.h"

namespace dynskip {

// Calls run(row, scratch) for each row, with scratch for num_logits; on the calling thread where handle is 0.
//
// Not by a parallel loop: OpenMP's threads spin for milliseconds behind it, and would take a core from all of the step that
// follows, which is more than they save here. A decoder's threads sleep by then.
template <typename Run>
void for_each_row_on(int64_t handle, int64_t num_rows, int64_t num_logits, const Run& run) {
  if (handle == 0 || num_rows < 2) {
    ChoiceScratch scratch;
    scratch.make_room(num_logits);
    for (int64_t row = 0; row < num_rows; ++row) {
      run(row, scratch);
    }
    return;
  }
  const std::shared_ptr<Decoder> decoder = decoder_at(handle);
  const std::lock_guard<std::mutex> lock(decoder->mutex);
  make_team(*decoder);
  for (ChoiceScratch& scratch : decoder->choice_scratch) {
    scratch.make_room(num_logits);
  }
  Team& team = *decoder->team;
  team.run([&](Team::Member& member) {
    team.for_each_task(member, num_rows, [&](int64_t row) { run(row, decoder->choice_scratch[member.index]); });
  });
}

} // namespace dynskip
