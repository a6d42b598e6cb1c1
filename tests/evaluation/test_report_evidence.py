"""What an interval carries: directions, distances, what a run would see, ceilings of shares."""

from __future__ import annotations

import numpy as np
import pytest
from summaries import row

from dynskip.evaluation.report.evidence import (
    apart,
    ceiling,
    detectable,
    direction,
    holm,
    kept_by_means,
    luck,
    negated,
    p_value,
)
from dynskip.evaluation.stats.oracle_controls import OracleScores


def test_direction_and_distance_need_intervals() -> None:
    above, below, open_, bare = row(0.3, 0.1), row(-0.3, 0.1), row(0.05, 0.1), row(0.3)
    assert [direction(each) for each in (above, below, open_, bare)] == [1, -1, 0, 0]
    assert (apart(above, below), apart(below, above), apart(above, row(0.15, 0.1))) == (1, -1, 0)
    assert apart(above, bare) == 0
    assert negated(above) == {"value": -0.3, "low": pytest.approx(-0.4), "high": pytest.approx(-0.2)}
    assert negated(bare) == {"value": -0.3, "low": None, "high": None}


def test_what_80_percent_of_runs_would_see() -> None:
    size = detectable(row(0.0, 1.96))
    assert size == pytest.approx(2.80, abs=0.01) and detectable(row(1.0)) is None
    # A true effect of that size, with that error: the interval leaves zero out in four runs of five.
    drawn = np.random.default_rng(0).normal(size, 1.0, 20_000)
    assert np.mean(drawn - 1.96 > 0) == pytest.approx(0.8, abs=0.01)


def test_p_values_and_holm() -> None:
    assert p_value(row(1.96, 1.96)) == pytest.approx(0.05, abs=1e-3)
    assert p_value(row(0.0, 0.0)) == 1.0 and p_value(row(0.1, 0.0)) == 0.0 and p_value(row(0.1)) is None
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize(("signal", "noise"), [(0.02, 0.08), (0.05, 0.05)])
def test_the_ceiling_is_what_expected_scores_gain(signal: float, noise: float) -> None:
    """Scores of a known signal and noise: the share that survives gives away the rest."""
    generator = np.random.default_rng(0)
    expected = 0.2 + signal * generator.standard_normal((6000, 4))
    sampled = expected + noise * generator.standard_normal((8, 6000, 4))
    scores = OracleScores((4, 8, 12, 24), expected, sampled, resamples=0)
    whole = scores.controls["in-sample"].gain[0, -1]
    share = {"value": float(scores.controls["cross-fitted"].gain[0, -1] / whole)}
    assert share["value"] == pytest.approx(signal**2 / (signal**2 + noise**2), abs=0.02)
    assert ceiling(share)["value"] == pytest.approx(scores.controls["oracle"].gain[0, -1] / whole, abs=0.03)
    assert luck(share)["value"] == pytest.approx(scores.controls["equal depth"].gain[0, -1] / whole, abs=0.03)
    half = scores.controls["cross-fitted means"].gain[0, -1] / whole
    assert kept_by_means(share, 4)["value"] == pytest.approx(half, abs=0.03)


def test_ceilings_of_shares_beyond_zero_and_one() -> None:
    found = ceiling({"value": 0.01, "low": -0.2, "high": 0.04})
    assert found == {"value": pytest.approx(0.1), "low": 0.0, "high": pytest.approx(0.2)}
    assert luck({"value": 0.36, "low": 0.19, "high": 1.2}) == pytest.approx({"value": 0.8, "low": 0.0, "high": 0.9})
    assert ceiling({"value": -0.5}) == {"value": 0.0}
    assert kept_by_means({"value": 1.0}, 6) == {"value": 1.0} and kept_by_means({"value": 0.0}, 6) == {"value": 0.0}
