// The kernels, one set for each instruction set, and the choice among them.

#pragma once

#include <cstdint>
#include <type_traits>

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

// What one thread does for one row: no kernel starts a thread or allocates.
template <typename Element>
struct ElementKernels {
  void (*decode_attention)(const DecodeAttentionTask<Element>&);
  void (*layer_norm)(const LayerNormRow<Element>&);
  void (*add)(Element* x, const Element* y, int64_t size); // x += y
  void (*rotate)(const RotateRow<Element>&);
  void (*activate)(const ActivateRow<Element>&);
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

// Rows times a bfloat16 matrix in the layout that packed_linear.cpp describes, plus a bias, through an activation.
struct PackedProduct {
  const BFloat16* x; // [num_rows, inputs], an even number of inputs
  int64_t x_stride;
  const BFloat16* weight;
  const BFloat16* bias; // [num_outputs] or null
  BFloat16* y; // [num_rows, num_outputs]
  int64_t num_rows;
  int64_t num_pairs; // of inputs
  int64_t panel_stride;
  int64_t num_outputs;
  Activation activation;
};

constexpr int64_t kPanelOutputs = 64;
constexpr int64_t kPairElements = 2 * kPanelOutputs; // of one pair of inputs in a panel
constexpr int64_t kInputBlock = 32; // the layout pads the inputs to a multiple of this
// Rows whose sums fit into registers beside the operands: 6 x 4 vectors.
constexpr int64_t kMaxBlockRows = 6;

constexpr int64_t packed_inputs(int64_t num_inputs) {
  return (num_inputs + kInputBlock - 1) / kInputBlock * kInputBlock;
}

constexpr int64_t num_panels_of(int64_t num_outputs) {
  return (num_outputs + kPanelOutputs - 1) / kPanelOutputs;
}

// Whether a product wants its rows copied, to packed_row_stride elements apart and with a zero behind an odd last input:
// rows a power of two apart would fall on the same lines of the cache.
constexpr bool copies_packed_rows(int64_t num_rows, int64_t num_inputs) {
  return num_rows > kMaxBlockRows || num_inputs % 2 != 0;
}

constexpr int64_t packed_row_stride(int64_t num_inputs) {
  return packed_inputs(num_inputs) + kInputBlock;
}

// Computes the outputs of some panels; sums is scratch, [num_rows, kPanelOutputs]. Threads with panels of their own share
// a product. The bits of an output do not depend on how.
using MultiplyPanels = void (*)(const PackedProduct& product, int64_t begin_panel, int64_t end_panel, float* sums);

// The function, or null where this CPU has no AVX-512 BF16.
MultiplyPanels multiply_panels();

} // namespace dynskip
