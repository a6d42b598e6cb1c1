"""Sampling: what a token is drawn from, what a seed repeats, and what the parameters refuse."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynskip import SamplingParams
from dynskip.sampling import NOT_FINITE, Sampler, choose_tokens, filtered_probabilities, most_likely


def slow_filtered_probabilities(
    logits: list[float], temperature: float, top_k: int | None, top_p: float
) -> list[float]:
    """The same rule on plain lists: temperature, then the top_k best, then the fewest that reach top_p."""
    best = max(logits)
    weights = [math.exp((logit - best) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: -weights[token])
    kept = order[: top_k or len(order)]
    total = sum(weights[token] for token in kept)
    chosen, mass = [], 0.0
    for token in kept:
        if mass >= top_p:
            break
        chosen.append(token)
        mass += weights[token] / total
    total = sum(weights[token] for token in chosen)
    return [weights[token] / total if token in chosen else 0.0 for token in range(len(logits))]


@given(
    st.integers(1, 60).flatmap(lambda size: st.permutations(range(size))),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.none() | st.integers(1, 70),
    st.sampled_from([0.05, 0.5, 0.83, 1.0]),
)
def test_filtered_probabilities_follow_the_rule(
    order: list[int], temperature: float, top_k: int | None, top_p: float
) -> None:
    # Distinct logits, so that no order among equals has to be agreed on.
    logits = [place * 0.137 for place in order]
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    probabilities = filtered_probabilities(torch.tensor(logits), params)
    expected = torch.tensor(slow_filtered_probabilities(logits, temperature, top_k, top_p))
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities, expected)
    assert torch.equal(probabilities > 0, expected > 0)


def test_top_k_and_top_p_by_hand() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    assert filtered_probabilities(logits, SamplingParams(temperature=1.0, top_k=1)).tolist() == [0, 0, 0, 1]
    kept = filtered_probabilities(logits, SamplingParams(temperature=1.0, top_p=0.6))
    torch.testing.assert_close(kept, torch.tensor([0, 0, 3 / 7, 4 / 7]))
    # top_p counts the share among the top_k: 4/7 reaches 0.5.
    kept = filtered_probabilities(logits, SamplingParams(temperature=1.0, top_k=2, top_p=0.5))
    torch.testing.assert_close(kept, torch.tensor([0, 0, 0, 1.0]))
    kept = filtered_probabilities(logits, SamplingParams(temperature=0.5))
    torch.testing.assert_close(kept, torch.tensor([1, 4, 9, 16]) / 30)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_the_lowest_temperatures_take_the_best_token(temperature: float) -> None:
    probabilities = filtered_probabilities(torch.tensor([3.0, -8.0, 7.0, 6.5]), SamplingParams(temperature=temperature))
    assert probabilities.tolist() == [0, 0, 1, 0]


def test_the_highest_temperature_draws_evenly() -> None:
    probabilities = filtered_probabilities(torch.tensor([3.0, -8.0, 7.0, 6.5]), SamplingParams(temperature=1e308))
    assert probabilities.tolist() == [0.25] * 4


def test_half_precision_logits_are_sampled_in_float32() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    probabilities = filtered_probabilities(logits, SamplingParams(temperature=0.7, top_p=0.9))
    assert probabilities.dtype == torch.float32 and abs(float(probabilities.sum()) - 1) < 1e-5


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0))
    counts = Counter(sampler.choose(logits) for _ in range(2000))
    for token, share in enumerate((0.1, 0.2, 0.3, 0.4)):
        assert abs(counts[token] / 2000 - share) < 4 * math.sqrt(share * (1 - share) / 2000)


def test_a_seed_repeats_and_every_output_of_a_prompt_draws_its_own() -> None:
    logits = torch.zeros(1000)
    params = SamplingParams(temperature=1.0, seed=5)
    first = [Sampler(params).choose(logits) for _ in range(3)]
    assert len(set(first)) == 1
    assert Sampler(params, index=1).choose(logits) != first[0]
    assert Sampler(params, index=1).choose(logits) == Sampler(SamplingParams(temperature=1.0, seed=6)).choose(logits)


def test_without_a_seed_each_output_differs() -> None:
    logits = torch.zeros(10**6)
    assert len({Sampler(SamplingParams(temperature=1.0)).choose(logits) for _ in range(5)}) == 5


def test_a_batch_may_mix_greedy_and_sampled_rows() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    greedy, sampled = SamplingParams(), SamplingParams(temperature=1.0, seed=1)
    tokens = choose_tokens(logits, [Sampler(greedy), Sampler(sampled), Sampler(greedy), Sampler(sampled)])
    assert tokens[0] == int(logits[0].argmax()) and tokens[2] == int(logits[2].argmax())
    assert tokens[1] == Sampler(sampled).choose(logits[1])
    assert choose_tokens(logits, [Sampler(greedy)] * 4) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, [-math.inf] * 7, [math.nan, math.inf, -math.inf, 1, 2, 3, 4]])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_row_whose_largest_logit_is_not_finite_has_no_token(bad: Any, place: int, dtype: torch.dtype) -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    sound = logits.to(dtype).clone()
    if isinstance(bad, list):
        logits[[1, 2]] = torch.tensor(bad)
    else:
        logits[[1, 2], place] = bad
    params = [SamplingParams(), SamplingParams(), *[SamplingParams(temperature=1.0, seed=1)] * 3]
    samplers, alone = ([Sampler(param) for param in params] for _ in range(2))
    tokens = choose_tokens(logits.to(dtype), samplers)
    assert tokens[1] == tokens[2] == NOT_FINITE
    expected = choose_tokens(sound, alone)
    assert [tokens[row] for row in (0, 3, 4)] == [expected[row] for row in (0, 3, 4)]
    # A row without a token has drawn none.
    generator = samplers[2].generator
    assert generator is not None and generator.initial_seed() == 1
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state())
    run, reported = most_likely(logits.to(dtype))
    assert reported.tolist()[1:3] == [NOT_FINITE] * 2 and all(0 <= token < 7 for token in run.tolist())


def test_a_logit_of_minus_infinity_is_that_of_a_token_that_never_comes() -> None:
    logits = torch.full((2, 9), -math.inf)
    logits[:, [2, 5]] = torch.tensor([1.0, 1.5])
    samplers = [Sampler(SamplingParams()), Sampler(SamplingParams(temperature=2.0, seed=3))]
    drawn = [choose_tokens(logits, samplers) for _ in range(40)]
    assert {greedy for greedy, _ in drawn} == {5} and {sampled for _, sampled in drawn} == {2, 5}


@pytest.mark.parametrize(
    ("option", "value", "requirement"),
    [
        ("max_tokens", 0, "be an integer of at least 1"),
        ("max_tokens", -3, "be an integer of at least 1"),
        ("max_tokens", 1.5, "be an integer of at least 1"),
        ("max_tokens", True, "be an integer of at least 1"),
        ("max_tokens", math.nan, "be an integer of at least 1"),
        ("max_tokens", torch.tensor(True), "be an integer of at least 1"),
        ("n", 0, r"be an integer in 1\.\.1024"),
        ("n", 2.0, r"be an integer in 1\.\.1024"),
        ("n", None, r"be an integer in 1\.\.1024"),
        ("n", 1025, r"be an integer in 1\.\.1024"),
        pytest.param("n", 10**6000, r"be an integer in 1\.\.1024", id="more digits than Python prints"),
        ("temperature", -0.1, "be at least 0"),
        ("temperature", math.nan, "be at least 0"),
        ("temperature", math.inf, "be at least 0"),
        ("temperature", "0", "be at least 0"),
        ("temperature", None, "be at least 0"),
        ("temperature", True, "be at least 0"),
        ("temperature", 10**400, "be at least 0"),
        ("temperature", torch.tensor(math.nan), "be at least 0"),
        ("top_p", 0.0, r"lie in \(0, 1\]"),
        ("top_p", 1.01, r"lie in \(0, 1\]"),
        ("top_p", -0.5, r"lie in \(0, 1\]"),
        ("top_p", math.nan, r"lie in \(0, 1\]"),
        ("top_p", None, r"lie in \(0, 1\]"),
        ("top_k", -2, "be at least 1 or None"),
        ("top_k", False, "be at least 1 or None"),
        ("top_k", 2.5, "be at least 1 or None"),
        ("logprobs", -1, "be at least 0 or None"),
        ("logprobs", True, "be at least 0 or None"),
        ("stop", "", "be text that is not empty"),
        ("stop", ["a", ""], "be text that is not empty"),
        ("stop", [3], "be text that is not empty"),
        ("stop", None, "be text that is not empty"),
        ("stop", b"a", "be text that is not empty"),
        ("stop", [b"a"], "be text that is not empty"),
        ("stop", ["a"] * 65, "be at most 64 texts"),
        ("stop", "a" * 1025, "be texts of at most 1024 characters"),
        ("stop", ["a", "\ud800"], "be text without lone surrogates"),
        ("stop_token_ids", ["a"], "be token ids"),
        ("stop_token_ids", [-1], "be token ids"),
        ("stop_token_ids", 3, "be token ids"),
        ("stop_token_ids", b"a", "be token ids"),
        ("stop_token_ids", [True], "be token ids"),
        ("seed", -1, r"lie in 0\.\.2\*\*63-1 or be None"),
        ("seed", 2**63, r"lie in 0\.\.2\*\*63-1 or be None"),
        ("seed", 0.5, r"lie in 0\.\.2\*\*63-1 or be None"),
        ("ignore_eos", "no", "be True or False"),
        ("ignore_eos", None, "be True or False"),
    ],
)
def test_params_out_of_range(option: str, value: Any, requirement: str) -> None:
    with pytest.raises(ValueError, match=rf"^SamplingParams: {option} must {requirement}, got ") as caught:
        SamplingParams(**{option: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_all_tokens_may_be_sampled_by_any_of_its_names() -> None:
    assert SamplingParams(top_k=0) == SamplingParams(top_k=-1) == SamplingParams(top_k=None) == SamplingParams()


def test_without_max_tokens_the_room_behind_the_prompt_counts() -> None:
    assert [SamplingParams(max_tokens=None).num_new_tokens(room) for room in (9, 1, 0, -3)] == [9, 1, 1, 1]
    assert SamplingParams(max_tokens=4).num_new_tokens(2) == 4


def test_unknown_params_are_rejected() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_new_tokens'"):
        SamplingParams(max_new_tokens=3)  # type: ignore[call-arg]


def test_params_are_hashable_and_frozen() -> None:
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[3])
    assert params == SamplingParams(stop=("a", "b"), stop_token_ids=(3,)) and hash(params)
    assert SamplingParams(stop="a").stop == ("a",)
    with pytest.raises(AttributeError):
        params.n = 2  # type: ignore[misc]
