"""The scheduler of the engine: nobody is lost, nobody waits too long, memory is never over-committed."""

from __future__ import annotations

import random
from collections import deque
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dynskip.costs.layer_costs import Curve, LayerCosts
from dynskip.costs.step_costs import StepCosts
from dynskip.paths import LayerPath
from dynskip.scheduler.kv_budget import KVBudget
from dynskip.scheduler.policies.by_path import ByPath
from dynskip.scheduler.policies.cohort import Cohort
from dynskip.scheduler.policies.make import POLICIES, make_policy
from dynskip.scheduler.policies.path_sets import MAX_ANCHORS, MAX_CANDIDATES, MAX_EXACT
from dynskip.scheduler.policies.policy import Lockstep, Policy
from dynskip.scheduler.scheduler import Decision, Scheduler
from dynskip.scheduler.sequence import SequenceState, Status

NUM_LAYERS = 6
PATHS = [
    LayerPath.uniform(NUM_LAYERS, 1),
    LayerPath.uniform(NUM_LAYERS, 2),
    LayerPath.of(NUM_LAYERS, [1, 4]),
    LayerPath.early_exit(NUM_LAYERS, 3),
    LayerPath.uniform(NUM_LAYERS, 3),
    LayerPath.random(NUM_LAYERS, 4, seed=0),
    LayerPath.of(NUM_LAYERS, [], allow_empty=True),
    LayerPath.full(NUM_LAYERS),
]


def costs(knee: int = 4, num_layers: int = NUM_LAYERS) -> StepCosts:
    """A layer takes 1 ms up to ``knee`` rows, then in proportion; the head half of that."""
    layer = Curve((knee, knee + 1, 3 * knee), (1.0, 1.0 + 1 / knee, 3.0))
    head = Curve((knee, knee + 1, 3 * knee), (0.5, 0.5 + 0.5 / knee, 1.5))
    both = LayerCosts(layer, head, 1e-4)
    return StepCosts(num_layers, both, both)


class Ledger:
    """Carries decisions out with a memory of its own, and complains about all that cannot be carried out."""

    def __init__(self, scheduler: Scheduler, max_wait: int | None) -> None:
        self.scheduler = scheduler
        self.max_wait = max_wait
        self.cached: dict[Any, int] = {}  # tokens whose keys and values are stored, by request
        self.outputs: dict[Any, int] = {}  # tokens of every request that has not ended
        self.last_step: dict[Any, int] = {}
        self.admissions: list[SequenceState] = []
        self.num_preempted = 0

    def add(self, sequence: SequenceState) -> None:
        self.scheduler.add(sequence)
        self.outputs[sequence.owner] = 0

    def step(self) -> Decision:
        decision = self.scheduler.schedule()
        for sequence in decision.preempt:
            self.num_preempted += 1
            del self.cached[sequence.owner]
            self.last_step.pop(sequence.owner, None)
            assert sequence.status is Status.WAITING
        decoding = [sequence.owner for sequence in decision.decode]
        prefilling = [chunk.sequence.owner for chunk in decision.prefill]
        assert len(set(decoding + prefilling)) == len(decoding) + len(prefilling), "somebody steps twice"
        assert len(decoding) <= self.scheduler.policy.batch
        assert sum(chunk.num_tokens for chunk in decision.prefill) <= self.scheduler.max_prefill_tokens
        for group, sequences in decision.parts:
            assert sequences
            for sequence in sequences:
                assert sequence.path == group.path
                # Everything but the last token has been run.
                known = sequence.num_prompt_tokens + self.outputs[sequence.owner]
                assert self.cached[sequence.owner] == known - 1
                self.cached[sequence.owner] += 1
                self._got_token(sequence)
        for chunk in decision.prefill:
            sequence = chunk.sequence
            if chunk.first == 0:
                assert sequence.owner not in self.cached
                self.admissions.append(sequence)
            assert self.cached.get(sequence.owner, 0) == chunk.first, "a chunk begins where the last one ended"
            assert chunk.num_tokens > 0
            self.cached[sequence.owner] = chunk.first + chunk.num_tokens
            known = sequence.num_prompt_tokens + self.outputs[sequence.owner]
            assert self.cached[sequence.owner] <= known
            assert chunk.is_last == (self.cached[sequence.owner] == known)
            if chunk.is_last:
                self._got_token(sequence)
        if self.max_wait is not None:
            waits = {request: decision.step - step for request, step in self.last_step.items()}
            assert all(wait < self.max_wait for wait in waits.values()), waits
        for request in [*decoding, *prefilling]:
            sequence = self.scheduler.sequence(request)
            assert sequence.num_generated == self.outputs[request]
            if sequence.num_generated >= sequence.max_tokens:
                self.end(request, aborted=False)
        return decision

    def end(self, request: Any, aborted: bool) -> None:
        (self.scheduler.abort if aborted else self.scheduler.finished)(request)
        self.cached.pop(request, None)
        self.last_step.pop(request, None)
        del self.outputs[request]

    def check(self) -> None:
        """What the scheduler counts is what is there."""
        scheduler, page = self.scheduler, self.scheduler.kv.page_size
        held = 0
        for request in self.cached:
            sequence = scheduler.sequence(request)
            # A prompt that runs in chunks has its whole room from the start.
            tokens = sequence.num_tokens if sequence.status is Status.PREFILLING else self.cached[request]
            assert sequence.kv_entries() == dict.fromkeys(sequence.path.layers, tokens)
            held += -(-tokens // page) * page * sequence.path.budget
        assert held == scheduler.kv.num_used <= scheduler.kv.num_slots
        assert scheduler.groups.num_resident == len(self.cached) <= scheduler.policy.pool
        assert scheduler.groups.num_waiting == len(self.outputs) - len(self.cached)
        assert scheduler.has_unfinished == bool(self.outputs)
        counters = scheduler.counters
        assert counters.num_added - counters.num_finished - counters.num_aborted == len(self.outputs)
        assert counters.num_preempted == self.num_preempted

    def drain(self, limit: int) -> None:
        """Step until all have ended, within ``limit`` steps."""
        for _ in range(limit):
            if not self.scheduler.has_unfinished:
                return
            decision = self.step()
            assert not decision.is_empty or decision.preempt, "nothing runs although requests are there"
            self.check()
        raise AssertionError(f"{len(self.outputs)} requests are left after {limit} steps")

    def _got_token(self, sequence: SequenceState) -> None:
        self.outputs[sequence.owner] += 1
        last = self.last_step.get(sequence.owner)
        if last is not None and self.max_wait is not None:
            assert self.scheduler.step - last <= self.max_wait, "somebody waited for too long"
        self.last_step[sequence.owner] = self.scheduler.step


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests, steps, aborts and stops under every policy, with memory that often runs out."""

    @initialize(
        name=st.sampled_from(POLICIES),
        batch=st.integers(1, 6),
        factor=st.integers(1, 5),
        patience=st.integers(0, 6),
        knee=st.sampled_from([1, 4, 64]),
        capacity=st.integers(192, 500),
        page=st.sampled_from([1, 4]),
        chunk=st.sampled_from([1, 3, 8, 100]),
    )
    def begin(
        self, name: str, batch: int, factor: int, patience: int, knee: int, capacity: int, page: int, chunk: int
    ) -> None:
        max_wait: int | None = None
        policy: Policy
        if name == "cohort":
            max_wait = factor + patience
            policy = Cohort(costs(knee), batch, factor * batch, max_wait, max_overtaken=3 * batch)
        else:
            policy = make_policy(name, costs(knee), batch)
            max_wait = 1  # all that is resident steps
        self.ledger = Ledger(Scheduler(policy, KVBudget(capacity, page), chunk), max_wait)
        self.num_requests = 0

    @rule(path=st.sampled_from(PATHS), prompt=st.integers(1, 6), output=st.integers(1, 24), copies=st.integers(1, 6))
    def add(self, path: LayerPath, prompt: int, output: int, copies: int) -> None:
        for _ in range(copies):
            self.ledger.add(SequenceState(self.num_requests, path, prompt, output))
            self.num_requests += 1

    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.ledger.step()
            self.ledger.check()

    @precondition(lambda self: self.ledger.outputs)
    @rule(pick=st.integers(0, 10**6), aborted=st.booleans())
    def end(self, pick: int, aborted: bool) -> None:
        requests = list(self.ledger.outputs) if aborted else [r for r, n in self.ledger.outputs.items() if n]
        if requests:
            self.ledger.end(requests[pick % len(requests)], aborted)

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.check()

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.drain(limit=80 * self.num_requests + 80)
            assert self.ledger.scheduler.kv.num_used == 0
            assert not list(self.ledger.scheduler.groups.resident)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=150, stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow], deadline=None
)


def random_ledger(
    policy: Policy, num_requests: int, capacity: int, max_wait: int | None, max_output: int = 12
) -> Ledger:
    """A ledger whose queue holds random requests of a few paths."""
    draw = random.Random(0)
    ledger = Ledger(Scheduler(policy, KVBudget(capacity, 2), 16), max_wait)
    for request in range(num_requests):
        path = draw.choices([PATHS[0], PATHS[1], PATHS[4], PATHS[7]], [74, 18, 6, 2])[0]
        ledger.add(SequenceState(request, path, draw.randint(1, 8), draw.randint(1, max_output)))
    return ledger


@pytest.mark.parametrize("name", POLICIES)
def test_memory_that_runs_out_preempts_often_and_loses_nobody(name: str) -> None:
    policy = make_policy(name, costs(), 8)
    ledger = random_ledger(policy, 300, 300, policy.max_wait if isinstance(policy, Cohort) else 1, 40)
    ledger.drain(20_000)
    assert ledger.scheduler.counters.num_finished == 300
    assert ledger.num_preempted > 15
    assert ledger.scheduler.kv.peak_used > 290


def test_the_youngest_goes_and_nobody_else() -> None:
    ledger = random_ledger(make_policy("cohort", costs(), 4), 100, 300, None, 40)
    for _ in range(200):
        residents = {r: ledger.scheduler.sequence(r) for r in ledger.cached}
        decision = ledger.step()
        if decision.preempt:
            youngest = sorted((s.order for s in residents.values()), reverse=True)[: len(decision.preempt)]
            assert [sequence.order for sequence in decision.preempt] == youngest
            assert not any(chunk.first == 0 for chunk in decision.prefill), "nobody joins while memory is short"
    assert ledger.num_preempted


def test_a_preempted_sequence_prefills_prompt_and_output() -> None:
    scheduler = Scheduler(Lockstep(2), KVBudget(20))
    first, second = (SequenceState(name, LayerPath.full(2), 3, 6) for name in "ab")
    scheduler.add(first)
    scheduler.add(second)
    decisions = [scheduler.schedule() for _ in range(4)]
    assert [len(decision.decode) for decision in decisions] == [0, 2, 2, 1]
    assert decisions[3].preempt == [second]
    assert second.num_generated == 3 and second.num_cached == 0 and second.num_preemptions == 1
    scheduler.finished("a")
    (chunk,) = scheduler.schedule().prefill
    assert (chunk.sequence, chunk.first, chunk.num_tokens, chunk.is_last) == (second, 0, 6, True)
    assert second.num_generated == 4 and second.num_cached == 6


@pytest.mark.parametrize("name", POLICIES)
def test_requests_of_one_path_are_admitted_in_the_order_of_arrival(name: str) -> None:
    ledger = random_ledger(make_policy(name, costs(), 4), 200, 10_000, None)
    ledger.drain(5_000)
    for path in {sequence.path for sequence in ledger.admissions}:
        orders = [sequence.order for sequence in ledger.admissions if sequence.path == path]
        assert orders == sorted(orders)


@pytest.mark.parametrize("max_overtaken", [0, 5, 40])
@pytest.mark.parametrize("name", ["cohort", "by_path"])
def test_the_oldest_request_is_overtaken_by_so_many_at_most(name: str, max_overtaken: int) -> None:
    policy = (
        Cohort(costs(), 4, 16, max_overtaken=max_overtaken)
        if name == "cohort"
        else ByPath(4, max_overtaken=max_overtaken)
    )
    ledger = random_ledger(policy, 300, 10_000, None)
    ledger.drain(5_000)
    waiting = deque(range(300))
    overtaken = most = 0
    for sequence in ledger.admissions:
        if sequence.order == waiting[0]:
            overtaken = 0
        else:
            overtaken += 1
            most = max(most, overtaken)
        waiting.remove(sequence.order)
    assert most <= max_overtaken
    assert most or not max_overtaken, "the bound was never put to the test"


def test_lockstep_is_first_come_first_served() -> None:
    ledger = random_ledger(Lockstep(4), 100, 10_000, 1)
    ledger.drain(5_000)
    assert [sequence.order for sequence in ledger.admissions] == list(range(100))


def test_by_path_never_mixes_paths() -> None:
    ledger = random_ledger(ByPath(4), 200, 10_000, 1)
    while ledger.scheduler.has_unfinished:
        decision = ledger.step()
        assert len({s.path for s in decision.decode} | {chunk.sequence.path for chunk in decision.prefill}) <= 1


@pytest.mark.parametrize("max_wait", [4, 5, 8, 32])
def test_the_bound_on_waiting_is_reached_and_never_exceeded(max_wait: int) -> None:
    # One sequence through all layers is worth the least that can be: it steps when it has to.
    ledger = Ledger(Scheduler(Cohort(costs(), 4, 16, max_wait), KVBudget(10_000)), max_wait)
    for request in range(400):
        ledger.add(SequenceState(request, PATHS[0] if request else PATHS[7], 2, 9))
    steps = []
    while ledger.scheduler.has_unfinished:
        decision = ledger.step()
        steps += [decision.step for sequence in decision.decode if sequence.owner == 0]
    waits = [after - before for before, after in pairwise(steps)]
    assert max(waits) == max_wait


def test_what_memory_allows_in_bytes_a_shallow_path_makes_longer() -> None:
    def num_resident(path: LayerPath) -> int:
        scheduler = Scheduler(make_policy("cohort", costs(), 64), KVBudget(960))
        for request in range(200):
            scheduler.add(SequenceState(request, path, 9, 4))
        scheduler.schedule()
        return scheduler.groups.num_resident

    assert num_resident(PATHS[7]) == 16
    assert num_resident(PATHS[1]) == 48


def test_a_decision_costs_no_more_where_more_requests_wait() -> None:
    def evaluations(num_waiting: int, num_paths: int, num_steps: int = 50) -> tuple[int, int]:
        """How many sets were tried, at most in one step and in all."""
        policy = Cohort(costs(num_layers=24), 16, 64)
        scheduler = Scheduler(policy, KVBudget(10**9))
        for request in range(64 + num_waiting):
            scheduler.add(SequenceState(request, LayerPath.random(24, 6, request % num_paths), 2, 10**6))
        scheduler.schedule()
        most, before = 0, policy.sets.num_evaluated
        start = before
        for _ in range(num_steps):
            scheduler.schedule()
            most, before = max(most, policy.sets.num_evaluated - before), policy.sets.num_evaluated
        return most, before - start

    assert evaluations(10, 4) == evaluations(5_000, 4)
    most, total = evaluations(10, 4)
    assert most <= 2**MAX_EXACT - 1 + 8 and total <= most, "what was tried once is remembered"
    for num_paths in (8, 64):
        most, _ = evaluations(100, num_paths)
        assert most <= MAX_ANCHORS * (1 + MAX_CANDIDATES) + 2 * num_paths


def test_the_deepest_rows_come_first_where_a_set_exceeds_the_batch() -> None:
    scheduler = Scheduler(Cohort(costs(knee=64), 4, 16, max_wait=1000), KVBudget(10_000))
    for request, path in enumerate([PATHS[7]] * 3 + [PATHS[4]] * 3):
        scheduler.add(SequenceState(request, path, 2, 50))
    scheduler.schedule()
    counts = [(group.path, len(rows)) for group, rows in scheduler.schedule().parts]
    assert counts == [(PATHS[7], 3), (PATHS[4], 1)]


def test_prompts_of_one_path_are_admitted_several_at_a_time() -> None:
    # 16 tokens of a prompt make a pass cheap: four prompts of four, once a batch runs anyway.
    scheduler = Scheduler(Cohort(costs(knee=16), 16, 64), KVBudget(10**6))
    for request in range(400):
        scheduler.add(SequenceState(request, PATHS[0], 4, 3 + request % 7))
    sizes = []
    while scheduler.groups.num_waiting:
        decision = scheduler.schedule()
        if decision.prefill and len(sizes) < 80:
            sizes.append(len(decision.prefill))
        for sequence in [*decision.decode, *(chunk.sequence for chunk in decision.prefill)]:
            if sequence.num_generated >= sequence.max_tokens:
                scheduler.finished(sequence.owner)
    assert sizes[0] == 64
    assert min(sizes[1:-1]) >= 4


def test_a_request_waits_a_little_for_company_while_a_full_batch_runs() -> None:
    def steps_until_admitted(num_running: int, num_more: int) -> int:
        scheduler = Scheduler(Cohort(costs(knee=16), 8, 32), KVBudget(10**6))
        for request in range(num_running):
            scheduler.add(SequenceState(request, PATHS[7], 4, 1000))
        scheduler.schedule()
        for request in range(num_more):
            scheduler.add(SequenceState(f"more {request}", PATHS[0], 4, 1000))
        return next(count for count in range(1, 100) if scheduler.schedule().prefill)

    assert steps_until_admitted(num_running=7, num_more=1) == 1
    assert steps_until_admitted(num_running=8, num_more=2) == 1, "two of four tokens are a quarter of a batch"
    assert steps_until_admitted(num_running=8, num_more=1) == 17


def test_a_request_that_can_never_fit_is_refused_with_what_would_fit() -> None:
    scheduler = Scheduler(Lockstep(2), KVBudget(100, page_size=4))
    with pytest.raises(ValueError, match="at most 17 tokens fit"):
        scheduler.add(SequenceState("long", LayerPath.full(NUM_LAYERS), 10, 8))
    assert not scheduler.has_unfinished
    scheduler.add(SequenceState("long", LayerPath.full(NUM_LAYERS), 10, 7))
    scheduler.add(SequenceState("shallow", PATHS[0], 50, 50))


def test_bad_input_is_refused() -> None:
    scheduler = Scheduler(Lockstep(2), KVBudget(1000))
    scheduler.add(SequenceState("a", PATHS[0], 1, 1))
    with pytest.raises(ValueError, match="request_id must be new, got 'a'"):
        scheduler.add(SequenceState("a", PATHS[0], 1, 1))
    for end in (scheduler.finished, scheduler.abort):
        with pytest.raises(ValueError, match="request_id must be of a request that has not ended, got 'b'"):
            end("b")
    scheduler.abort("a")
    assert scheduler.counters.num_finished == 0 and scheduler.counters.num_aborted == 1
    with pytest.raises(ValueError, match="has not ended"):
        scheduler.abort("a")
    scheduler.add(SequenceState("a", PATHS[0], 1, 1))
    with pytest.raises(ValueError, match="num_prompt_tokens must be at least 1, got 0"):
        SequenceState("c", PATHS[0], 0, 1)
    with pytest.raises(ValueError, match="num_slots must be at least 1, got 0"):
        KVBudget(0)
    with pytest.raises(ValueError, match="max_prefill_tokens must be at least 1, got 0"):
        Scheduler(Lockstep(1), KVBudget(1), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fastest", "batch": 1}, "name must be one of cohort, lockstep, by_path, got 'fastest'"),
        ({"name": "lockstep", "batch": 0}, "batch must be at least 1, got 0"),
        ({"name": "lockstep", "batch": 2, "pool": 8}, "pool must be 2, the batch, for lockstep, got 8"),
        ({"name": "by_path", "batch": 2, "max_wait": 8}, "max_wait must be left out for by_path, got 8"),
        ({"name": "cohort", "batch": 4, "pool": 3}, "pool must be at least the batch, 4, got 3"),
        ({"name": "cohort", "batch": 4, "pool": 17, "max_wait": 4}, "max_wait must be at least 5"),
    ],
)
def test_limits_that_no_policy_can_keep_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(costs=costs(), **arguments)


def test_preemption_beside_a_queue_leaves_nothing_behind() -> None:
    draw = random.Random(1)
    scheduler = Scheduler(Lockstep(8), KVBudget(120))
    num_added = 0
    while scheduler.counters.num_preempted < 200:
        while scheduler.groups.num_waiting < 20:
            scheduler.add(SequenceState(num_added, LayerPath.full(2), 2, draw.choice([2, 30])))
            num_added += 1
        decision = scheduler.schedule()
        for sequence in [*(chunk.sequence for chunk in decision.prefill if chunk.is_last), *decision.decode]:
            if sequence.num_generated >= sequence.max_tokens:
                scheduler.finished(sequence.owner)
        # One entry for the head of the only path, and outdated ones of heads that have left since.
        assert len(scheduler.groups._heads) <= 8


def test_a_sequence_that_replays_runs_its_output_again_row_by_row() -> None:
    scheduler = Scheduler(Lockstep(2), KVBudget(20))
    old, young = (SequenceState(name, LayerPath.full(1), 4, 12, replays=name == "young") for name in ("old", "young"))
    scheduler.add(old)
    scheduler.add(young)
    while not (decision := scheduler.schedule()).preempt:
        assert scheduler.step < 20
    assert decision.preempt == [young] and young.num_generated == 0
    num_known = young.num_replayed
    assert num_known == old.num_generated - 1 > 3 and young.num_known_tokens == 4 + num_known
    while old.num_generated < old.max_tokens:
        scheduler.schedule()
        assert young.status is Status.WAITING, "admitted with room for its prompt only, it would have to go again"
    scheduler.finished("old")
    (chunk,) = scheduler.schedule().prefill
    assert (chunk.sequence, chunk.first, chunk.num_tokens) == (young, 0, 4)
    for num_generated in range(2, 13):
        assert scheduler.schedule().decode == [young] and young.num_generated == num_generated
