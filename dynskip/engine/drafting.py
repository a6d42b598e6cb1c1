"""Guessing ahead: before a decode step, the drafts of its sequences guess the tokens that the step then verifies.

A guess is a row of the step like any other, at the position behind its sequence's last token. What the step chooses
from a row's logits is the sequence's next token, guessed or not; the rows behind the first wrong guess have seen a
token that never came, and their entries are given back.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import Tensor

from dynskip.causal_lm import CausalLM
from dynskip.costs.step_costs import StepCosts
from dynskip.engine.kv_pool import KVPool
from dynskip.engine.model_runner import ModelRunner
from dynskip.engine.request import OutputSequence, Span
from dynskip.execution.turns import BegunRows, Turns
from dynskip.found import found_paths_of, search_command
from dynskip.models.linear import NATIVE_ROWS
from dynskip.paths import LayerPath
from dynskip.sampling import NOT_FINITE
from dynskip.scheduler.outcome import Tally
from dynskip.speculation.acceptance import Acceptance
from dynskip.speculation.draft import Draft
from dynskip.speculation.lengths import MOST_GUESSES, Candidate, Choice, DraftLengths

# Known tokens of a preempted sequence that run again in one step.
REPLAYED_ROWS = 8
# Own entries that a draft lacks run as rows of its first guess, if they are no more than these; else as a prompt.
_FEW_ROWS = 8
# The share of the time of steps with a draft that probes may lose: guesses that do not seem to pay, made to see whether
# they would be right. A loss is what a step takes beyond what plain steps take for its tokens, and of a step that runs
# entries which a draft lacks all that guesses take; gains of later probes are set against it.
# Behind the first seconds the share falls as the root of the time: the longer probes have changed nothing, the fewer
# are worth it.
_PROBED_SHARE, _PROBED_MS = 0.01, 5e3
# Where no guess pays, so many steps go by before the question is asked again, and twice as many each further time:
# asking costs time, too, and the answer is the same while as many sequences step and nothing is learnt.
_IDLE_STEPS, _MOST_IDLE_STEPS = 3, 48
# And so many more, up to as many, that asking takes this share of the time: choosing is Python, and steps may be short.
_ASKED_SHARE = 0.01
# A probe looks at so many guesses.
_PROBE_LENGTH = 1


class DraftWarning(UserWarning):
    """A draft failed; its request goes on without one."""


def most_rows(model: CausalLM) -> int:
    """Of a step of ``model`` that verifies guesses, unless it has more without them."""
    return NATIVE_ROWS if model.backend.name == "native" else 4 * NATIVE_ROWS


def find_draft(model: CausalLM, path: LayerPath) -> Draft | None:
    """What a search has left as the draft of ``model`` for requests along ``path``; None where none pays.

    A draft is searched for the full path, other paths have none. What it gains was predicted for the device that it was
    searched on; whether an engine guesses with it, that decides by the costs of its own. Raises ValueError, naming the
    command, where no search for a draft has run.
    """
    found = found_paths_of(model, "find_draft")
    if not found.searched_draft:
        raise ValueError(
            "find_draft: model must have a draft that a search has found, got paths only. Run "
            f"`{search_command(model.config.name_or_path, getattr(model.config, 'adapter', None))} --score speed`."
        )
    if found.draft is None or path.budget < path.num_layers:
        return None
    return Draft(LayerPath.of(found.num_layers, found.draft.layers), found.draft.entries, found.draft.agreement)


@dataclass
class _Learnt:
    """What is known of a model's drafts, whichever engine has seen it."""

    acceptance: Acceptance = field(default_factory=Acceptance)
    lengths: DraftLengths | None = None
    spent_ms: float = 0.0  # of all steps with a draft in them
    probed_ms: float = 0.0  # lost by probes
    next_probe_ms: float = 0.0  # what must be spent before there is time for another

    def of_costs(self, costs: StepCosts, most_rows: int, resumes: bool) -> DraftLengths:
        """The lengths that those costs make pay, with what was learnt of these costs before."""
        made = DraftLengths(costs, most_rows, resumes)
        if self.lengths is None or not made.asks_as(self.lengths):
            self.lengths = made
        return self.lengths


# An engine lives as long as a batch of `LLM.generate`, which is too short to learn from.
_LEARNT: WeakKeyDictionary[CausalLM, _Learnt] = WeakKeyDictionary()


def forget_acceptance(model: CausalLM) -> None:
    """Forget how often drafts of ``model`` were right: its weights have changed. Engines that run already do not."""
    if model in _LEARNT:
        _LEARNT[model].acceptance = Acceptance()


def forget_drafts(model: CausalLM) -> None:
    """Forget all that steps with drafts of ``model`` have shown: an engine that is made now begins as the first one."""
    _LEARNT.pop(model, None)


@dataclass
class Drafting:
    """Decides how many tokens the sequences of a step guess, lets their drafts guess them, and learns from it.

    costs: asked for when the first draft comes. max_prompt_tokens: most tokens of a prompt that a draft runs in a step.
    """

    runner: ModelRunner
    kv: KVPool
    tally: Tally
    costs: Callable[[], StepCosts]
    max_prompt_tokens: int
    acceptance: Acceptance = field(init=False)
    _lengths: DraftLengths | None = None
    _dropped: list[tuple[int, int, int]] = field(default_factory=list)  # cache sequence, tokens kept, entries behind
    _is_prepared: bool = False
    _choice: Choice | None = None
    _num_seqs: int = 0  # of the step, those with a path
    _num_spans: int = 0  # all of them
    _num_idle: int = 0  # steps that go by before the question is asked again
    _idle_steps: int = 0  # so many of the last time, for steps of _idle_spans
    _idle_spans: int = 0
    _num_given: int = 0  # tokens of the step
    _begin_s: float = 0.0
    _is_regular: bool = True  # whether the step does nothing but guess and verify
    _is_probe: bool = False  # whether its guesses are made to see whether they would be right
    _is_idle: bool = False  # whether the question is not asked in it
    _guessed_ms: float = 0.0
    _caught_up_ms: float = 0.0  # of these, what entries took that drafts lacked

    def __post_init__(self) -> None:
        self._learnt = _LEARNT.setdefault(self.runner.model, _Learnt())
        self.acceptance = self._learnt.acceptance

    def prepare(self, batch: int) -> None:
        """Compile and load what steps of ``batch`` sequences launch that verify guesses: none waits for it later."""
        if not self._is_prepared:
            self.runner.executor.warm_up(self.kv.cache, min(batch * (1 + MOST_GUESSES), max(batch, self._most_rows)))
            self._is_prepared = True

    @property
    def lengths(self) -> DraftLengths | None:
        """What chooses lengths, with what it has learnt of this model; None before the first draft."""
        return self._lengths

    @property
    def _most_rows(self) -> int:
        return most_rows(self.runner.model)

    def extend(self, spans: Sequence[Span]) -> list[Span]:
        """The decode spans of a step, one token each, with the tokens that are guessed or known behind them.

        Guesses are in `OutputSequence.guesses`. Memory that the step's own rows need is not touched.
        """
        self._choice = None
        self._is_regular, self._is_probe, self._is_idle, self._num_given = True, False, False, 0
        if all(span.sequence.draft is None and not span.sequence.is_replayed for span in spans):
            return list(spans)
        if self._num_idle and len(spans) == self._idle_spans and not any(span.sequence.is_replayed for span in spans):
            self._num_idle -= 1
            self._is_idle, self._begin_s = True, time.perf_counter()
            return list(spans)
        self._begin_s = time.perf_counter()
        self._num_spans = len(spans)
        num_free = self.kv.num_free
        extended = list(spans)
        candidates: list[tuple[int, Candidate]] = []
        riders: list[tuple[int, Candidate]] = []
        others: list[LayerPath] = []
        for index, span in enumerate(spans):
            sequence = span.sequence
            sequence.guesses, sequence.begun = [], None
            path = sequence.path
            if path is None:
                continue
            if sequence.is_replayed:
                num_known = min(sequence.num_tokens - span.first - 1, REPLAYED_ROWS, num_free // max(path.budget, 1))
                num_free -= num_known * path.budget
                extended[index] = Span(sequence, span.first, 1 + num_known)
                others.append(path)
            elif (candidate := self._candidate(sequence, path)) is None:
                others.append(path)
            else:
                (riders if candidate.rides else candidates).append((index, candidate))
        if not candidates:
            self.kv.make_room(self.kv.num_free - num_free)
            return extended
        candidates += riders
        sequences = [spans[index].sequence for index, _ in candidates]
        lengths = self._choose([candidate for _, candidate in candidates], sequences, others)
        if not any(lengths):
            self._begin_s = time.perf_counter()  # most plain steps are not asked for: choosing is a price of guesses
        guessing, made = [], []
        for (index, candidate), length in zip(candidates, lengths, strict=True):
            span = spans[index]
            length, num_slots = self._affordable(span, candidate, length, num_free)
            made.append(length)
            if length:
                num_free -= num_slots
                guessing.append((index, candidate.draft, length))
        self.kv.make_room(self.kv.num_free - num_free)
        self._guessed_ms = self._caught_up_ms = 0.0
        if guessing:
            if made != [*lengths]:  # what is learnt is learnt of the guesses that are made
                self._choice = self._draft_lengths().of_lengths([each for _, each in candidates], others, made)
            self._idle_steps = self._idle_spans = 0
            begin_s = time.perf_counter()
            self._guess([(spans[index], draft, length) for index, draft, length in guessing])
            for index, _, _ in guessing:
                span = spans[index]
                extended[index] = Span(span.sequence, span.first, 1 + len(span.sequence.guesses))
            self._guessed_ms = 1e3 * (time.perf_counter() - begin_s)
        elif any(lengths):
            self._rest()
            self._choice = None  # there was no memory for it, or entries were not worth making: nothing is learnt
        return extended

    def accepted(self, span: Span, num_kept: int) -> None:
        """Learn that the first ``num_kept`` rows of ``span`` have seen tokens that came."""
        sequence = span.sequence
        num_guesses = len(sequence.guesses)
        self._num_given += num_kept
        if num_guesses and sequence.draft is not None and sequence.path is not None:
            num_right = min(num_kept - 1, num_guesses)
            self.acceptance.add(sequence.path, sequence.draft, sequence.rate, num_right, num_guesses)
            sequence.num_drafted += num_guesses
            self.tally.num_drafted += num_guesses
            self.tally.num_verifications += 1
            place = self.kv.draft_place(sequence.state)
            # The last guess was never run by the draft itself.
            num_tokens = span.first + min(num_kept, num_guesses)
            if place is not None and place.num_tokens > num_tokens:
                self._dropped.append((place.cache_id, num_tokens, place.num_tokens - num_tokens))
                place.num_tokens = num_tokens
        if num_kept < span.num_tokens and sequence.state.cache_id >= 0:
            self._dropped.append((sequence.state.cache_id, span.first + num_kept, span.num_tokens - num_kept))
        sequence.guesses, sequence.begun = [], None

    def forget(self, sequence: OutputSequence) -> None:
        """Take back the guesses of a step that could not run with them."""
        if sequence.begun is not None and sequence.state.cache_id >= 0:
            num_begun = len(sequence.begun.states)
            self.kv.cache.truncate([sequence.state.cache_id], [sequence.num_tokens - 1], [num_begun])
        sequence.guesses, sequence.begun = [], None
        self.kv.drop_draft(sequence.state)

    def interrupt(self) -> None:
        """Forget the step that has not ended: whose entries it would have given back, holds them no more."""
        self._dropped, self._choice = [], None

    def end_step(self) -> None:
        """Give back the entries of wrong guesses, and learn from how long the step took."""
        if self._dropped:
            cache_ids, num_tokens, num_dropped = zip(*self._dropped, strict=True)
            self.kv.cache.truncate(cache_ids, num_tokens, num_dropped)
            self._dropped = []
        if self._is_idle:
            self._learnt.spent_ms += 1e3 * (time.perf_counter() - self._begin_s)
        if self._lengths is None:
            return
        if self._choice is None or not self._is_regular:
            self._lengths.skip()
        if self._choice is None:
            return
        measured_ms = 1e3 * (time.perf_counter() - self._begin_s)
        self._learnt.spent_ms += measured_ms
        if not self._is_regular:
            self._learnt.probed_ms += self._guessed_ms * self._is_probe
            return
        guessed_ms = self._guessed_ms - self._caught_up_ms
        self._lengths.observe(self._choice, self._num_seqs, guessed_ms, measured_ms - self._guessed_ms)
        if self._is_probe:
            lost_ms = self._lengths.lost_ms(self._choice, self._num_seqs, self._num_given, measured_ms)
            self._learnt.probed_ms = max(0.0, self._learnt.probed_ms + lost_ms)

    def _candidate(self, sequence: OutputSequence, path: LayerPath) -> Candidate | None:
        # The last token of an output is never run, and a guess behind it is worth nothing.
        num_left = sequence.state.max_tokens - len(sequence.token_ids)
        if num_left < 2:
            return None
        draft, most = sequence.draft, min(num_left - 1, MOST_GUESSES)
        if draft is not None:
            return Candidate(path, draft, self.acceptance.of(path, draft, sequence.rate), most)
        if not self.runner.executor.resumes or sequence.params.changes_logits(len(sequence.token_ids)):
            return None  # guessed from logits that nothing has changed, its tokens would not be sure
        own = _draft_of_its_own(path)
        return None if own is None else Candidate(path, own, 1.0, most, rides=True)

    def _entries_ms(self, sequence: OutputSequence, candidate: Candidate) -> float:
        """What the entries take that the draft still lacks, as predicted; nothing where they are few."""
        if candidate.draft.entries == "path":
            return 0.0
        place = self.kv.draft_place(sequence.state)
        num_missing = sequence.num_tokens - (0 if place is None else place.num_tokens)
        if num_missing <= _FEW_ROWS:
            return 0.0
        return self._draft_lengths().costs.prefill_ms([(candidate.draft.path, num_missing)], 0)

    def _is_worth_entries(self, sequence: OutputSequence, candidate: Candidate) -> bool:
        """Whether what the draft saves for the tokens that are left is more than the entries take that it lacks.

        A look at a draft that does not seem to pay saves nothing, and has counted them among what it loses.
        """
        entries_ms = self._entries_ms(sequence, candidate)
        if not entries_ms or self._is_probe:
            return True
        assert self._choice is not None, "it guesses by a choice"
        num_left = sequence.state.max_tokens - len(sequence.token_ids)
        return self._choice.saved_ms(self._num_seqs, num_left) > entries_ms

    def _draft_lengths(self) -> DraftLengths:
        if self._lengths is None:
            self._lengths = self._learnt.of_costs(self.costs(), self._most_rows, self.runner.executor.resumes)
            self._lengths.interrupt()  # guesses of another engine are no neighbours of its steps
        return self._lengths

    def _choose(
        self, candidates: Sequence[Candidate], sequences: Sequence[OutputSequence], others: Sequence[LayerPath]
    ) -> tuple[int, ...]:
        lengths = self._draft_lengths()
        self._num_seqs = len(candidates) + len(others)
        plain = lengths.plain(candidates, others)
        choice = self._choice = plain or lengths.choose(candidates, others)
        probed = None
        if plain is None and not any(choice.lengths):
            probed = self._probe(candidates, sequences, others)
            if probed is None:
                self._rest()
        return probed or choice.lengths

    def _rest(self) -> None:
        """Let some steps go by before the question is asked again."""
        assert self._choice is not None and self._lengths is not None, "the question was asked"
        asked_ms = 1e3 * (time.perf_counter() - self._begin_s)
        step_ms = self._choice.plain_ms * self._lengths.slowness(self._num_seqs)
        worth = round(asked_ms / (_ASKED_SHARE * step_ms)) if step_ms else 0
        is_same = self._num_spans == self._idle_spans
        steps = max(2 * self._idle_steps * is_same, _IDLE_STEPS, worth)
        self._idle_steps = min(steps, _MOST_IDLE_STEPS)
        self._num_idle, self._idle_spans = self._idle_steps, self._num_spans

    def _probe(
        self, candidates: Sequence[Candidate], sequences: Sequence[OutputSequence], others: Sequence[LayerPath]
    ) -> tuple[int, ...] | None:
        """Lengths for a look at drafts that do not seem to pay, where all such looks lose little, this one included."""
        assert self._choice is not None and self._lengths is not None
        learnt = self._learnt
        if learnt.spent_ms < learnt.next_probe_ms:
            return None
        place = max(range(len(candidates)), key=lambda index: (not candidates[index].rides, candidates[index].rate))
        probe = self._lengths.probe(candidates, others, place, _PROBE_LENGTH)
        lost_ms = self._lengths.lost_ms(probe, self._num_seqs)
        for sequence, candidate, length in zip(sequences, candidates, probe.lengths, strict=True):
            lost_ms += self._entries_ms(sequence, candidate) * (length > 0)
        learnt.next_probe_ms = _spent_for(learnt.probed_ms + lost_ms)
        if learnt.spent_ms < learnt.next_probe_ms:
            return None
        self._choice, self._is_probe = probe, True
        return probe.lengths

    def _affordable(self, span: Span, candidate: Candidate, length: int, num_free: int) -> tuple[int, int]:
        """At most ``length`` guesses of a sequence for which there is memory, and the slots that they take."""
        sequence, budget = span.sequence, candidate.path.budget
        draft = candidate.draft
        if length and not self._is_worth_entries(sequence, candidate):
            return 0, 0
        if length and draft.entries == "own":
            place = self.kv.draft_place(sequence.state) or self.kv.open_draft(sequence.state)
            if place is None:
                return 0, 0
            num_missing = span.first + 1 - place.num_tokens
            own = draft.path.budget * (num_missing + length - 1)
            while length and own + length * budget > num_free:
                length -= 1
                own -= draft.path.budget
            return length, own + length * budget
        while length and length * budget > num_free:
            length -= 1
        return length, length * budget

    def _guess(self, guessing: Sequence[tuple[Span, Draft, int]]) -> None:
        """Let each draft guess as many tokens for its span; one that fails guesses none, and is its request's no more.

        Drafts guess together. Where that fails each guesses alone: whose fault it is only that shows.
        """
        cache = self.kv.cache
        sequences = [span.sequence for span, _, _ in guessing]
        places = [self.kv.draft_place(sequence.state) for sequence in sequences]
        held = [sequence.state.cache_id for sequence in sequences]
        held += [place.cache_id for place in places if place is not None]
        mark = cache.mark(held)
        before = [None if place is None else place.num_tokens for place in places]
        try:
            self._run(guessing)
        except Exception as error:
            cache.rewind(mark)  # type: ignore[arg-type]  # its own mark
            self._is_regular = False
            for sequence, place, num_tokens in zip(sequences, places, before, strict=True):
                sequence.guesses, sequence.begun = [], None
                if place is not None and num_tokens is not None:
                    place.num_tokens = num_tokens
            if len(guessing) > 1:
                warnings.warn(f"Drafts failed together, and guess alone: {error!r}", DraftWarning, stacklevel=2)
                for each in guessing:
                    self._guess([each])
                return
            (sequence,) = sequences
            sequence.draft = None
            self.kv.drop_draft(sequence.state)
            warnings.warn(f"A draft failed, and its output goes on without: {error!r}", DraftWarning, stacklevel=2)

    def _run(self, guessing: Sequence[tuple[Span, Draft, int]]) -> None:
        cache = self.kv.cache
        resumes = self.runner.executor.resumes
        rows = [_Guessing(span, draft, length, self.kv, resumes) for span, draft, length in guessing]
        for row in rows:
            self._catch_up(row)
        begun = [row for row in rows if row.num_missing <= _FEW_ROWS]
        self._is_regular &= len(begun) == len(rows)  # of the others a prompt is too long for one step
        rows = begun
        own_paths = [row for row in rows if row.place is None]
        if rows:
            turns = Turns(
                [row.next_tokens for row in rows],
                [row.first for row in rows],
                [row.cache_id for row in rows],
                [row.draft.path for row in rows],
                [row.length for row in rows],
                # What the path would choose from these logits, by the same noise: a right guess is the token itself.
                [row.sequence.choice for row in rows],
                self.runner.model.device,
                [row.num_common for row in rows] if any(row.num_common for row in rows) else None,
            )
            tokens, states = self.runner.guess(turns, cache)
            for index, row in enumerate(rows):
                row.take(tokens[index], None if states is None else states[:, index])
        if own_paths:
            # Entries that the draft made among the path's are the path's own in the layers that both begin with. Behind
            # them they are made anew when the path verifies.
            cache.truncate(
                [row.cache_id for row in own_paths],
                [row.span.first for row in own_paths],
                [row.num_run for row in own_paths],
                [0 if row.sequence.begun is None else row.sequence.begun.num_layers for row in own_paths],
            )

    def _catch_up(self, row: _Guessing) -> None:
        """Make the own entries that a draft lacks, as far as one step may, if they are many."""
        if row.place is None or row.num_missing <= _FEW_ROWS:
            return
        sequence, place = row.sequence, row.place
        begin_s = time.perf_counter()
        if not place.num_tokens:
            self._copy_from_sibling(sequence, place.cache_id)
        count = min(row.num_missing - 1, self.max_prompt_tokens)
        if count:
            tokens = sequence.tokens(place.num_tokens, count)
            self.runner.prefill_draft(tokens, (place.num_tokens, place.cache_id), row.draft.path, self.kv.cache)
            place.num_tokens += count
        self._caught_up_ms += 1e3 * (time.perf_counter() - begin_s)
        # Elsewhere these were only launched by now: their time would be that of the guesses.
        self._is_regular &= self.runner.model.device.type == "cpu"

    def _copy_from_sibling(self, sequence: OutputSequence, cache_id: int) -> None:
        """Begin with the entries that another output of the same prompt has already."""
        place = self.kv.draft_place(sequence.state)
        assert place is not None
        num_prompt = len(sequence.prompt_ids)
        for other in sequence.request.sequences:
            theirs = self.kv.draft_place(other.state)
            if other is not sequence and theirs is not None and theirs.num_tokens >= num_prompt:
                self.kv.cache.share(theirs.cache_id, cache_id, num_prompt)
                place.num_tokens = num_prompt
                return


def _spent_for(lost_ms: float) -> float:
    """How long steps with a draft must have taken before probes may have lost so much."""
    at_first_ms = lost_ms / _PROBED_SHARE
    return max(at_first_ms, at_first_ms**2 / _PROBED_MS)


@functools.lru_cache(maxsize=256)
def _draft_of_its_own(path: LayerPath) -> Draft | None:
    """``path`` as its own draft: it is always right, and its verification goes on behind all layers; None of none."""
    own = Draft(path, "path")
    return own if own.num_common_layers(path) else None


class _Guessing:
    """A sequence while its draft guesses."""

    def __init__(self, span: Span, draft: Draft, length: int, kv: KVPool, resumes: bool) -> None:
        self.span = span
        self.draft = draft
        self.length = length
        self.sequence = span.sequence
        self.place = kv.draft_place(self.sequence.state)
        self.cache_id = self.sequence.state.cache_id if self.place is None else self.place.cache_id
        path = self.sequence.path
        assert path is not None, "a draft guesses for a path"
        self.num_common = draft.num_common_layers(path) if resumes and self.place is None else 0
        self.num_run = 0

    @property
    def num_missing(self) -> int:
        """Tokens that run before the first guess: the last one, and in own entries those that have none yet."""
        return 1 if self.place is None else self.span.first + 1 - self.place.num_tokens

    @property
    def first(self) -> int:
        """The position of the first of them."""
        return self.span.first + 1 - self.num_missing

    @property
    def next_tokens(self) -> list[int]:
        """These tokens."""
        return self.sequence.tokens(self.first, self.num_missing)

    def take(self, tokens: list[int], states: Tensor | None) -> None:
        """The missing tokens and all but the last of ``tokens``, which were guessed behind them, have run.

        states: [K, C], theirs behind the layers that draft and path begin with, if it has any.
        """
        self.num_run = self.num_missing + len(tokens) - 1
        if self.place is not None:
            self.place.num_tokens += self.num_run
        self.sequence.guesses = [token for token in tokens if token != NOT_FINITE]
        if self.num_common and states is not None and self.sequence.guesses:
            self.sequence.begun = BegunRows(self.num_common, states[: self.num_run])
