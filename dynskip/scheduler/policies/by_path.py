"""One path at a time, until nothing of it is left."""

from __future__ import annotations

from dynskip.scheduler.groups import PathGroup, PathGroups
from dynskip.scheduler.policies.policy import Lockstep

# Batches that a path may go on for while an older request of another path waits.
_MAX_BATCHES = 64


class ByPath(Lockstep):
    """Only requests of one path are resident. The next path is that of the request that arrived first.

    A path that never runs dry would keep all others out: after ``max_overtaken`` requests that arrived later than the
    oldest in the queue it takes no more.
    """

    name = "by_path"

    def __init__(self, batch: int, max_overtaken: int | None = None) -> None:
        super().__init__(batch)
        self.max_overtaken = _MAX_BATCHES * batch if max_overtaken is None else max_overtaken
        self._num_overtaken = 0

    def next_group(self, groups: PathGroups, step: int) -> PathGroup | None:
        """The path that is resident while it has a queue; once it has left, that of the oldest request."""
        oldest = groups.oldest_waiting()
        if oldest is None:
            return None
        current = next(groups.resident, None)
        if current is None:
            self._num_overtaken = 0
            return oldest
        head = current.head()
        if current is oldest:
            return current
        if head is None or self._num_overtaken >= self.max_overtaken:
            return None
        self._num_overtaken += 1
        return current
