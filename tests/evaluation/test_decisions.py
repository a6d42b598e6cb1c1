"""Tests and corrections: each against a hand calculation, or a simulation whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from dynskip.evaluation.stats.decisions import equivalence, false_discovery, mean_p, two_sided_p

pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install dynskip[eval]")


def test_false_discovery_is_that_of_benjamini_and_hochberg() -> None:
    # By hand: p * m / rank, from the largest down the smallest so far.
    assert false_discovery([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert false_discovery([0.9, 0.8]) == pytest.approx([0.9, 0.9]) and false_discovery([]) == []


def test_of_what_is_found_few_are_none() -> None:
    generator = np.random.default_rng(0)
    shares = []
    for _ in range(300):
        effects = np.where(np.arange(20) < 8, 3.5, 0.0)
        values = generator.normal(effects[:, None], np.sqrt(30), (20, 30))
        found = np.array(false_discovery([mean_p(row) for row in values])) < 0.05
        shares.append(found[8:].sum() / max(found.sum(), 1))
    assert np.mean(shares) < 0.05


def test_the_size_of_a_paired_test() -> None:
    generator = np.random.default_rng(1)
    weights = generator.integers(1, 60, 80).astype(float)
    # Sequences of more tokens have a steadier mean: what is weighted is no plain mean.
    below = [mean_p(generator.normal(0, 1 / np.sqrt(weights)), weights) < 0.05 for _ in range(600)]
    assert 0.02 < np.mean(below) < 0.08
    assert mean_p(np.zeros(5)) == 1.0 and mean_p(np.ones(5)) == 0.0
    seen = [mean_p(generator.normal(2.8 / np.sqrt(80), 1, 80)) < 0.05 for _ in range(400)]
    assert np.mean(seen) == pytest.approx(0.8, abs=0.06)


def test_equivalence_is_claimed_in_one_of_twenty_at_the_margin() -> None:
    generator = np.random.default_rng(2)
    at_margin = [equivalence(generator.normal(0.5, 1, 100), 0.5) < 0.05 for _ in range(600)]
    assert 0.02 < np.mean(at_margin) < 0.08
    inside = [equivalence(generator.normal(0.0, 1, 100), 0.5) < 0.05 for _ in range(100)]
    assert np.mean(inside) > 0.95
    # Few sequences see no difference and claim no equivalence.
    few = generator.normal(0, 1, 8)
    assert mean_p(few) > 0.05 and equivalence(few, 0.5) > 0.05


def test_equivalence_by_hand() -> None:
    values = np.array([0.1, 0.2, 0.3, 0.4, 0.0])
    # Mean 0.2, standard error sqrt(0.025 / 5): t = 0.3 / 0.0707 = 4.243 on 4 degrees of freedom.
    assert equivalence(values, 0.5) == pytest.approx(0.00662, abs=1e-4)
    assert equivalence(np.zeros(4), 0.1) == 0.0 and equivalence(np.full(4, 0.2), 0.1) == 1.0
    weighted = equivalence(values, 0.5, np.array([1.0, 1.0, 1.0, 1.0, 1.0]))
    assert weighted == pytest.approx(equivalence(values, 0.5))
    with pytest.raises(ValueError, match="margin must be above 0, got 0"):
        equivalence(values, 0)


def test_a_p_value_from_resamples() -> None:
    drawn = np.arange(-4.0, 95.0)  # 5 of 99 are 0 or below
    assert two_sided_p(40.0, drawn) == pytest.approx(2 * 6 / 100)
    assert two_sided_p(0.0, drawn) == 1.0 and two_sided_p(1.0, np.ones(99)) == pytest.approx(0.02)
