"""How often the tokens of a draft are right: a rate of each pair of paths, and of each request on top of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from dynskip.paths import LayerPath
from dynskip.speculation.draft import Draft

# What is believed of a draft that was never tried, and as how many guesses that counts.
_FIRST, _FIRST_WEIGHT = 0.7, 2.0
# As how many guesses the agreement counts that a search has seen, on other texts.
_SEARCHED_WEIGHT = 32.0
# A pair of paths remembers about so many guesses; a request's own rate begins as so many of its pair's.
_MEMORY = 256.0
_PAIR_WEIGHT = 8.0
# A request remembers about so many of its own: texts change.
_OWN_MEMORY = 64.0
MOST_PAIRS = 4096


@dataclass(slots=True)
class Rate:
    """A share of right guesses among those that were looked at, older ones counting less and less."""

    memory: float
    right: float = 0.0
    seen: float = 0.0

    def add(self, right: int, seen: int) -> None:
        """Count ``right`` of ``seen`` guesses."""
        keep = max(0.0, 1 - seen / self.memory)
        self.right, self.seen = keep * self.right + right, keep * self.seen + seen

    def mean(self, prior: float, weight: float) -> float:
        """The share, where ``prior`` counts as ``weight`` guesses."""
        return (self.right + prior * weight) / (self.seen + weight)


@dataclass(slots=True)
class Acceptance:
    """The rates of one engine, by the path that verifies and the draft that guesses.

    A guess behind a wrong one is not looked at: nothing is learnt of it. Of more than `MOST_PAIRS` pairs of path and
    draft, which clients of a server choose, the one that was seen longest ago is forgotten.
    """

    _pairs: dict[tuple[LayerPath, Draft], Rate] = field(default_factory=dict)

    def pair(self, path: LayerPath, draft: Draft) -> float:
        """The share of guesses of ``draft`` that are right for requests along ``path``."""
        searched = draft.agreement
        first, weight = (_FIRST, _FIRST_WEIGHT) if searched is None else (searched, _SEARCHED_WEIGHT)
        rate = self._pairs.get((path, draft))
        return first if rate is None else rate.mean(first, weight)

    def of(self, path: LayerPath, draft: Draft, own: Rate) -> float:
        """The same of one request, whose own rate is ``own``."""
        return own.mean(self.pair(path, draft), _PAIR_WEIGHT)

    def add(self, path: LayerPath, draft: Draft, own: Rate, accepted: int, drafted: int) -> None:
        """Count a verification that has accepted the first ``accepted`` of ``drafted`` guesses."""
        seen = min(accepted + 1, drafted)
        own.add(accepted, seen)
        rate = self._pairs.pop((path, draft), None) or Rate(_MEMORY)
        rate.add(accepted, seen)
        self._pairs[path, draft] = rate  # the last one now
        if len(self._pairs) > MOST_PAIRS:
            del self._pairs[next(iter(self._pairs))]


def own_rate() -> Rate:
    """The rate of a new request."""
    return Rate(_OWN_MEMORY)
