"""The choice of each row's next token by one program, without sorting: nearly all tokens are told from the winner by
one exponential, and what top_p keeps by the mass ahead of the winner."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty, int64

from dynskip.kernels.launches import launch

_NUM_COUNTERS = 256
_NUM_WARPS = 8
# Left to itself ptxas may spill to make room for one program more.
_MAX_REGISTERS = 128
# A counter of Philox has words for four tokens, 16 apart; `choice_reference.gumbel_noise` says which.
_LANES = tl.constexpr(16)
_WORDS = tl.constexpr(4)
_NOT_FINITE = tl.constexpr(-1)
# What float32 may be off when it tells which tokens cannot win.
_TOLERANCE = tl.constexpr(1.001)


@triton.jit(
    do_not_specialize_on_alignment=[
        *("temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seed_ptr", "output_ptr", "position_ptr"),
    ]
)
def choose_tokens_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    output_ptr,
    position_ptr,
    out_ptr,
    stride_row,
    num_tokens,
    NUM_COUNTERS: tl.constexpr,
):
    """One program for each row. Tokens that are left: those with a larger logit than `cut`, and of those with an equal
    one the tokens up to `last`."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_row
    largest, first, is_finite = find_largest(logits_ptr, num_tokens, NUM_COUNTERS * _WORDS)
    token = tl.where(is_finite, first, _NOT_FINITE)
    temperature = tl.load(temperature_ptr + row)
    if is_finite & (temperature > 0):
        cut, last = largest * 0.0 - float("inf"), num_tokens
        top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
        seed, output, position = tl.load(seed_ptr + row), tl.load(output_ptr + row), tl.load(position_ptr + row)
        if (top_k > 0) & (top_k < num_tokens):
            cut, last = find_kth(logits_ptr, top_k.to(tl.int32), num_tokens, NUM_COUNTERS * _WORDS)
        if min_p > 0:
            least = largest + (temperature * tl.log(min_p)).to(tl.float32)
            last = tl.where(least > cut, num_tokens, last)
            cut = tl.maximum(least, cut)
        token, logit = find_winner(
            *(logits_ptr, largest, first, temperature, cut, last, seed, output, position, num_tokens, NUM_COUNTERS)
        )
        if top_p < 1:
            tile: tl.constexpr = NUM_COUNTERS * _WORDS
            enough = top_p * sum_weights(logits_ptr, largest, temperature, cut, last, num_tokens, tile)
            ahead = sum_weights(logits_ptr, largest, temperature, logit, token - 1, num_tokens, tile)
            # The winner among all tokens is the winner among those that are kept, if it is kept. If not, none behind it
            # is kept either. The first of all always is.
            while (token != first) & (ahead >= enough):
                token, logit = find_winner(
                    *(logits_ptr, largest, first, temperature, logit, token - 1),
                    *(seed, output, position, num_tokens, NUM_COUNTERS),
                )
                ahead = sum_weights(logits_ptr, largest, temperature, logit, token - 1, num_tokens, tile)
    tl.store(out_ptr + row, token.to(tl.int64))


@triton.jit
def load_logits(logits_ptr, tokens, num_tokens):
    """float32, -inf behind the last."""
    return tl.load(logits_ptr + tokens, mask=tokens < num_tokens, other=-float("inf")).to(tl.float32)


@triton.jit
def is_left(logits, tokens, cut, last):
    """Whether the cut leaves a token."""
    return (logits > cut) | ((logits == cut) & (tokens <= last))


@triton.jit
def find_largest(logits_ptr, num_tokens, TILE: tl.constexpr):
    """The largest logit, the first token that has it, and whether it is finite and no logit is NaN."""
    best = tl.full([TILE], -float("inf"), tl.float32)
    places = tl.zeros([TILE], tl.int32)
    is_nan = tl.zeros([TILE], tl.int32)
    for start in tl.range(0, num_tokens, TILE):
        tokens = start + tl.arange(0, TILE)
        logits = load_logits(logits_ptr, tokens, num_tokens)
        is_nan |= (logits != logits).to(tl.int32)
        places = tl.where(logits > best, tokens, places)
        best = tl.where(logits > best, logits, best)
    largest = tl.max(best, axis=0)
    token = tl.min(tl.where(best == largest, places, num_tokens), axis=0)
    return largest, token, (tl.max(is_nan, axis=0) == 0) & (tl.abs(largest) < float("inf"))


@triton.jit
def sum_weights(logits_ptr, largest, temperature, cut, last, num_tokens, TILE: tl.constexpr):
    """What the tokens that are left weigh together, float64 sums of float32, the likeliest 1."""
    sums = tl.zeros([TILE], tl.float64)
    for start in tl.range(0, num_tokens, TILE):
        tokens = start + tl.arange(0, TILE)
        logits = load_logits(logits_ptr, tokens, num_tokens)
        weights = tl.where(is_left(logits, tokens, cut, last), tl.exp(over(logits - largest, temperature)), 0.0)
        sums += weights.to(tl.float64)
    return tl.sum(sums, axis=0)


@triton.jit
def over(distances, temperature):
    """Distances to the largest logit over the temperature, float32, -1e9 at least; 0 stays 0 at any temperature."""
    factor = tl.maximum(tl.minimum(1.0 / temperature, 1e38), 1e-28).to(tl.float32)
    return tl.maximum(distances, -1e9 / factor) * factor


@triton.jit
def ordered(logits):
    """int32, in the order of the logits; both zeros are one."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def find_kth(logits_ptr, k, num_tokens, TILE: tl.constexpr):
    """The cut that leaves k tokens: the first in the order of falling logits, equal ones in the order of their ids."""
    # Bit by bit, from the sign on: the largest key that k tokens reach.
    key = tl.full([], -0x80000000, tl.int64)
    for bit in tl.range(0, 32):
        higher = key + (tl.full([], 1, tl.int64) << (31 - bit))
        count = tl.zeros([TILE], tl.int32)
        for start in tl.range(0, num_tokens, TILE):
            tokens = start + tl.arange(0, TILE)
            keys = ordered(load_logits(logits_ptr, tokens, num_tokens))
            count += ((keys >= higher) & (tokens < num_tokens)).to(tl.int32)
        key = tl.where(tl.sum(count, axis=0) >= k, higher, key)
    num_above = tl.zeros([TILE], tl.int32)
    for start in tl.range(0, num_tokens, TILE):
        tokens = start + tl.arange(0, TILE)
        keys = ordered(load_logits(logits_ptr, tokens, num_tokens))
        num_above += ((keys > key) & (tokens < num_tokens)).to(tl.int32)
    num_left = k - tl.sum(num_above, axis=0)
    cut = tl.full([], -float("inf"), tl.float32)
    last, num_equal = num_tokens, tl.zeros([], tl.int32)
    for start in tl.range(0, num_tokens, TILE):
        tokens = start + tl.arange(0, TILE)
        logits = load_logits(logits_ptr, tokens, num_tokens)
        is_equal = ((ordered(logits) == key) & (tokens < num_tokens)).to(tl.int32)
        cut = tl.maximum(cut, tl.max(tl.where(is_equal > 0, logits, -float("inf")), axis=0))
        is_last = (is_equal > 0) & (num_equal + tl.cumsum(is_equal, axis=0) == num_left)
        last = tl.minimum(last, tl.min(tl.where(is_last, tokens, num_tokens), axis=0))
        num_equal += tl.sum(is_equal, axis=0)
    return cut, last


@triton.jit
def noise_of(bits):
    """Gumbel noise, float64, from random bits: `choice_reference.gumbel_noise`. 1 - u needs 33 bits and is exact."""
    uniform = (bits.to(tl.float64) + 0.5) * (1.0 / 4294967296.0)
    return -tl.log(-tl.log(1.0 - uniform))


@triton.jit
def find_winner(
    logits_ptr,
    largest,
    first,
    temperature,
    cut,
    last,
    seed,
    output,
    position,
    num_tokens,
    NUM_COUNTERS: tl.constexpr,
):
    """Of the tokens that are left the one with the largest score, scaled logit and noise, and its logit.

    first: one of them, with the logit `largest`.
    """
    group: tl.constexpr = _LANES * _WORDS
    c1, c2, zero = position.to(tl.uint32), output.to(tl.uint32), tl.zeros([], tl.uint32)
    at_first = (first // group * _LANES + first % _LANES).to(tl.uint32)
    bits0, bits1, bits2, bits3 = tl.philox(seed, at_first, c1, c2, zero)
    word = first % group // _LANES
    bits = tl.where(word < 2, tl.where(word == 0, bits0, bits1), tl.where(word == 2, bits2, bits3))
    best, winner, logit = noise_of(bits), first, largest
    for start in tl.range(0, num_tokens, NUM_COUNTERS * _WORDS):
        counters = start // _WORDS + tl.arange(0, NUM_COUNTERS)
        words = tl.philox(seed, counters.to(tl.uint32), c1, c2, zero)
        tokens = counters // _LANES * group + counters % _LANES
        for i in tl.static_range(_WORDS):
            best, winner, logit = better(
                *(logits_ptr, tokens + i * _LANES, words[i], largest, temperature, cut, last, num_tokens),
                *(best, winner, logit),
            )
    return winner, logit


@triton.jit
def better(logits_ptr, tokens, bits, largest, temperature, cut, last, num_tokens, best, winner, logit):
    """The winner among `tokens` and the one before. With noise -log(E), E = -log(1 - u), a score above `best` means
    E < exp(scaled - best), and E is at least u."""
    logits = load_logits(logits_ptr, tokens, num_tokens)
    distances = logits - largest
    bound = tl.exp(over(distances, temperature) - best.to(tl.float32)) * _TOLERANCE
    may_win = (bits.to(tl.float32) * (1.0 / 4294967296.0) < bound) & (tokens < num_tokens)
    may_win &= is_left(logits, tokens, cut, last)
    if tl.max(may_win.to(tl.int32), axis=0) > 0:
        scores = tl.where(may_win, distances.to(tl.float64) / temperature + noise_of(bits), -float("inf"))
        score = tl.max(scores, axis=0)
        token = tl.min(tl.where(may_win & (scores == score), tokens, num_tokens), axis=0)
        is_better = (score > best) | ((score == best) & (token < winner))
        logit = tl.where(is_better, tl.max(tl.where(tokens == token, logits, -float("inf")), axis=0), logit)
        winner = tl.where(is_better, token, winner)
        best = tl.where(is_better, score, best)
    return best, winner, logit


def choose_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    output: Tensor,
    position: Tensor,
) -> Tensor:
    """The token of each row of `logits` `[R, V]`: `[R], int64`. See `choice_reference.choose_tokens`, whose noise and
    formulas these are, up to the rounding of logarithms; weights of top_p are float32.

    Logits are contiguous in a row. Cost: reads R * V logits once, once more for a draw, twice for each round of top_p,
    and 34 times for top_k; nothing is waited for.
    """
    chosen = empty(len(logits), dtype=int64, device=logits.device)
    launch(
        "choose_tokens",
        choose_tokens_kernel,
        (len(logits),),
        (logits, temperature, top_k, top_p, min_p, seed, output, position, chosen),
        (logits.stride(0), logits.shape[1]),
        NUM_COUNTERS=_NUM_COUNTERS,
        num_warps=_NUM_WARPS,
        maxnreg=_MAX_REGISTERS,
    )
    return chosen
