"""The methods of a search: from scores of candidates to one path a budget. No model; greater scores are better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dynskip.paths import LayerPath

METHODS = ("influence", "greedy", "swap")
Evaluate = Callable[[Sequence[LayerPath]], list[float]]


def greedily(num_layers: int, least_budget: int, evaluate: Evaluate) -> dict[int, LayerPath]:
    """By budget: what is left after removing, again and again, the layer without which the score is best."""
    path, found = LayerPath.full(num_layers), {}
    while path.budget > least_budget:
        path = best(removals(path), evaluate)
        found[path.budget] = path
    return found


def by_swaps(paths: Mapping[int, LayerPath], evaluate: Evaluate) -> dict[int, LayerPath]:
    """By budget: the path from which no exchange of one layer improves the score, begun at that of ``paths``.

    Of all exchanges the best is made, again and again.
    """
    found = {}
    for budget, path in paths.items():
        while (better := best([path, *swaps(path)], evaluate)) != path:
            path = better
        found[budget] = path
    return found


def best(paths: Sequence[LayerPath], evaluate: Evaluate) -> LayerPath:
    """The path of the best score, the first of several."""
    scores = evaluate(paths)
    return paths[max(range(len(paths)), key=lambda index: scores[index])]


def removals(path: LayerPath) -> list[LayerPath]:
    """``path`` without one of its layers, each in its turn."""
    return [_path(path, set(path.layers) - {layer}) for layer in path.layers]


def swaps(path: LayerPath) -> list[LayerPath]:
    """``path`` with one of its layers exchanged for one that it leaves out, each pair in its turn."""
    kept = set(path.layers)
    left_out = [layer for layer in range(path.num_layers) if layer not in kept]
    return [_path(path, (kept - {old}) | {new}) for old in path.layers for new in left_out]


def num_removal_runs(num_layers: int, least_budget: int) -> int:
    """How many layers `greedily` runs: those of each path, and those behind each removal."""
    return sum(budget - 1 + budget * (budget - 1) // 2 for budget in range(num_layers, max(least_budget, 1), -1))


def _path(path: LayerPath, layers: set[int]) -> LayerPath:
    return LayerPath.of(path.num_layers, layers, allow_empty=True)
