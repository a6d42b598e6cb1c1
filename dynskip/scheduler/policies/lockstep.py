"""All running sequences step together, first come first served."""

from __future__ import annotations

from dynskip.scheduler.groups import PathGroup, PathGroups
from dynskip.scheduler.policies.policy import Part, check_limits


class Lockstep:
    """What engines without paths do: all residents step, and a step pays for the union of all paths."""

    name = "lockstep"

    def __init__(self, batch: int) -> None:
        check_limits("Lockstep", batch, batch)
        self.batch = self.pool = batch

    def next_group(self, groups: PathGroups, step: int) -> PathGroup | None:
        """The path of the request that arrived first."""
        return groups.oldest_waiting()

    def choose(self, groups: PathGroups, step: int) -> list[Part]:
        """All that run."""
        return [(group, list(group.running)) for group in groups.resident if group.running]
