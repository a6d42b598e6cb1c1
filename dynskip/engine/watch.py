"""`StepWatch`: who stepped in the last steps, and through which layers; kept for a while after each look."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from dynskip.paths import LayerPath
from dynskip.scheduler.scheduler import Decision
from dynskip.scheduler.sequence import SequenceState

if TYPE_CHECKING:
    from dynskip.engine.request import OutputSequence

# Steps that are kept, and of each the prompts and the decode rows: half a second of the smallest model.
_MOST_STEPS = 512
_MOST_ROWS = 64
# Seconds behind the last look after which steps are no longer kept.
_IDLE_S = 10.0


class WatchedRow(NamedTuple):
    """One sequence in one step.

    place: the lowest number that no other resident sequence had when it came. path: the layers that its tokens may run.
    num_tokens: of its prompt those that the step ran, else those that it got. num_guesses: those its draft guessed for
    the step. draft: the path of the draft; None where nothing was guessed.
    """

    place: int
    path: LayerPath
    num_tokens: int
    num_guesses: int = 0
    draft: LayerPath | None = None


class WatchedStep(NamedTuple):
    """A step: first ``prompts`` run, then decode ``rows``, at most 64 of each.

    number: counted from 1. begin_s: on the clock of `Watched.time_s`; prefill_s, decode_s: how long both parts took.
    """

    number: int
    begin_s: float
    prefill_s: float
    decode_s: float
    prompts: tuple[WatchedRow, ...]
    rows: tuple[WatchedRow, ...]


@dataclass(frozen=True)
class Watched:
    """What an engine holds at ``time_s``, seconds since it was made, and its last steps.

    num_waiting, num_prefilling, num_running, kv_bytes, kv_capacity_bytes: as in `EngineStats`. num_tokens: generated
    since the engine was made. num_steps: made since then. steps: those that were kept, oldest first.
    """

    time_s: float
    num_waiting: int
    num_prefilling: int
    num_running: int
    num_tokens: int
    kv_bytes: int
    kv_capacity_bytes: int
    num_steps: int
    steps: tuple[WatchedStep, ...]


class StepWatch:
    """Keeps the last steps for 10 seconds after each look; costs a comparison a step at any other time.

    clock: in seconds, that of the times that `end` is given.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start_s = clock()
        self._looked_s: float | None = None  # None: nothing is kept
        self._steps: deque[WatchedStep] = deque(maxlen=_MOST_STEPS)
        self._places: dict[SequenceState, int] = {}
        self._free: list[int] = []  # heap of places below len(_places) + len(_free) that are free
        self._prompts: tuple[WatchedRow, ...] = ()
        self._decoding: list[tuple[SequenceState, int, int]] = []  # with tokens and guesses before the step

    def look(self, since: int) -> tuple[float, tuple[WatchedStep, ...]]:
        """The time, and the steps behind number ``since`` that were kept. Steps are kept from now on."""
        self._looked_s = self._clock()
        return self._looked_s - self._start_s, tuple(step for step in self._steps if step.number > since)

    def begin(self, decision: Decision) -> None:
        """A step is about to carry out ``decision``."""
        if self._looked_s is None:
            return
        if decision.prefill:
            self._forget_gone(list(self._places))  # also those that left between steps
        self._prompts = tuple(
            WatchedRow(self._place(chunk.sequence), chunk.sequence.path, chunk.num_tokens)
            for chunk in decision.prefill[:_MOST_ROWS]
        )
        self._decoding = []
        for state in decision.decode[:_MOST_ROWS]:
            self._place(state)
            self._decoding.append((state, len(state.owner.token_ids), state.owner.num_drafted))

    def end(self, number: int, begin_s: float, prefill_s: float, decode_s: float) -> None:
        """The step that was begun, number ``number``, has ended."""
        if self._looked_s is None:
            return
        if begin_s - self._looked_s > _IDLE_S:
            self._stop()
            return
        rows = tuple(self._row(state, *before) for state, *before in self._decoding)
        self._steps.append(WatchedStep(number, begin_s - self._start_s, prefill_s, decode_s, self._prompts, rows))
        self._forget_gone([state for state, *_ in self._decoding])

    def _row(self, state: SequenceState, num_tokens: int, num_drafted: int) -> WatchedRow:
        sequence: OutputSequence = state.owner
        num_guesses = sequence.num_drafted - num_drafted
        draft = sequence.draft.path if sequence.draft is not None and num_guesses else None
        return WatchedRow(self._places[state], state.path, len(sequence.token_ids) - num_tokens, num_guesses, draft)

    def _place(self, state: SequenceState) -> int:
        place = self._places.get(state)
        if place is None:
            place = heapq.heappop(self._free) if self._free else len(self._places)
            self._places[state] = place
        return place

    def _forget_gone(self, states: Iterable[SequenceState]) -> None:
        for state in states:
            if not state.is_resident and state in self._places:
                heapq.heappush(self._free, self._places.pop(state))

    def _stop(self) -> None:
        self._looked_s = None
        self._steps.clear()
        self._places.clear()
        self._free.clear()
        self._prompts, self._decoding = (), []
