// The kernels, one set for each instruction set, and the choice among them.

#pragma once

#include <cstdint>
#include <type_traits>

#include "element.h"

namespace dynskip {

// The attention of some heads of one query row over the tokens that one sequence has cached.
template <typename Element>
struct DecodeAttentionTask {
  const Element* query; // [H, D]
  const Element* k_cache; // [num_slots, H, D]
  const Element* v_cache; // [num_slots, H, D]
  const int32_t* slots; // [num_tokens]
  Element* out; // [H, D]
  float* scratch; // decode_attention_scratch_floats(num_heads, head_size)
  int64_t num_tokens;
  int64_t slot_stride; // elements from one slot of a cache to the next
  int64_t first_head;
  int64_t num_heads;
  int64_t head_size; // fastest where it is a multiple of 16
  float scale;
};

// Tokens whose scores are held at once.
constexpr int64_t kChunkTokens = 128;

constexpr int64_t decode_attention_scratch_floats(int64_t num_heads, int64_t head_size) {
  const int64_t whole_vectors = (head_size + 15) / 16 * 16;
  return num_heads * (kChunkTokens + 2 * whole_vectors + 2);
}

// One row of LayerNorm: out [C] from x [C]; weight and bias [C], or null.
template <typename Element>
struct LayerNormRow {
  const Element* x;
  const Element* weight;
  const Element* bias;
  Element* out;
  int64_t size;
  float eps;
};

template <typename Element>
struct ElementKernels {
  void (*decode_attention)(const DecodeAttentionTask<Element>&);
  void (*layer_norm)(const LayerNormRow<Element>&);
  void (*add)(Element* x, const Element* y, int64_t size); // x += y
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

} // namespace dynskip
