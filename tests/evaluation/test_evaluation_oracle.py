"""The controls of the oracle on scores whose nature is known: pure noise, pure signal, and in between."""

from __future__ import annotations

import numpy as np
import pytest

from dynskip.evaluation.stats.oracle_controls import OracleScores, dealt

COSTS = (4, 8, 12, 24)
MEANS = np.array([0.25, 0.31, 0.32, 0.34])


def scores_of(signal_sd: float, noise_sd: float, num_seqs: int = 300, seed: int = 0) -> OracleScores:
    """What a sequence scores along a path: mean + its own preference + noise of each text."""
    generator = np.random.default_rng(seed)
    expected = MEANS + signal_sd * generator.standard_normal((num_seqs, 4))
    texts = expected + noise_sd * generator.standard_normal((13, num_seqs, 4))
    return OracleScores(COSTS, texts[0], texts[1:], resamples=100)


def test_a_target_that_many_resamples_never_reach_has_no_upper_end() -> None:
    """Full depth is best for every sequence and one deep path a little worse: what is dealt at random stays below."""
    generator = np.random.default_rng(0)
    greedy = np.full((80, 4), 0.3) + 0.05 * generator.standard_normal((80, 1))
    scores = OracleScores(COSTS, greedy, np.stack([greedy, greedy]), resamples=200)
    reached = np.concatenate([[12.0], np.where(np.arange(200) < 20, np.nan, 12.0), np.full(80, 12.0)])
    found = scores.matching(reached)
    assert found.never == 0.1 and found.budget.high == np.inf and found.budget.low == 12.0
    row = found.budget.row(metric="matching_budget")
    assert (row["value"], row["low"], row["high"]) == (12.0, 12.0, None) and "detectable" not in row
    nowhere = scores.matching(np.where(np.arange(281) < 1, np.nan, reached))
    assert nowhere.budget.value == np.inf
    seldom = np.concatenate([[12.0], np.where(np.arange(200) < 2, np.nan, 12.0), np.full(80, 12.0)])
    assert scores.matching(seldom).budget.high == 12.0 and scores.matching(seldom).never == 0.01


def test_equally_deep_paths_of_pure_noise_gain_what_the_oracle_gains() -> None:
    generator = np.random.default_rng(1)
    noise = 0.08 * generator.standard_normal((2, 400, 4))
    scores = OracleScores(COSTS, MEANS + noise[0], equal=0.33 + noise[1], resamples=100)
    at = scores.at(8.0)
    value, low, high = scores.interval(scores.surviving_share("equal depth, greedy", "oracle", at))
    assert value == pytest.approx(1.0, abs=0.15) and low < value < high
    assert scores.matching_budget_of(scores.controls["equal depth, greedy"], scores.greedy).budget.value == (
        pytest.approx(scores.matching_budget.budget.value, abs=0.8)
    )
    # Paths that always agree leave nothing to choose.
    alike = OracleScores(COSTS, MEANS + noise[0], equal=np.full((400, 4), 0.33), resamples=20)
    assert alike.controls["equal depth, greedy"].gain[0, at] == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match=r"equal must be \[400, 4\], a column for each path, got \[400, 3\]"):
        OracleScores(COSTS, MEANS + noise[0], equal=np.zeros((400, 3)))


def test_tokens_are_chosen_for_and_sequences_resampled() -> None:
    """Sequences of three equal tokens are what the sequences alone are: thrice the rows, the same intervals."""
    generator = np.random.default_rng(2)
    greedy = MEANS + 0.08 * generator.standard_normal((90, 4))
    whole = OracleScores(COSTS, greedy, resamples=100)
    tokens = OracleScores(COSTS, np.repeat(greedy, 3, axis=0), resamples=100, units=np.repeat(np.arange(90), 3))
    assert tokens.counts.shape == whole.counts.shape == (191, 90)
    for part in ("score", "random", "gain"):
        np.testing.assert_allclose(
            getattr(tokens.controls["oracle"], part), getattr(whole.controls["oracle"], part), atol=1e-9
        )
    longer = np.repeat(np.arange(90), np.where(np.arange(90) == 0, 6, 3))
    weighted = OracleScores(COSTS, greedy[longer], resamples=10, units=longer)
    assert weighted.means(weighted.greedy)[0] == pytest.approx(greedy[longer].mean(0))


def test_the_ceiling_is_the_root_of_what_survives() -> None:
    scores = scores_of(signal_sd=0.06, noise_sd=0.08)
    at = scores.at(8.0)
    shares = scores.surviving_share("cross-fitted", "in-sample", at)
    value, low, high = scores.interval(np.sqrt(np.clip(shares, 0, 1)))
    assert value == pytest.approx(0.6, abs=0.1) and low < 0.6 < high  # sqrt(0.36 / (0.36 + 0.64))


def share(scores: OracleScores, control: str, reference: str, budget: float = 8.0) -> tuple[float, float, float]:
    at = scores.at(budget)
    controls = scores.controls
    interval = scores.interval(controls[control].gain[:, at] / controls[reference].gain[:, at])
    return tuple(map(float, interval))


def test_of_pure_noise_nothing_survives() -> None:
    scores = scores_of(signal_sd=0.0, noise_sd=0.08)
    assert scores.matching_budget.budget.value / 24 == pytest.approx(0.27, abs=0.05)
    for control, reference in (("cross-fitted", "in-sample"), ("cross-fitted greedy", "oracle")):
        value, low, high = share(scores, control, reference)
        assert low < 0 < high or abs(value) < 0.05
    # And draws of equal depth gain all of it.
    value, low, high = share(scores, "equal depth", "in-sample")
    assert value == pytest.approx(1.0, abs=0.1) and low < value < high


def test_of_pure_signal_everything_survives() -> None:
    scores = scores_of(signal_sd=0.08, noise_sd=0.0)
    assert scores.matching_budget.budget.value / 24 == pytest.approx(0.27, abs=0.05)
    for control, reference in (("cross-fitted", "in-sample"), ("cross-fitted greedy", "oracle")):
        assert share(scores, control, reference)[0] == pytest.approx(1.0)
    # Without noise all draws of one depth are alike: they gain nothing.
    assert np.allclose(scores.best_of_draws(), scores.sampled.mean(0))


def test_the_mean_of_many_draws_keeps_more_than_one_draw() -> None:
    scores = scores_of(signal_sd=0.06, noise_sd=0.06)
    one, many = share(scores, "cross-fitted", "in-sample"), share(scores, "cross-fitted means", "in-sample")
    assert 0.3 < one[0] < many[0] < 1.0


def test_random_assignment_is_that_of_the_same_histogram() -> None:
    scores = scores_of(signal_sd=0.05, noise_sd=0.05)
    at = scores.at(7.0)
    chosen = scores.knapsack.choose(7.0)
    dealt_at_random = np.bincount(chosen, minlength=4) / len(chosen) @ scores.greedy.mean(0)
    # The hull's last step is taken in part, the knapsack's sequences are whole.
    assert scores.controls["oracle"].random[0, at] == pytest.approx(dealt_at_random, abs=2e-3)
    assert scores.controls["oracle"].score[0, at] == pytest.approx(scores.knapsack.value(7.0), abs=1e-3)
    generator = np.random.default_rng(0)
    shuffled = [scores.greedy[np.arange(len(chosen)), generator.permutation(chosen)].mean() for _ in range(300)]
    assert np.mean(shuffled) == pytest.approx(dealt_at_random, abs=1e-3)


def test_intervals_hold_their_value_and_repeat() -> None:
    first, again = scores_of(0.05, 0.05), scores_of(0.05, 0.05)
    assert first.matching_budget == again.matching_budget
    value, low, high = first.matching_budget.budget
    assert first.matching_budget.never == 0.0
    assert low <= value <= high
    _, _, matching = first.null_models(resamples=10)
    assert len(matching) == 11 and 4 <= matching.min() <= matching.max() <= 24


def test_the_curve_has_the_papers_steps_and_ends_at_the_best() -> None:
    scores = scores_of(0.05, 0.05)
    assert scores.grid[[0, 1, -1]].tolist() == pytest.approx([4.0, 4.04, 24.0])
    assert scores.controls["oracle"].score[0, 0] == pytest.approx(scores.greedy[:, 0].mean())
    assert scores.controls["oracle"].score[0, -1] == pytest.approx(scores.greedy.max(1).mean())
    assert scores.static[0, -1] == pytest.approx(scores.greedy.mean(0).max())


def test_a_batch_is_dealt_as_the_choices_are() -> None:
    choices = np.array([0] * 5 + [1] * 3 + [3] * 2)
    assert dealt(choices, 4, 10) == [5, 3, 0, 2]
    assert dealt(choices, 4, 64) == [32, 19, 0, 13]
    assert sum(dealt(choices, 4, 7)) == 7


def test_bad_scores_are_named() -> None:
    table = np.zeros((5, 4))
    with pytest.raises(ValueError, match=r"sampled must be \[M, 5, 4\] with M of at least 2"):
        OracleScores(COSTS, table, np.zeros((1, 5, 4)))
    with pytest.raises(ValueError, match="costs must increase"):
        OracleScores((8, 4, 12, 24), table, np.zeros((4, 5, 4)))
