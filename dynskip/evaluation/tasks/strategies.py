"""Rules for the layers of a budget that know nothing of the model: uniform, exit, and random for each prompt anew."""

from __future__ import annotations

from dynskip.evaluation.tasks.generations import stable_seed
from dynskip.paths import LayerPath

FIXED, DRAWN = ("uls", "exit"), ("rls", "rls-first")
_DRAWN_NAME = "drawn"


def strategy_path(strategy: str, budget: int, num_layers: int, seed: int, row: int) -> LayerPath:
    """The path of the prompt at ``row`` under a strategy; for a drawn one it depends on seed and row."""
    if strategy == "uls":
        return LayerPath.uniform(num_layers, budget=budget)
    if strategy == "exit":
        return LayerPath.early_exit(num_layers, budget=budget)
    if strategy not in DRAWN:
        raise ValueError(f"strategy_path: strategy must be one of {', '.join(FIXED + DRAWN)}, got {strategy!r}.")
    drawn = stable_seed(strategy, budget, seed, row)
    return LayerPath.random(num_layers, budget=budget, seed=drawn, keep_first=strategy == "rls-first")


def drawn_name(strategy: str, budget: int, seed: int) -> str:
    """What items call the paths of a drawn strategy, of which each prompt has its own."""
    return f"{_DRAWN_NAME}:{strategy}:{budget}:{seed}"


def is_drawn(name: str) -> bool:
    """Whether it is a name of `drawn_name`, and not that of a path that all prompts share."""
    return name.startswith(f"{_DRAWN_NAME}:")


def drawn_path(name: str, num_layers: int, row: int) -> LayerPath:
    """The path of the prompt at ``row`` by a name of `drawn_name`."""
    _, strategy, budget, seed = name.split(":")
    return strategy_path(strategy, int(budget), num_layers, int(seed), row)
