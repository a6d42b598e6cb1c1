"""Runs the tokens that the scheduler has chosen through the model: from sequences to logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynskip.engine.request import OutputSequence
from dynskip.executor import CompactExecutor
from dynskip.kv_cache import KVCache
from dynskip.model import ExecutorName, OPTForCausalLM
from dynskip.reference_executor import ReferenceCache
from dynskip.routing import PathRoute, StepTokens
from dynskip.step import Step, packed_positions


class Span(NamedTuple):
    """``num_tokens`` tokens of a sequence from its token ``first`` on, whose predecessors are in the cache."""

    sequence: OutputSequence
    first: int
    num_tokens: int


class StepRunner:
    """Runs spans of sequences, whose routes have one key, and returns logits.

    deterministic: a row's bits do not depend on its neighbours; None: as the model was made.
    alone: with an executor of its own, whose buffers and graphs no other user of the model takes away.
    """

    def __init__(
        self, model: OPTForCausalLM, executor: ExecutorName, deterministic: bool | None = None, alone: bool = False
    ) -> None:
        self.model = model
        self.deterministic = model.deterministic if deterministic is None else deterministic
        self.executor: Any = model.executor(executor)  # with caches of its own kind
        if executor == "compact" and (alone or self.deterministic != model.deterministic):
            self.executor = CompactExecutor(model.model.decoder, model.lm_head, model.backend, self.deterministic)
        self._decode: tuple[list[tuple[OutputSequence, int]], Step] | None = None

    def prompt(self, spans: Sequence[Span], cache: KVCache | ReferenceCache) -> Tensor:
        """[B, V]: the logits of the last token of each span: all begin their sequences, or none does."""
        counts = tuple(span.num_tokens for span in spans)
        firsts = tuple(span.first for span in spans)
        device = self.model.device
        tokens = [token for span in spans for token in span.sequence.tokens(span.first, span.num_tokens)]
        positions = packed_positions(counts, torch.device("cpu"))
        if any(firsts):
            positions += torch.tensor(firsts).repeat_interleave(torch.tensor(counts))
        routes = [span.sequence.route for span in spans]
        step = Step(
            torch.tensor(tokens, dtype=torch.int64).to(device),
            positions.to(device),
            torch.tensor([span.sequence.state.cache_id for span in spans], device=device),
            routes[0].plan(routes, StepTokens(firsts, counts, is_prompt=True)),
            fresh=not any(firsts),
        )
        hidden_states = self.executor.run(step, cache)
        last_rows = torch.tensor(counts, device=device).cumsum(0) - 1
        return self._head(hidden_states[last_rows])

    def decode(self, spans: Sequence[Span], cache: KVCache | ReferenceCache) -> Tensor:
        """[B, V]: the logits of spans of one token each; the next step may overwrite them."""
        step = self.decode_step(spans)
        if isinstance(self.executor, CompactExecutor):
            assert isinstance(cache, KVCache), "each executor makes its own cache"
            logits = self.executor.logits(step, cache)
            if logits is not None:
                return logits
        return self._head(self.executor.run(step, cache))

    def decode_step(self, spans: Sequence[Span]) -> Step:
        """The decode step of ``spans``; its plan is kept while they and their paths stay the same."""
        places = [(span.sequence, span.sequence.state.cache_id) for span in spans]
        device = self.model.device
        token_ids = torch.tensor([span.sequence.tokens(span.first, 1)[0] for span in spans], device=device)
        firsts = [span.first for span in spans]
        position_ids = torch.tensor(firsts, device=device)
        routes = [sequence.route for sequence, _ in places]
        if self._decode is not None and self._decode[0] == places and isinstance(routes[0], PathRoute):
            old = self._decode[1]
            return Step(token_ids, position_ids, old.cache_ids, old.plan, decode=True)
        plan = routes[0].plan(routes, StepTokens(tuple(firsts), (1,) * len(spans), is_prompt=False))
        cache_ids = torch.tensor([cache_id for _, cache_id in places], device=device)
        step = Step(token_ids, position_ids, cache_ids, plan, decode=True)
        self._decode = (places, step)
        return step

    def forget(self) -> None:
        """Plan the next step anew, whoever takes part in it."""
        self._decode = None

    def _head(self, hidden_states: Tensor) -> Tensor:
        if not isinstance(self.executor, CompactExecutor):
            return self.model.head(hidden_states, "reference")
        finished = self.model.model.decoder.finish(hidden_states, self.deterministic)
        return self.model.lm_head(finished, deterministic=self.deterministic)
