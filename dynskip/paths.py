"""Layer paths: which layers of a decoder a sequence runs."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from dynskip.arguments import as_int, shown
from dynskip.found import Searched, found_paths_of

if TYPE_CHECKING:
    import torch

MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class LayerPath:
    """The layers that a sequence runs, in increasing order, out of ``num_layers``.

    Build one with :meth:`full`, :meth:`uniform`, :meth:`early_exit`, :meth:`random`, :meth:`of`, :meth:`found` or
    :meth:`parse`.
    Paths are immutable, hashable and compare by value.
    """

    num_layers: int
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        num_layers = _num_layers("LayerPath", self.num_layers)
        layers = _layers("LayerPath", num_layers, self.layers)
        object.__setattr__(self, "num_layers", num_layers)
        object.__setattr__(self, "layers", layers)
        previous = -1
        for layer in layers:
            if not 0 <= layer < self.num_layers:
                raise ValueError(
                    f"LayerPath: layers must lie in 0..{self.num_layers - 1}, got {shown(layer)}. "
                    f"The model has {self.num_layers} layers, counted from 0."
                )
            if layer == previous:
                raise ValueError(f"LayerPath: layers must be distinct, got {layer} twice.")
            if layer < previous:
                raise ValueError(f"LayerPath: layers must increase, got {layer} after {previous}. Use LayerPath.of.")
            previous = layer

    @staticmethod
    def full(num_layers: int) -> LayerPath:
        """The path that runs every layer."""
        return LayerPath(num_layers, tuple(range(_num_layers("LayerPath.full", num_layers))))

    @staticmethod
    def uniform(num_layers: int, budget: int) -> LayerPath:
        """The path of uniform layer skipping (ULS): ``budget`` layers spread evenly, layer 0 always among them.

        Layer l runs iff the number of layers run so far is at most l * budget / num_layers
        (arXiv 2410.20022, section 3.1). Paths of different budgets are not nested in general.
        """
        num_layers, budget = _budget("LayerPath.uniform", num_layers, budget)
        layers: list[int] = []
        for layer in range(num_layers):
            if len(layers) * num_layers <= layer * budget:
                layers.append(layer)
        return LayerPath(num_layers, tuple(layers))

    @staticmethod
    def early_exit(num_layers: int, budget: int) -> LayerPath:
        """The path that runs layers 0..budget-1, then leaves through the shared final norm and head."""
        num_layers, budget = _budget("LayerPath.early_exit", num_layers, budget)
        return LayerPath(num_layers, tuple(range(budget)))

    @staticmethod
    def random(num_layers: int, budget: int, seed: int, keep_first: bool = False) -> LayerPath:
        """A random path of exactly ``budget`` layers (RLS); the same seed gives the same path on every machine.

        ``keep_first`` forces layer 0 into the path ("RLS w/ L1" of arXiv 2410.20022).
        """
        num_layers, budget = _budget("LayerPath.random", num_layers, budget)
        number = as_int(seed)
        if number is None:
            raise TypeError(f"LayerPath.random: seed must be an integer, got {shown(seed)}.")
        # random.Random.sample is stable across platforms and Python versions for integer seeds.
        generator = random.Random(number)
        first = 1 if keep_first else 0
        drawn = generator.sample(range(first, num_layers), budget - first)
        return LayerPath(num_layers, tuple(sorted([*range(first), *drawn])))

    @staticmethod
    def of(num_layers: int, layers: Iterable[int], allow_empty: bool = False) -> LayerPath:
        """The path of the given layer indices, in any order.

        Raises ValueError for a repeated, negative or too large index, and for no index at all unless
        ``allow_empty``: a sequence without layers goes from the embedding straight to the head.
        """
        num_layers = _num_layers("LayerPath.of", num_layers)
        chosen = _layers("LayerPath.of", num_layers, layers)
        if not chosen and not allow_empty:
            raise ValueError("LayerPath.of: layers must name at least one layer, got none. Pass allow_empty=True.")
        return LayerPath(num_layers, tuple(sorted(chosen)))

    @staticmethod
    def found(model: Searched | str | Path, budget: int) -> LayerPath:
        """The path of ``budget`` layers that `dynskip search` has found for a model.

        model: a `CausalLM`, or a folder with a model and what a search has left beside it. Raises ValueError, naming
        the command, where no search has run, or none for that budget; TypeError for what is no model.
        """
        found = found_paths_of(model, "LayerPath.found")
        num_layers, budget = _budget("LayerPath.found", found.num_layers, budget)
        return LayerPath.of(num_layers, found.layers_of(budget, "LayerPath.found"))

    @staticmethod
    def parse(text: str, num_layers: int, model: Searched | str | Path | None = None) -> LayerPath:
        """The path that ``text`` names: ``full``, ``uniform:B``, ``exit:B``, ``random:B:SEED`` or ``layers:0,5,23``;
        where ``model`` is given, as in :meth:`found`, also ``found:B``."""
        kind, _, rest = text.strip().partition(":")
        try:
            if kind == "full" and not rest:
                return LayerPath.full(num_layers)
            if kind == "uniform":
                return LayerPath.uniform(num_layers, budget=_parse_int(rest))
            if kind == "exit":
                return LayerPath.early_exit(num_layers, budget=_parse_int(rest))
            if kind == "random":
                budget, _, seed = rest.partition(":")
                return LayerPath.random(num_layers, budget=_parse_int(budget), seed=_parse_int(seed))
            if kind == "layers":
                return LayerPath.of(num_layers, [_parse_int(part) for part in rest.split(",")])
            if kind == "found" and model is not None:
                return LayerPath.found(model, budget=_parse_int(rest))
        except _NotAnInteger:
            pass  # the error below names the whole text, which says more than the part that failed
        known = "full, uniform:B, exit:B, random:B:SEED" + (", found:B" if model is not None else "")
        raise ValueError(f"LayerPath.parse: path must be {known} or layers:I,J,..., got {text!r}.")

    @property
    def budget(self) -> int:
        """How many layers the path runs."""
        return len(self.layers)

    @property
    def mask(self) -> torch.Tensor:
        """[L], bool on the CPU: True where the layer runs."""
        import torch

        mask = torch.zeros(self.num_layers, dtype=torch.bool)
        mask[list(self.layers)] = True
        return mask

    def __str__(self) -> str:
        runs: list[str] = []
        start = previous = -2
        for layer in (*self.layers, self.num_layers + 1):
            if layer != previous + 1:
                if start >= 0:
                    runs.append(f"{start}" if start == previous else f"{start}-{previous}")
                start = layer
            previous = layer
        return f"{self.budget}/{self.num_layers} layers {{{','.join(runs)}}}"


class _NotAnInteger(ValueError):
    pass


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise _NotAnInteger(text) from None


def _num_layers(function: str, num_layers: object) -> int:
    number = as_int(num_layers)
    if number is None:
        raise TypeError(f"{function}: num_layers must be an integer, got {shown(num_layers)}.")
    if number < 1:
        raise ValueError(f"{function}: num_layers must be at least 1, got {shown(number)}.")
    if number > MAX_LAYERS:
        raise ValueError(f"{function}: num_layers must be at most {MAX_LAYERS}, got {shown(number)}.")
    return number


def _budget(function: str, num_layers: object, budget: object) -> tuple[int, int]:
    """Both as integers."""
    most, number = _num_layers(function, num_layers), as_int(budget)
    if number is None:
        raise TypeError(f"{function}: budget must be an integer, got {shown(budget)}.")
    if not 1 <= number <= most:
        raise ValueError(f"{function}: budget must lie in 1..{most}, got {shown(number)}.")
    return most, number


def _layers(function: str, num_layers: int, layers: object) -> tuple[int, ...]:
    """The layers as integers. Of too many, one more than the model has: enough for an error to name a wrong one."""
    if not isinstance(layers, Iterable):
        raise TypeError(f"{function}: layers must be integers, got {shown(layers)}.")
    numbers = []
    for layer in islice(layers, num_layers + 1):
        number = as_int(layer)
        if number is None:
            raise TypeError(f"{function}: layers must be integers, got {shown(layer)}.")
        numbers.append(number)
    return tuple(numbers)
