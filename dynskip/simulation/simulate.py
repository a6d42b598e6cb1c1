"""The scheduler against a simulated clock: what a stream of requests would take on a device of known costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from dynskip.costs.step_costs import StepCosts
from dynskip.paths import LayerPath
from dynskip.scheduler.kv_budget import KVBudget
from dynskip.scheduler.outcome import Outcome, Tally
from dynskip.scheduler.policies.make import make_policy
from dynskip.scheduler.scheduler import Decision, Scheduler
from dynskip.scheduler.sequence import SequenceState
from dynskip.simulation.workload import Request

UNLIMITED_SLOTS = 2**62
MAX_ENGINES = 1024
_num_cached = attrgetter("num_cached")


@dataclass(frozen=True)
class EngineOptions:
    """How the engines of a simulation are set up; see `make_policy` and `Scheduler`."""

    policy: str = "cohort"
    batch: int = 16
    pool: int | None = None
    max_wait: int | None = None
    kv_slots: int = UNLIMITED_SLOTS
    page_size: int = 16
    max_prefill_tokens: int = 2048

    def scheduler(self, costs: StepCosts) -> Scheduler:
        """A scheduler set up so."""
        policy = make_policy(self.policy, costs, self.batch, self.pool, self.max_wait)
        return Scheduler(policy, KVBudget(self.kv_slots, self.page_size), self.max_prefill_tokens)


class SimulatedEngine:
    """Carries out what a scheduler decides by adding up what it would take.

    A step takes the time of its prefill and of its decode rows, one after the other; its tokens are there at its end.
    clock_s: the time at the end of the last step. work_ms: decode time of the requests it holds, in ideal batches and
    at the mean length of those that have ended.
    """

    def __init__(self, costs: StepCosts, options: EngineOptions) -> None:
        self.costs = costs
        self.scheduler = options.scheduler(costs)
        self.clock_s = 0.0
        self.tally = Tally()
        self.num_of_path: dict[LayerPath, int] = {}
        self.work_ms = 0.0
        self._batch = options.batch
        self._row_ms: dict[LayerPath, float] = {}
        self._num_added = 0
        self._admitted_s: dict[SequenceState, float] = {}
        self._first_s: dict[SequenceState, float] = {}

    def add(self, request: Request) -> None:
        """Let ``request`` wait."""
        sequence = SequenceState(
            self._num_added, request.path, request.num_prompt, request.num_output, request.arrival_s
        )
        self.scheduler.add(sequence)
        if self.tally.first_s is None:
            self.tally.first_s = request.arrival_s
        self._num_added += 1
        self.num_of_path[request.path] = self.num_of_path.get(request.path, 0) + 1
        self.work_ms += self.row_ms(request.path)

    def row_ms(self, path: LayerPath) -> float:
        """What a row of ``path`` costs in an ideal batch."""
        if path not in self._row_ms:
            self._row_ms[path] = self.costs.path_ms(path, self._batch) / self._batch
        return self._row_ms[path]

    def run_until(self, time_s: float) -> None:
        """Step until the clock has reached ``time_s`` or nothing is left; an idle clock is put forward to it."""
        while self.clock_s < time_s and self.scheduler.has_unfinished:
            self.step()
        if not self.scheduler.has_unfinished and time_s < float("inf"):
            self.clock_s = max(self.clock_s, time_s)

    def step(self) -> None:
        """One step."""
        begin_s = self.clock_s
        decision = self.scheduler.schedule()
        assert not decision.is_empty or decision.preempt, "a scheduler with requests finds something to do"
        prefill_ms = self._prefill_ms(decision)
        decode_ms = self._decode_ms(decision)
        tally = self.tally
        tally.num_steps += 1
        tally.prefill_s += prefill_ms / 1e3
        tally.decode_s += decode_ms / 1e3
        self.clock_s = begin_s + (prefill_ms + decode_ms) / 1e3
        for chunk in decision.prefill:
            sequence = chunk.sequence
            if chunk.first == 0:
                self._admitted_s.setdefault(sequence, begin_s)
            if chunk.is_last:
                tally.num_tokens += 1
                # Prompts run before decode rows: as in the engine, their tokens are there before the step ends.
                self._first_s.setdefault(sequence, begin_s + prefill_ms / 1e3)
                if sequence.num_generated >= sequence.max_tokens:
                    self._finish(sequence)
        for _, sequences in decision.parts:
            for sequence in sequences:
                if sequence.num_generated >= sequence.max_tokens:
                    self._finish(sequence)

    def close(self) -> Tally:
        """The tally, with what the scheduler counted."""
        counters = self.scheduler.counters
        self.tally.num_preempted = counters.num_preempted
        self.tally.longest_wait = counters.longest_wait
        self.tally.peak_kv_slots = self.scheduler.kv.peak_used
        return self.tally

    def _prefill_ms(self, decision: Decision) -> float:
        if not decision.prefill:
            return 0.0
        self.tally.num_prefills += 1
        tokens: dict[LayerPath, int] = {}
        for chunk in decision.prefill:
            path = chunk.sequence.path
            tokens[path] = tokens.get(path, 0) + chunk.num_tokens
        return self.costs.prefill_ms(list(tokens.items()), sum(chunk.is_last for chunk in decision.prefill))

    def _decode_ms(self, decision: Decision) -> float:
        if not decision.parts:
            return 0.0
        tally = self.tally
        union = num_entries = num_rows = 0
        cohort = []
        for group, sequences in decision.parts:
            count, budget = len(sequences), group.path.budget
            cohort.append((group.path, count))
            num_entries += budget * sum(map(_num_cached, sequences))
            num_rows += count
            tally.num_row_layers += count * budget
            union |= group.mask
        tally.num_decode_steps += 1
        tally.num_rows += num_rows
        tally.num_tokens += num_rows
        tally.num_paths += len(cohort)
        tally.num_union_layers += union.bit_count()
        return self.costs.decode_ms(cohort, num_entries)

    def _finish(self, sequence: SequenceState) -> None:
        tally = self.tally
        tally.num_requests += 1
        first_s = self._first_s.pop(sequence)
        tally.ttft_s.append(first_s - sequence.arrival_s)
        tally.queue_s.append(self._admitted_s.pop(sequence) - sequence.arrival_s)
        if sequence.num_generated > 1:
            tally.tpot_s.append((self.clock_s - first_s) / (sequence.num_generated - 1))
        tally.last_s = self.clock_s
        self.num_of_path[sequence.path] -= 1
        self.work_ms -= self.row_ms(sequence.path)
        self.scheduler.finished(sequence.owner)


# From the engines and a request to one of them.
Choose = Callable[[Sequence[SimulatedEngine], Request], SimulatedEngine]


def check_engines(num_engines: int) -> None:
    """Raise ValueError where so many engines cannot be simulated."""
    if num_engines < 1:
        raise ValueError(f"simulate: num_engines must be at least 1, got {num_engines}.")
    if num_engines > MAX_ENGINES:
        raise ValueError(f"simulate: num_engines must be at most {MAX_ENGINES}, got {num_engines}.")


def simulate(
    costs: StepCosts,
    requests: Sequence[Request],
    options: EngineOptions,
    num_engines: int = 1,
    on_request: Callable[[], None] | None = None,
    choose: Choose | None = None,
) -> Outcome:
    """What ``num_engines`` engines make of ``requests``, which come in the order of arrival.

    A request goes to an engine when it arrives, by ``choose``; without one, among those with about the least work, to
    the one that has most requests of its path. on_request: called when a request arrives.
    """
    check_engines(num_engines)
    choose = least_work_then_path if choose is None else choose
    engines = [SimulatedEngine(costs, options) for _ in range(num_engines)]
    for request in requests:
        for engine in engines:
            engine.run_until(request.arrival_s)
        choose(engines, request).add(request)
        if on_request is not None:
            on_request()
    for engine in engines:
        engine.run_until(float("inf"))
    return Outcome.of([engine.close() for engine in engines])


def least_work_then_path(engines: Sequence[SimulatedEngine], request: Request) -> SimulatedEngine:
    """Where to send a request: a batch of its path more or less makes no difference to what counts as least work."""
    if len(engines) == 1:
        return engines[0]
    path = request.path
    limit = min(engine.work_ms for engine in engines) + engines[0].costs.path_ms(
        path, engines[0].scheduler.policy.batch
    )
    near = [engine for engine in engines if engine.work_ms <= limit]
    return max(near, key=lambda engine: (engine.num_of_path.get(path, 0), -engine.work_ms))
