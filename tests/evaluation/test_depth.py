"""What decides depth: correlations, groups and task types, each against an answer known beforehand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from evaluation_models import tiny_setup

from dynskip.evaluation.registry import EXPERIMENTS, run_item
from dynskip.evaluation.stats.decisions import (
    correlations,
    explained_by_groups,
    pearson,
    permutation_p,
    spearman,
    spearman_p,
    spearman_within,
    spearman_within_p,
)
from dynskip.evaluation.sweep.context import Context
from dynskip.evaluation.sweep.store import ItemStore
from dynskip.evaluation.tasks.path_families import choices, family_generations, family_items
from dynskip.evaluation.tasks.prompt_facts import FIRST_WORDS, OTHER, task_type

scipy_stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install dynskip[eval]")


def test_correlations_are_those_of_scipy() -> None:
    generator = np.random.default_rng(0)
    x = generator.integers(0, 9, 60).astype(float)  # with ties
    y = x + generator.normal(0, 3, 60)
    assert pearson(x, y) == pytest.approx(scipy_stats.pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(scipy_stats.spearmanr(x, y).statistic)


def test_p_values_of_rank_correlations_have_their_size() -> None:
    generator = np.random.default_rng(3)
    groups = np.repeat(np.arange(4), 10)
    plain, within = [], []
    for _ in range(400):
        x, y = generator.normal(size=40), generator.normal(size=40)
        plain.append(spearman_p(x, y) < 0.05)
        within.append(spearman_within_p(x + 9 * groups, y + 9 * groups, groups) < 0.05)
    assert 0.02 < np.mean(plain) < 0.09 and 0.02 < np.mean(within) < 0.09
    assert spearman_p(np.ones(5), np.arange(5.0)) == 1.0
    assert spearman_within_p(np.ones(5), np.arange(5.0), np.zeros(5, dtype=int)) == 1.0


def test_what_groups_alone_make_is_no_correlation_within_them() -> None:
    generator = np.random.default_rng(4)
    groups = np.repeat(np.arange(3), 200)
    x, y = generator.normal(size=600) + 5 * groups, generator.normal(size=600) - 5 * groups
    assert spearman(x, y) < -0.8 and abs(spearman_within(x, y, groups)) < 0.1
    related = x - 5 * groups + 0.5 * generator.normal(size=600)
    assert spearman_within(x, related - 5 * groups, groups) > 0.7
    assert spearman_within(x, related - 5 * groups, groups) == pytest.approx(
        pearson(*(_centred(scipy_stats.rankdata(each), groups) for each in (x, related - 5 * groups)))
    )
    assert spearman_within(x, y, np.zeros(600, dtype=int)) == pytest.approx(spearman(x, y))


def _centred(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return values - np.array([values[groups == group].mean() for group in groups])


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


def test_draws_give_two_difficulties_and_one_takes_no_reference(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed: pip install dynskip[eval]")
    pytest.importorskip("rouge_score", reason="rouge-score is not installed: pip install dynskip[eval]")
    setup = tiny_setup(tmp_path, draws=4, temperature=2.0)
    context, (members,) = Context(setup), choices(setup).values()
    with ItemStore(tmp_path / "items") as store:
        without = [*EXPERIMENTS["depth"].plan(setup, store)]
        drawn = [item for seed in setup.sample_seeds for item in family_items(setup, members, seed)]
        for item in store.missing(without):
            store.add(item, run_item(item, context), 1.0)
        names = [{row.get("feature") for row in EXPERIMENTS["depth"].summarise(setup, store)["rows"]}]
        for item in store.missing(drawn):
            result = run_item(item, context)
            # A random model ends no text by itself: lengths of their own for each row and draw.
            for of_path in result["paths"].values():
                of_path["num_tokens"] = [1 + row * item.seed % 7 for row in result["rows"]]
            store.add(item, result, 1.0)
        section = EXPERIMENTS["depth"].summarise(setup, store)
        names.append({row.get("feature") for row in section["rows"]})
        greedy = family_generations(setup, store, members).rouge_l
        draws = [family_generations(setup, store, members, seed) for seed in setup.sample_seeds]
    assert names[1] - names[0] == {"sd_of_draws", "sd_of_draw_lengths"}
    differs = np.ptp(greedy, axis=1) > 0
    spread = np.std([each.num_tokens[differs, -1] for each in draws], axis=0, ddof=1)
    bins = [r for r in section["rows"] if r["metric"] == "binned_depth" and r["feature"] == "sd_of_draw_lengths"]
    assert len(draws) == 4 and differs.sum() >= 3 and np.ptp(spread) > 0
    assert min(row["bin_low"] for row in bins) == pytest.approx(spread.min())
    assert max(row["bin_high"] for row in bins) == pytest.approx(spread.max())
