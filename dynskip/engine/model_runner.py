"""Runs the tokens that the scheduler has chosen through the model: from sequences to logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dynskip.causal_lm import CausalLM, ExecutorName
from dynskip.engine.in_flight import TokensInFlight
from dynskip.engine.kv_pool import Cache
from dynskip.engine.prompt_logprobs import add_prompt_logprobs
from dynskip.engine.request import OutputSequence, Span, choices_of
from dynskip.execution.compact import CompactExecutor
from dynskip.execution.executor import Predictions
from dynskip.execution.native_steps import NativeSteps
from dynskip.execution.step import Step, packed_positions
from dynskip.execution.turns import Guesses, Turns, rows_step
from dynskip.ops.transfer import columns_to_device, to_device
from dynskip.paths import LayerPath
from dynskip.routing.routes import PathRoute, StepTokens
from dynskip.scheduler.outcome import NO_CALLS, CallTimes


class ModelRunner:
    """Runs spans of sequences, whose routes have one key, and returns logits.

    deterministic: a row's bits do not depend on its neighbours; None: as the model was made.
    own_executor: with buffers and graphs that no other user of the model takes away.
    reads_late: whether the host may read a decode step's tokens while the next one runs, as it does on a GPU.
    """

    def __init__(
        self,
        model: CausalLM,
        executor: ExecutorName,
        deterministic: bool | None = None,
        own_executor: bool = False,
    ) -> None:
        self.model = model
        self.deterministic = model.deterministic if deterministic is None else deterministic
        self._device = model.device  # that of the cache: it is asked for in every step
        self.reads_late = self._device.type == "cuda"
        self._executor_name = executor
        self.executor = model.executor(executor)
        if own_executor or self.deterministic != model.deterministic:
            self.executor = model.new_executor(executor, self.deterministic)
        self._spent = NO_CALLS
        self._decode: tuple[list[OutputSequence], list[int], Step] | None = None

    @property
    def native_steps(self) -> NativeSteps | None:
        """What makes a step one native call; None where none does."""
        return self.executor.native_steps if isinstance(self.executor, CompactExecutor) else None

    def newly_spent(self) -> CallTimes:
        """What native calls have taken since this was asked for last; zeros unless `NativeSteps.is_timed`."""
        steps = self.native_steps
        if steps is None or not steps.is_timed:
            return NO_CALLS
        before, self._spent = self._spent, CallTimes(*steps.times_s)
        return self._spent - before

    def prompt(self, spans: Sequence[Span], cache: Cache) -> Predictions:
        """What follows the last token of each span: all begin their sequences, or none does.

        Sequences that lack log-probabilities of their prompts get them.
        """
        step = self._spans_step(spans, [span.sequence.state.cache_id for span in spans], is_prompt=True)
        last_rows = torch.tensor([span.num_tokens for span in spans]).cumsum(0) - 1
        last_rows = to_device(last_rows, self.model.device)
        if not any(span.sequence.lacks_prompt_logprobs for span in spans):
            return self.executor.predict(step, cache, last_rows)
        states, head = self.executor.run(step, cache), self.executor.head
        for span, own in zip(spans, torch.split(states, [span.num_tokens for span in spans]), strict=True):
            if span.sequence.lacks_prompt_logprobs:
                add_prompt_logprobs(span, own, head, self.model.decoder_config.vocab_size)
        return Predictions(head(states[last_rows]))

    def decode(self, spans: Sequence[Span], cache: Cache, in_flight: TokensInFlight | None = None) -> Predictions:
        """What follows each token of ``spans``, row by row; the next step may overwrite it.

        in_flight: holds the tokens of those spans whose tokens the host does not know.
        """
        # A device that reads late chooses behind the step.
        choices = None if self.reads_late else choices_of(spans)
        if all(span.num_tokens == 1 for span in spans):
            return self.executor.predict(self.decode_step(spans, in_flight), cache, choices=choices)
        tokens = [sequence.tokens(first, count) for sequence, first, count in spans]
        firsts, ids = [span.first for span in spans], [span.sequence.state.cache_id for span in spans]
        paths = [span.sequence.route.layers for span in spans]
        begun = [span.sequence.begun for span in spans]
        step = rows_step(tokens, firsts, ids, paths, self.model.device, begun=begun)
        return self.executor.predict(step, cache, choices=choices)

    @torch.no_grad()
    def guess(self, turns: Turns, cache: Cache) -> Guesses:
        """See `Executor.guess`."""
        return self.executor.guess(turns, cache)

    @torch.no_grad()
    def prefill_draft(self, tokens: list[int], place: tuple[int, int], path: LayerPath, cache: Cache) -> None:
        """Leave the entries of ``tokens`` along ``path`` in ``cache``.

        place: the position of the first of them, and their sequence in the cache.
        """
        step = rows_step([tokens], place[:1], place[1:], [path], self.model.device, decode=False)
        self.executor.run(step, cache)

    def decode_step(self, spans: Sequence[Span], in_flight: TokensInFlight | None = None) -> Step:
        """The decode step of ``spans``; its plan is kept while they and their paths stay the same."""
        sequences = [span.sequence for span in spans]
        cache_ids = [sequence.state.cache_id for sequence in sequences]
        firsts = [span.first for span in spans]
        if in_flight is None:
            tokens = [*map(OutputSequence.token_at, sequences, firsts)]
            token_ids, position_ids = columns_to_device((tokens, firsts), self._device)
        else:
            token_ids, position_ids = in_flight.inputs(spans)
        route, known = sequences[0].route, self._decode
        if known is not None and known[:2] == (sequences, cache_ids) and isinstance(route, PathRoute):
            old = known[2]
            return Step(token_ids, position_ids, old.cache_ids, old.plan, decode=True)
        routes = [sequence.route for sequence in sequences]
        plan = route.plan(routes, StepTokens(tuple(firsts), (1,) * len(spans), is_prompt=False))
        (places,) = columns_to_device((cache_ids,), self._device)
        step = Step(token_ids, position_ids, places, plan, decode=True)
        self._decode = (sequences, cache_ids, step)
        return step

    def forget(self) -> None:
        """Plan the next step anew, even where its sequences stay the same."""
        self._decode = None

    @torch.no_grad()
    def run_alone(self, sequence: OutputSequence, on_layer: Callable[[int, Tensor], None]) -> tuple[Tensor, Tensor]:
        """[N, C] and [1, V]: the last layer's output, and the logits after the last token, of ``sequence`` run again.

        Prompt and output, each in one step, in a cache and by an executor of their own: no other sequence is touched.
        on_layer: as in `Executor.run`, of both steps.
        """
        executor = self.model.new_executor(self._executor_name, self.deterministic)
        num_prompt, num_tokens = len(sequence.prompt_ids), sequence.num_tokens
        cache = executor.new_cache(1, num_tokens, sequence.route.num_entries(num_tokens))
        spans = [Span(sequence, 0, num_prompt), Span(sequence, num_prompt, num_tokens - num_prompt)]
        for span in spans:
            if span.num_tokens:
                step = self._spans_step([span], [0], is_prompt=span.first == 0)
                hidden_states = executor.run(step, cache, on_layer)
        return hidden_states, executor.head(hidden_states[-1:])

    def _spans_step(self, spans: Sequence[Span], cache_ids: Sequence[int], is_prompt: bool) -> Step:
        counts = tuple(span.num_tokens for span in spans)
        firsts = tuple(span.first for span in spans)
        tokens = [token for span in spans for token in span.sequence.tokens(span.first, span.num_tokens)]
        positions = packed_positions(counts, torch.device("cpu"))
        if any(firsts):
            positions += torch.from_numpy(np.repeat(np.array(firsts), counts))
        routes = [span.sequence.route for span in spans]
        device = self.model.device
        token_ids, position_ids = to_device(torch.stack([torch.tensor(tokens), positions]), device)
        plan = routes[0].plan(routes, StepTokens(firsts, counts, is_prompt=is_prompt))
        return Step(token_ids, position_ids, to_device(torch.tensor(cache_ids), device), plan, fresh=not any(firsts))
