"""What a row should gain: a run of its requests, step by step, in the times that the costs of steps predict."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.speculation.cells import Cell
from dynskip.causal_lm import CausalLM
from dynskip.costs.step_costs import StepCosts
from dynskip.engine.drafting import most_rows
from dynskip.paths import LayerPath
from dynskip.speculation.draft import Draft
from dynskip.speculation.lengths import MOST_GUESSES, Candidate, Choice, DraftLengths

# Runs whose times are summed: of a closed batch the slowest sequence says when it ends.
_NUM_RUNS = 8


def predicted_gain(model: CausalLM, costs: StepCosts, cell: Cell, rates: Sequence[float], prompt_len: int) -> float:
    """The time of decode steps without a draft over that with one, before anything has run.

    rates: how often guesses of a request are right, each independently; requests take them by turns.
    A run ends as it does on an engine: with fewer and fewer sequences in a step. Lengths are chosen as by an engine
    that has run the same before, plain steps to compare with among them; looks at drafts that do not pay are left out.
    """
    path = LayerPath.full(model.num_layers)
    lengths = DraftLengths(costs, most_rows(model), model.executor().resumes)
    run = _Run(cell, costs, path, rates, prompt_len, lengths)
    run.ms(cell.draft.for_path(path))  # learns that steps take what is predicted
    with_ms = sum(run.ms(cell.draft.for_path(path)) for _ in range(_NUM_RUNS)) / _NUM_RUNS
    return run.ms(None) / with_ms


@dataclass
class _Run:
    """The requests of a row; see `predicted_gain`."""

    cell: Cell
    costs: StepCosts
    path: LayerPath
    rates: Sequence[float]
    prompt_len: int
    lengths: DraftLengths
    draw: random.Random = field(default_factory=lambda: random.Random(0))

    def ms(self, draft: Draft | None) -> float:
        """Milliseconds of all decode steps."""
        total_ms = 0.0
        waiting = [*enumerate(self.cell.output_lens())]
        left: dict[int, int] = {}  # tokens to come of the requests that run
        own_entries: set[int] = set()  # requests whose draft has made them
        while waiting or left:
            while waiting and len(left) < self.cell.batch:
                request, num_tokens = waiting.pop(0)
                if num_tokens > 1:  # a prompt gives the first
                    left[request] = num_tokens - 1
            choice = None if draft is None else self._choice(left, draft)
            guesses: dict[int, int] = {}
            if draft is not None and choice is not None and any(choice.lengths):
                guessing = [request for request, count in left.items() if count > 1]
                for request, length in zip(guessing, choice.lengths, strict=True):
                    entries_ms = 0.0
                    if draft.entries == "own" and request not in own_entries:
                        entries_ms = self.costs.prefill_ms([(draft.path, self.prompt_len)], 0)
                    if length and choice.saved_ms(len(left), left[request]) > entries_ms:
                        guesses[request] = length
                        own_entries.add(request)
                        total_ms += entries_ms
            if choice is not None and (guesses or not any(choice.lengths)):
                self.lengths.observe(choice, len(left), choice.guess_ms, choice.verify_ms)
            if choice is not None and guesses:
                total_ms += choice.guess_ms + choice.verify_ms
            else:
                total_ms += self.costs.path_ms(self.path, len(left))
            for request in [*left]:
                left[request] -= self._num_given(request, guesses.get(request, 0))
                if not left[request]:
                    del left[request]
        return total_ms

    def _choice(self, left: dict[int, int], draft: Draft) -> Choice | None:
        """What a step does; None where no request may guess."""
        candidates = [
            Candidate(self.path, draft, self._rate(request), min(count - 1, MOST_GUESSES))
            for request, count in left.items()
            if count > 1  # a guess behind the last token is worth nothing
        ]
        if not candidates:
            return None
        others = [self.path] * (len(left) - len(candidates))
        return self.lengths.plain(candidates, others) or self.lengths.choose(candidates, others)

    def _num_given(self, request: int, num_guesses: int) -> int:
        """The tokens that a verification gives."""
        num_right = 0
        while num_right < num_guesses and self.draw.random() < self._rate(request):
            num_right += 1
        return 1 + num_right

    def _rate(self, request: int) -> float:
        return self.rates[request % len(self.rates)]
