"""Several tasks timed in turns, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

# From the lowest to the highest of six rounds holds their median with more than 95 %; of five it does not.
LEAST_ROUNDS = 6
# Does one piece of work. It may return its own milliseconds, where some of what it did does not count.
Task = Callable[[], float | None]


@dataclass
class Samples:
    """The milliseconds of one task, round by round."""

    rounds: list[list[float]] = field(default_factory=list)

    @property
    def ms(self) -> float:
        """The median of all samples."""
        return median(sample for samples in self.rounds for sample in samples)

    @property
    def range_ms(self) -> tuple[float, float]:
        """The fastest and the slowest sample."""
        flat = [sample for samples in self.rounds for sample in samples]
        return min(flat), max(flat)

    @property
    def num_samples(self) -> int:
        """How many times the task ran."""
        return sum(map(len, self.rounds))

    def plus(self, ms: float) -> Samples:
        """Samples of this task and of one more that always takes ``ms``."""
        return Samples([[sample + ms for sample in samples] for samples in self.rounds])

    def ratios(self, other: Samples) -> list[float]:
        """Of each round this task's median time as a multiple of the other's in the same round."""
        assert len(self.rounds) == len(other.rounds), "a ratio compares tasks that were timed in turns"
        return [median(ours) / median(theirs) for ours, theirs in zip(self.rounds, other.rounds, strict=True)]

    def over(self, other: Samples) -> float:
        """The median of `ratios`."""
        return median(self.ratios(other))


def interval_over_rounds(
    statistic: Callable[[list[Any]], float], rounds: Sequence[Any], resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of ``statistic`` of ``rounds``, by a bootstrap that draws whole rounds.

    Raises ValueError for fewer than `LEAST_ROUNDS`: of those no more is known than their range, which holds less.
    """
    if len(rounds) < LEAST_ROUNDS:
        raise ValueError(f"interval_over_rounds: rounds must be at least {LEAST_ROUNDS}, got {len(rounds)}.")
    draw = random.Random(seed)
    drawn = sorted(statistic(draw.choices(rounds, k=len(rounds))) for _ in range(resamples))
    return drawn[int(0.025 * resamples)], drawn[int(0.975 * resamples) - 1]


@contextmanager
def progress_bar(title: str, total: int, shown: bool) -> Iterator[Any]:
    """A bar on stderr that is gone when the context ends."""
    from tqdm import tqdm

    with tqdm(total=total, desc=title, leave=False, file=sys.stderr, disable=not shown) as bar:
        yield bar


def interleave(
    tasks: Mapping[str, Task],
    num_rounds: int,
    num_repeats: int = 1,
    num_warm_ups: int = 1,
    on_call: Callable[[str], None] | None = None,
    num_lead_ins: int = 0,
) -> dict[str, Samples]:
    """The samples of each task: in every round each runs ``num_repeats`` times, the first of a round changing in turn.

    num_warm_ups: calls of each task before the first round, not counted. on_call: told the name of each task before it
    runs. num_lead_ins: calls at the beginning of each turn, not counted: threads of the task before may spin for
    milliseconds behind their last work, and are asleep by then.
    """
    names = list(tasks)
    for name in names:
        for _ in range(num_warm_ups):
            timed(tasks[name], name, on_call)
    samples = {name: Samples() for name in names}
    for turn in range(num_rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            for _ in range(num_lead_ins):
                timed(tasks[name], name, on_call)
            samples[name].rounds.append([timed(tasks[name], name, on_call) for _ in range(num_repeats)])
    return samples


def timed(task: Task, name: str = "", on_call: Callable[[str], None] | None = None) -> float:
    """The milliseconds that ``task`` took, or says that it took."""
    if on_call is not None:
        on_call(name)
    start = time.perf_counter()
    own_ms = task()
    return (time.perf_counter() - start) * 1e3 if own_ms is None else own_ms
