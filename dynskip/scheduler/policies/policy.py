"""The interface of a scheduling policy, and the simplest: all running sequences step, first come first served."""

from __future__ import annotations

from typing import Protocol

from dynskip.arguments import shown
from dynskip.scheduler.groups import PathGroup, PathGroups
from dynskip.scheduler.sequence import SequenceState

# Rows of a step, and resident sequences, that an engine keeps lists for.
MAX_BATCH = 2**16
MAX_POOL = 2**20
# The rows of one path in a decode step.
Part = tuple[PathGroup, list[SequenceState]]


class Policy(Protocol):
    """Says who becomes resident, and who of the resident steps.

    name: as in `POLICIES`. batch: most rows of a decode step. pool: most resident sequences.
    """

    name: str
    batch: int
    pool: int

    def next_group(self, groups: PathGroups, step: int) -> PathGroup | None:
        """The path whose head is admitted next; None: none more in this step. A place in the pool is free."""
        ...

    def choose(self, groups: PathGroups, step: int) -> list[Part]:
        """Who decodes in step ``step``: at most ``batch`` running sequences, by path, the oldest of each path first."""
        ...


def check_limits(name: str, batch: int, pool: int) -> None:
    """Raise ValueError where a policy of that name cannot work with ``batch`` and ``pool``."""
    if batch < 1:
        raise ValueError(f"{name}: batch must be at least 1, got {shown(batch)}.")
    if batch > MAX_BATCH:
        raise ValueError(f"{name}: batch must be at most {MAX_BATCH}, got {shown(batch)}.")
    if pool < batch:
        raise ValueError(f"{name}: pool must be at least the batch, {batch}, got {shown(pool)}.")
    if pool > MAX_POOL:
        raise ValueError(f"{name}: pool must be at most {MAX_POOL}, got {shown(pool)}.")


class Lockstep:
    """What engines without paths do: all residents step, and a step pays for the union of all paths."""

    name = "lockstep"

    def __init__(self, batch: int) -> None:
        check_limits(type(self).__name__, batch, batch)
        self.batch = self.pool = batch

    def next_group(self, groups: PathGroups, step: int) -> PathGroup | None:
        """The path of the request that arrived first."""
        return groups.oldest_waiting()

    def choose(self, groups: PathGroups, step: int) -> list[Part]:
        """All that run."""
        return [(group, list(group.running)) for group in groups.resident if group.running]
