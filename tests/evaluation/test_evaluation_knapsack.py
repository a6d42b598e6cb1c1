"""The oracle's knapsack against brute force, its hulls against it, and the null model against the paper's figures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynskip.evaluation.stats.knapsack import Hulls, Knapsack, smallest_budgets
from dynskip.evaluation.stats.oracle_controls import NullModel

PAPER_COSTS = (4, 8, 12, 24)
PAPER_MEANS = (0.2493, 0.3085, 0.3208, 0.3418)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], list[int], float]:
    """Scores [N, K], costs [K] and a budget that the cheapest path meets."""
    num_seqs, num_paths = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    # Few distinct values, so that ties are common.
    score = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1, width=32))
    scores = [[draw(score) for _ in range(num_paths)] for _ in range(num_seqs)]
    costs = [draw(st.integers(0, 9)) for _ in range(num_paths)]
    budget = draw(st.floats(min(costs), max(costs) + 1))
    return scores, costs, budget


@settings(max_examples=300)
@given(problems())
def test_the_knapsack_is_the_best_of_all_choices(problem: tuple[list[list[float]], list[int], float]) -> None:
    scores, costs, budget = problem
    table = np.array(scores)
    allowed = [
        np.mean([table[seq, path] for seq, path in enumerate(paths)])
        for paths in itertools.product(range(len(costs)), repeat=len(scores))
        if sum(costs[path] for path in paths) <= budget * len(scores) + 1e-9
    ]
    knapsack = Knapsack(scores, costs)
    assert knapsack.value(budget) == pytest.approx(max(allowed))
    chosen = knapsack.choose(budget)
    assert np.mean(table[np.arange(len(scores)), chosen]) == pytest.approx(max(allowed))
    assert np.mean([costs[path] for path in chosen]) <= budget + 1e-9


@given(problems())
def test_the_smallest_budget_is_the_smallest(problem: tuple[list[list[float]], list[int], float]) -> None:
    scores, costs, _ = problem
    knapsack = Knapsack(scores, costs)
    target = knapsack.value(max(costs)) * 0.9
    budget = knapsack.smallest_budget(target)
    assert knapsack.value(budget) >= target - 1e-9
    totals = {sum(c) for c in itertools.product(costs, repeat=len(scores))}
    cheaper = [total / len(scores) for total in totals if total / len(scores) < budget - 1e-9]
    assert all(knapsack.value(mean) < target for mean in cheaper)
    assert np.isnan(knapsack.smallest_budget(knapsack.value(max(costs)) + 1))


@given(problems())
def test_hulls_reach_the_knapsack_but_for_a_part_of_a_sequence(
    problem: tuple[list[list[float]], list[int], float],
) -> None:
    scores, costs, budget = problem
    exact, relaxed = Knapsack(scores, costs).value(budget), Hulls(scores, costs).curve([budget])[0]
    largest_step = np.ptp(np.array(scores), axis=1).max() / len(scores)
    assert exact - 1e-9 <= relaxed <= exact + largest_step + 1e-9


def test_hulls_of_a_resample_are_those_of_its_rows() -> None:
    generator = np.random.default_rng(0)
    scores, judge = generator.random((40, 4)), generator.random((40, 4))
    budgets = np.linspace(4, 24, 51)
    drawn = generator.integers(0, 40, 40)
    counts = np.bincount(drawn, minlength=40)[None].astype(float)
    weighted = Hulls(scores, PAPER_COSTS)
    repeated = Hulls(scores[drawn], PAPER_COSTS)
    np.testing.assert_allclose(weighted.curve(budgets, counts)[0], repeated.curve(budgets))
    np.testing.assert_allclose(weighted.curve(budgets, counts, judge)[0], repeated.curve(budgets, judge=judge[drawn]))
    np.testing.assert_allclose(weighted.shares(budgets, counts)[0], repeated.shares(budgets), atol=1e-12)
    np.testing.assert_allclose(weighted.shares(budgets).sum(-1), 1.0)
    # The mean cost of the shares is the budget, until nothing dearer is better.
    mean_costs = weighted.shares(budgets) @ np.array(PAPER_COSTS)
    np.testing.assert_allclose(mean_costs, np.minimum(budgets, mean_costs[-1]))


def test_of_equal_choices_the_cheapest_is_taken() -> None:
    scores = [[0.5, 0.5, 0.5], [0.1, 0.9, 0.9]]
    assert Knapsack(scores, [4, 8, 24]).choose(budget=24).tolist() == [0, 1]


def test_smallest_budgets_stands_on_the_line_between_two_points() -> None:
    budgets, values = np.array([4.0, 8.0, 12.0]), np.array([[0.1, 0.3, 0.4]] * 4)
    found = smallest_budgets(budgets, values, np.array([0.05, 0.2, 0.4, 0.5]))
    np.testing.assert_allclose(found, [4.0, 6.0, 12.0, np.nan])


@pytest.mark.parametrize(
    ("scores", "costs", "complaint"),
    [
        ([[0.1, 0.2]], [4], r"scores must be \[N, 1\]"),
        ([[0.1, float("nan")]], [4, 8], "scores must be finite"),
        ([[0.1, 0.2]], [4.5, 8.0], "costs must be integers"),
    ],
)
def test_bad_tables_are_named(scores: list[list[float]], costs: list[int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Knapsack(scores, costs)


def test_a_budget_below_every_path_is_named() -> None:
    with pytest.raises(ValueError, match="budget must be at least the cheapest path's 4, got 3"):
        Knapsack([[0.1, 0.2]], [4, 8]).choose(budget=3)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_null_model_repeats_the_papers_headline(seed: int) -> None:
    """Noise of sd 0.08 on the paper's four means lets an oracle match full depth at 27 % of the layers."""
    null, small = (NullModel(PAPER_MEANS, PAPER_COSTS, 0.08, num_seqs) for num_seqs in (20_000, 2000))
    budgets = np.arange(4, 24.001, 0.04)
    assert null.matching_budget(0.3418, budgets, seed) / 24 == pytest.approx(0.27, abs=0.006)
    # And with the knapsack itself on as many sequences as the paper had.
    knapsack = Knapsack(small.scores(seed), PAPER_COSTS)
    assert knapsack.smallest_budget(0.3418) / 24 == pytest.approx(0.27, abs=0.02)


def test_the_null_model_is_fitted_by_the_mean_of_the_best() -> None:
    """The paper's best of all candidates has the mean 0.3964."""
    assert NullModel.fitted(PAPER_MEANS, PAPER_COSTS, 0.3964).sd == pytest.approx(0.08, abs=0.001)
    assert NullModel.fitted(PAPER_MEANS, PAPER_COSTS, max(PAPER_MEANS)).sd < 0.01
    with pytest.raises(ValueError, match=r"mean_of_best must be at least the best mean 0\.3418"):
        NullModel.fitted(PAPER_MEANS, PAPER_COSTS, 0.3)
