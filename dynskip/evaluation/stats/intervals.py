"""Intervals by bootstrap over sequences, and correlations that have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """A statistic and the bounds of its 95 % interval; each a float, or an array where the statistic is one."""

    value: Any
    low: Any
    high: Any

    def at(self, index: int) -> Interval:
        """The interval of one entry of an array."""
        return Interval(float(self.value[index]), float(self.low[index]), float(self.high[index]))

    def row(self, **labels: Any) -> dict[str, Any]:
        """``labels`` and the three numbers, as a row of a summary."""
        return {**labels, "value": tidy(self.value), "low": tidy(self.low), "high": tidy(self.high)}


def tidy(value: Any) -> float | None:
    """A number as a summary holds it: six decimals, None for one that is not finite."""
    return round(float(value), 6) if value is not None and np.isfinite(value) else None


def point(value: float, **labels: Any) -> dict[str, Any]:
    """A row of a summary for a number of which nothing was resampled."""
    return {**labels, "value": tidy(value), "low": None, "high": None}


def bootstrap(
    statistic: Callable[..., Any], *arrays: npt.NDArray[Any], seed: int = 0, resamples: int = 1000
) -> Interval:
    """``statistic(*arrays)`` with its 95 % percentile interval over resampled sequences.

    arrays: each [N, ...]; a resample draws N sequences with replacement, the same from every array.
    statistic: gives a float or an array; NaN in some resamples is left out of the percentiles of its entry.
    """
    num_seqs = _num_sequences("bootstrap", arrays)
    generator = np.random.default_rng(seed)
    value = statistic(*arrays)
    drawn = []
    for _ in range(resamples):
        chosen = generator.integers(0, num_seqs, num_seqs)
        drawn.append(statistic(*(array[chosen] for array in arrays)))
    return percentiles(value, np.asarray(drawn, dtype=np.float64))


def percentiles(value: Any, drawn: Floats) -> Interval:
    """``value`` between the 2.5th and 97.5th percentile of ``drawn`` [resamples, ...]; NaN where nothing is finite."""
    finite = np.isfinite(drawn)
    known = finite.any(0)
    low, high = np.nanpercentile(np.where(known, np.where(finite, drawn, np.nan), 0.0), [2.5, 97.5], axis=0)
    return Interval(value, np.where(known, low, np.nan)[()], np.where(known, high, np.nan)[()])


def resampled_counts(num_seqs: int, resamples: int, seed: int) -> Floats:
    """[resamples, N]: how often each of N sequences is drawn in each resample; rows sum to N."""
    shares = np.full(num_seqs, 1.0 / num_seqs)
    return np.random.default_rng(seed).multinomial(num_seqs, shares, size=resamples).astype(np.float64)


def bootstrap_mean(
    values: npt.NDArray[Any], weights: npt.NDArray[Any] | None = None, seed: int = 0, resamples: int = 1000
) -> Interval:
    """The mean of ``values``, [N] or [N, K], over sequences, weighted by ``weights`` [N], with its interval."""
    _num_sequences("bootstrap_mean", (values,) if weights is None else (values, weights))
    values = np.asarray(values, dtype=np.float64)
    weight = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    counts = resampled_counts(len(values), resamples, seed) * weight
    total = counts.sum(1).reshape(-1, *(1,) * (values.ndim - 1))
    value = np.tensordot(weight, values, 1) / weight.sum()
    return percentiles(value, np.tensordot(counts, values, 1) / total)


def _num_sequences(function: str, arrays: tuple[npt.NDArray[Any], ...]) -> int:
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1 or not min(lengths):
        raise ValueError(
            f"{function}: arrays must have one entry per sequence, the same number of at least 1, "
            f"got {sorted(lengths)}."
        )
    return lengths.pop()


def pearson(x: Floats, y: Floats) -> float:
    """Pearson's r of two samples [N]; 0 where one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


def spearman(x: Floats, y: Floats) -> float:
    """Spearman's rank correlation of two samples [N], equal values sharing their mean rank; 0 without variation."""
    return pearson(ranks(x), ranks(y))


def ranks(values: Floats) -> Floats:
    """[N], float64: the rank of each value, from 1; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return ((last - counts + 1 + last) / 2)[inverse]


def explained_by_groups(values: Floats, groups: Floats) -> float:
    """The share of the variance of ``values`` [N] between the groups, in [0, 1] (eta squared); 0 without variance.

    Groups drawn at random explain (G - 1) / (N - 1) on average, not 0.
    """
    _, inverse = np.unique(groups, return_inverse=True)
    counts = np.bincount(inverse)
    means = np.bincount(inverse, weights=values) / counts
    total = ((values - values.mean()) ** 2).sum()
    return float((counts * (means - values.mean()) ** 2).sum() / total) if total > 0 else 0.0


def correlations(x: Floats, y: Floats, seed: int = 0) -> dict[str, Interval]:
    """``pearson`` and ``spearman`` of ``x`` [N] with ``y`` [N], each with its 95 % interval over pairs."""
    if x.shape != y.shape or x.ndim != 1 or len(x) < 3:
        raise ValueError(
            f"correlations: x and y must be two samples of one length of at least 3, got {list(x.shape)} and "
            f"{list(y.shape)}. Evaluate more prompts."
        )
    both = bootstrap(lambda a, b: np.array([pearson(a, b), spearman(a, b)]), x, y, seed=seed)
    return {"pearson": both.at(0), "spearman": both.at(1)}


def permutation_p(values: Floats, groups: npt.ArrayLike, seed: int = 0, num_permutations: int = 2000) -> float:
    """How often shuffled groups explain at least as much of ``values`` as ``groups`` do; never exactly 0."""
    generator = np.random.default_rng(seed)
    labels = np.asarray(groups, dtype=np.float64)
    observed = explained_by_groups(values, labels)
    # A shuffle that splits the values in the same way may differ in the last bit.
    hits = sum(
        explained_by_groups(values, generator.permutation(labels)) >= observed - 1e-12 for _ in range(num_permutations)
    )
    return (hits + 1) / (num_permutations + 1)
