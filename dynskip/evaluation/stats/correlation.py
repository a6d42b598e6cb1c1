"""Correlations with intervals, and how much a grouping explains."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dynskip.evaluation.stats.intervals import Floats, Interval, bootstrap


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
