"""What a row with its 95 % interval can carry: direction, error, p-value, and the effect that it could have shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from dynskip.evaluation.report.rows import Row, bounds
from dynskip.evaluation.stats.intervals import DETECTABLE, HALF_WIDTH, Interval


def direction(row: Row) -> int:
    """1 where the interval of ``row`` lies above zero, -1 where it lies below, else 0; 0 without an interval.

    Of one test of many, whose row has a q, it is 0 as well where q says that it may be a false discovery.
    """
    ends = bounds(row)
    if ends is None or (row.get("q") is not None and row["q"] >= 0.05):
        return 0
    return int(ends[0] > 0) - int(ends[1] < 0)


def apart(first: Row, second: Row) -> int:
    """1 where the interval of ``first`` lies above that of ``second``, -1 where below, 0 where they touch."""
    if bounds(first) is None or bounds(second) is None:
        return 0
    return int(first["low"] > second["high"]) - int(first["high"] < second["low"])


def negated(row: Row) -> dict[str, Any]:
    """``row`` with its value and interval turned over."""
    ends = bounds(row)
    low, high = (None, None) if ends is None else (-ends[1], -ends[0])
    return {**row, "value": -row["value"], "low": low, "high": high}


def standard_error(row: Row) -> float | None:
    """The standard error that the width of the interval stands for; None without an interval."""
    ends = bounds(row)
    return None if ends is None else float(ends[1] - ends[0]) / (2 * HALF_WIDTH)


def detectable(row: Row) -> float | None:
    """The smallest true effect that an interval as wide as that of ``row`` leaves zero out of in 80 % of runs."""
    error = standard_error(row)
    return None if error is None else DETECTABLE * error


def p_value(row: Row) -> float | None:
    """The two-sided p-value of ``row`` against zero, its error taken as normal; None without an interval."""
    ends = bounds(row)
    return None if ends is None else Interval(row["value"], *ends).p


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted by Holm for all of them being tested, whatever they have to do with each other."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def ceiling(share: Row) -> dict[str, float]:
    """What a choice by expected scores would keep of a gain of which ``share`` survives on another draw.

    With scores of a signal of deviation S and noise of deviation N, both normal, a choice on one draw gains in
    proportion to sqrt(S^2 + N^2) on that draw, r = S^2 / (S^2 + N^2) of it on another; knowing the signal gains S.
    """
    return _mapped(share, lambda r: math.sqrt(r))


def luck(share: Row) -> dict[str, float]:
    """What the same choice gains on noise alone, sqrt(1 - r): the least that a control without any signal shows."""
    return _mapped(share, lambda r: math.sqrt(1 - r))


def kept_by_means(share: Row, num_draws: int) -> dict[str, float]:
    """What a choice on the mean of ``num_draws`` draws keeps on others, by the same reasoning."""
    return _mapped(share, lambda r: r / math.sqrt(r + (1 - r) / num_draws))


def _mapped(share: Row, function: Callable[[float], float]) -> dict[str, float]:
    """``function``, monotone, of a share and its bounds, each put into [0, 1] first."""
    known = {
        name: function(min(1.0, max(0.0, share[name])))
        for name in ("value", "low", "high")
        if share.get(name) is not None
    }
    if {"low", "high"} <= known.keys():
        known["low"], known["high"] = sorted((known["low"], known["high"]))
    return known
