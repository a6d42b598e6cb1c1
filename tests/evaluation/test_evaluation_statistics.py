"""Bootstrap intervals, and ROUGE-L against rouge_score."""

from __future__ import annotations

import numpy as np
import pytest

from dynskip.evaluation.stats.intervals import bootstrap, bootstrap_mean, percentiles, point


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


def test_what_is_not_finite_stays_out_of_percentiles_and_is_null_in_a_row() -> None:
    interval = percentiles(np.array([1.0, np.nan]), np.array([[1.0, np.nan], [np.nan, np.nan], [3.0, np.inf]]))
    assert interval.low[0] >= 1.0 and interval.high[0] <= 3.0 and np.isnan(interval.low[1])
    assert interval.at(1).row(metric="m") == {"metric": "m", "value": None, "low": None, "high": None}
    assert point(0.25, metric="m") == {"metric": "m", "value": 0.25, "low": None, "high": None}


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
