"""Which paths should step together: sets of groups, ranked by what their rows are worth for the time that they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynskip.costs.step_costs import StepCosts
from dynskip.paths import LayerPath
from dynskip.scheduler.groups import PathGroup

# Up to so many groups every set is tried, 2^5 - 1 of them. Beyond, sets grow from a few groups, by a few others.
MAX_EXACT = 5
MAX_ANCHORS = 3
MAX_CANDIDATES = 12
# Above so many rows, counts are rounded up to sixteenths of the batch, so that answers come from memory more often.
_FINE_ROWS = 16
_MAX_KNOWN = 1024  # questions, each with up to 31 sets: 2 MiB


@dataclass(frozen=True, slots=True)
class PathSet:
    """Groups that may step together: a bit mask over the groups asked about. score: value over time, 1 is ideal."""

    members: int
    score: float


class PathSets:
    """Ranks sets of paths for batches of at most ``batch`` rows.

    A row is worth what it costs in a full batch of its path alone, so that such a batch scores 1. Counting tokens
    instead would starve deep paths and then pay for them alone.

    num_evaluated: how often a set's time was worked out: what a decision costs, as a number.
    """

    def __init__(self, costs: StepCosts, batch: int) -> None:
        self.costs = costs
        self.batch = batch
        self.num_evaluated = 0
        self._unit = max(1, batch // _FINE_ROWS)
        self._worths: dict[int, float] = {}
        self._ranked: dict[tuple[int, ...], list[PathSet]] = {}

    def worth(self, group: PathGroup) -> float:
        """The milliseconds that a row of ``group`` is worth; deeper paths are worth more."""
        worth = self._worths.get(group.number)
        if worth is None:
            if len(self._worths) >= _MAX_KNOWN:
                self._worths.clear()
            worth = self._worths[group.number] = self._ms([(group.path, self.batch)]) / self.batch
        return worth

    def rank(self, groups: Sequence[PathGroup], required: int) -> list[PathSet]:
        """Sets that hold the groups of the bit mask ``required``, the best first; each of ``groups`` has a row."""
        if len(groups) > MAX_EXACT:
            return self._grow(groups, required)
        key = []
        for group in groups:
            key += [
                group.number,
                self._rounded(len(group.running)),
                self._rounded(group.num_resident + group.num_waiting),
            ]
        ranked = self._ranked.get(tuple(key))
        if ranked is None:
            if len(self._ranked) >= _MAX_KNOWN:
                self._ranked.clear()
            ranked = self._ranked[tuple(key)] = self._try_all(groups)
        return [path_set for path_set in ranked if path_set.members & required == required] if required else ranked

    def _try_all(self, groups: Sequence[PathGroup]) -> list[PathSet]:
        worths = [self.worth(group) for group in groups]
        deepest_first = sorted(range(len(groups)), key=lambda i: worths[i], reverse=True)
        sets = []
        for members in range(1, 1 << len(groups)):
            left, value, rows = self.batch, 0.0, []
            for i in deepest_first:
                if members >> i & 1 and left:
                    count = min(left, self._rounded(len(groups[i].running)))
                    left -= count
                    value += count * worths[i]
                    rows.append((groups[i].path, count))
            sets.append(PathSet(members, value / self._ms(rows)))
        return sorted(sets, key=lambda path_set: path_set.score, reverse=True)

    def _grow(self, groups: Sequence[PathGroup], required: int) -> list[PathSet]:
        """Sets that begin with what is required and one group, and take in others while the score rises."""
        offers = []
        for i, group in enumerate(groups):
            count = min(self.batch, len(group.running))
            offers.append((count * self.worth(group), i, count))
        offers.sort(reverse=True)
        offers = offers[:MAX_CANDIDATES]
        sets = []
        for _, anchor, _ in offers[:MAX_ANCHORS]:
            chosen = required | 1 << anchor
            left, value, union, rows = self.batch, 0.0, 0, []
            for i in _bits(chosen):
                count = min(left, len(groups[i].running))
                left -= count
                value += count * self.worth(groups[i])
                union |= groups[i].mask
                if count:
                    rows.append((groups[i].path, count))
            score = value / self._ms(rows)
            by_new_layers = sorted(offers, key=lambda offer: (groups[offer[1]].mask & ~union).bit_count())
            for worth, i, count in by_new_layers:
                if not left:
                    break
                if chosen >> i & 1:
                    continue
                added = min(left, count)
                tried = (value + worth * added / count) / self._ms([*rows, (groups[i].path, added)])
                if tried > score:
                    chosen, score, value, left = chosen | 1 << i, tried, value + worth * added / count, left - added
                    union |= groups[i].mask
                    rows.append((groups[i].path, added))
            if left:  # paths that need no more layers come along
                for i, group in enumerate(groups):
                    if not group.mask & ~union:
                        chosen |= 1 << i
            sets.append(PathSet(chosen, score))
        return sorted(sets, key=lambda path_set: path_set.score, reverse=True)

    def _rounded(self, count: int) -> int:
        if count >= self.batch:
            return self.batch
        return count if count <= _FINE_ROWS else -(-count // self._unit) * self._unit

    def _ms(self, rows: Sequence[tuple[LayerPath, int]]) -> float:
        self.num_evaluated += 1
        return self.costs.decode_ms(rows)


def _bits(mask: int) -> list[int]:
    return [i for i in range(mask.bit_length()) if mask >> i & 1]
