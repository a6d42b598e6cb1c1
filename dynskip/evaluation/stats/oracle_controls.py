"""What an oracle over depths gains, and what the same procedure gains where depth can tell it nothing. Pure arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dynskip.evaluation.stats.intervals import Floats, Interval, bca, left_out_counts, resampled_counts
from dynskip.evaluation.stats.knapsack import Hulls, Knapsack, smallest_budgets

_STEPS_PER_MODEL = 600  # mean budgets of a grid: 0.04 layers of 24, as in arXiv 2410.20022
_NUM_SEQS = 20_000
_LARGEST_SD = 1.0
_CHUNK = 64  # resamples whose weights are held at once


@dataclass(frozen=True)
class NullModel:
    """Score of a sequence along path k = ``means[k]`` plus independent normal noise of deviation ``sd``.

    means: [K], the mean score of each path. costs: [K], its layers. num_seqs: how many stand for all. Whatever
    an oracle gains here, it gains by choosing the luckiest of K draws: no path suits a sequence better than another.
    """

    means: tuple[float, ...]
    costs: tuple[int, ...]
    sd: float
    num_seqs: int = _NUM_SEQS

    @staticmethod
    def fitted(
        means: Sequence[float], costs: Sequence[int], mean_of_best: float, seed: int = 0, num_seqs: int = _NUM_SEQS
    ) -> NullModel:
        """The null model whose best of all paths, sequence by sequence, has the mean ``mean_of_best``.

        Raises ValueError where no noise does that.
        """
        noise = _noise(len(means), seed, num_seqs)
        low, high = 0.0, _LARGEST_SD
        if not max(means) <= mean_of_best <= _mean_of_best(means, noise, high):
            raise ValueError(
                f"NullModel.fitted: mean_of_best must be at least the best mean {max(means):.4f} and within reach of "
                f"noise of sd {high}, got {mean_of_best:.4f}."
            )
        for _ in range(24):  # halving 1.0 so often leaves less than any score is rounded to
            middle = (low + high) / 2
            low, high = (middle, high) if _mean_of_best(means, noise, middle) < mean_of_best else (low, middle)
        return NullModel(tuple(means), tuple(costs), (low + high) / 2, num_seqs)

    def scores(self, seed: int = 0) -> Floats:
        """[num_seqs, K]: scores drawn from the model."""
        return np.asarray(self.means) + self.sd * _noise(len(self.means), seed, self.num_seqs)

    def curve(self, budgets: npt.ArrayLike, seed: int = 0) -> Floats:
        """[len(budgets)]: what the oracle reaches on the model at each mean cost."""
        return Hulls(self.scores(seed), self.costs).curve(budgets)

    def matching_budget(self, target: float, budgets: Floats, seed: int = 0) -> float:
        """The smallest mean cost at which the oracle reaches ``target`` on the model; NaN where it never does."""
        return float(smallest_budgets(budgets, self.curve(budgets, seed)[None], np.array([target]))[0])


def _noise(num_paths: int, seed: int, num_seqs: int) -> Floats:
    noise = np.random.default_rng(seed).standard_normal((num_seqs, num_paths))
    return noise - noise.mean(0)  # so that the means of the model are those of its scores


def _mean_of_best(means: Sequence[float], noise: Floats, sd: float) -> float:
    return float((np.asarray(means) + sd * noise).max(1).mean())


@dataclass(frozen=True)
class Choice:
    """Paths chosen on some scores and judged on others, at every mean cost of a grid, with resamples.

    score: [R, G], the mean score of the choice. random: the same, expected of dealing the same histogram of paths
    to the sequences at random. First the data, then resamples, then the data without one part.
    """

    score: Floats
    random: Floats

    @property
    def gain(self) -> Floats:
        """[R, G]: what knowing the sequence is worth."""
        return self.score - self.random


class Matching(NamedTuple):
    """The smallest mean cost at which a choice reaches full depth's score, and the share of resamples that never do.

    A bound beyond the full depth is infinite: so many resamples never reach the score.
    """

    budget: Interval
    never: float


@dataclass(frozen=True)
class OracleScores:
    """Scores of N sequences along K paths, and everything that is computed from them.

    costs: [K], increasing; the last is the full depth. greedy: [N, K], scores of which there is one, of greedy texts or
    log-likelihoods. sampled: [M, N, K], M independent draws; None where nothing is drawn. equal: [N, K], the same as
    greedy along K paths of one depth; None without them. units: [N], the sequence that each row belongs to, where rows
    are tokens: sequences are what is resampled.
    """

    costs: tuple[int, ...]
    greedy: Floats
    sampled: Floats | None = None
    resamples: int = 1000
    seed: int = 0
    equal: Floats | None = None
    units: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if list(self.costs) != sorted(set(self.costs)) or len(self.costs) < 2:
            raise ValueError(f"OracleScores: costs must increase and be at least two, got {self.costs}.")
        if self.sampled is not None and (
            self.sampled.ndim != 3 or self.sampled.shape[1:] != self.greedy.shape or len(self.sampled) < 2
        ):
            raise ValueError(
                f"OracleScores: sampled must be [M, {', '.join(map(str, self.greedy.shape))}] with M of at least 2, "
                f"got {list(self.sampled.shape)}."
            )
        if self.equal is not None and self.equal.shape != self.greedy.shape:
            raise ValueError(
                f"OracleScores: equal must be {list(self.greedy.shape)}, a column for each path, "
                f"got {list(self.equal.shape)}."
            )

    @cached_property
    def grid(self) -> Floats:
        """[G]: mean costs from the cheapest path's to the full depth."""
        step = self.costs[-1] / _STEPS_PER_MODEL
        num_steps = round((self.costs[-1] - self.costs[0]) / step)
        return self.costs[0] + (self.costs[-1] - self.costs[0]) * np.arange(num_steps + 1) / num_steps

    @cached_property
    def counts(self) -> Floats:
        """[R, sequences]: every sequence once, then the resamples, then all but one part; no more without resamples."""
        num_seqs = len(self.greedy) if self.units is None else int(self.units.max()) + 1
        if not self.resamples:
            return np.ones((1, num_seqs))
        drawn = resampled_counts(num_seqs, self.resamples, self.seed)
        return np.concatenate([np.ones((1, num_seqs)), drawn, left_out_counts(num_seqs)])

    def _weights(self) -> Iterator[Floats]:
        """[<= 64, N]: how often each row counts, some resamples after the other."""
        for first in range(0, len(self.counts), _CHUNK):
            part = self.counts[first : first + _CHUNK]
            yield part if self.units is None else part[:, self.units]

    def means(self, scores: Floats) -> Floats:
        """[R, ...]: the mean over rows of ``scores`` [N, ...] in the data and in each resample."""
        ones = (1,) * (scores.ndim - 1)
        return np.concatenate([np.tensordot(w, scores, 1) / w.sum(1).reshape(-1, *ones) for w in self._weights()])

    def interval(self, values: Floats) -> Interval:
        """The interval of a statistic [R, ...]."""
        return bca(values[0], values[1 : 1 + self.resamples], values[1 + self.resamples :])

    def choice(self, chosen_on: Floats, judged_on: Floats) -> Choice:
        """Paths chosen on the scores ``chosen_on`` [N, K] by the knapsack and judged on ``judged_on`` [N, K]."""
        hulls = Hulls(chosen_on, self.costs)
        score = np.concatenate([hulls.curve(self.grid, weights, judged_on) for weights in self._weights()])
        shares = np.concatenate([hulls.shares(self.grid, weights) for weights in self._weights()])
        return Choice(score, np.einsum("sgk,sk->sg", shares, self.means(judged_on)))

    @cached_property
    def _groups(self) -> list[Floats]:
        """Each [K, N, K]: as many draws as there are paths; what is left over is in none."""
        if self.sampled is None:
            return []
        size, draws = len(self.costs), self.sampled
        return [draws[first : first + size] for first in range(0, len(draws) - size + 1, size)]

    @cached_property
    def controls(self) -> dict[str, Choice]:
        """By name what is chosen on some scores and judged on others, the mean over all such pairs.

        oracle: on the greedy scores, as in the paper. equal depth, greedy: the same on as many paths of one depth,
        shifted to the means of the depths: no deeper path is among them. in-sample: on the texts of one draw.
        cross-fitted: chosen on one draw and judged on all others; means: on the mean of one half of the draws and on
        the other, what expected scores allow; greedy: on the mean of all draws and on the greedy texts, which took no
        part in the choice. equal depth: the oracle on texts that are all of full depth, K draws whose means are shifted
        to those of the K depths: its columns differ by chance and by a constant, so what it gains is luck; absent with
        fewer draws.
        """
        pairs = {"oracle": [(self.greedy, self.greedy)]}
        if self.equal is not None:
            shifted = self._shifted(self.equal, self.greedy)
            pairs["equal depth, greedy"] = [(shifted, shifted)]
        if self.sampled is not None:
            draws, total = self.sampled, self.sampled.sum(0)
            halves = draws[::2].mean(0), draws[1::2].mean(0)
            pairs |= {
                "in-sample": [(scores, scores) for scores in draws],
                "cross-fitted": [(scores, (total - scores) / (len(draws) - 1)) for scores in draws],
                "cross-fitted means": [halves, halves[::-1]],
                "cross-fitted greedy": [(draws.mean(0), self.greedy)],
            }
            if self._groups:
                alike = [self._shifted(group[:, :, -1].T, draws.mean(0)) for group in self._groups]
                pairs["equal depth"] = [(scores, scores) for scores in alike]
        found = {name: [self.choice(*pair) for pair in of_name] for name, of_name in pairs.items()}
        return {
            name: Choice(*(np.mean([getattr(each, part) for each in choices], axis=0) for part in ("score", "random")))
            for name, choices in found.items()
        }

    @staticmethod
    def _shifted(columns: Floats, depths: Floats) -> Floats:
        """``columns`` [N, K] with the means of ``depths`` [N, K]."""
        return columns - columns.mean(0) + depths.mean(0)

    def surviving_share(self, control: str, reference: str, column: int) -> Floats:
        """[R]: the gain of a control at a place of the grid over that of ``reference``; NaN where that is none."""
        whole, kept = self.controls[reference].gain[:, column], self.controls[control].gain[:, column]
        return np.where(np.abs(whole) > 1e-9, kept / np.where(whole == 0, 1.0, whole), np.nan)

    def at(self, budget: float) -> int:
        """The place of the largest mean cost of the grid that is at most ``budget``."""
        return max(0, int(np.searchsorted(self.grid, budget + 1e-9, side="right")) - 1)

    @cached_property
    def knapsack(self) -> Knapsack:
        """The exact oracle on the greedy scores."""
        return Knapsack(self.greedy, self.costs)

    @cached_property
    def matching_budget(self) -> Matching:
        """Where the oracle reaches the mean of the full depth, the data's own by the exact knapsack."""
        found = smallest_budgets(self.grid, self.controls["oracle"].score, self.means(self.greedy[:, -1]))
        exact = self.knapsack.smallest_budget(float(self.greedy[:, -1].mean()))
        return self.matching(np.concatenate([[exact], found[1:]]))

    def matching_budget_of(self, choice: Choice, judged_on: Floats) -> Matching:
        """Where a choice reaches the mean of the full depth of the scores it is judged on."""
        return self.matching(smallest_budgets(self.grid, choice.score, self.means(judged_on[:, -1])))

    def matching(self, found: Floats) -> Matching:
        """The interval of mean costs [R]; NaN, for a target that is never reached, counts as infinite."""
        full = self.costs[-1]
        # A number beyond every cost takes its place among the others; an interval that ends behind full depth is open.
        coded = np.where(np.isnan(found), full + 1.0, found)
        bounds = (float(bound) for bound in self.interval(coded))
        never = float(np.isnan(found[1 : 1 + self.resamples]).mean())
        return Matching(Interval(*(np.inf if bound > full + 1e-9 else bound for bound in bounds)), never)

    @cached_property
    def static(self) -> Floats:
        """[R, G]: the best mean score of a random mixture of paths at each mean cost: the hull of the means."""
        return np.stack([Hulls(mean[None], self.costs).curve(self.grid) for mean in self.means(self.greedy)])

    def null_models(self, resamples: int = 100) -> tuple[NullModel, Floats, Floats]:
        """The null model fitted to the greedy means and the mean of the best, its curve [G], and matching budgets
        [1 + resamples] of it and of its fits to resamples."""
        resamples = min(resamples, self.resamples)
        means, best = self.means(self.greedy)[: 1 + resamples], self.means(self.greedy.max(1))[: 1 + resamples]
        fits = [
            NullModel.fitted(mean.tolist(), self.costs, max(float(top), float(mean.max())), num_seqs=num_seqs)
            for mean, top, num_seqs in zip(means, best, [20_000] + [4000] * resamples, strict=False)
        ]
        matching = [fit.matching_budget(fit.means[-1], self.grid) for fit in fits]
        return fits[0], fits[0].curve(self.grid), np.array(matching)

    def best_of_draws(self) -> Floats:
        """[N, K]: the best of K draws at equal depth, the mean over groups of draws."""
        if not self._groups:
            draws = 0 if self.sampled is None else len(self.sampled)
            raise ValueError(f"OracleScores: sampled must hold at least {len(self.costs)} draws, got {draws}.")
        return np.mean([group.max(0) for group in self._groups], axis=0)

    def best_of_depths(self) -> Floats:
        """[N]: the best of K depths, one draw of each; the mean over draws."""
        assert self.sampled is not None, "draws are what the best is of"
        best: Floats = self.sampled.max(2).mean(0)
        return best


def dealt(choices: npt.NDArray[np.int64], num_paths: int, batch: int) -> list[int]:
    """[K]: how many of ``batch`` sequences run each path, their histogram that of ``choices``, of any shape."""
    exact = np.bincount(choices.ravel(), minlength=num_paths) * batch / choices.size
    counts = np.floor(exact).astype(int)
    for path in np.argsort(counts - exact, kind="stable")[: batch - counts.sum()]:
        counts[path] += 1
    return [int(count) for count in counts]
