// The choice of a row's next token; compiled once for each instruction set.
//
// A token is drawn by the Gumbel-max trick: it has the largest sum of scaled logit and noise among the tokens that the
// filters keep. Nearly all tokens are told from the winner without a logarithm. With noise -log(E), E = -log(1 - v) and
// a uniform v, a sum above `score` means E < e^(scaled - score), and E is at least v. So a block of tokens needs one
// exponential and its uniforms; tokens that pass are compared in float64, by the formula of the specification.
//
// Filters keep the first tokens of the row in the order of falling logits, equal ones in the order of their numbers.
// The winner among all tokens is the winner among the kept ones if it is kept, which the mass ahead of it tells. If it
// is not, no token behind it is kept either, and the next winner is sought ahead of it: nothing is sorted.

#pragma once

#include <cmath>
#include <cstdint>

#include "choose.h"
#include "lanes.h"
#include "row_kernels.h"

namespace dynskip {
namespace {

typedef uint64_t WideBits __attribute__((vector_size(64)));

constexpr int kBlockVectors = kChoiceBlock / kNumLanes;
// -log(-log(1 - 2^-33)), the noise of the smallest uniform, rounded up.
constexpr float kLargestNoise = 22.88f;
// Weights below e^-40 of the largest are no part of a mass.
constexpr float kLightest = -40.0f;
// What float32 may be off when it tells which tokens cannot win.
constexpr float kTolerance = 1.001f;
// Blocks whose weights are added in float32.
constexpr int64_t kMassBlocks = 16;

// GCC splits arithmetic on sixteen lanes into vectors that the machine has, but comparisons into single lanes.
#if defined(DYNSKIP_HAS_AVX512)
constexpr int kPartBytes = 64;
#elif defined(DYNSKIP_HAS_AVX2)
constexpr int kPartBytes = 32;
#else
constexpr int kPartBytes = 16;
#endif
constexpr int kNumParts = sizeof(Lanes) / kPartBytes;

typedef float LanesPart __attribute__((vector_size(kPartBytes)));
typedef int32_t IntPart __attribute__((vector_size(kPartBytes)));

template <typename Result, typename Part, typename Operand, typename Run>
DYNSKIP_INLINE Result by_part(Operand a, Operand b, const Run& run) {
  Part a_parts[kNumParts];
  Part b_parts[kNumParts];
  std::memcpy(a_parts, &a, sizeof(a));
  std::memcpy(b_parts, &b, sizeof(b));
  decltype(run(a_parts[0], b_parts[0])) results[kNumParts];
  for (int i = 0; i < kNumParts; ++i) {
    results[i] = run(a_parts[i], b_parts[i]);
  }
  Result result;
  std::memcpy(&result, results, sizeof(result));
  return result;
}

DYNSKIP_INLINE IntLanes is_above(Lanes a, Lanes b) {
  return by_part<IntLanes, LanesPart>(a, b, [](LanesPart x, LanesPart y) { return (IntPart)(x > y); });
}

DYNSKIP_INLINE IntLanes is_at_least(Lanes a, Lanes b) {
  return by_part<IntLanes, LanesPart>(a, b, [](LanesPart x, LanesPart y) { return (IntPart)(x >= y); });
}

DYNSKIP_INLINE IntLanes is_equal(Lanes a, Lanes b) {
  return by_part<IntLanes, LanesPart>(a, b, [](LanesPart x, LanesPart y) { return (IntPart)(x == y); });
}

DYNSKIP_INLINE IntLanes is_above(IntLanes a, IntLanes b) {
  return by_part<IntLanes, IntPart>(a, b, [](IntPart x, IntPart y) { return (IntPart)(x > y); });
}

// b where a is NaN.
DYNSKIP_INLINE Lanes larger(Lanes a, Lanes b) {
#if defined(DYNSKIP_HAS_AVX512)
  return (Lanes)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#else
  return by_part<Lanes, LanesPart>(a, b, [](LanesPart x, LanesPart y) { return x > y ? x : y; });
#endif
}

DYNSKIP_INLINE IntLanes smaller(IntLanes a, IntLanes b) {
  return by_part<IntLanes, IntPart>(a, b, [](IntPart x, IntPart y) { return x < y ? x : y; });
}

// Negative for NaN alone.
DYNSKIP_INLINE IntLanes below_nan(Lanes x) {
  return 0x7f800000 - ((IntLanes)x & 0x7fffffff);
}

// One bit for each lane, set where the lane is negative.
DYNSKIP_INLINE uint32_t lane_bits(IntLanes mask) {
#if defined(DYNSKIP_HAS_AVX512)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__SSE2__)
  typedef float Quad __attribute__((vector_size(16)));
  Quad quads[4];
  std::memcpy(quads, &mask, sizeof(quads));
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) {
    bits |= static_cast<uint32_t>(__builtin_ia32_movmskps(quads[i])) << (4 * i);
  }
  return bits;
#else
  uint32_t bits = 0;
  for (int i = 0; i < kNumLanes; ++i) {
    bits |= (static_cast<uint32_t>(mask[i]) >> 31) << i;
  }
  return bits;
#endif
}

DYNSKIP_INLINE bool any(IntLanes mask) {
  return lane_bits(mask) != 0;
}

// The logits of a block, and -inf behind the last.
struct LogitBlock {
  Lanes x[kBlockVectors];
};

template <typename Element>
DYNSKIP_INLINE LogitBlock load_block(const Element* logits, int64_t num_logits, int64_t block) {
  const Element* p = logits + block * kChoiceBlock;
  const int64_t count = num_logits - block * kChoiceBlock;
  LogitBlock loaded;
  if (__builtin_expect(count >= kChoiceBlock, 1)) {
#pragma GCC unroll 4
    for (int j = 0; j < kBlockVectors; ++j) {
      loaded.x[j] = load(p + j * kNumLanes);
    }
    return loaded;
  }
  for (int j = 0; j < kBlockVectors; ++j) {
    const int64_t rest = count - j * kNumLanes;
    loaded.x[j] = broadcast(-INFINITY);
    if (rest > 0) {
      loaded.x[j] = select(first_lanes(rest), load_upto(p + j * kNumLanes, rest), loaded.x[j]);
    }
  }
  return loaded;
}

template <typename Element>
DYNSKIP_INLINE float logit_at(const Element* logits, int64_t token) {
  return load_some(logits + token, 1)[0];
}

// With keeps_maxima, writes the largest logit in each lane of each block.
template <bool keeps_maxima, typename Element>
DYNSKIP_INLINE LargestLogit find_largest(const Element* logits, int64_t num_logits, float* maxima) {
  Lanes best = broadcast(-INFINITY);
  IntLanes best_block = {};
  IntLanes below = {};
  const int64_t num_blocks = num_choice_blocks(num_logits);
  for (int64_t block = 0; block < num_blocks; ++block) {
    const LogitBlock logit = load_block(logits, num_logits, block);
    below |= (below_nan(logit.x[0]) | below_nan(logit.x[1])) | (below_nan(logit.x[2]) | below_nan(logit.x[3]));
    const Lanes largest = larger(larger(logit.x[0], logit.x[1]), larger(logit.x[2], logit.x[3]));
    if (keeps_maxima) {
      store(maxima + block * kNumLanes, largest);
    }
    const IntLanes is_larger = is_above(largest, best);
    best = select(is_larger, largest, best);
    best_block = (best_block & ~is_larger) | ((int32_t)block & is_larger);
  }
  const bool has_nan = any(below);
  const float value = has_nan ? NAN : maximum(best);
  int64_t first_block = num_blocks;
  for (int lane = 0; lane < kNumLanes; ++lane) {
    const bool may_be_first = best[lane] == value && best_block[lane] < first_block;
    first_block = may_be_first ? best_block[lane] : first_block;
  }
  int64_t token = has_nan ? 0 : first_block * kChoiceBlock;
  for (; token < num_logits - 1; ++token) {
    const float logit = logit_at(logits, token);
    if (has_nan ? logit != logit : logit == value) {
      break;
    }
  }
  return {value, token};
}

template <typename Element>
LargestLogit largest_logit(const Element* logits, int64_t num_logits) {
  return find_largest<false>(logits, num_logits, nullptr);
}

// The low halves of 64-bit lanes times a number of 32 bits.
DYNSKIP_INLINE WideBits multiply_low(WideBits a, uint32_t factor) {
#if defined(DYNSKIP_HAS_AVX512)
  return (WideBits)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(factor));
#elif defined(DYNSKIP_HAS_AVX2)
  __m256i halves[2];
  std::memcpy(halves, &a, sizeof(halves));
  for (int i = 0; i < 2; ++i) {
    halves[i] = _mm256_mul_epu32(halves[i], _mm256_set1_epi64x(factor));
  }
  std::memcpy(&a, halves, sizeof(halves));
  return a;
#else
  return (a & 0xffffffffu) * (uint64_t)factor;
#endif
}

// Random bits for each token of a block: Philox4x32-10 (Salmon et al., SC 2011). The four words of a counter belong to
// the tokens in one lane.
struct Philox {
  uint64_t keys[10][2];
  uint64_t position;
  uint64_t output;

  explicit Philox(const Choice& choice) : position(choice.position), output(choice.output) {
    uint32_t low = static_cast<uint32_t>(choice.seed);
    uint32_t high = static_cast<uint32_t>(choice.seed >> 32);
    for (auto& key : keys) {
      key[0] = low;
      key[1] = high;
      low += 0x9e3779b9u;
      high += 0xbb67ae85u;
    }
  }
};

struct RandomBlock {
  BitLanes bits[kBlockVectors];
};

DYNSKIP_INLINE RandomBlock draw_block(const Philox& philox, int64_t block) {
  const BitLanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const BitLanes counter = lane + (uint32_t)(block * kNumLanes);
  // Even lanes and odd lanes, each in the low half of 64 bits; what the high halves hold does not matter.
  WideBits words[2][4];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    WideBits c0 = half == 0 ? (WideBits)counter : (WideBits)counter >> 32;
    WideBits c1 = WideBits{} + philox.position;
    WideBits c2 = WideBits{} + philox.output;
    WideBits c3 = {};
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const WideBits product0 = multiply_low(c0, 0xd2511f53u);
      const WideBits product1 = multiply_low(c2, 0xcd9e8d57u);
      c0 = (product1 >> 32) ^ c1 ^ philox.keys[round][0];
      c2 = (product0 >> 32) ^ c3 ^ philox.keys[round][1];
      c1 = product1;
      c3 = product0;
    }
    words[half][0] = c0;
    words[half][1] = c1;
    words[half][2] = c2;
    words[half][3] = c3;
  }
  RandomBlock drawn;
#pragma GCC unroll 4
  for (int j = 0; j < kBlockVectors; ++j) {
    drawn.bits[j] = (BitLanes)((words[0][j] & 0xffffffffu) | (words[1][j] << 32));
  }
  return drawn;
}

// Half of the random bits, and below the uniforms that all of them make.
DYNSKIP_INLINE IntLanes halved(BitLanes bits) {
  return (IntLanes)(bits >> 1);
}

DYNSKIP_INLINE Lanes uniform_below(IntLanes half) {
  return __builtin_convertvector(half, Lanes) * 0x1p-31f;
}

// The tokens that are left: those with larger logits than `value`, and those with an equal one up to `last_token`.
struct Cut {
  float value = -INFINITY;
  int32_t last_token = INT32_MAX;
};

DYNSKIP_INLINE IntLanes kept(const Cut& cut, Lanes x, int64_t first_token) {
  const IntLanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Lanes value = broadcast(cut.value);
  const IntLanes is_behind = is_above(lane + (int32_t)first_token, IntLanes{} + cut.last_token);
  return is_above(x, value) | (is_equal(x, value) & ~is_behind);
}

// From logits to scaled logits, the largest of which is 0.
struct Scale {
  float largest;
  float factor;
  double temperature;
};

// In float32, close enough to tell which tokens cannot win; NaN for a logit of -inf at the highest temperatures.
DYNSKIP_INLINE Lanes scaled(const Scale& scale, Lanes x) {
  return (x - scale.largest) * scale.factor;
}

// e^x for x <= 0; 0 for NaN and below -87.
DYNSKIP_INLINE Lanes weight_of(Lanes x) {
  const Lanes lowest = broadcast(-87.0f);
  return (Lanes)((IntLanes)exp_in_range<false>(larger(x, lowest), Lanes{}) & is_at_least(x, lowest));
}

struct Winner {
  int64_t token;
  double score;
};

DYNSKIP_INLINE double score_of(const Scale& scale, float logit, uint32_t bits) {
  const float distance = logit - scale.largest;
  const double uniform = (bits + 0.5) * 0x1p-32;
  return distance / scale.temperature - std::log(-std::log1p(-uniform));
}

// The tokens that the cut leaves have one with the largest score, and with sums_mass their weights add up to *mass.
// start: one of them.
template <bool cuts, bool sums_mass, typename Element>
DYNSKIP_INLINE Winner find_winner(
    const ChoiceRow<Element>& row, const Scale& scale, const Philox& philox, const Cut& cut, int64_t start, double* mass) {
  const int64_t num_blocks = num_choice_blocks(row.num_logits);
  const int64_t start_block = start / kChoiceBlock;
  Winner winner = {start, 0.0};
  {
    const RandomBlock drawn = draw_block(philox, start_block);
    const int64_t place = start % kChoiceBlock;
    const uint32_t bits = drawn.bits[place / kNumLanes][place % kNumLanes];
    winner.score = score_of(scale, logit_at(row.logits, start), bits);
  }
  // Those of uniforms whose token has a weight.
  float most = static_cast<float>(std::exp(-winner.score)) * kTolerance;
  float least = static_cast<float>(winner.score) - kLargestNoise;
  double total = 0.0;
  Lanes partial = {};
  for (int64_t block = 0; block < num_blocks; ++block) {
    if (sums_mass && block % kMassBlocks == 0) {
      total += sum(partial);
      partial = Lanes{};
    }
    const Lanes maxima = load(row.maxima + block * kNumLanes);
    if (cuts && !any(is_at_least(maxima, broadcast(cut.value)))) {
      continue;
    }
    const Lanes scaled_maxima = scaled(scale, maxima);
    const bool may_win = any(is_at_least(scaled_maxima, broadcast(least)));
    const bool has_mass = sums_mass && any(is_at_least(scaled_maxima, broadcast(kLightest)));
    if (!may_win && !has_mass) {
      continue;
    }
    const LogitBlock logit = load_block(row.logits, row.num_logits, block);
    Lanes weights[kBlockVectors];
    Lanes largest_weight;
    if (sums_mass) {
#pragma GCC unroll 4
      for (int j = 0; j < kBlockVectors; ++j) {
        weights[j] = weight_of(scaled(scale, logit.x[j]));
        if (cuts) {
          const IntLanes is_kept = kept(cut, logit.x[j], block * kChoiceBlock + j * kNumLanes);
          weights[j] = (Lanes)((IntLanes)weights[j] & is_kept);
        }
      }
      partial += (weights[0] + weights[1]) + (weights[2] + weights[3]);
      largest_weight = larger(larger(weights[0], weights[1]), larger(weights[2], weights[3]));
    } else {
      largest_weight = weight_of(scaled_maxima);
    }
    if (!may_win) {
      continue;
    }
    const RandomBlock drawn = draw_block(philox, block);
    const IntLanes smallest = smaller(
        smaller(halved(drawn.bits[0]), halved(drawn.bits[1])), smaller(halved(drawn.bits[2]), halved(drawn.bits[3])));
    if (__builtin_expect(!any(is_above(largest_weight * most, uniform_below(smallest))), 1)) {
      continue;
    }
    for (int j = 0; j < kBlockVectors; ++j) {
      const int64_t first_token = block * kChoiceBlock + j * kNumLanes;
      const Lanes weight = sums_mass ? weights[j] : weight_of(scaled(scale, logit.x[j]));
      IntLanes may_be = is_above(weight * most, uniform_below(halved(drawn.bits[j])));
      if (cuts && !sums_mass) {
        may_be &= kept(cut, logit.x[j], first_token);
      }
      for (uint32_t lanes = lane_bits(may_be); lanes != 0; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        const double score = score_of(scale, logit.x[j][lane], drawn.bits[j][lane]);
        const int64_t token = first_token + lane;
        if (score > winner.score || (score == winner.score && token < winner.token)) {
          winner = {token, score};
          most = static_cast<float>(std::exp(-score)) * kTolerance;
          least = static_cast<float>(score) - kLargestNoise;
        }
      }
    }
  }
  if (sums_mass) {
    *mass = total + sum(partial);
  }
  return winner;
}

// The weights of the tokens that come before a token in the order of falling logits.
template <typename Element>
DYNSKIP_INLINE double mass_ahead(const ChoiceRow<Element>& row, const Scale& scale, int64_t token) {
  const Cut ahead = {logit_at(row.logits, token), static_cast<int32_t>(token) - 1};
  const int64_t num_blocks = num_choice_blocks(row.num_logits);
  double total = 0.0;
  Lanes partial = {};
  for (int64_t block = 0; block < num_blocks; ++block) {
    if (block % kMassBlocks == 0) {
      total += sum(partial);
      partial = Lanes{};
    }
    if (!any(is_at_least(load(row.maxima + block * kNumLanes), broadcast(ahead.value)))) {
      continue;
    }
    const LogitBlock logit = load_block(row.logits, row.num_logits, block);
    Lanes weights[kBlockVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kBlockVectors; ++j) {
      const IntLanes is_ahead = kept(ahead, logit.x[j], block * kChoiceBlock + j * kNumLanes);
      weights[j] = (Lanes)((IntLanes)weight_of(scaled(scale, logit.x[j])) & is_ahead);
    }
    partial += (weights[0] + weights[1]) + (weights[2] + weights[3]);
  }
  return total + sum(partial);
}

// Smaller for larger logits; 0 and -0 are equal.
DYNSKIP_INLINE BitLanes falling_keys(Lanes x) {
  const BitLanes bits = (BitLanes)(x + 0.0f);
  const BitLanes is_negative = (BitLanes)((IntLanes)bits >> 31);
  return ~(bits ^ (is_negative | 0x80000000u));
}

// The cut behind the top_k first tokens of the row.
template <typename Element>
DYNSKIP_INLINE Cut cut_behind(const ChoiceRow<Element>& row, int64_t top_k) {
  const int64_t num_blocks = num_choice_blocks(row.num_logits);
  const int64_t num_maxima = num_blocks * kNumLanes;
  BitLanes keys;
  // The top_k-th of the largest logits of any groups of tokens is no more than the top_k-th of all.
  Cut bound;
  if (2 * top_k <= num_maxima) {
    int64_t num_groups = 0;
    const bool by_block = 2 * top_k <= num_blocks;
    for (int64_t block = 0; block < num_blocks; ++block) {
      keys = falling_keys(load(row.maxima + block * kNumLanes));
      uint32_t smallest = keys[0];
      for (int lane = 0; lane < kNumLanes; ++lane) {
        smallest = keys[lane] < smallest ? keys[lane] : smallest;
        if (!by_block) {
          row.keys[num_groups] = (uint64_t)keys[lane] << 32 | num_groups;
          ++num_groups;
        }
      }
      if (by_block) {
        row.keys[num_groups] = (uint64_t)smallest << 32 | num_groups;
        ++num_groups;
      }
    }
    const int64_t group = kth_smallest(row.keys, num_groups, top_k - 1) & 0xffffffffu;
    bound.value = by_block ? maximum(load(row.maxima + group * kNumLanes)) : row.maxima[group];
  }
  int64_t num_keys = 0;
  for (int64_t block = 0; block < num_blocks; ++block) {
    if (!any(is_at_least(load(row.maxima + block * kNumLanes), broadcast(bound.value)))) {
      continue;
    }
    const LogitBlock logit = load_block(row.logits, row.num_logits, block);
    for (int j = 0; j < kBlockVectors; ++j) {
      const int64_t first_token = block * kChoiceBlock + j * kNumLanes;
      const int64_t rest = row.num_logits - first_token;
      keys = falling_keys(logit.x[j]);
      const IntLanes counts = is_at_least(logit.x[j], broadcast(bound.value)) & first_lanes(rest < kNumLanes ? rest : kNumLanes);
      for (uint32_t lanes = lane_bits(counts); lanes != 0; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        row.keys[num_keys++] = (uint64_t)keys[lane] << 32 | (uint64_t)(first_token + lane);
      }
    }
  }
  const int64_t last = kth_smallest(row.keys, num_keys, top_k - 1) & 0xffffffffu;
  return {logit_at(row.logits, last), static_cast<int32_t>(last)};
}

template <typename Element>
int64_t choose_token(const ChoiceRow<Element>& row) {
  const Choice& choice = row.choice;
  const bool is_greedy = choice.temperature == 0;
  const LargestLogit largest = is_greedy ? find_largest<false>(row.logits, row.num_logits, nullptr)
                                         : find_largest<true>(row.logits, row.num_logits, row.maxima);
  if (!__builtin_isfinite(largest.value)) {
    return kNoToken;
  }
  if (is_greedy) {
    return largest.token;
  }
  const double factor = 1.0 / choice.temperature;
  const Scale scale = {largest.value, factor < 0x1p127 ? static_cast<float>(factor) : 0x1p127f, choice.temperature};
  const Philox philox(choice);
  Cut cut;
  const bool has_min_p = choice.min_p > 0;
  if (has_min_p) {
    const double margin = choice.temperature * std::log(choice.min_p);
    cut.value = margin < -3e38 ? -INFINITY : largest.value + static_cast<float>(margin);
  }
  const bool has_top_k = choice.top_k > 0 && choice.top_k < row.num_logits;
  if (has_top_k) {
    const Cut behind = cut_behind(row, choice.top_k);
    cut = behind.value < cut.value ? cut : behind;
  }
  const bool has_cut = has_min_p || has_top_k;
  if (choice.top_p >= 1) {
    return has_cut ? find_winner<true, false>(row, scale, philox, cut, largest.token, nullptr).token
                   : find_winner<false, false>(row, scale, philox, cut, largest.token, nullptr).token;
  }
  double mass = 0.0;
  int64_t token = has_cut ? find_winner<true, true>(row, scale, philox, cut, largest.token, &mass).token
                          : find_winner<false, true>(row, scale, philox, cut, largest.token, &mass).token;
  // Ends: nothing is ahead of the most likely token.
  while (token != largest.token && mass_ahead(row, scale, token) >= choice.top_p * mass) {
    cut = {logit_at(row.logits, token), static_cast<int32_t>(token) - 1};
    token = find_winner<true, false>(row, scale, philox, cut, largest.token, nullptr).token;
  }
  return token;
}

} // namespace
} // namespace dynskip
