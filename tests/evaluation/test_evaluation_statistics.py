"""Bootstrap intervals, and ROUGE-L against rouge_score."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dynskip.evaluation.stats.intervals import bca, bootstrap, bootstrap_mean, left_out_counts, percentiles, point

scipy_stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install dynskip[eval]")


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        value, low, high = bootstrap_mean(generator.normal(1.0, 2.0, 100), seed=seed, resamples=200)
        assert low < value < high
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_mean_is_the_same_either_way() -> None:
    values = np.random.default_rng(1).random((60, 3))
    fast = bootstrap_mean(values, seed=1, resamples=2000)
    slow = bootstrap(lambda rows: rows.mean(0), values, seed=2, resamples=2000)
    assert bootstrap_mean(values[:, 0]).row()["detectable"] > 0
    np.testing.assert_allclose(fast.value, slow.value)
    np.testing.assert_allclose(fast.low, slow.low, atol=0.01)
    np.testing.assert_allclose(fast.high, slow.high, atol=0.01)
    assert fast.at(1).value == values[:, 1].mean()


def test_weights_make_a_mean_over_tokens() -> None:
    values, tokens = np.array([0.0, 1.0]), np.array([30.0, 10.0])
    assert bootstrap_mean(values, tokens).value == 0.25


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(1).random(30)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_arrays_are_resampled_together() -> None:
    x = np.arange(20.0)
    interval = bootstrap(lambda a, b: float(np.abs(a - b).max()), x, x.copy())
    assert tuple(interval) == (0.0, 0.0, 0.0)


def test_the_interval_is_the_bca_of_scipy() -> None:
    """On the same resamples the same bounds, of a statistic and data that are skewed."""
    values = np.random.default_rng(5).exponential(1.0, 60)
    places = np.random.default_rng(3).integers(0, 60, (999, 60))
    for statistic in (np.mean, np.std):
        drawn = SimpleNamespace(bootstrap_distribution=statistic(values[places], axis=1))
        expected = scipy_stats.bootstrap(
            (values,), statistic, vectorized=True, n_resamples=0, bootstrap_result=drawn, method="BCa"
        ).confidence_interval
        found = bootstrap(statistic, values, seed=3, resamples=999)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        plain = np.percentile(drawn.bootstrap_distribution, [2.5, 97.5])
        assert found.high > plain[1] + 1e-3, "the skew is corrected for"
    whole = bootstrap(lambda rows: rows.mean(1), values, seed=3, resamples=999, batched=True)
    assert whole == bootstrap(np.mean, values, seed=3, resamples=999)


def test_intervals_of_a_skewed_mean_miss_it_less_where_its_tail_is() -> None:
    generator = np.random.default_rng(0)
    covered, too_low = 0, {"bca": 0, "percentiles": 0}
    for seed in range(300):
        values = generator.exponential(1.0, 25)
        drawn = values[np.random.default_rng(seed).integers(0, 25, (300, 25))].mean(1)
        _, low, high = bca(values.mean(), drawn, left_out_counts(25) @ values / 24)
        covered += low <= 1.0 <= high
        too_low["bca"] += high < 1.0
        too_low["percentiles"] += percentiles(values.mean(), drawn).high < 1.0
    assert 0.88 <= covered / 300 <= 0.97 and too_low["bca"] < too_low["percentiles"]


def test_parts_stand_for_sequences_where_there_are_many() -> None:
    assert left_out_counts(3).tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    many = left_out_counts(1001)
    assert many.shape == (200, 1001) and set(many.sum(0)) == {199.0}
    assert left_out_counts(1).shape == (0, 1)
    values = np.random.default_rng(5).exponential(1.0, 1000)
    # The skew of a mean, by hand: the acceleration is its third moment over 6 sqrt(N).
    deviations = values - values.mean()
    by_hand = (deviations**3).mean() / (deviations**2).mean() ** 1.5 / 6 / np.sqrt(1000)
    left_out = (left_out_counts(1000) * values).sum(1) / 995
    moved = left_out.mean() - left_out
    assert (moved**3).sum() / (6 * (moved**2).sum() ** 1.5) == pytest.approx(by_hand, rel=0.35)


def test_the_detectable_effect_is_seen_in_four_of_five_runs() -> None:
    generator = np.random.default_rng(2)
    size = float(np.median([bootstrap_mean(generator.normal(0, 1, 80), resamples=300).detectable for _ in range(40)]))
    seen = [bootstrap_mean(generator.normal(size, 1, 80), resamples=300).low > 0 for _ in range(300)]
    assert np.mean(seen) == pytest.approx(0.8, abs=0.07)


def test_what_does_not_vary_and_one_sequence_alone_have_no_width() -> None:
    assert tuple(bootstrap_mean(np.full(9, 0.5), resamples=50)) == pytest.approx((0.5, 0.5, 0.5))
    assert tuple(bootstrap_mean(np.array([0.25]), resamples=50)) == (0.25, 0.25, 0.25)
    assert tuple(bootstrap(np.median, np.array([3.0]), resamples=50)) == (3.0, 3.0, 3.0)
    # A value beyond all of its resamples, as a minimum is: percentiles stand.
    found = bca(-1.0, np.linspace(0, 1, 101)[:, None], np.linspace(0, 1, 7)[:, None])
    assert (found.low, found.high) == pytest.approx((0.025, 0.975))


def test_what_is_not_finite_stays_out_of_intervals_and_is_null_in_a_row() -> None:
    interval = percentiles(np.array([1.0, np.nan]), np.array([[1.0, np.nan], [np.nan, np.nan], [3.0, np.inf]]))
    assert interval.low[0] >= 1.0 and interval.high[0] <= 3.0 and np.isnan(interval.low[1])
    assert interval.at(1).row(metric="m") == {"metric": "m", "value": None, "low": None, "high": None}
    assert point(0.25, metric="m") == {"metric": "m", "value": 0.25, "low": None, "high": None}
    drawn = np.random.default_rng(0).normal(1, 0.1, (200, 2))
    drawn[::3, 0] = np.nan
    found = bca(np.array([1.0, np.nan]), drawn, np.random.default_rng(1).normal(1, 0.01, (30, 2)))
    assert 0.7 < found.low[0] < 1 < found.high[0] < 1.3 and np.isnan(found.low[1])
    assert found.at(0).row(metric="m")["detectable"] == pytest.approx(2.8 * 0.1, rel=0.2)


def test_arrays_of_other_lengths_are_named() -> None:
    with pytest.raises(ValueError, match=r"bootstrap: arrays must have one entry per sequence.*got \[2, 3\]"):
        bootstrap(np.mean, np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="bootstrap_mean: arrays must have one entry per sequence"):
        bootstrap_mean(np.zeros(0))


def test_rouge_l_is_that_of_rouge_score() -> None:
    scorer_module = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed")
    from dynskip.evaluation.tasks.generations import rouge_l

    words = ["the", "cat", "sat", "on", "a", "mat", "running", "runs", "ran", ",", ".", "Ünïcode", "3.5", "don't"]
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(words, size=size)) for size in generator.integers(0, 30, 40)]
    references, predictions = texts[:20], texts[20:]
    scorer = scorer_module.RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(references, predictions, strict=True)
    expected = [scorer.score(ref, pred)["rougeL"].fmeasure for ref, pred in pairs]
    assert rouge_l(references, predictions) == expected
    # By hand: the longest common subsequence of 4 and 3 words has 2: precision 2/3, recall 2/4.
    assert rouge_l(["a b c d"], ["a x c"]) == [pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))]
    # No stemmer: two forms of a word do not match.
    assert rouge_l(["running"], ["runs"]) == [0.0]
    assert rouge_l([], []) == []
    with pytest.raises(ValueError, match="predictions must be one per reference, got 1 for 2"):
        rouge_l(["a", "b"], ["a"])
