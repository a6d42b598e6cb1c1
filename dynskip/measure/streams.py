"""Streams of requests through the engine, timed in turns: what disturbs one policy disturbs all."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, Protocol

import torch

from dynskip.causal_lm import CausalLM
from dynskip.costs.step_costs import StepCosts
from dynskip.engine.engine import Engine
from dynskip.execution.kv_cache import KVCache
from dynskip.execution.slot_pool import by_numpy
from dynskip.sampling import SamplingParams
from dynskip.scheduler.outcome import NO_CALLS, Outcome
from dynskip.simulation.workload import Request

# One turn of a competitor.
TURN_S = 0.25


class Competitor(Protocol):
    """Somebody who serves the requests, a little at a time."""

    name: str

    @property
    def progress(self) -> float:
        """Which share of the tokens is there."""
        ...

    def advance(self) -> None:
        """Go on for a little while."""
        ...


@dataclass(frozen=True)
class Job:
    """A request with its prompt; ``request.num_output`` tokens are generated, whatever they are."""

    prompt_ids: list[int]
    request: Request

    @property
    def params(self) -> SamplingParams:
        """Greedy, and no end before the last token."""
        return SamplingParams(max_tokens=self.request.num_output, ignore_eos=True)


class Served:
    """The engine under one policy, with all requests there at the beginning.

    All memory of keys and values is written once before, as by requests of an hour ago: new pages take longer than what
    is stored there, and a policy that keeps more requests has more of them.

    times_calls: whether the engine's tally tells what of its seconds native calls have taken in products, in attention
    and in the rest. token_ids: the outputs of those that have ended, by their numbers.
    """

    def __init__(
        self,
        name: str,
        model: CausalLM,
        jobs: Sequence[Job],
        costs: StepCosts,
        turn_s: float = TURN_S,
        times_calls: bool = False,
        **options: Any,
    ) -> None:
        self.name = name
        self._turn_s = turn_s
        longest = max(len(job.prompt_ids) + job.request.num_output for job in jobs)
        self._own_s = 0.0
        self._begin_s: float | None = None
        self.engine = Engine(model, costs=costs, max_context_len=longest, clock=self._clock, **options)
        if times_calls and self.engine.runner.native_steps is not None:
            self.engine.runner.native_steps.is_timed = True
        cache = self.engine.kv.cache
        assert isinstance(cache, KVCache), "of the executor that engines have unless they are told another"
        for entries in (cache.k_cache, cache.v_cache):
            if by_numpy(entries.device):  # PyTorch's threads would spin for the first milliseconds that are timed
                entries.view(torch.uint8).numpy().fill(0)
            else:
                entries.zero_()
        self.num_tokens = sum(job.request.num_output for job in jobs)
        self.token_ids: dict[Hashable, list[int]] = {}
        for job in jobs:
            self.engine.add_request(job.prompt_ids, job.params, job.request.path)

    @property
    def progress(self) -> float:
        """Which share of the tokens is there."""
        return self.engine.tally.num_tokens / self.num_tokens

    def advance(self) -> None:
        """A turn's steps."""
        self._begin_s = time.perf_counter()
        while self.engine.has_unfinished and time.perf_counter() < self._begin_s + self._turn_s:
            for output in self.engine.step():
                assert output.finish_reason == "length", output
                self.token_ids[output.request_id] = output.token_ids
        self._own_s += time.perf_counter() - self._begin_s
        self._begin_s = None

    def _clock(self) -> float:
        """Seconds of its own turns: it stands while others have theirs."""
        return self._own_s + (0.0 if self._begin_s is None else time.perf_counter() - self._begin_s)

    @property
    def outcome(self) -> Outcome:
        """What it came to."""
        return self.engine.stats().outcome

    @property
    def parts_s(self) -> dict[str, dict[str, float]]:
        """Seconds of prefills and of decode steps by part: those of `CallTimes`, and what is outside of calls.

        Without parts where calls are not timed.
        """
        tally = self.engine.tally
        found = {}
        for phase, whole_s, calls in (
            ("prefill", tally.prefill_s, tally.prefill_calls),
            ("decode", tally.decode_s, tally.decode_calls),
        ):
            if calls != NO_CALLS:
                found[phase] = {**asdict(calls), "outside_s": whole_s - sum(astuple(calls))}
        return found


def take_turns(competitors: Sequence[Competitor], on_turn: Callable[[], None] | None = None) -> None:
    """Let whoever is furthest behind go on, until all are done; ``on_turn`` is called after each turn."""
    while True:
        left = [competitor for competitor in competitors if competitor.progress < 1]
        if not left:
            return
        min(left, key=lambda competitor: competitor.progress).advance()
        if on_turn is not None:
            on_turn()
