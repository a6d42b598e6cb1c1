"""Recipes against a frontier: hand calculations, coverage and size by simulation, and nothing beyond its ends."""

from __future__ import annotations

import numpy as np
import pytest

from dynskip.evaluation.stats.frontiers import Measured, _spread, compare

NUM_SEQS = 60


def run(score: float, cost: float, noise: float = 0.0, generator: np.random.Generator | None = None) -> Measured:
    """A run whose sequences score ``score`` and noise, and cost ``cost`` for each of ten decided tokens."""
    drawn = np.zeros(NUM_SEQS) if generator is None else noise * generator.standard_normal(NUM_SEQS)
    ones = np.ones(NUM_SEQS)
    return Measured(score + drawn, ones, 10 * cost * ones, 10 * ones)


def test_the_difference_is_to_the_line_between_neighbours() -> None:
    frontier = {"a": [[run(0.2, 4)]], "b": [[run(0.4, 8)]], "c": [[run(0.5, 12)]]}
    found = compare({"x": [[run(0.5, 5)]], "y": [[run(0.4, 8)]]}, frontier, resamples=50)
    assert found["x"].difference is not None and found["x"].cost.value == pytest.approx(5)
    assert found["x"].difference.value == pytest.approx(0.5 - 0.25) and found["x"].inside == 1.0
    assert found["y"].difference is not None and found["y"].difference.value == pytest.approx(0.0)
    # Trainings and draws count alike, whatever their number.
    nested = {"x": [[run(0.3, 8)], [run(0.5, 8), run(0.7, 8)]]}
    compared = compare(nested, frontier, resamples=50)["x"].difference
    assert compared is not None and compared.value == pytest.approx((0.3 + 0.6) / 2 - 0.4)


@pytest.mark.parametrize("cost", [3.0, 12.5])
def test_nothing_is_made_up_beyond_the_ends(cost: float) -> None:
    frontier = {"a": [[run(0.2, 4)]], "c": [[run(0.5, 12)]]}
    found = compare({"x": [[run(0.9, cost)]]}, frontier, resamples=50)["x"]
    assert (found.difference, found.p, found.inside) == (None, None, 0.0) and not found.is_within


def test_a_rival_at_the_edge_of_the_frontier_is_beyond_it_in_resamples() -> None:
    generator = np.random.default_rng(0)
    decided = np.ones(NUM_SEQS)
    wide = Measured(np.full(NUM_SEQS, 0.5), decided, generator.uniform(6, 14, NUM_SEQS), decided)
    frontier = {"a": [[run(0.2, 4)]], "c": [[run(0.5, float(wide.cost.mean()))]]}
    found = compare({"x": [[wide]]}, frontier, resamples=200)["x"]
    assert found.difference is not None and 0.3 < found.inside < 0.7 and not found.is_within


def test_neighbours_are_those_that_a_rival_is_held_against() -> None:
    frontier = {"a": [[run(0.2, 4)]], "b": [[run(0.4, 8)]], "c": [[run(0.5, 12)]], "b too": [[run(0.3, 8)]]}
    rivals = {"x": [[run(0.5, 5)]], "at b": [[run(0.4, 8)]], "beyond": [[run(0.9, 13)]], "at c": [[run(0.4, 12)]]}
    found = {name: each.neighbours for name, each in compare(rivals, frontier, resamples=50).items()}
    assert found == {"x": ("a", "b", "b too"), "at b": ("b", "b too"), "beyond": (), "at c": ("c",)}
    # Trainings on both sides of b: the line is another one in many resamples.
    wide = {"x": [[run(0.5, 7)], [run(0.5, 10)]]}
    assert compare(wide, frontier, resamples=200)["x"].neighbours == ("a", "b", "c", "b too")


def test_names_of_one_controller_are_one_point() -> None:
    alike = {f"fixed {alpha}": [[run(0.2, 4)]] for alpha in (2, 4, 6, 10)}
    found = compare({"x": [[run(0.3, 4)]]}, alike, resamples=50)["x"]
    assert found.difference is not None and found.difference.value == pytest.approx(0.1)


def trained(effect: float, cost: float, generator: np.random.Generator) -> list[list[Measured]]:
    """Five trainings that differ by 0.05, and two draws of noise that differ by 0.03."""
    return [
        [run(effect + training + 0.03 * generator.standard_normal(), cost, 0.1, generator) for _ in range(2)]
        for training in 0.05 * generator.standard_normal(5)
    ]


def test_intervals_hold_how_far_trainings_and_draws_differ() -> None:
    generator = np.random.default_rng(1)
    covered = alone = 0
    num_runs = 120
    for seed in range(num_runs):
        frontier = {"a": trained(0.2, 4, generator), "b": trained(0.4, 8, generator)}
        rival = trained(0.3, 6, generator)
        found = compare({"x": rival}, frontier, resamples=200, seed=seed)["x"].difference
        # The same data, all runs of a recipe taken for one: sequences alone are resampled.
        whole = {
            name: [
                [
                    Measured(
                        *(
                            np.mean([part for runs in of for part in (getattr(r, field) for r in runs)], axis=0)
                            for field in ("score", "weight", "cost", "decided")
                        )
                    )
                ]
            ]
            for name, of in {**frontier, "x": rival}.items()
        }
        single = compare({"x": whole.pop("x")}, whole, resamples=200, seed=seed)["x"].difference
        assert found is not None and single is not None
        covered += found.low <= 0 <= found.high
        alone += single.low <= 0 <= single.high
    assert covered / num_runs >= 0.85, "nominally 0.95; five trainings make it a little less"
    assert alone < covered - 0.15 * num_runs, "intervals over sequences alone miss trainings and draws"


def test_few_trainings_widen_the_interval_by_students_t() -> None:
    """Three trainings of each of three recipes are six degrees of freedom, t of 2.447 for 1.960."""
    generator = np.random.default_rng(3)
    num_runs, covered = 150, {}
    for num_trainings in (3, 12):
        held = 0
        for seed in range(num_runs):

            def trainings(score: float, cost: float, num_trainings: int = num_trainings) -> list[list[Measured]]:
                return [
                    [run(score + each, cost, 0.02, generator)]
                    for each in 0.05 * generator.standard_normal(num_trainings)
                ]

            frontier = {"a": trainings(0.2, 4), "b": trainings(0.4, 8)}
            found = compare({"x": trainings(0.3, 6)}, frontier, resamples=200, seed=seed)["x"]
            assert found.difference is not None and found.p is not None
            held += found.difference.low <= 0 <= found.difference.high
        covered[num_trainings] = held / num_runs
    assert min(covered.values()) >= 0.9, f"nominally 0.95: {covered}"
    assert _spread(6) == pytest.approx(2.447 / 1.960, abs=1e-3) and _spread(0) == 1.0


def test_an_effect_is_seen() -> None:
    generator = np.random.default_rng(2)
    frontier = {"a": trained(0.2, 4, generator), "b": trained(0.4, 8, generator)}
    found = compare({"x": trained(0.6, 6, generator)}, frontier, resamples=400)["x"]
    assert found.difference is not None and found.difference.low > 0.1 and found.p is not None and found.p < 0.05
