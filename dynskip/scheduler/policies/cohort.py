"""More sequences are resident than step at once; each step takes the paths that are worth most for its time."""

from __future__ import annotations

from itertools import islice

from dynskip.costs.step_costs import StepCosts
from dynskip.scheduler.groups import PathGroup, PathGroups
from dynskip.scheduler.policies.path_sets import PathSets
from dynskip.scheduler.policies.policy import Part, check_limits

# The default of max_wait: so many steps, or passes of batches through the pool if that is longer. It is the smallest
# that costs under 3 % of throughput, for a few nested paths and for a dozen unrelated ones (see bench/LOG.md).
_MIN_WAIT = 12
_WAIT_PASSES = 3
# Batches that may be admitted before the oldest request of the queue.
_MAX_BATCHES = 64
# Steps that the head of a path's queue waits for others to prefill with, while a full batch runs.
_PATIENCE = 16
# Sets whose scores differ by less are as good as each other: age decides.
_TIE = 1e-3


class Cohort:
    """Keeps a pool of sequences, and lets those of well-chosen paths step while the others wait.

    Admission fills one path's group to a batch after the other: the fullest that is not full goes first, and a new
    path is opened for the request that arrived first. A burst of short prompts of one path costs less than each of
    them alone, so that with a full batch running, places are filled several at a time.

    No running sequence waits more than ``max_wait`` steps from its own last token to its next: one that could not be
    served in time if the steps to come were full of older ones, steps now (see `due`).

    costs: what a step takes. batch, pool: as in `Policy`. max_overtaken: how many requests may be admitted before the
    one that has been in the queue for longest.
    """

    name = "cohort"

    def __init__(
        self,
        costs: StepCosts,
        batch: int,
        pool: int,
        max_wait: int | None = None,
        max_overtaken: int | None = None,
    ) -> None:
        check_limits("Cohort", batch, pool)
        least = -(-pool // batch)
        self.max_wait = max(_MIN_WAIT, _WAIT_PASSES * least) if max_wait is None else max_wait
        if self.max_wait < least:
            raise ValueError(
                f"Cohort: max_wait must be at least {least}, the steps that batches of {batch} take through a pool of "
                f"{pool}, got {max_wait}. Use a smaller pool."
            )
        self.batch = batch
        self.pool = pool
        self.max_overtaken = _MAX_BATCHES * batch if max_overtaken is None else max_overtaken
        self.sets = PathSets(costs, batch)
        self._efficient_tokens = costs.efficient_tokens()
        self._burst: tuple[int, PathGroup, bool] | None = None  # step, group, whether it was full before
        self._oldest = -1
        self._num_overtaken = 0

    def next_group(self, groups: PathGroups, step: int) -> PathGroup | None:
        """The path to be filled, or None where it pays to wait until several places are free."""
        oldest = groups.oldest_waiting()
        if oldest is None:
            return None
        group = self._next_group(groups, oldest, step)
        if group is None:
            return None
        if group is not oldest:
            self._num_overtaken += 1
        if self._burst is None or self._burst[:2] != (step, group):
            self._burst = (step, group, group.num_resident >= self.batch)
        return group

    def choose(self, groups: PathGroups, step: int) -> list[Part]:
        """The best set of paths that holds all that are due; deeper paths first where the batch is too small."""
        running = [group for group in groups.resident if group.running]
        if not running:
            return []
        if groups.num_running <= self.batch and not groups.num_waiting:
            # No request is left whose company would be worth waiting for: each layer is read least often if all step.
            return [(group, list(group.running)) for group in running]
        due = self.due(groups, step)
        if len(running) == 1:
            chosen = running
        else:
            required = sum(1 << i for i, group in enumerate(running) if group in due)
            ranked = self.sets.rank(running, required)
            best = ranked[0].score * (1 - _TIE)
            candidates = (path_set for path_set in ranked if path_set.score >= best)
            members = min(candidates, key=lambda path_set: _oldest_step(running, path_set.members)).members
            chosen = [group for i, group in enumerate(running) if members >> i & 1]
            chosen.sort(key=self.sets.worth, reverse=True)
        left = self.batch - sum(due.values())
        parts = []
        for group in chosen:
            num_due = due.get(group, 0)
            more = min(left, len(group.running) - num_due)
            left -= more
            if num_due + more:
                parts.append((group, list(islice(group.running, num_due + more))))
        return parts

    def due(self, groups: PathGroups, step: int) -> dict[PathGroup, int]:
        """How many of each group, the oldest, must step in ``step`` for all to be in time.

        With d the steps that a sequence may still wait: if for some d more than batch * (d + 1) had to step by then,
        one would be late. So what exceeds batch * d steps now. As long as the pool is no larger than
        batch * max_wait, that is never more than a batch.
        """
        # A sequence that may wait for as many steps as the pool takes from end to end cannot be part of an excess.
        latest = step - self.max_wait + -(-groups.num_running // self.batch)
        ages: list[tuple[int, PathGroup]] = []
        for group in groups.resident:
            for sequence in group.running:
                if sequence.last_step >= latest:
                    break
                ages.append((sequence.last_step, group))
        if not ages:
            return {}
        ages.sort(key=lambda age: age[0])
        num_due = 0
        for rank, (last_step, _) in enumerate(ages):
            slack = last_step + self.max_wait - step
            assert slack >= 0, "all sequences that were due have stepped"
            num_due = max(num_due, rank + 1 - self.batch * slack)
        assert num_due <= self.batch, "the pool is no larger than batch * max_wait"
        due: dict[PathGroup, int] = {}
        for _, group in ages[:num_due]:
            due[group] = due.get(group, 0) + 1
        return due

    def _next_group(self, groups: PathGroups, oldest: PathGroup, step: int) -> PathGroup | None:
        head = oldest.head()
        assert head is not None, "a group with a queue has a head"
        if head.order != self._oldest:
            self._oldest, self._num_overtaken = head.order, 0
        if self._num_overtaken >= self.max_overtaken:
            return oldest
        if self._burst is not None and self._burst[0] == step:
            _, group, was_full = self._burst
            if group.num_waiting and (was_full or group.num_resident < self.batch):
                return group
        best: PathGroup | None = None
        for group in groups.resident:
            wanted = group.num_waiting and group.num_resident < self.batch
            if wanted and (best is None or group.num_resident > best.num_resident) and self._pays(groups, group, step):
                best = group
        group = best or groups.oldest_waiting(self.batch) or oldest
        return group if group is best or self._pays(groups, group, step) else None

    def _pays(self, groups: PathGroups, group: PathGroup, step: int) -> bool:
        """Whether to admit from ``group`` now: enough requests and places for a prefill at a good price.

        Below a full batch every request is admitted, and none waits for company for longer than `_PATIENCE`.
        """
        if groups.num_running < self.batch:
            return True
        head = group.head()
        assert head is not None, "a group with a queue has a head"
        burst = min(-(-self._efficient_tokens // head.num_tokens), max(1, self.batch // 4))
        if group.num_waiting < burst and step - head.queued_step <= _PATIENCE:
            return False
        places = self.pool - groups.num_resident
        if group.num_resident < self.batch:
            places = min(places, self.batch - group.num_resident)
        return places >= min(burst, group.num_waiting)


def _oldest_step(groups: list[PathGroup], members: int) -> int:
    """The step of the last token of the sequence in the set that has waited for longest."""
    return min(next(iter(group.running)).last_step for i, group in enumerate(groups) if members >> i & 1)
