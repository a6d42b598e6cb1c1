"""What a draft gains by how often it is right: agreement, weighed against the costs of guessing and verifying."""

from __future__ import annotations

from dataclasses import dataclass, field

from dynskip.costs.step_costs import StepCosts
from dynskip.models.linear import NATIVE_ROWS
from dynskip.paths import LayerPath
from dynskip.speculation.draft import Draft
from dynskip.speculation.lengths import MOST_GUESSES, Candidate, DraftLengths


@dataclass
class DraftGains:
    """The gain of drafts for one request along the full path, by the costs of steps.

    resumes: whether a verification goes on behind what a draft has run of its path; see `DraftLengths`.
    """

    costs: StepCosts
    resumes: bool = False
    _lengths: DraftLengths = field(init=False)

    def __post_init__(self) -> None:
        self._lengths = DraftLengths(self.costs, NATIVE_ROWS, self.resumes)

    def gain(self, draft: Draft, agreement: float) -> float:
        """Tokens a second over those without guesses, at the best number of guesses; below 1 where none pays.

        agreement: the share of first guesses that are right; later ones are taken to be right as often.
        """
        candidate = self._candidate(draft, agreement)
        return max(self._lengths.probe([candidate], (), 0, length).gain for length in range(1, MOST_GUESSES + 1))

    def pays(self, draft: Draft, agreement: float) -> bool:
        """Whether an engine with these costs would guess with it."""
        return any(self._lengths.choose([self._candidate(draft, agreement)]).lengths)

    def _candidate(self, draft: Draft, agreement: float) -> Candidate:
        full = LayerPath.full(self.costs.num_layers)
        return Candidate(full, draft.for_path(full), agreement, MOST_GUESSES)
