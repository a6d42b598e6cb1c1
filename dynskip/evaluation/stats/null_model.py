"""The null model of the oracle: scores of pure noise that know nothing of their sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynskip.evaluation.stats.knapsack import Hulls, smallest_budgets

Floats = npt.NDArray[np.float64]

_NUM_SEQS = 20_000
_LARGEST_SD = 1.0


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
