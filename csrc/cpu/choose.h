// The choice of a row's next token from its logits: what it is chosen by, and what one thread needs for it.
// dynskip/ops/choice_reference.py specifies it.

#pragma once

#include <cstdint>

namespace dynskip {

// In place of a token, where the largest logit of a row is NaN or infinite.
constexpr int64_t kNoToken = -1;

// How the token of one row is chosen. The noise depends on the last three and the token's number alone.
struct Choice {
  double temperature; // 0 for the most likely token
  int64_t top_k; // 0 for all
  double top_p; // 1 for all
  double min_p; // 0 for all
  uint64_t seed;
  uint32_t output; // which output of its prompt the row is
  uint32_t position; // tokens of the output before this one
};

// The largest logit of a row and its first token. NaN counts as the largest of all numbers.
struct LargestLogit {
  float value;
  int64_t token; // always one of the row's
};

// Tokens whose noise is drawn at once.
constexpr int64_t kChoiceBlock = 64;

constexpr int64_t num_choice_blocks(int64_t num_logits) {
  return (num_logits + kChoiceBlock - 1) / kChoiceBlock;
}

// What a thread keeps for one row after another. No element needs a value before.
constexpr int64_t num_choice_maxima(int64_t num_logits) {
  return num_choice_blocks(num_logits) * 16;
}

constexpr int64_t num_choice_keys(int64_t num_logits) {
  return num_choice_blocks(num_logits) * kChoiceBlock;
}

template <typename Element>
struct ChoiceRow {
  const Element* logits; // [num_logits]
  int64_t num_logits; // 1 .. 2^31 - 65
  Choice choice;
  float* maxima; // [num_choice_maxima(num_logits)]; neither is read or written where the temperature is 0
  uint64_t* keys; // [num_choice_keys(num_logits)]
};

// The k-th smallest (from 0) of some keys, whose low halves are distinct and rise; they are overwritten.
uint64_t kth_smallest(uint64_t* keys, int64_t num_keys, int64_t k);

} // namespace dynskip
