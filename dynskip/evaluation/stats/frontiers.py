"""Rivals against a measured frontier at equal cost, resampled over trainings, draws of noise and sequences. Arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dynskip.evaluation.stats.decisions import two_sided_p
from dynskip.evaluation.stats.intervals import Floats, Interval, percentiles, resampled_counts, scipy_stats

# Of all resamples so many must leave the rival within the frontier's costs, or it is beyond them.
LEAST_INSIDE = 0.95


@dataclass(frozen=True, eq=False)
class Measured:
    """One training with one draw of noise on N sequences, [N] each: a score is the sum of ``score`` over that of
    ``weight``, a cost the sum of ``cost`` over that of ``decided``."""

    score: Floats
    weight: Floats
    cost: Floats
    decided: Floats

    def table(self) -> Floats:
        """[N, 4]."""
        return np.stack([self.score, self.weight, self.cost, self.decided], axis=1)


# By training the runs of a recipe, one for each draw of noise.
Trainings = Sequence[Sequence[Measured]]


@dataclass(frozen=True)
class Comparison:
    """A rival's score less that of the frontier at its own cost.

    difference: None where the frontier does not reach as low, or as high, which is never made up for. inside: the
    share of resamples in which it does. p: two-sided, None without a difference. neighbours: names of those of the
    frontier that the rival is held against, in more than 5 % of the resamples in which it is; none without a
    difference.
    """

    cost: Interval
    difference: Interval | None
    inside: float
    p: float | None
    neighbours: tuple[str, ...] = ()

    @property
    def is_within(self) -> bool:
        """Whether the frontier reaches the rival's cost, in the data and in nearly all resamples."""
        return self.difference is not None and self.inside >= LEAST_INSIDE


def compare(
    rivals: Mapping[str, Trainings], frontier: Mapping[str, Trainings], resamples: int = 1000, seed: int = 0
) -> dict[str, Comparison]:
    """By name of a rival how it does against the frontier, a curve through the recipes of ``frontier`` by cost.

    Each resample draws sequences, the same for all; of each recipe trainings; and of each of these draws of noise, all
    with replacement. Of one training, or one draw, the interval cannot hold how far others differ. Of a few trainings
    resamples are spread by Student's t over the normal quantile, of as many degrees of freedom as the rival and its
    neighbours have trainings beyond the first of each. Between two recipes the frontier is a line, below which one
    that bends lies or above; recipes of one cost are one point, their mean.
    """
    everything = {**{("rival", name): each for name, each in rivals.items()}}
    everything |= {("frontier", name): each for name, each in frontier.items()}
    flat = [run.table() for trainings in everything.values() for runs in trainings for run in runs]
    num_seqs = len(flat[0])
    drawn = np.concatenate([np.ones((1, num_seqs)), resampled_counts(num_seqs, resamples, seed)])
    # [1 + S, runs, 4]: sums over the sequences of each resample.
    sums = np.einsum("sn,rnk->srk", drawn, np.stack(flat), optimize=True)
    generator = np.random.default_rng(seed + 1)
    points: dict[tuple[str, str], tuple[Floats, Floats]] = {}
    first = 0
    for key, trainings in everything.items():
        sizes = [len(runs) for runs in trainings]
        shares = _nested_shares(sizes, resamples, generator)
        own = np.einsum("sr,srk->sk", shares, sums[:, first : first + sum(sizes)])
        points[key] = own[:, 2] / np.maximum(own[:, 3], 1e-12), own[:, 0] / np.maximum(own[:, 1], 1e-12)
        first += sum(sizes)
    line = {name: points["frontier", name] for name in frontier}
    num_more = {name: len(trainings) - 1 for name, trainings in frontier.items()}
    return {
        name: _against(*points["rival", name], line, num_more, len(trainings) - 1) for name, trainings in rivals.items()
    }


def _nested_shares(sizes: Sequence[int], resamples: int, generator: np.random.Generator) -> Floats:
    """[1 + S, runs]: how much each run counts, all trainings and their draws alike, and then resampled in levels.

    Of n one fewer are drawn, where there are several: the variance of their mean is then that of the mean of n, which
    n of them would make too small by (n - 1) / n, of three trainings by a third.
    """
    starts = np.cumsum([0, *sizes[:-1]])
    shares = np.zeros((1 + resamples, sum(sizes)))
    for start, size in zip(starts, sizes, strict=True):
        shares[0, start : start + size] = 1 / (size * len(sizes))
    num_trainings = max(1, len(sizes) - 1)
    for sample in range(1, 1 + resamples):
        for training in generator.integers(0, len(sizes), num_trainings):
            num_draws = max(1, sizes[training] - 1)
            runs = starts[training] + generator.integers(0, sizes[training], num_draws)
            np.add.at(shares[sample], runs, 1 / (num_draws * num_trainings))
    return shares


def _against(
    cost: Floats, score: Floats, line: Mapping[str, tuple[Floats, Floats]], num_more: Mapping[str, int], num_own: int
) -> Comparison:
    """num_more, num_own: trainings beyond the first, of each of the line and of the rival."""
    found = np.full(len(cost), np.nan)
    near = np.zeros((len(cost), len(line)), dtype=bool)
    for sample in range(len(cost)):
        own = np.array([each[0][sample] for each in line.values()])
        costs, scores = _merged(own, [each[1][sample] for each in line.values()])
        if len(costs) and costs[0] - 1e-9 <= cost[sample] <= costs[-1] + 1e-9:
            found[sample] = score[sample] - np.interp(cost[sample], costs, scores)
            near[sample] = _beside(cost[sample], costs, own)
    inside = float(np.isfinite(found[1:]).mean()) if len(found) > 1 else float(np.isfinite(found[0]))
    of_cost = percentiles(float(cost[0]), cost[1:])
    if not np.isfinite(found[0]) or not inside:
        return Comparison(of_cost, None, inside, None)
    known = found[1:][np.isfinite(found[1:])]
    shares = near[np.isfinite(found)].mean(0)
    neighbours = tuple(name for name, share in zip(line, shares, strict=True) if share > 1 - LEAST_INSIDE)
    value, freedom = float(found[0]), num_own + sum(num_more[name] for name in neighbours)
    known = value + (known - value) * _spread(freedom)
    return Comparison(of_cost, percentiles(value, known), inside, two_sided_p(value, known), neighbours)


def _spread(freedom: int) -> float:
    """By how much an interval of so many degrees of freedom is wider than the normal one; one of none is left alone."""
    if not freedom:
        return 1.0
    stats = scipy_stats()
    return float(stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975))


def _beside(cost: float, costs: Floats, own: Floats) -> np.ndarray:
    """Which of ``own`` costs are those next to ``cost``, below and above; or the one that is as large."""
    above = min(int(np.searchsorted(costs, cost - 1e-6)), len(costs) - 1)
    below = above if abs(costs[above] - cost) <= 1e-6 else max(above - 1, 0)
    return (np.abs(own - costs[below]) <= 1e-6) | (np.abs(own - costs[above]) <= 1e-6)


def _merged(costs: Floats | Sequence[float], scores: Sequence[float]) -> tuple[Floats, Floats]:
    """Points by cost, increasing, those of one cost as their mean: several names of one controller are one point."""
    order = np.argsort(costs, kind="stable")
    sorted_costs, sorted_scores = np.array(costs)[order], np.array(scores)[order]
    group = np.cumsum(np.concatenate([[0], np.diff(sorted_costs) > 1e-6])[: len(order)].astype(np.int64))
    counts = np.maximum(np.bincount(group), 1)
    mean = [np.bincount(group, weights=values) / counts for values in (sorted_costs, sorted_scores)]
    return mean[0], mean[1]
