"""Intervals by bootstrap over sequences: scipy's BCa, from resamples that are computed as suits a statistic."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_NORMAL = NormalDist()
HALF_WIDTH = _NORMAL.inv_cdf(0.975)  # standard errors from the value of a 95 % interval to its bounds
# Standard errors that a true effect must be away from zero to be seen by such an interval in four of five runs.
POWER = 0.8
DETECTABLE = HALF_WIDTH + _NORMAL.inv_cdf(POWER)
_CHUNK = 256  # resamples that are held at once
# Parts of the data that are left out in turn, for the skew of a statistic: single sequences where there are no more.
_NUM_PARTS = 200


class Interval(NamedTuple):
    """A statistic and the bounds of its 95 % interval; each a float, or an array where the statistic is one."""

    value: Any
    low: Any
    high: Any

    def at(self, index: int) -> Interval:
        """The interval of one entry of an array."""
        return Interval(float(self.value[index]), float(self.low[index]), float(self.high[index]))

    @property
    def detectable(self) -> Any:
        """The smallest true effect that an interval as wide leaves zero out of in 80 % of runs."""
        return DETECTABLE * (self.high - self.low) / (2 * HALF_WIDTH)

    @property
    def p(self) -> float:
        """The two-sided p-value of the statistic, a float, against zero, its error taken as normal from the width."""
        error = float(self.high - self.low) / (2 * HALF_WIDTH)
        if error == 0:
            return float(self.value == 0)
        return 2 * _NORMAL.cdf(-abs(self.value) / error)

    def row(self, **labels: Any) -> dict[str, Any]:
        """``labels``, the three numbers and the detectable effect, as a row of a summary."""
        bounds = {"low": tidy(self.low), "high": tidy(self.high)}
        known = None not in bounds.values()
        return {
            **labels,
            "value": tidy(self.value),
            **bounds,
            **({"detectable": tidy(self.detectable)} if known else {}),
        }


def tidy(value: Any) -> float | None:
    """A number as a summary holds it: six decimals, None for one that is not finite."""
    return round(float(value), 6) if value is not None and np.isfinite(value) else None


def point(value: float, **labels: Any) -> dict[str, Any]:
    """A row of a summary for a number of which nothing was resampled."""
    return {**labels, "value": tidy(value), "low": None, "high": None}


def scipy_stats() -> Any:
    """The module scipy.stats; ImportError, with the way to get it, where it is not installed."""
    try:
        import scipy.stats
    except ImportError:
        raise ImportError(
            "scipy_stats: the package scipy must be installed, got none. Install it with `pip install dynskip[eval]`."
        ) from None
    return scipy.stats


def bca(value: npt.ArrayLike, drawn: Floats, left_out: Floats) -> Interval:
    """``value`` between the bounds of its bias-corrected and accelerated 95 % interval.

    drawn: [S, ...], the statistic in S resamples. left_out: [G, ...], with one of G equal parts of the data left out,
    as `left_out_counts` has them. Resamples in which it is NaN are left out. Where the method has no answer, a
    statistic that lies beyond all of its resamples for one, the percentiles of ``drawn`` stand.
    """
    whole = np.asarray(value, dtype=np.float64)
    flat = np.atleast_1d(whole).reshape(-1)
    table, without = drawn.reshape(len(drawn), len(flat)), left_out.reshape(len(left_out), len(flat))
    low, high = np.full(len(flat), np.nan), np.full(len(flat), np.nan)
    known = np.isfinite(table).all(0) & np.isfinite(without).all(0) & np.isfinite(flat)
    if known.any():
        low[known], high[known] = _bca_bounds(flat[known], table[:, known], without[:, known])
    for column in np.flatnonzero(~known & np.isfinite(flat)):
        finite = table[np.isfinite(table[:, column]), column]
        others = np.where(np.isfinite(without[:, column]), without[:, column], flat[column])
        if len(finite):
            (low[column],), (high[column],) = _bca_bounds(flat[[column]], finite[:, None], others[:, None])
    return Interval(value, low.reshape(whole.shape)[()], high.reshape(whole.shape)[()])


def _bca_bounds(value: Floats, drawn: Floats, left_out: Floats) -> tuple[Floats, Floats]:
    """[M] and [M]: the bounds for M statistics, all of whose values [M], [S, M] and [G, M] are finite."""
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    num_parts = len(left_out)
    if num_parts < 2:
        return low, high
    # All resamples alike, as of a difference of nothing: no method, and no need of one.
    varies = (np.ptp(drawn, axis=0) > 0) & (np.ptp(left_out, axis=0) > 0)
    if not varies.any():
        return low, high
    value, drawn, left_out = value[varies], drawn[:, varies], left_out[:, varies]
    all_places = num_parts * (num_parts - 1) // 2

    def known(places: npt.NDArray[np.int64], axis: int = -1) -> Floats:
        """The statistic of the parts at ``places``, [G] or [batch, G - 1]: all of them, or all but one."""
        return value if places.ndim == 1 else left_out[all_places - places.sum(axis)].T

    stats = scipy_stats()
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        # What is degenerate comes back as NaN, and is answered below.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (np.arange(num_parts),),
            known,
            vectorized=True,
            n_resamples=0,
            batch=_CHUNK,
            method="BCa",
            bootstrap_result=SimpleNamespace(bootstrap_distribution=drawn.T),
        ).confidence_interval
    low[varies] = np.where(np.isnan(found.low), low[varies], found.low)
    high[varies] = np.where(np.isnan(found.high), high[varies], found.high)
    return low, high


def bootstrap(
    statistic: Callable[..., Any],
    *arrays: npt.NDArray[Any],
    seed: int = 0,
    resamples: int = 1000,
    batched: bool = False,
) -> Interval:
    """``statistic(*arrays)`` with its 95 % BCa interval over sequences.

    arrays: each [N, ...]; a resample draws N sequences with replacement, the same from every array.
    statistic: gives a float or an array; NaN in some resamples is left out. batched: it takes arrays [S, N, ...] of S
    resamples at once, and gives [S, ...].
    """
    num_seqs = _num_sequences("bootstrap", arrays)

    def of(places: npt.NDArray[np.int64]) -> Any:
        """[S, ...]: the statistic of the sequences at ``places`` [S, n]."""
        chosen = [array[places] for array in arrays]
        return statistic(*chosen) if batched else [statistic(*each) for each in zip(*chosen, strict=True)]

    places = np.random.default_rng(seed).integers(0, num_seqs, (resamples, num_seqs))
    (value,) = of(np.arange(num_seqs)[None])
    drawn = [of(places[first : first + _CHUNK]) for first in range(0, resamples, _CHUNK)]
    left_out = [of(np.flatnonzero(counts)[None]) for counts in left_out_counts(num_seqs)]
    if not left_out:
        return Interval(value, value, value)
    return bca(value, *(np.asarray(np.concatenate(parts), dtype=np.float64) for parts in (drawn, left_out)))


def medians(values: Floats) -> Any:
    """[S]: the medians of S resamples [S, N], for `bootstrap`."""
    return np.median(values, axis=-1)


@lru_cache(maxsize=2)
def resampled_counts(num_seqs: int, resamples: int, seed: int) -> Floats:
    """[resamples, N]: how often each of N sequences is drawn in each resample; rows sum to N. Not to be written to."""
    shares = np.full(num_seqs, 1.0 / num_seqs)
    counts = np.random.default_rng(seed).multinomial(num_seqs, shares, size=resamples).astype(np.float64)
    counts.setflags(write=False)
    return counts


def left_out_counts(num_seqs: int) -> Floats:
    """[G, N]: 0 for the sequences of one of G parts, each in its turn, 1 for all others; no row for one sequence."""
    num_parts = min(num_seqs, _NUM_PARTS) if num_seqs > 1 else 0
    return (np.arange(num_seqs) % max(num_parts, 1) != np.arange(num_parts)[:, None]).astype(np.float64)


def bootstrap_mean(
    values: npt.NDArray[Any], weights: npt.NDArray[Any] | None = None, seed: int = 0, resamples: int = 1000
) -> Interval:
    """The mean of ``values``, [N] or [N, K], over sequences, weighted by ``weights`` [N], with its BCa interval."""
    num_seqs = _num_sequences("bootstrap_mean", (values,) if weights is None else (values, weights))
    values = np.asarray(values, dtype=np.float64)
    weight = np.ones(num_seqs) if weights is None else np.asarray(weights, dtype=np.float64)
    value = np.tensordot(weight, values, 1) / weight.sum()

    def means(counts: Floats) -> Floats:
        weighted = counts * weight
        return np.tensordot(weighted, values, 1) / weighted.sum(1).reshape(-1, *(1,) * (values.ndim - 1))

    if num_seqs == 1:
        return Interval(value, value, value)
    return bca(value, means(resampled_counts(num_seqs, resamples, seed)), means(left_out_counts(num_seqs)))


def percentiles(value: Any, drawn: Floats) -> Interval:
    """``value`` between the 2.5th and the 97.5th percentile of ``drawn`` [resamples, ...]; NaN is left out.

    For what is resampled in levels, where no sequence can be left out.
    """
    finite = np.isfinite(drawn)
    known = finite.any(0)
    low, high = np.nanpercentile(np.where(known, np.where(finite, drawn, np.nan), 0.0), [2.5, 97.5], axis=0)
    return Interval(value, np.where(known, low, np.nan)[()], np.where(known, high, np.nan)[()])


def _num_sequences(function: str, arrays: tuple[npt.NDArray[Any], ...]) -> int:
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1 or not min(lengths):
        raise ValueError(
            f"{function}: arrays must have one entry per sequence, the same number of at least 1, "
            f"got {sorted(lengths)}."
        )
    return lengths.pop()
