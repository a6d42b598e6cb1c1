"""Streams of requests, drawn: paths, lengths and times of arrival."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dynskip.arguments import shown
from dynskip.found import Searched
from dynskip.paths import LayerPath

# The shares of arXiv 2410.20022's budgets: a mean of 5.6 of 24 layers, its 23.3 %.
PAPER_MIX = "uniform:4=74,uniform:8=18,uniform:12=6,full=2"


# What a simulation can be asked for: it takes its time and memory by requests, and by their tokens.
MAX_REQUESTS = 10**6
MAX_REQUEST_TOKENS = 10**6
MAX_TOKENS = 10**8
# Requests a second: clocks and waits stay finite.
RATES = (1e-6, 1e9)
_MAX_SHARE = 1e12


@dataclass(frozen=True)
class Request:
    """A request to come: ``num_output`` tokens will be generated, which no scheduler knows."""

    arrival_s: float
    path: LayerPath
    num_prompt: int
    num_output: int


@dataclass(frozen=True)
class Workload:
    """What requests are drawn from.

    paths: each with its share. rate: requests a second in a Poisson stream; None: all are there from the beginning.
    mean_output: the mean of geometrically distributed lengths; with ``fixed_output`` every output is as long.
    """

    num_requests: int
    paths: tuple[tuple[LayerPath, float], ...]
    num_prompt: int = 32
    mean_output: float = 16.0
    fixed_output: bool = False
    rate: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_requests", "num_prompt", "mean_output"):
            if getattr(self, name) < 1:
                raise ValueError(f"Workload: {name} must be at least 1, got {getattr(self, name)}.")
            most = MAX_REQUESTS if name == "num_requests" else MAX_REQUEST_TOKENS
            if not getattr(self, name) <= most:
                raise ValueError(f"Workload: {name} must be at most {most}, got {shown(getattr(self, name))}.")
        num_tokens = self.num_requests * (self.num_prompt + self.mean_output)
        if num_tokens > MAX_TOKENS:
            raise ValueError(
                f"Workload: num_requests must leave at most {MAX_TOKENS} tokens of prompts and outputs, got "
                f"{num_tokens:.0f}. Ask for fewer or shorter requests."
            )
        if self.rate is not None and not RATES[0] <= self.rate <= RATES[1]:
            raise ValueError(f"Workload: rate must lie in {RATES[0]:g}..{RATES[1]:g} a second, got {self.rate}.")

    def draw(self, seed: int = 0) -> list[Request]:
        """The requests in the order of arrival; the same seed gives the same everywhere, with and without a rate."""
        lengths, mix, times = (random.Random(f"{seed} {name}") for name in ("lengths", "paths", "times"))
        paths, shares = [path for path, _ in self.paths], [share for _, share in self.paths]
        clock = 0.0
        requests = []
        for path in mix.choices(paths, shares, k=self.num_requests):
            if self.rate is not None:
                clock += times.expovariate(self.rate)
            requests.append(Request(clock, path, self.num_prompt, self._output(lengths)))
        return requests

    def _output(self, draw: random.Random) -> int:
        if self.fixed_output or self.mean_output == 1:
            return round(self.mean_output)
        return 1 + int(math.log(1 - draw.random()) / math.log(1 - 1 / self.mean_output))


def parse_mix(
    text: str, num_layers: int, model: Searched | str | Path | None = None
) -> tuple[tuple[LayerPath, float], ...]:
    """The paths of ``PATH=SHARE,PATH=SHARE,...``; a share is 1 if left out, and they need not add up to anything.

    model: as in `LayerPath.parse`.

    A number after a comma goes on with the path before it, as in ``layers:0,5=1``.
    """
    parts: list[str] = []
    for piece in text.split(","):
        if parts and "=" not in parts[-1] and piece.partition("=")[0].strip().isdigit():
            parts[-1] += f",{piece}"
        else:
            parts.append(piece)
    mix = []
    for part in parts:
        path, equals, share = part.partition("=")
        try:
            weight = float(share) if equals else 1.0
        except ValueError:
            weight = -1.0
        if not 0 < weight <= _MAX_SHARE:
            raise ValueError(
                f"parse_mix: share must be a positive number of at most {_MAX_SHARE:g}, got {part!r}. "
                "Write PATH=SHARE,PATH=SHARE."
            )
        mix.append((LayerPath.parse(path, num_layers, model), weight))
    return tuple(mix)


def at_full_depth(requests: Sequence[Request]) -> list[Request]:
    """The same requests, each through all layers."""
    return [replace(request, path=LayerPath.full(request.path.num_layers)) for request in requests]
