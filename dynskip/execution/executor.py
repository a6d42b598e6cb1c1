"""`Executor`: what runs steps through a decoder, and keeps keys and values in caches of its own kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from dynskip.execution.step import RowCounts, Step
from dynskip.execution.turns import Guesses, Turns
from dynskip.ops.choice import choose_tokens
from dynskip.ops.logit_changes import float_rows
from dynskip.sampling import Choice

CacheT = TypeVar("CacheT")


class Predictions(NamedTuple):
    """What may follow some rows.

    logits: [R, V]. most_likely: [R], int64, as `choice_reference.most_likely` says; None: nobody has looked yet.
    decoder: whose threads may draw tokens, as `native.choose_tokens` names it; 0 for none.
    drawn: [R], int64, the tokens by the choices that the step was given; None: they are still to be drawn.
    """

    logits: Tensor
    most_likely: Tensor | None = None
    decoder: int = 0
    drawn: Tensor | None = None

    def of_rows(self, rows: list[int]) -> Predictions:
        """A copy of those of some rows, in float32: the same tokens follow."""
        likely, drawn = (None if tokens is None else tokens[rows] for tokens in (self.most_likely, self.drawn))
        return Predictions(float_rows(self.logits, rows, self.decoder), likely, self.decoder, drawn)


class Executor(Protocol[CacheT]):
    """Runs steps and counts the rows of each layer that it computes. ``cache``: one that this executor made.

    What warms up, retires and releases does nothing unless an executor has something to keep.
    """

    row_counts: RowCounts

    @property
    def resumes(self) -> bool:
        """Whether it runs steps with rows that have begun, and keeps states for them: see `Step.begun`."""
        return True

    def new_cache(self, num_seqs: int, max_context_len: int, num_slots: int) -> CacheT:
        """A cache for ``num_seqs`` sequences of at most ``max_context_len`` tokens and ``num_slots`` entries in all."""
        ...

    def run(self, step: Step, cache: CacheT | None, on_layer: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """[N, C]: the last layer's output for every row of ``step``.

        cache: takes the new entries; None where nothing will be decoded from them.
        on_layer: called with each layer's index and input, [N, C], which the layer may then change in place.
        """
        ...

    def head(self, hidden_states: Tensor) -> Tensor:
        """[R, V]: the logits of the last layer's output ``hidden_states``, [R, C]."""
        ...

    def finish(self, hidden_states: Tensor) -> Tensor:
        """[R, E]: what the head sees of the last layer's output ``hidden_states``, [R, C]."""
        ...

    def logits(self, step: Step, cache: CacheT) -> Tensor:
        """[N, V]: the logits of the rows of a decode step; the next step may overwrite them."""
        return self.head(self.run(step, cache))

    def predict(
        self, step: Step, cache: CacheT, rows: Tensor | None = None, choices: Sequence[Choice] | None = None
    ) -> Predictions:
        """What follows ``rows`` ([R], int64) of ``step``, or each row; tokens where they come with it.

        choices: [R], how tokens will be chosen; None where that is the most likely ones, or not known.
        """
        return Predictions(self.logits(step, cache) if rows is None else self.head(self.run(step, cache)[rows]))

    def guess(self, turns: Turns, cache: CacheT) -> Guesses:
        """What each sequence of ``turns`` guesses.

        It leaves entries in ``cache``: of the tokens of the first step, and of all guesses but the last.
        """
        guesses: list[list[int]] = [[] for _ in turns.tokens]
        kept = None if turns.num_common is None else _KeptStates(turns)
        going, step, rows = list(range(len(guesses))), turns.first_step, turns.last_rows
        while True:
            if kept is None:
                predictions = self.predict(step, cache, rows)
            else:
                states = self.run(step, cache, kept.begin_step(going, rows))
                kept.look(step.plan.num_layers, states)
                predictions = Predictions(self.head(states if rows is None else states[rows]))
            choices = [turns.choice(index, len(guesses[index])) for index in going]
            tokens = choose_tokens(predictions.logits, choices, predictions.most_likely, predictions.decoder)
            for index, token in zip(going, tokens, strict=True):
                guesses[index].append(token)
            following = turns.next_step(guesses)
            if following is None:
                return Guesses(guesses, None if kept is None else kept.states)
            (going, step), rows = following, None

    def warm_up(self, cache: CacheT, max_rows: int) -> None:
        """Compile and load what decode steps of at most ``max_rows`` rows launch: no step waits for it later."""
        return

    def retire(self, cache: CacheT) -> None:
        """Keep ``cache``, which is used no more, where the next batch gains by it."""
        return

    def release(self) -> None:
        """Give back the memory of retired caches, static buffers and graphs."""
        return


class _KeptStates:
    """The states that some sequences have behind a number of layers, as `Guesses.states`, collected layer by layer."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.states: Tensor | None = None
        self._step = -1
        self._going: list[int] = []
        self._rows: list[int] = []

    def begin_step(self, going: list[int], rows: Tensor | None) -> Callable[[int, Tensor], None]:
        """What looks at the layers of the next step, in which the sequences ``going`` have ``rows``; None for all."""
        self._step += 1
        self._going = going
        self._rows = list(range(len(going))) if rows is None else rows.tolist()
        return self.look

    def look(self, layer: int, hidden_states: Tensor) -> None:
        """Keep what is wanted of the input of ``layer``, [N, C]; that of layer L is the last layer's output."""
        if self.states is None:
            shape = self.turns.num_steps, len(self.turns.tokens), hidden_states.shape[1]
            self.states = hidden_states.new_empty(shape)
        wanted = self.turns.num_common
        assert wanted is not None, "states are kept"
        for index, row in zip(self._going, self._rows, strict=True):
            if layer and wanted[index] == layer:
                self.states[self._step, index] = hidden_states[row]
