"""Correlations and tests by scipy.stats: associations, groups, equivalence, corrections for how many were tested."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dynskip.evaluation.stats.intervals import Floats, Interval, bootstrap, scipy_stats

_SMALLEST = 1e-12  # differences that rounding alone makes


def pearson(x: Floats, y: Floats) -> float:
    """Pearson's r of two samples [N]; 0 where one of them does not vary."""
    return float(_rows_of_r(x[None], y[None])[0])


def spearman(x: Floats, y: Floats) -> float:
    """Spearman's rank correlation of two samples [N], equal values sharing their mean rank; 0 without variation."""
    return 0.0 if np.ptp(x) == 0 or np.ptp(y) == 0 else float(scipy_stats().spearmanr(x, y).statistic)


def spearman_p(x: Floats, y: Floats) -> float:
    """The two-sided p-value of `spearman` against no association; 1 without variation."""
    return 1.0 if np.ptp(x) == 0 or np.ptp(y) == 0 else float(scipy_stats().spearmanr(x, y).pvalue)


def correlations(x: Floats, y: Floats, seed: int = 0, resamples: int = 1000) -> dict[str, Interval]:
    """``pearson`` and ``spearman`` of ``x`` [N] with ``y`` [N], each with its 95 % interval over pairs."""
    if x.shape != y.shape or x.ndim != 1 or len(x) < 3:
        raise ValueError(
            f"correlations: x and y must be two samples of one length of at least 3, got {list(x.shape)} and "
            f"{list(y.shape)}. Evaluate more prompts."
        )
    rank = scipy_stats().rankdata

    def both(a: Floats, b: Floats) -> Floats:
        return np.stack([_rows_of_r(a, b), _rows_of_r(rank(a, axis=1), rank(b, axis=1))], axis=1)

    found = bootstrap(both, x, y, seed=seed, resamples=resamples, batched=True)
    return {"pearson": found.at(0), "spearman": found.at(1)}


def _rows_of_r(x: Floats, y: Floats) -> Floats:
    """[S]: Pearson's r of each row of ``x`` with that of ``y``, both [S, N]; 0 where one does not vary."""
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    scale = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return np.where(scale > 0, (x * y).sum(1) / np.where(scale > 0, scale, 1.0), 0.0)


def spearman_within(x: Floats, y: Floats, groups: npt.NDArray[np.int64]) -> float:
    """The correlation of the ranks of ``x`` and ``y``, [N] each, less the means of their groups [N]; 0 without any."""
    rank = scipy_stats().rankdata
    counts = np.maximum(np.bincount(groups), 1)

    def centred(values: Floats) -> Floats:
        ranks = rank(values)
        return np.asarray(ranks - (np.bincount(groups, weights=ranks) / counts)[groups])

    a, b = centred(x), centred(y)
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 1e-9 else 0.0


def spearman_within_p(x: Floats, y: Floats, groups: npt.NDArray[np.int64]) -> float:
    """The two-sided p-value of `spearman_within`, by the t distribution that a partial correlation has."""
    r, freedom = spearman_within(x, y, groups), len(x) - 1 - len(np.unique(groups))
    if freedom < 1 or r == 0:
        return 1.0
    if abs(r) >= 1:
        return 0.0
    return float(2 * scipy_stats().t.sf(abs(r) * np.sqrt(freedom / (1 - r * r)), freedom))


def explained_by_groups(values: Floats, groups: Floats) -> float:
    """The share of the variance of ``values`` [N] between the groups, in [0, 1] (eta squared); 0 without variance.

    Groups drawn at random explain (G - 1) / (N - 1) on average, not 0.
    """
    _, inverse = np.unique(groups, return_inverse=True)
    counts = np.bincount(inverse)
    means = np.bincount(inverse, weights=values) / counts
    total = ((values - values.mean()) ** 2).sum()
    return float((counts * (means - values.mean()) ** 2).sum() / total) if total > 0 else 0.0


def permutation_p(values: Floats, groups: npt.ArrayLike, seed: int = 0, num_permutations: int = 2000) -> float:
    """How often shuffled groups explain at least as much of ``values`` as ``groups`` do; never exactly 0."""
    labels = np.asarray(groups, dtype=np.float64)
    if len(values) < 2:
        return 1.0
    found = scipy_stats().permutation_test(
        (labels,),
        lambda shuffled: explained_by_groups(values, shuffled),
        permutation_type="pairings",
        alternative="greater",
        n_resamples=num_permutations,
        vectorized=False,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def false_discovery(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted by Benjamini and Hochberg: below 0.05 stand findings of which 5 % are none on average."""
    return [] if not p_values else [float(p) for p in scipy_stats().false_discovery_control(p_values, method="bh")]


def equivalence(differences: Floats, margin: float, weights: Floats | None = None) -> float:
    """The p-value of two one-sided t-tests: below 0.05 the mean of ``differences`` [N] lies within ``margin`` of 0.

    weights: [N]: the mean is weighted by them, a ratio of sums, each sequence standing for what it adds to it.
    """
    if margin <= 0:
        raise ValueError(f"equivalence: margin must be above 0, got {margin}.")
    values = _weighted(differences, weights)
    if _is_constant(values):
        return 0.0 if abs(values[0]) < margin else 1.0
    test = scipy_stats().ttest_1samp
    above = test(values, -margin, alternative="greater").pvalue
    below = test(values, margin, alternative="less").pvalue
    return float(max(above, below))


def mean_p(differences: Floats, weights: Floats | None = None) -> float:
    """The two-sided p-value of a t-test of the mean of ``differences`` [N] against zero, weighted as `equivalence`."""
    values = _weighted(differences, weights)
    if _is_constant(values):
        return 1.0 if abs(values[0]) < _SMALLEST else 0.0
    return float(scipy_stats().ttest_1samp(values, 0.0).pvalue)


def _is_constant(values: Floats) -> bool:
    return bool(np.ptp(values) < _SMALLEST)


def _weighted(differences: Floats, weights: Floats | None) -> Floats:
    """[N]: values whose mean is the weighted one, and whose spread is that of its error."""
    values = np.asarray(differences, dtype=np.float64)
    if weights is None:
        return values
    mean = float(np.average(values, weights=weights))
    return np.asarray(mean + weights * (values - mean) / weights.mean())


def two_sided_p(value: float, drawn: Floats) -> float:
    """The p-value against zero of a statistic with resamples ``drawn`` [S]: the share on the far side of 0, twice."""
    beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return 1.0 if value == 0 else float(min(1.0, 2 * (beyond + 1) / (len(drawn) + 1)))
