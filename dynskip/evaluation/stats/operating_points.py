"""The mean budgets at which routers are trained and chosen depths are looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dynskip.evaluation.stats.intervals import Floats
from dynskip.evaluation.stats.knapsack import Knapsack

# Of the full depth: 8 and 12 of 24 layers.
SHARES = (1 / 3, 1 / 2)


def operating_points(scores: Floats, costs: Sequence[int]) -> list[float]:
    """Mean budgets, increasing: where the oracle on ``scores`` [N, K] first matches the dearest path, to a tenth of a
    layer, and a third and a half of that path's layers. Budgets that leave no choice are left out."""
    cheapest, dearest = min(costs), max(costs)
    full = scores[:, list(costs).index(dearest)].mean()
    matching = Knapsack(scores, costs).smallest_budget(float(full))
    points = {round(share * dearest, 1) for share in SHARES} | {math.ceil(round(matching * 10, 6)) / 10}
    return sorted(point for point in points if cheapest < point < dearest)
