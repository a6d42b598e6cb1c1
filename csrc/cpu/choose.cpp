#include "choices.h"

#include <algorithm>
#include <cmath>

#include "decoder_rows.h"
#include "dispatch.h"
#include "kernels.h"
#include "ops.h"
#include "rows.h"

namespace dynskip {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

uint64_t kth_smallest(uint64_t* keys, int64_t num_keys, int64_t k) {
  constexpr int64_t kFewKeys = 512;
  constexpr int kDigitBits = 11;
  constexpr uint64_t kMask = (1u << kDigitBits) - 1;
  while (num_keys > kFewKeys) {
    uint64_t differing = 0;
    for (int64_t i = 0; i < num_keys; ++i) {
      differing |= keys[i] ^ keys[0];
    }
    const uint32_t high = static_cast<uint32_t>(differing >> 32);
    if (high == 0) {
      return keys[k];
    }
    const int shift = std::max(64 - __builtin_clz(high) - kDigitBits, 32);
    uint32_t counts[kMask + 1] = {};
    for (int64_t i = 0; i < num_keys; ++i) {
      ++counts[keys[i] >> shift & kMask];
    }
    uint64_t digit = 0;
    while (k >= counts[digit]) {
      k -= counts[digit++];
    }
    int64_t num_same = 0;
    for (int64_t i = 0; i < num_keys; ++i) {
      const uint64_t key = keys[i];
      keys[num_same] = key;
      num_same += (key >> shift & kMask) == digit;
    }
    num_keys = num_same;
  }
  std::nth_element(keys, keys + k, keys + num_keys);
  return keys[k];
}

namespace {

void check_logits(const char* op, const Tensor& logits) {
  DYNSKIP_CHECK(
      logits.dim() == 2 && logits.size(1) >= 1 && (logits.size(1) == 1 || logits.stride(1) == 1),
      op, ": logits must be [R, V] with contiguous rows and V at least 1, got ", shape_of(logits), ".");
  DYNSKIP_CHECK(
      logits.size(1) <= INT32_MAX - kChoiceBlock, op, ": logits must have columns that int32 can number, got ",
      logits.size(1), ".");
}

template <typename Value>
const Value* checked_column(
    const char* op, const char* name, const Tensor& column, ScalarType dtype, int64_t num_rows) {
  DYNSKIP_CHECK(
      column.scalar_type() == dtype && column.dim() == 1 && column.size(0) == num_rows && column.is_contiguous(),
      op, ": ", name, " must be contiguous [", num_rows, "] ", dtype == ScalarType::Double ? "float64" : "int64",
      ", got ", shape_of(column), ".");
  return static_cast<const Value*>(column.data_ptr());
}

} // namespace

std::vector<Choice> checked_choices(
    const char* op, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p, const Tensor& min_p,
    const Tensor& seed, const Tensor& output, const Tensor& position, int64_t num_rows) {
  const auto* temperatures = checked_column<double>(op, "temperature", temperature, ScalarType::Double, num_rows);
  const auto* top_ks = checked_column<int64_t>(op, "top_k", top_k, ScalarType::Long, num_rows);
  const auto* top_ps = checked_column<double>(op, "top_p", top_p, ScalarType::Double, num_rows);
  const auto* min_ps = checked_column<double>(op, "min_p", min_p, ScalarType::Double, num_rows);
  const auto* seeds = checked_column<int64_t>(op, "seed", seed, ScalarType::Long, num_rows);
  const auto* outputs = checked_column<int64_t>(op, "output", output, ScalarType::Long, num_rows);
  const auto* positions = checked_column<int64_t>(op, "position", position, ScalarType::Long, num_rows);
  std::vector<Choice> choices(num_rows);
  for (int64_t row = 0; row < num_rows; ++row) {
    choices[row].temperature = temperatures[row];
    choices[row].top_k = top_ks[row];
    choices[row].top_p = top_ps[row];
    choices[row].min_p = min_ps[row];
    choices[row].seed = static_cast<uint64_t>(seeds[row]);
    choices[row].output = static_cast<uint32_t>(outputs[row]);
    choices[row].position = static_cast<uint32_t>(positions[row]);
  }
  return choices;
}

std::vector<Choice> checked_choices(const char* op, const std::vector<Tensor>& columns, int64_t num_rows) {
  DYNSKIP_CHECK(
      columns.empty() || columns.size() == 7, op, ": choices must be seven columns or none, got ", columns.size(), ".");
  if (columns.empty()) {
    return {};
  }
  return checked_choices(
      op, columns[0], columns[1], columns[2], columns[3], columns[4], columns[5], columns[6], num_rows);
}

Tensor most_likely(const Tensor& logits) {
  check_logits("most_likely", logits);
  const int64_t num_rows = logits.size(0);
  const int64_t num_logits = logits.size(1);
  Tensor tokens = torch::stable::empty({num_rows}, ScalarType::Long);
  auto* results = static_cast<int64_t*>(tokens.data_ptr());
  for_element_type(logits.scalar_type(), "most_likely", [&](auto element) {
    using Element = decltype(element);
    const auto kernel = kernels().of<Element>().largest_logit;
    const auto* values = static_cast<const Element*>(logits.data_ptr());
    const int64_t stride = logits.stride(0);
    for_each_row(num_rows, num_logits, [&](int64_t row) {
      const LargestLogit largest = kernel(values + row * stride, num_logits);
      results[row] = std::isfinite(largest.value) ? largest.token : kNoToken;
    });
  });
  return tokens;
}

Tensor choose_tokens(
    const Tensor& logits,
    const Tensor& temperature,
    const Tensor& top_k,
    const Tensor& top_p,
    const Tensor& min_p,
    const Tensor& seed,
    const Tensor& output,
    const Tensor& position,
    int64_t handle) {
  check_logits("choose_tokens", logits);
  const int64_t num_rows = logits.size(0);
  const int64_t num_logits = logits.size(1);
  const std::vector<Choice> choices =
      checked_choices("choose_tokens", temperature, top_k, top_p, min_p, seed, output, position, num_rows);
  Tensor tokens = torch::stable::empty({num_rows}, ScalarType::Long);
  auto* results = static_cast<int64_t*>(tokens.data_ptr());
  for_element_type(logits.scalar_type(), "choose_tokens", [&](auto element) {
    using Element = decltype(element);
    const auto kernel = kernels().of<Element>().choose_token;
    const auto* values = static_cast<const Element*>(logits.data_ptr());
    const int64_t stride = logits.stride(0);
    const auto draw = [&](int64_t row, ChoiceScratch& scratch) {
      ChoiceRow<Element> task;
      task.logits = values + row * stride;
      task.num_logits = num_logits;
      task.choice = choices[row];
      task.maxima = scratch.maxima.data();
      task.keys = scratch.keys.data();
      results[row] = kernel(task);
    };
    for_each_row_on(handle, num_rows, num_logits, draw);
  });
  return tokens;
}

} // namespace dynskip
