// The kernels, one set for each instruction set, and the choice among them.

#pragma once

#include <cstdint>
#include <type_traits>

#include "choose.h"
#include "element.h"

namespace dynskip {

// The functions of feed-forward layers, as dynskip/ops/reference.py numbers them.
enum class Activation : int64_t { kNone, kRelu, kGelu, kGeluTanh, kSilu, kEnd };

// The attention of some heads of one query row over the tokens that one sequence has cached. The query heads of a task are
// H of G key-value heads, group_size to each; a task of whole groups reads each key and value once.
template <typename Element>
struct DecodeAttentionTask {
  const Element* query; // [H, D]
  const Element* k_cache; // [num_slots, G, D]
  const Element* v_cache; // [num_slots, G, D]
  const int32_t* slots; // [num_tokens]
  Element* out; // [H, D]
  float* scratch; // decode_attention_scratch_floats(num_heads, head_size)
  int64_t num_tokens;
  int64_t slot_stride; // elements from one slot of a cache to the next
  int64_t first_head; // of the query
  int64_t num_heads;
  int64_t head_size; // fastest where it is a multiple of 16
  int64_t group_size;
  float scale;
  const float* slopes; // [H], or null
  int64_t window; // 0 for none
  int64_t position; // of the query; read with slopes and windows only, as the next
  const int32_t* slot_positions; // [num_slots]
};

// Tokens whose scores are held at once.
constexpr int64_t kChunkTokens = 128;

constexpr int64_t decode_attention_scratch_floats(int64_t num_heads, int64_t head_size) {
  const int64_t whole_vectors = (head_size + 15) / 16 * 16;
  return num_heads * (kChunkTokens + 2 * whole_vectors + 2);
}

// Rows of one prompt that attend together, and heads of one task at most.
constexpr int64_t kPromptRows = 32;
constexpr int64_t kMostPromptHeads = 8;
constexpr int64_t kMostPromptHeadSize = 256;

// The attention of some rows of one prompt for some query heads of one key-value head.
struct PromptAttentionTask {
  const BFloat16* query; // [num_rows, H, D], rows query_stride apart
  const BFloat16* k_cache; // [num_slots, G, D]
  const BFloat16* v_cache; // [num_slots, G, D]
  const int32_t* slots; // of the prompt's tokens
  BFloat16* out; // [num_rows, H, D], rows out_stride apart
  float* scratch; // prompt_attention_scratch_floats(num_heads, head_size)
  int32_t key_limits[kPromptRows]; // tokens that each row attends to, at least 1 of each place
  int32_t positions[kPromptRows]; // read with slopes and windows only, as slot_positions
  int64_t num_rows;
  int64_t query_stride;
  int64_t out_stride;
  int64_t slot_stride;
  int64_t kv_head;
  int64_t first_head; // of the query
  int64_t num_heads; // kMostPromptHeads at most
  int64_t head_size; // a multiple of 16, kMostPromptHeadSize at most
  float scale;
  const float* slopes; // [H], or null
  int64_t window; // 0 for none
  const int32_t* slot_positions; // [num_slots]
};

constexpr int64_t prompt_attention_scratch_floats(int64_t num_heads, int64_t head_size) {
  const int64_t whole_tiles = (head_size + 31) / 32 * 32;
  return num_heads * kPromptRows * (2 * whole_tiles + 2) + kChunkTokens * (whole_tiles + 2 * kPromptRows) + 16;
}

using AttendPrompt = void (*)(const PromptAttentionTask&);

// The function for heads of so many elements; null without the instruction set, or where it takes no such heads.
AttendPrompt attend_prompt_amx(int64_t head_size);
AttendPrompt attend_prompt_avx512_bf16(int64_t head_size);

// The fastest of them that this machine has.
AttendPrompt attend_prompt(int64_t head_size);

// One row of LayerNorm, or of RMSNorm: out [C] from x [C]; weight and bias [C], or null.
template <typename Element>
struct LayerNormRow {
  const Element* x;
  const Element* weight;
  const Element* bias;
  Element* out;
  int64_t size;
  float eps;
  bool rms;
};

// The heads of one row, which are turned to its position in place.
template <typename Element>
struct RotateRow {
  Element* x; // [H, D]
  const float* cos_sin; // [rotary_size] of the position
  const Element* weight; // [D] of the RMSNorm of each head, or null
  int64_t num_heads;
  int64_t head_size;
  int64_t rotary_size; // even, at most head_size
  float eps;
};

// out [size] is the activation of x [size], times factors [size] unless they are null; out may be x.
template <typename Element>
struct ActivateRow {
  const Element* x;
  const Element* factors;
  Element* out;
  int64_t size;
  Activation activation;
};

// Rows times a matrix, plus a bias, through an activation: y [num_rows, num_outputs]. Results are summed in float32 over
// the inputs in order, and rounded once: the bits of a row depend on that row alone.
//
// The matrix is dense [num_outputs, num_inputs], or in oneDNN's layout: panels of 64 or 32 outputs, one after another; in
// a panel, for each input (bfloat16: for each pair of inputs) the weights of its outputs. So a panel is read from front to
// back. The inputs are padded with zeros to whole blocks, the outputs to a whole panel.
template <typename Element>
struct Product {
  const Element* x; // packed bfloat16: zeros up to packed_inputs()
  int64_t x_stride;
  const Element* weight;
  const Element* bias; // [num_outputs] or null
  Element* y;
  int64_t y_stride;
  int64_t num_rows;
  int64_t num_inputs;
  int64_t num_outputs;
  int64_t panel_outputs; // 64 or 32, or 0 for a dense matrix
  Activation activation;
};

constexpr int64_t kMaxPanelOutputs = 64;
constexpr int64_t kDensePanelOutputs = 16; // of a dense matrix, what a thread takes at once

// Elements from one panel's row of weights to the next, in inputs: bfloat16 has its inputs in pairs.
template <typename Element>
constexpr int64_t kInputBlock = std::is_same_v<Element, BFloat16> ? 32 : 16;

template <typename Element>
constexpr int64_t packed_inputs(int64_t num_inputs) {
  return (num_inputs + kInputBlock<Element> - 1) / kInputBlock<Element> * kInputBlock<Element>;
}

// Elements between rows, and zeros behind each, that suit every product: rows a power of two apart would fall on the same
// lines of the cache.
constexpr int64_t padded_row_stride(int64_t num_inputs) {
  return (num_inputs + 31) / 32 * 32 + 32;
}

template <typename Element>
constexpr int64_t num_panels(const Product<Element>& product) {
  const int64_t outputs = product.panel_outputs == 0 ? kDensePanelOutputs : product.panel_outputs;
  return (product.num_outputs + outputs - 1) / outputs;
}

// Panels of 32 outputs whose sums a thread holds at once where many rows pass over them.
constexpr int64_t kChunkPanels = 8;

// Floats that a thread needs beside a product.
template <typename Element>
constexpr int64_t product_scratch_floats(int64_t num_rows, int64_t num_inputs) {
  if (std::is_same_v<Element, BFloat16>) {
    return num_rows * kChunkPanels * 32;
  }
  return num_rows * (2 * kMaxPanelOutputs + (std::is_same_v<Element, Float16> ? padded_row_stride(num_inputs) : 0));
}

// Computes the outputs of some panels. Threads with panels of their own share a product.
template <typename Element>
using MultiplyPanels = void (*)(const Product<Element>& product, int64_t begin_panel, int64_t end_panel, float* scratch);

// What one thread does: no kernel starts a thread or allocates.
template <typename Element>
struct ElementKernels {
  void (*decode_attention)(const DecodeAttentionTask<Element>&);
  void (*layer_norm)(const LayerNormRow<Element>&);
  void (*add)(Element* x, const Element* y, int64_t size); // x += y
  void (*rotate)(const RotateRow<Element>&);
  void (*activate)(const ActivateRow<Element>&);
  LargestLogit (*largest_logit)(const Element* logits, int64_t num_logits);
  int64_t (*choose_token)(const ChoiceRow<Element>&); // kNoToken for none
  float (*dot)(const Element* x, const float* y, int64_t size);
  MultiplyPanels<Element> multiply_dense;
  MultiplyPanels<Element> multiply_packed; // float32 and float16
};

struct Kernels {
  const char* name;
  ElementKernels<float> f32;
  ElementKernels<BFloat16> bf16;
  ElementKernels<Float16> f16;

  template <typename Element>
  const ElementKernels<Element>& of() const {
    if constexpr (std::is_same_v<Element, float>) {
      return f32;
    } else if constexpr (std::is_same_v<Element, BFloat16>) {
      return bf16;
    } else {
      return f16;
    }
  }
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The set for the best instruction set of this machine.
const Kernels& kernels();

// The function for a matrix with panels of so many outputs, 0 for a dense one; null where this CPU has none: packed
// bfloat16 needs AVX-512 BF16 where panels have 64 outputs, AMX where they have 32.
template <typename Element>
MultiplyPanels<Element> multiply_panels(int64_t panel_outputs);

// Those of packed bfloat16, each of the instruction set that oneDNN has the layout for; null without it.
MultiplyPanels<BFloat16> multiply_panels_avx512_bf16();
MultiplyPanels<BFloat16> multiply_panels_amx();

// Whether many rows by bfloat16 panels of so many outputs take no longer than oneDNN's product, as has been measured: with
// AMX, and with AVX-512 BF16 where panels come whole from the second cache.
bool multiplies_many_rows(int64_t panel_outputs);
bool streams_panels_avx512_bf16();

} // namespace dynskip
