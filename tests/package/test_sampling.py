"""Sampling parameters: what they refuse, and their seeds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dynskip import SamplingParams
from dynskip.sampling import draw_seed


def test_a_seed_is_kept_or_drawn_from_torch_and_greedy_params_have_none() -> None:
    assert draw_seed(SamplingParams(temperature=1.0, seed=2**63 - 1)) == 2**63 - 1
    assert draw_seed(SamplingParams(seed=3)) is None
    params = SamplingParams(temperature=1.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [draw_seed(params) for _ in range(5)]
        assert len(set(drawn)) == 5 and all(seed is not None and 0 <= seed < 2**53 for seed in drawn)
        torch.manual_seed(0)
        assert [draw_seed(params) for _ in range(5)] == drawn


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
        ("temperature", -0.1, "be at least 0, and finite"),
        ("temperature", math.nan, "be at least 0, and finite"),
        ("temperature", math.inf, "be at least 0, and finite"),
        ("temperature", "0", "be at least 0, and finite"),
        ("temperature", None, "be at least 0, and finite"),
        ("temperature", True, "be at least 0, and finite"),
        ("temperature", 10**400, "be at least 0, and finite"),
        ("temperature", torch.tensor(math.nan), "be at least 0, and finite"),
        ("top_p", 0.0, r"lie in \(0, 1\]"),
        ("top_p", 1.01, r"lie in \(0, 1\]"),
        ("top_p", -0.5, r"lie in \(0, 1\]"),
        ("top_p", math.nan, r"lie in \(0, 1\]"),
        ("top_p", None, r"lie in \(0, 1\]"),
        ("top_k", -2, "be at least 1, or None, 0 or -1 for all"),
        ("top_k", False, "be at least 1, or None, 0 or -1 for all"),
        ("top_k", 2.5, "be at least 1, or None, 0 or -1 for all"),
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
        ("seed", -2, r"lie in 0\.\.2\*\*63-1, or be None or -1"),
        ("seed", 2**63, r"lie in 0\.\.2\*\*63-1, or be None or -1"),
        ("seed", 0.5, r"lie in 0\.\.2\*\*63-1, or be None or -1"),
        ("ignore_eos", "no", "be True or False"),
        ("ignore_eos", None, "be True or False"),
    ],
)
def test_params_out_of_range(option: str, value: Any, requirement: str) -> None:
    with pytest.raises(ValueError, match=rf"^SamplingParams: {option} must {requirement}, got ") as caught:
        SamplingParams(**{option: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_all_tokens_may_be_sampled_by_any_of_its_names() -> None:
    assert SamplingParams(seed=-1) == SamplingParams(seed=None) == SamplingParams()
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
