"""The multiple-choice knapsack of the oracle: one path per sequence, the best mean score under a mean cost.

Exact by dynamic programming over integer costs; for thousands of bootstrap resamples by the upper hulls of the
sequences, which reach the same value but for a part of one sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

# Mean budgets such as 5.6 are not binary fractions: a capacity may miss its integer by rounding alone.
_ROUNDING = 1e-9
# Shares of the full depth at which routers are trained and chosen depths are looked at: 8 and 12 of 24 layers.
SHARES = (1 / 3, 1 / 2)


class Knapsack:
    """The best mean score of N sequences under every mean cost.

    scores: [N, K], of each sequence along each of K paths. costs: [K], integers, the layers of each path.

    Cost: O(N * K * capacity) time, N * capacity bytes, with capacity = N * (max - min cost) / gcd of the differences.
    """

    def __init__(self, scores: npt.ArrayLike, costs: Sequence[int]) -> None:
        self.scores, self.costs = _checked("Knapsack", scores, costs)
        num_seqs = len(self.scores)
        extra = self.costs - self.costs.min()
        self._unit = math.gcd(*(int(cost) for cost in extra)) or 1
        weights = extra // self._unit
        capacity = int(num_seqs * weights.max())
        best = np.zeros(capacity + 1)
        self._choices = np.empty((num_seqs, capacity + 1), dtype=np.uint8)
        order = np.argsort(weights, kind="stable")  # of equal scores the cheaper path
        for seq, scores_of in enumerate(self.scores):
            reached = np.full(capacity + 1, -np.inf)
            choice = self._choices[seq]
            for path in order:
                weight = int(weights[path])
                value = np.full(capacity + 1, -np.inf)
                value[weight:] = best[: capacity + 1 - weight] + scores_of[path]
                better = value > reached
                reached[better] = value[better]
                choice[better] = path
            best = reached
        self._best = best
        self._weights = weights

    def _capacity(self, budget: float) -> int:
        num_seqs = len(self.scores)
        cheapest = int(self.costs.min())
        if budget < cheapest - _ROUNDING:
            raise ValueError(
                f"Knapsack: budget must be at least the cheapest path's {cheapest}, got {budget:g}. "
                "No choice is as cheap as that."
            )
        room = num_seqs * (budget - cheapest) / self._unit
        return min(math.floor(room + _ROUNDING * num_seqs), len(self._best) - 1)

    def value(self, budget: float) -> float:
        """The best mean score at a mean cost of at most ``budget``."""
        return float(self._best[self._capacity(budget)]) / len(self.scores)

    def choose(self, budget: float) -> Integers:
        """[N], int64: the path of each sequence in a choice that reaches :meth:`value`, the cheapest such choice."""
        room = self._capacity(budget)
        # The table holds the best value for at most this room, which less room may reach as well.
        room = int(np.searchsorted(self._best[: room + 1], self._best[room]))
        chosen = np.empty(len(self.scores), dtype=np.int64)
        for seq in range(len(self.scores) - 1, -1, -1):
            chosen[seq] = self._choices[seq, room]
            room -= int(self._weights[chosen[seq]])
        return chosen

    def smallest_budget(self, target: float) -> float:
        """The smallest mean cost at which the best mean score is at least ``target``; NaN where none is."""
        reached = self._best / len(self.scores) >= target - 1e-12
        if not reached.any():
            return math.nan
        return float(self.costs.min()) + int(np.argmax(reached)) * self._unit / len(self.scores)


def operating_points(scores: Floats, costs: Sequence[int]) -> list[float]:
    """Mean budgets, increasing: where the oracle on ``scores`` [N, K] first matches the dearest path, to a tenth of a
    layer, and a third and a half of that path's layers. Budgets that leave no choice are left out."""
    cheapest, dearest = min(costs), max(costs)
    full = scores[:, list(costs).index(dearest)].mean()
    matching = Knapsack(scores, costs).smallest_budget(float(full))
    points = {round(share * dearest, 1) for share in SHARES} | {math.ceil(round(matching * 10, 6)) / 10}
    return sorted(point for point in points if cheapest < point < dearest)


class Hulls:
    """Steps up the upper convex hulls of all sequences, best first: the fractional knapsack of any reweighting.

    A choice at a price per layer takes of each sequence the hull's steps that are worth their price. The steps are
    sorted once; which sequences a resample holds only weights them.
    """

    def __init__(self, scores: npt.ArrayLike, costs: Sequence[int]) -> None:
        self.scores, self.costs = _checked("Hulls", scores, costs)
        num_seqs, num_paths = self.scores.shape
        rows = np.arange(num_seqs)
        cheapest = self.costs == self.costs.min()
        self.first = np.where(cheapest, self.scores, -np.inf).argmax(1)
        # From the last path first, so that of equal slopes the farthest step is taken: points on one line are one step.
        backwards = np.argsort(-self.costs, kind="stable")
        at, sequences, starts, ends, slopes = self.first, [], [], [], []
        for _ in range(num_paths - 1):
            gain = self.scores - self.scores[rows, at][:, None]
            price = (self.costs[None, :] - self.costs[at][:, None]).astype(np.float64)
            worth = (price > 0) & (gain > 0)
            slope = np.where(worth, gain / np.where(worth, price, 1.0), -np.inf)[:, backwards]
            steepest = slope.argmax(1)
            moves = np.isfinite(slope[rows, steepest])
            sequences.append(rows[moves])
            starts.append(at[moves])
            ends.append(backwards[steepest[moves]])
            slopes.append(slope[rows, steepest][moves])
            at = np.where(moves, backwards[steepest], at)
        best_first = np.argsort(-np.concatenate([np.empty(0), *slopes]), kind="stable")
        self.sequences, self.starts, self.ends = (
            np.concatenate([np.empty(0, dtype=np.int64), *parts])[best_first] for parts in (sequences, starts, ends)
        )

    def curve(self, budgets: npt.ArrayLike, counts: npt.ArrayLike | None = None, judge: Floats | None = None) -> Floats:
        """[len(budgets)], or [S, len(budgets)] with counts: mean score of the choices at each mean cost.

        counts: [S, N], how often each sequence stands in each of S resamples. judge: [N, K], the scores that the
        choices are judged by, in place of those that they were made on. The last step taken counts in part.
        """
        judged = self.scores if judge is None else np.asarray(judge, dtype=np.float64)
        return self._curves(budgets, counts, judged[..., None])[..., 0]

    def shares(self, budgets: npt.ArrayLike, counts: npt.ArrayLike | None = None) -> Floats:
        """As :meth:`curve` with one more axis [K]: the share of the sequences that each path is chosen for."""
        num_seqs, num_paths = self.scores.shape
        return self._curves(budgets, counts, np.broadcast_to(np.eye(num_paths), (num_seqs, num_paths, num_paths)))

    def _curves(self, budgets: npt.ArrayLike, counts: npt.ArrayLike | None, judged: Floats) -> Floats:
        """[S, len(budgets), J] for ``judged`` [N, K, J]."""
        grid = np.asarray(budgets, dtype=np.float64)
        num_seqs, num_judges = len(self.scores), judged.shape[2]
        weights = np.ones((1, num_seqs)) if counts is None else np.asarray(counts, dtype=np.float64)
        dearer = (self.costs[self.ends] - self.costs[self.starts]).astype(np.float64)
        better = judged[self.sequences, self.ends] - judged[self.sequences, self.starts]
        at_first = judged[np.arange(num_seqs), self.first]
        values = np.empty((len(weights), len(grid), num_judges))
        for sample, weight in enumerate(weights):
            share = weight / weight.sum()
            of_step = share[self.sequences]
            costs = np.concatenate(([0.0], np.cumsum(of_step * dearer))) + share @ self.costs[self.first]
            for index in range(num_judges):
                gained = np.concatenate(([0.0], np.cumsum(of_step * better[:, index])))
                values[sample, :, index] = np.interp(grid, costs, gained + share @ at_first[:, index])
        return values if counts is not None else values[0]


def smallest_budgets(budgets: Floats, values: Floats, targets: Floats) -> Floats:
    """[S]: where each curve of ``values`` [S, len(budgets)] first reaches its target [S]; NaN where it never does.

    Between two budgets the curve is a line. Curves do not fall.
    """
    found = np.full(len(values), np.nan)
    for sample, (curve, target) in enumerate(zip(values, targets, strict=True)):
        reached = np.flatnonzero(curve >= target - 1e-12)
        if not len(reached):
            continue
        at = int(reached[0])
        if at == 0:
            found[sample] = budgets[0]
            continue
        rise = curve[at] - curve[at - 1]
        share = (target - curve[at - 1]) / rise if rise > 0 else 1.0
        found[sample] = budgets[at - 1] + min(1.0, max(0.0, share)) * (budgets[at] - budgets[at - 1])
    return found


def _checked(function: str, scores: npt.ArrayLike, costs: Sequence[int]) -> tuple[Floats, Integers]:
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or not table.size or table.shape[1] != len(costs):
        raise ValueError(
            f"{function}: scores must be [N, {len(costs)}], one column per cost, got shape {list(table.shape)}."
        )
    if table.shape[1] > 256:
        raise ValueError(f"{function}: scores must have at most 256 columns, got {table.shape[1]}.")
    if not np.isfinite(table).all():
        raise ValueError(f"{function}: scores must be finite, got NaN or infinity.")
    cost = np.asarray(costs)
    if not np.issubdtype(cost.dtype, np.integer) or (cost < 0).any():
        raise ValueError(f"{function}: costs must be integers of at least 0, got {list(costs)}. Count layers.")
    return table, cost.astype(np.int64)
