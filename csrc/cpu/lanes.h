// Sixteen float32 lanes and what the kernels need of them: loads, stores, sums, exp, activations.
//
// Included once by each isa_*.cpp, after it has set its target: the compiler's vector extension turns the same source
// into AVX-512, AVX2 or whatever the machine has. Everything is static and inlined, so that no code compiled for one
// instruction set can be linked where another was meant.

#pragma once

#include <cstdint>
#include <cstring>

#include "element.h"
#include "kernels.h"

#define DYNSKIP_INLINE static inline __attribute__((always_inline))

namespace dynskip {
namespace {

constexpr int kNumLanes = 16;

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t IntLanes __attribute__((vector_size(64)));
typedef uint32_t BitLanes __attribute__((vector_size(64)));
typedef uint16_t HalfBits __attribute__((vector_size(32)));

DYNSKIP_INLINE Lanes broadcast(float x) {
  return Lanes{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

DYNSKIP_INLINE Lanes select(IntLanes mask, Lanes yes, Lanes no) {
  return (Lanes)(((IntLanes)yes & mask) | ((IntLanes)no & ~mask));
}

DYNSKIP_INLINE Lanes maximum(Lanes a, Lanes b) {
  return select(a > b, a, b);
}

DYNSKIP_INLINE Lanes load(const float* p) {
  Lanes x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

DYNSKIP_INLINE void store(float* p, Lanes x) {
  std::memcpy(p, &x, sizeof(x));
}

DYNSKIP_INLINE Lanes load(const BFloat16* p) {
  HalfBits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return (Lanes)(__builtin_convertvector(bits, BitLanes) << 16);
}

// The nearest bfloat16, ties to even, in the low halves.
DYNSKIP_INLINE BitLanes rounded_bits(Lanes x) {
  const BitLanes bits = (BitLanes)x;
  const BitLanes rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // Rounding would carry some NaNs into infinity.
  const BitLanes is_nan = (BitLanes)(x != x);
  return (rounded & ~is_nan) | (0x7fc0u & is_nan);
}

DYNSKIP_INLINE void store(BFloat16* p, Lanes x) {
  const HalfBits half = __builtin_convertvector(rounded_bits(x), HalfBits);
  std::memcpy(p, &half, sizeof(half));
}

#if defined(DYNSKIP_HAS_AVX512)

DYNSKIP_INLINE Lanes load(const Float16* p) {
  return (Lanes)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

DYNSKIP_INLINE void store(Float16* p, Lanes x) {
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}

#else

DYNSKIP_INLINE Lanes load(const Float16* p) {
  HalfBits bits;
  std::memcpy(&bits, p, sizeof(bits));
  const BitLanes wide = __builtin_convertvector(bits, BitLanes);
  // The exponent's bias differs by 112; a product rights it for subnormal numbers too.
  const Lanes magnitude = (Lanes)((wide & 0x7fffu) << 13) * 0x1p112f;
  const BitLanes is_special = (BitLanes)((wide & 0x7c00u) == 0x7c00u);
  return (Lanes)((BitLanes)magnitude | (is_special & 0x7f800000u) | ((wide & 0x8000u) << 16));
}

DYNSKIP_INLINE void store(Float16* p, Lanes x) {
  for (int i = 0; i < kNumLanes; ++i) {
    p[i] = Float16(x[i]);
  }
}

#endif

// The last elements of a row, fewer than a vector, with zeros behind them.
template <typename Element>
DYNSKIP_INLINE Lanes load_some(const Element* p, int64_t count) {
  Element some[kNumLanes];
  std::memset(static_cast<void*>(some), 0, sizeof(some));
  std::memcpy(static_cast<void*>(some), p, count * sizeof(Element));
  return load(some);
}

template <typename Element>
DYNSKIP_INLINE void store_some(Element* p, Lanes x, int64_t count) {
  Element some[kNumLanes];
  store(some, x);
  std::memcpy(static_cast<void*>(p), some, count * sizeof(Element));
}

// Thirty-two consecutive elements, spread over two vectors in an order of the element type's own: arithmetic that keeps
// to this order on both sides saves bfloat16 half of its conversion.
struct Pair {
  Lanes a;
  Lanes b;
};

template <typename Element>
DYNSKIP_INLINE Pair load_pair(const Element* p) {
  return {load(p), load(p + kNumLanes)};
}

template <typename Element>
DYNSKIP_INLINE void store_pair(Element* p, Pair x) {
  store(p, x.a);
  store(p + kNumLanes, x.b);
}

DYNSKIP_INLINE Pair load_pair(const BFloat16* p) {
  BitLanes bits;
  std::memcpy(&bits, p, sizeof(bits));
  return {(Lanes)(bits << 16), (Lanes)(bits & 0xffff0000u)};
}

DYNSKIP_INLINE void store_pair(BFloat16* p, Pair x) {
  const BitLanes bits = rounded_bits(x.a) | (rounded_bits(x.b) << 16);
  std::memcpy(p, &bits, sizeof(bits));
}

// The lane sums of sixteen vectors, in lane i the sum of v[i]; always added in the same order.
DYNSKIP_INLINE Lanes sum_each(Lanes v[kNumLanes]) {
  Lanes pairs[8];
  for (int i = 0; i < 8; ++i) {
    const Lanes low =
        __builtin_shufflevector(v[i], v[i + 8], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    const Lanes high =
        __builtin_shufflevector(v[i], v[i + 8], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    pairs[i] = low + high;
  }
  Lanes quads[4];
  for (int i = 0; i < 4; ++i) {
    const Lanes low = __builtin_shufflevector(
        pairs[i], pairs[i + 4], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    const Lanes high = __builtin_shufflevector(
        pairs[i], pairs[i + 4], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    quads[i] = low + high;
  }
  Lanes halves[2];
  for (int i = 0; i < 2; ++i) {
    const Lanes low = __builtin_shufflevector(
        quads[i], quads[i + 2], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    const Lanes high = __builtin_shufflevector(
        quads[i], quads[i + 2], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    halves[i] = low + high;
  }
  const Lanes low =
      __builtin_shufflevector(halves[0], halves[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  const Lanes high =
      __builtin_shufflevector(halves[0], halves[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  const Lanes sums = low + high;
  // The vectors lie in the order 0 4 8 12, 2 6 10 14, 1 5 9 13, 3 7 11 15.
  return __builtin_shufflevector(sums, sums, 0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
}

DYNSKIP_INLINE float sum(Lanes x) {
  for (int step = kNumLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) {
      x[i] += x[i + step];
    }
  }
  return x[0];
}

DYNSKIP_INLINE float maximum(Lanes x) {
  float largest = x[0];
  for (int i = 1; i < kNumLanes; ++i) {
    largest = x[i] > largest ? x[i] : largest;
  }
  return largest;
}

// e^(x + tail), without has_tail e^x, for x in -87..0 and a tail near 0, error below 2 ulp.
template <bool has_tail>
DYNSKIP_INLINE Lanes exp_in_range(Lanes x, Lanes tail) {
  constexpr float kRoundToInteger = 0x1.8p23f;
  const Lanes shifted = x * 0x1.715476p0f + kRoundToInteger;
  const Lanes n = shifted - kRoundToInteger;
  // ln 2 in two parts, the first short enough for its product with n to be exact.
  Lanes r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  if (has_tail) {
    r += tail;
  }
  Lanes y = broadcast(1.0f / 5040);
  for (const float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    y = y * r + coefficient;
  }
  return (Lanes)((IntLanes)y + ((IntLanes)shifted << 23));
}

// The same for any x <= 0; zero for x below -87, where float32 would be subnormal.
template <bool has_tail>
DYNSKIP_INLINE Lanes exp_of_sum(Lanes x, Lanes tail) {
  constexpr float kLowest = -87.0f;
  const IntLanes vanishes = x < kLowest;
  x = select(vanishes, broadcast(kLowest), x);
  const Lanes scaled = exp_in_range<has_tail>(x, tail);
  return select(vanishes, Lanes{}, select(x != x, x, scaled));
}

DYNSKIP_INLINE Lanes exp_nonpositive(Lanes x) {
  return exp_of_sum<false>(x, Lanes{});
}

DYNSKIP_INLINE Lanes magnitude(Lanes x) {
  return (Lanes)((BitLanes)x & 0x7fffffffu);
}

// 1 / (1 + e^-x).
DYNSKIP_INLINE Lanes sigmoid(Lanes x) {
  const Lanes e = exp_nonpositive(-magnitude(x));
  return select(x < 0.0f, e, broadcast(1.0f)) / (1.0f + e);
}

// The share of the standard normal distribution below x. The error of the smaller of the two shares beside x is relative.
DYNSKIP_INLINE Lanes normal_share(Lanes x) {
  const Lanes size = magnitude(x);
  // Where it is small, the share is e^(-x^2 / 2) times a function that a polynomial in t follows to 4e-9.
  const Lanes t = 1.0f / (1.0f + 0.3f * size);
  Lanes y = broadcast(-0x1.51586p-6f);
  for (const float coefficient :
       {0x1.cbc34ep-4f, -0x1.d26fbap-3f, 0x1.877608p-3f, -0x1.4308bp-4f, 0x1.889284p-4f, 0x1.418d34p-4f, 0x1.c36b2cp-4f,
        0x1.e9c792p-4f, 0x1.ea3c68p-4f}) {
    y = y * t + coefficient;
  }
  // A number of twelve bits has an exact square.
  const Lanes head = (Lanes)((BitLanes)size & 0xfffff000u);
  const Lanes rest = (size - head) * (size + head);
  const Lanes smaller = y * t * exp_of_sum<true>(-0.5f * (head * head), -0.5f * rest);
  return select(x > 0.0f, 1.0f - smaller, smaller);
}

// The functions of `Activation`, in float32: errors are units in the last place of the larger of x and the result.
template <Activation activation>
DYNSKIP_INLINE Lanes activated(Lanes x) {
  switch (activation) {
    case Activation::kRelu:
      return select(x < 0.0f, Lanes{}, x); // a NaN stays one
    case Activation::kGelu:
      return x * normal_share(x);
    case Activation::kGeluTanh:
      // (1 + tanh(u)) / 2 is the sigmoid of 2 * u.
      return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
    case Activation::kSilu:
      return x * sigmoid(x);
    default:
      return x;
  }
}

} // namespace
} // namespace dynskip
