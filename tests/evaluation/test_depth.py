"""What decides depth: correlations, groups and task types, each against an answer known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynskip.evaluation.stats.intervals import (
    correlations,
    explained_by_groups,
    pearson,
    permutation_p,
    ranks,
    spearman,
)
from dynskip.evaluation.tasks.prompt_facts import FIRST_WORDS, OTHER, task_type

scipy_stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install dynskip[eval]")


def test_correlations_are_those_of_scipy() -> None:
    generator = np.random.default_rng(0)
    x = generator.integers(0, 9, 60).astype(float)  # with ties
    y = x + generator.normal(0, 3, 60)
    assert pearson(x, y) == pytest.approx(scipy_stats.pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(scipy_stats.spearmanr(x, y).statistic)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_ranks_are_those_of_scipy(values: list[int]) -> None:
    assert ranks(np.array(values, dtype=float)).tolist() == scipy_stats.rankdata(values).tolist()


def test_a_sample_without_variation_correlates_with_nothing() -> None:
    assert pearson(np.ones(5), np.arange(5.0)) == 0.0
    assert spearman(np.arange(5.0), np.ones(5)) == 0.0


def test_an_interval_holds_what_is_known() -> None:
    generator = np.random.default_rng(1)
    x = generator.normal(size=2000)
    related = correlations(x, 0.6 * x + 0.8 * generator.normal(size=2000))
    assert related["pearson"].low < 0.6 < related["pearson"].high
    assert related["pearson"].high - related["pearson"].low < 0.1
    unrelated = correlations(x, generator.normal(size=2000))
    assert all(interval.low < 0 < interval.high for interval in unrelated.values())
    monotone = correlations(x, np.exp(3 * x))["spearman"]
    assert (monotone.value, monotone.low, monotone.high) == pytest.approx((1.0, 1.0, 1.0))


def test_correlations_need_pairs() -> None:
    with pytest.raises(ValueError, match=r"x and y must be two samples of one length of at least 3, got \[2\]"):
        correlations(np.ones(2), np.ones(2))


def test_groups_explain_what_lies_between_them() -> None:
    groups = np.repeat([0.0, 1.0, 2.0], 4)
    assert explained_by_groups(groups * 5, groups) == pytest.approx(1.0)
    assert explained_by_groups(np.tile([1.0, 2.0, 3.0, 4.0], 3), groups) == pytest.approx(0.0)
    assert explained_by_groups(np.ones(12), groups) == 0.0
    # Between the means 0 and 2 lies a variance of 1, within the groups one of 1: half.
    assert explained_by_groups(np.array([-1.0, 1.0, 1.0, 3.0]), np.array([0, 0, 1, 1])) == pytest.approx(0.5)


def test_a_permutation_test_tells_groups_from_none() -> None:
    generator = np.random.default_rng(2)
    groups = generator.integers(0, 4, 200)
    assert permutation_p(groups + generator.normal(size=200), groups) < 0.01
    chances = [permutation_p(generator.normal(size=200), groups, num_permutations=200) for _ in range(20)]
    assert 0.2 < np.mean(chances) < 0.8
    assert permutation_p(np.ones(200), groups, num_permutations=50) == 1.0


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("Write a poem about the sea.", "write"),
        ("Please summarise this text:", "summarise"),
        ("What is the capital of Peru?", "question"),
        ("Given a list of names, sort it by length.", "rewrite"),
        ("Given the rule, please calculate the result.", "calculate"),
        ("Given a text without a comma", OTHER),
        ("CLASSIFY the animals", "classify"),
        ("Give three tips for staying healthy.", "list"),
        ("Describe the structure of an atom.", "explain"),
        ("Xylophones!", OTHER),
        ("", OTHER),
        ("please", OTHER),
    ],
)
def test_task_types(instruction: str, expected: str) -> None:
    assert task_type(instruction) == expected


def test_no_word_stands_for_two_types() -> None:
    words = [word for words in FIRST_WORDS.values() for word in words.split()]
    assert len(words) == len(set(words))
