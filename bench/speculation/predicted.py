"""What a row should gain: a run of its requests, step by step, in the times that the costs of steps predict."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.speculation.cells import Cell
from dynskip.causal_lm import CausalLM
from dynskip.costs.step_costs import StepCosts
from dynskip.engine.drafting import most_rows
from dynskip.paths import LayerPath
from dynskip.speculation.draft import Draft
from dynskip.speculation.lengths import MOST_GUESSES, Candidate, DraftLengths

# Runs whose times are summed: of a closed batch the slowest sequence says when it ends.
_NUM_RUNS = 8


def predicted_gain(
    model: CausalLM,
    costs: StepCosts,
    cell: Cell,
    rates: Sequence[float],
    prompt_len: int,
    learnt: DraftLengths | None = None,
) -> float:
    """The time of decode steps without a draft over that with one, before either has been timed.

    rates: how often guesses of a request are right, each independently; requests take them by turns. learnt: what an
    engine has learnt of how long guesses and verifications take beside what ``costs`` say; None: they take that.
    A run ends as it does on an engine: with fewer and fewer sequences in a step. Lengths are chosen as by an engine
    that has run the same before, plain steps to compare with among them; looks at drafts that do not pay are left out.
    """
    path = LayerPath.full(model.num_layers)
    lengths = copy.deepcopy(learnt) or DraftLengths(costs, most_rows(model), model.executor().resumes)
    run = _Run(cell, costs, path, rates, prompt_len, lengths)
    run.ms(cell.draft.for_path(path))  # learns of sizes that nobody has seen that steps take what is predicted
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
            guesses, step_ms = self._step(left, draft, own_entries)
            total_ms += step_ms
            for request in [*left]:
                left[request] -= self._num_given(request, guesses.get(request, 0))
                if not left[request]:
                    del left[request]
        return total_ms

    def _step(self, left: dict[int, int], draft: Draft | None, own_entries: set[int]) -> tuple[dict[int, int], float]:
        """How many tokens each request guesses in a step, and its milliseconds."""
        guessing = [request for request, count in left.items() if count > 1]  # the last token is not worth a guess
        if draft is None or not guessing:
            return {}, self.costs.path_ms(self.path, len(left))
        candidates = [
            Candidate(self.path, draft, self._rate(request), min(left[request] - 1, MOST_GUESSES))
            for request in guessing
        ]
        others = [self.path] * (len(left) - len(candidates))
        choice = self.lengths.plain(candidates, others) or self.lengths.choose(candidates, others)
        lengths, entries_ms = [*choice.lengths], 0.0
        if draft.entries == "own":
            makes_ms = self.costs.prefill_ms([(draft.path, self.prompt_len)], 0)
            for place, request in enumerate(guessing):
                if not lengths[place] or request in own_entries:
                    continue
                if choice.saved_ms(len(left), left[request]) > makes_ms:
                    own_entries.add(request)
                    entries_ms += makes_ms
                else:
                    lengths[place] = 0
        if any(choice.lengths) and not any(lengths):
            return {}, choice.plain_ms
        if lengths != [*choice.lengths]:
            choice = self.lengths.of_lengths(candidates, others, lengths)
        guess_ms, verify_ms = self.lengths.expected_ms(choice, len(left))
        unit = self.lengths.slowness(len(left))
        self.lengths.observe(choice, len(left), guess_ms * unit, verify_ms * unit)
        return dict(zip(guessing, lengths, strict=True)), guess_ms + verify_ms + entries_ms

    def _num_given(self, request: int, num_guesses: int) -> int:
        """The tokens that a verification gives."""
        num_right = 0
        while num_right < num_guesses and self.draw.random() < self._rate(request):
            num_right += 1
        return 1 + num_right

    def _rate(self, request: int) -> float:
        return self.rates[request % len(self.rates)]
