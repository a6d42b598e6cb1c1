"""Carries out what the scheduler has decided: prefills and decode rows, tokens chosen, sequences ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from dynskip.engine.choosing import choose
from dynskip.engine.diagnosis import diagnose
from dynskip.engine.drafting import Drafting
from dynskip.engine.in_flight import TokensInFlight
from dynskip.engine.kv_pool import KVPool
from dynskip.engine.model_runner import ModelRunner
from dynskip.engine.prompt_logprobs import top_logprobs
from dynskip.engine.request import OutputSequence, Request, Span
from dynskip.engine.text_rule import TextRule
from dynskip.execution.executor import Predictions
from dynskip.ops.choice import launch_choice
from dynskip.routing.routes import PathRoute
from dynskip.sampling import NOT_FINITE
from dynskip.scheduler.outcome import Tally
from dynskip.scheduler.scheduler import Chunk, Decision, Scheduler
from dynskip.scheduler.sequence import SequenceState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Spans, and what follows each of them, or with guesses each of their rows.
Predicted = tuple[list[Span], Predictions]


@dataclass
class StepExecution:
    """Runs the sequences of a decision, and books what becomes of them.

    An exception in what belongs to a request ends that request and no other.
    now: the engine's clock. on_end: called with a request all of whose outputs have ended.
    model_s: how long the model and the choice of tokens took since it was set to zero.
    in_flight: the tokens of the last decode step, where they were not read; see `ModelRunner.reads_late`.
    """

    runner: ModelRunner
    kv: KVPool
    scheduler: Scheduler
    tally: Tally
    tokenizer: PreTrainedTokenizerBase | None
    now: Callable[[], float]
    on_end: Callable[[Request], None]
    drafting: Drafting
    model_s: float = 0.0
    in_flight: TokensInFlight | None = None
    _union: int = 0  # the layers that rows of the step have run, as bits

    def prefill(self, chunks: Sequence[Chunk]) -> None:
        """Run chunks of prompts, and choose the next token of those that are complete."""
        if not chunks:
            return
        self.tally.num_prefills += 1
        now_s = self.now()
        spans: list[Span] = []
        copies: dict[OutputSequence, list[Span]] = {}
        leaders: dict[Hashable, OutputSequence] = {}
        for chunk in chunks:
            sequence: OutputSequence = chunk.sequence.owner
            span = Span(sequence, chunk.first, chunk.num_tokens)
            if chunk.sequence.admitted_step == self.scheduler.step:
                if sequence.request.admitted_s is None:
                    sequence.request.admitted_s = now_s
                    sequence.request.num_cached_tokens = chunk.first
                self.tally.num_shared_tokens += chunk.first
                if chunk.is_last and chunk.sequence.num_generated == 1:
                    leader = leaders.setdefault(_prompt_key(sequence), sequence)
                    if leader is not sequence and not sequence.lacks_prompt_logprobs:
                        copies.setdefault(leader, []).append(span)
                        continue
            spans.append(span)
        complete = {chunk.sequence.owner for chunk in chunks if chunk.is_last}
        while spans:
            begun, going_on = ([span for span in spans if bool(span.first) is late] for late in (False, True))
            for same in [*_by_key(begun), *_by_key(going_on)]:
                self._accept_complete(self._attempt(same, self._run_prompt), complete, copies)
            # Copies whose leader's prefill failed run on their own.
            spans = [copy for rest in copies.values() for copy in rest]
            copies = {}

    def decode(self, decision: Decision) -> None:
        """Run the last token of each decode row, and choose its next.

        Tokens in flight are read behind it, and then its own, too, where no request is left for a next step.
        """
        before = self.in_flight
        self._decode_rows(decision)
        if self.in_flight is before or not self.scheduler.has_unfinished:
            self.read()

    def read(self) -> None:
        """Give the sequences whose tokens are in flight these tokens, and see whether they are the last."""
        if self.in_flight is not None:
            self._land(self.in_flight)
            self.in_flight = None

    def _decode_rows(self, decision: Decision) -> None:
        tally = self.tally
        spans: list[Span] = []
        num_paths = 0
        self._union = 0
        if self.in_flight is not None and any(
            state.owner.draft is not None or state.owner.is_replayed for state in decision.decode
        ):
            self.read()  # several rows of a sequence begin with a token that the host knows
        for group, states in decision.parts:
            # schedule() has already counted the token of this step, so the input token is num_tokens - 2.
            part = [Span(s.owner, s.num_tokens - 2, 1) for s in states if s.owner.finish_reason is None]
            if part:
                spans += part
                num_paths += 1
                if num_fixed := sum(span.sequence.path is not None for span in part):
                    self._union |= group.mask
                    tally.num_row_layers += num_fixed * group.path.budget
        if not spans:
            return
        begin_s = time.perf_counter()
        spans = self.drafting.extend(spans)
        self.model_s += time.perf_counter() - begin_s
        tally.num_decode_steps += 1
        tally.num_rows += sum(span.num_tokens for span in spans)
        tally.num_paths += num_paths
        for same in _by_key(spans):
            attempts = self._attempt(same, self._run_decode)
            for run, predictions in attempts:
                if any(span.num_tokens > 1 for span in run):
                    self._verify(run, predictions)
                    continue
                sequences = [span.sequence for span in run]
                if len(attempts) == 1 and self._may_fly(sequences):
                    self._launch(sequences, predictions)
                else:
                    self._accept(sequences, predictions)
        self.drafting.end_step()
        tally.num_union_layers += self._union.bit_count()

    def _run_prompt(self, spans: Sequence[Span]) -> Predictions:
        return self.runner.prompt(spans, self.kv.cache)

    def _run_decode(self, spans: Sequence[Span]) -> Predictions:
        if spans[0].sequence.path is not None:
            return self.runner.decode(spans, self.kv.cache, self.in_flight)
        # Only the executor knows how many rows ran each layer.
        counts = self.runner.executor.row_counts
        before = [*counts.run]
        predictions = self.runner.decode(spans, self.kv.cache, self.in_flight)
        num_run = [after - earlier for after, earlier in zip(counts.run, before, strict=True)]
        self.tally.num_row_layers += sum(num_run)
        self._union |= sum(1 << layer for layer, count in enumerate(num_run) if count)
        return predictions

    def _attempt(self, spans: Sequence[Span], run: Callable[[Sequence[Span]], Predictions]) -> list[Predicted]:
        """The sequences and what follows. Where running them together raises, each runs alone, or ends by it."""
        spans = [span for span in spans if span.sequence.finish_reason is None]
        if not spans:
            return []
        begin_s = time.perf_counter()
        mark = self.kv.cache.mark([span.sequence.state.cache_id for span in spans])
        try:
            predictions = run(spans)
        except Exception as error:
            self.kv.cache.rewind(mark)  # type: ignore[arg-type]  # its own mark
            self.read()  # a sequence that fails gets what was chosen before, and may have ended by it
            if len(spans) == 1 and spans[0].num_tokens > 1 and run == self._run_decode:
                # Rows that were guessed are not the request's: without them it is as if nobody had guessed.
                self.drafting.forget(spans[0].sequence)
                return self._attempt([Span(spans[0].sequence, spans[0].first, 1)], run)
            if len(spans) == 1:
                if spans[0].sequence.finish_reason is None:
                    self._fail(spans[0].sequence, error)
                return []
            alone = [each for span in spans for each in self._attempt([span], run)]
            return [(run, Predictions(predicted.logits.clone())) for run, predicted in alone]
        self.model_s += time.perf_counter() - begin_s
        return [(spans, predictions)]

    def _accept_complete(
        self,
        attempts: Sequence[Predicted],
        complete: set[OutputSequence],
        copies: dict[OutputSequence, list[Span]],
    ) -> None:
        """Give a token to those whose prompts have run to the end, and to the copies that share their prompts."""
        for spans, predictions in attempts:
            sequences = [span.sequence for span in spans]
            rows: list[int] = []
            accepted: list[OutputSequence] = []
            for row, sequence in enumerate(sequences):
                # The callback of another may have ended it; its copies run on their own then.
                if sequence not in complete or sequence.finish_reason is not None:
                    continue
                rows.append(row)
                accepted.append(sequence)
                self.kv.offer(sequence.state)
                for copy, _, num_tokens in copies.pop(sequence, ()):
                    if copy.finish_reason is not None:
                        continue
                    self.kv.fork(sequence.state, copy.state)
                    self.tally.num_shared_tokens += num_tokens
                    rows.append(row)
                    accepted.append(copy)
            if accepted:
                are_all = len(rows) == len(sequences) == len(set(rows))
                self._accept(accepted, predictions if are_all else predictions.of_rows(rows))

    def _may_fly(self, sequences: Sequence[OutputSequence]) -> bool:
        """Whether the tokens of a decode step may be read late: the device can choose them by itself.

        Not where a controller or a mask decides for each token: it would see tokens behind the last one.
        """
        return self.runner.reads_late and all(
            not sequence.params.changes_logits()
            and sequence.params.logprobs is None
            and sequence.path is not None
            and sequence.draft is None
            and not sequence.is_replayed
            for sequence in sequences
        )

    def _launch(self, sequences: list[OutputSequence], predictions: Predictions) -> None:
        """Let the device choose the tokens of a decode step, and read those of the one before meanwhile."""
        begin_s = time.perf_counter()
        choices = [sequence.choice_of(sequence.state.num_generated - 1) for sequence in sequences]
        try:
            tokens = launch_choice(predictions.logits, choices, predictions.most_likely)
        except Exception:
            self._accept(sequences, predictions)  # where each row's own choice ends its request, or does not
            return
        before, self.in_flight = self.in_flight, TokensInFlight(sequences, tokens)
        self.model_s += time.perf_counter() - begin_s
        if before is not None:
            self._land(before)
        for sequence in sequences:
            if sequence.finish_reason is None and sequence.state.num_generated >= sequence.state.max_tokens:
                self._leave(sequence, self.scheduler.finished)

    def _land(self, in_flight: TokensInFlight) -> None:
        begin_s = time.perf_counter()
        tokens = in_flight.read()
        self.model_s += time.perf_counter() - begin_s
        now_s = self.now()
        for sequence, token in zip(in_flight.sequences, tokens, strict=True):
            if sequence.finish_reason is None:
                self._append(sequence, token, None, now_s)

    def _accept(self, sequences: Sequence[OutputSequence], predictions: Predictions) -> None:
        """Choose a token for each sequence, unless it has one, and see whether it is the last."""
        self.read()
        if any(sequence.is_replayed for sequence in sequences):
            rows = [row for row, sequence in enumerate(sequences) if not sequence.is_replayed]
            sequences, predictions = [sequences[row] for row in rows], predictions.of_rows(rows)
        if not sequences:
            return
        begin_s = time.perf_counter()
        logits = predictions.logits
        if any(sequence.params.logprobs is not None for sequence in sequences):
            logits = logits.cpu()  # once, for tokens and log-probabilities of all rows
            predictions = predictions._replace(logits=logits)
        own = [(sequence, len(sequence.token_ids)) for sequence in sequences]
        tokens = choose(predictions, own)
        self.model_s += time.perf_counter() - begin_s
        now_s = self.now()
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            # A request that has failed takes its other outputs with it.
            if sequence.finish_reason is not None:
                continue
            if isinstance(token, Exception):
                self._fail(sequence, token)
            else:
                self._append(sequence, token, None if sequence.params.logprobs is None else logits[row], now_s)

    def _verify(self, spans: Sequence[Span], predictions: Predictions) -> None:
        """Give each sequence the tokens that its rows choose, up to the first that is not what the next row has run."""
        self.read()
        begin_s = time.perf_counter()
        logits = predictions.logits
        if any(span.sequence.params.logprobs is not None for span in spans):
            logits = logits.cpu()
        places: dict[tuple[OutputSequence, int], int] = {}  # row of each output token that is not known yet
        first_row = 0
        for sequence, _, count in spans:
            for rank in range(count):
                position = sequence.state.num_generated - 1 + rank
                if position >= len(sequence.token_ids):
                    places[sequence, position] = first_row + rank
            first_row += count
        rows = [*places.values()]
        chosen = predictions.of_rows(rows) if len(rows) < first_row else predictions
        tokens = dict(zip(rows, choose(chosen, [*places]), strict=True))
        self.model_s += time.perf_counter() - begin_s
        now_s = self.now()
        for span in spans:
            first = span.sequence.state.num_generated - 1  # the output token that the first row gives
            own = [places.get((span.sequence, first + rank)) for rank in range(span.num_tokens)]
            self._take(span, [None if row is None else (tokens[row], logits[row]) for row in own], now_s)

    def _take(self, span: Span, chosen: Sequence[tuple[int | Exception, Tensor] | None], now_s: float) -> None:
        """Append the tokens of one sequence; chosen: of each row, None where its token was known before."""
        sequence, state = span.sequence, span.sequence.state
        if sequence.finish_reason is not None:
            return
        inputs = sequence.tokens(span.first, span.num_tokens)
        num_kept = 1
        for each, token in zip(chosen, inputs[1:], strict=False):
            if each is not None and each[0] != token:
                break
            num_kept += 1
        self.drafting.accepted(span, num_kept)
        for rank, each in enumerate(chosen[:num_kept]):
            if each is None:
                continue
            next_token, logits = each
            if isinstance(next_token, Exception):
                self._fail(sequence, next_token)
            else:
                kept_logits = None if sequence.params.logprobs is None else logits
                self._append(sequence, next_token, kept_logits, now_s, was_guessed=rank + 1 < num_kept)
            if sequence.finish_reason is not None:
                return
        state.num_cached += num_kept - 1
        state.num_generated += num_kept - 1

    def _append(
        self, sequence: OutputSequence, token: int, logits: Tensor | None, now_s: float, was_guessed: bool = False
    ) -> None:
        """Give ``sequence`` a token. ``logits``: [V], those it was chosen from; only for log-probabilities."""
        request, params = sequence.request, sequence.params
        if token == NOT_FINITE:
            self._fail(sequence, diagnose(self.runner, sequence))
            return
        try:
            if params.logprobs is not None:
                assert logits is not None, "tokens with log-probabilities do not fly"
                sequence.logprobs += top_logprobs(logits[None], [token], params.logprobs)
            sequence.was_guessed.append(was_guessed)
            sequence.token_ids.append(token)
            sequence.times_s.append(now_s)
            if was_guessed and sequence.draft is not None:  # else it rode along with the guesses of others
                sequence.num_accepted += 1
                self.tally.num_accepted += 1
            self.tally.num_tokens += 1
            if request.first_s is None:
                request.first_s = now_s
            if request.on_token is not None:
                request.on_token(request.request_id, sequence.index, token)
            reason = self.finish_reason(sequence)
        except Exception as error:
            self._fail(sequence, error)
            return
        if reason is not None and sequence.finish_reason is None:
            self.finish(sequence, reason)

    def finish_reason(self, sequence: OutputSequence) -> str | None:
        """Why ``sequence`` ends with the token that it has last; None where it goes on."""
        if sequence.token_ids[-1] in sequence.request.stop_ids:
            return "stop"
        if sequence.params.stop:
            assert self.tokenizer is not None, "add_request refuses stop texts without a tokenizer"
            if TextRule.of(sequence.params).has_stopped(self.tokenizer, sequence.token_ids):
                return "stop"
        return "length" if len(sequence.token_ids) >= sequence.state.max_tokens else None

    def finish(self, sequence: OutputSequence, reason: str) -> None:
        """End ``sequence``, whose last token was its last."""
        sequence.finish_reason = reason
        self._leave(sequence, self.scheduler.finished)
        if sequence.request.has_ended:
            self.on_end(sequence.request)

    def end(self, request: Request, reason: str) -> None:
        """End what of ``request`` has not ended."""
        if request.has_ended:
            return
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                sequence.finish_reason = reason
                self._leave(sequence, self.scheduler.abort)
        self.on_end(request)

    def _leave(self, sequence: OutputSequence, how: Callable[[Hashable], SequenceState]) -> None:
        """Let the scheduler forget ``sequence``, unless it has: it does so before the last token is read."""
        if self.scheduler.knows(sequence):
            how(sequence)

    def _fail(self, sequence: OutputSequence, error: Exception) -> None:
        sequence.request.error = error
        self.end(sequence.request, "error")


def _prompt_key(sequence: OutputSequence) -> Hashable:
    """Equal for sequences whose prompts leave the same entries and logits."""
    whose = sequence.path if isinstance(sequence.route, PathRoute) else id(sequence.request)
    return whose, tuple(sequence.prompt_ids)


def _by_key(spans: Sequence[Span]) -> list[list[Span]]:
    """The spans of each key together: those that may share a step."""
    if len({id(span.sequence.route) for span in spans}) <= 1 and spans:
        return [list(spans)]
    same: dict[Hashable, list[Span]] = {}
    for span in spans:
        same.setdefault(span.sequence.route.key, []).append(span)
    return list(same.values())
