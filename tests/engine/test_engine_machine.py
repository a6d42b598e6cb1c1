"""Random requests, steps, aborts and interruptions, under every policy, with memory that runs out all the time."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from models import random_prompts, tiny_hf
from streams import Ask, Parity, assert_empty, check_slots, costs, drawn, engine, greedy, same

from dynskip import LayerPath, OPTForCausalLM
from dynskip.controllers import HiddenStateGate
from dynskip.engine.request import OutputSequence, RequestOutput
from dynskip.scheduler.policies.make import POLICIES
from dynskip.scheduler.sequence import Status

NUM_LAYERS = 3
HIDDEN_SIZE = 16
# The most that a request of `asks` may hold, in key-value entries.
MOST_SLOTS = 117
# With so many steps for each policy there are more than 10,000 in all.
MIN_STEPS = 2000


@functools.cache
def model() -> OPTForCausalLM:
    changes = {"num_hidden_layers": NUM_LAYERS, "hidden_size": HIDDEN_SIZE, "ffn_dim": 32, "word_embed_proj_dim": 16}
    return OPTForCausalLM.from_hf(tiny_hf(seed=1, **changes), backend="torch", deterministic=True)


@functools.cache
def asks() -> list[Ask]:
    """What may be asked for: families of prompts with a prefix in common, every kind of path, greedy and with seeds."""
    generator = torch.Generator().manual_seed(5)
    gate = HiddenStateGate(torch.randn(NUM_LAYERS, 2, HIDDEN_SIZE, generator=generator))
    mask = torch.rand(40, NUM_LAYERS, generator=generator) < 0.6
    shallow, middle, full = (LayerPath.of(NUM_LAYERS, layers) for layers in ([1], [0, 2], [0, 1, 2]))
    kinds: list[tuple[Any, dict[str, Any]]] = [(path, {}) for path in (shallow, middle, full) for _ in range(3)]
    kinds += [(LayerPath.of(NUM_LAYERS, [], allow_empty=True), {}), (gate, {"prompt_depth": "full"})]
    kinds += [(Parity(), {"kv_policy": policy}) for policy in ("propagate", "evict", "share")]
    kinds += [(mask, {"kv_policy": policy}) for policy in ("propagate", "evict", "share")]
    draw = random.Random(6)
    (prefix,) = random_prompts([18])
    prompts = [prefix[: draw.choice([16, 17, 18])] + tail for tail in ([5], [6, 7], [6, 8, 9], [6, 7, 4, 4])]
    prompts += random_prompts([1, 3, 5, 8, 11])
    chosen = []
    for index in range(3 * len(kinds)):
        path, options = kinds[index % len(kinds)]
        prompt, max_tokens, n = draw.choice(prompts), draw.choice([1, 2, *range(6, 19)]), draw.choice([1, 1, 1, 2, 3])
        params = greedy(max_tokens, n=n) if index % 2 else drawn(max_tokens, index, n=n)
        chosen.append(Ask(prompt, params, path, options))
    assert all((len(ask.prompt) + ask.params.max_tokens - 1) * NUM_LAYERS <= MOST_SLOTS for ask in chosen)
    return chosen


@functools.cache
def alone(index: int, max_prefill_tokens: int) -> RequestOutput:
    """What a request becomes in an engine of its own."""
    return asks()[index].alone(model=model(), max_prefill_tokens=max_prefill_tokens)


@dataclass
class Totals:
    """What all examples of one policy came to."""

    num_steps: int = 0
    num_requests: int = 0
    num_preempted: int = 0
    num_aborted: int = 0
    num_interrupts: int = 0
    num_shared_tokens: int = 0
    num_waits: int = 0


class EngineMachine(RuleBasedStateMachine):
    """An engine whose every output is held against the same request alone."""

    policy = "lockstep"
    totals = Totals()

    @initialize(
        batch=st.integers(3, 8),
        factor=st.integers(1, 3),
        patience=st.integers(0, 4),
        num_slots=st.integers(MOST_SLOTS, MOST_SLOTS + 20),
        max_prefill_tokens=st.sampled_from([4, 16, 64]),
    )
    def begin(self, batch: int, factor: int, patience: int, num_slots: int, max_prefill_tokens: int) -> None:
        options: dict[str, Any] = {}
        if self.policy == "cohort":
            options = {"pool": factor * batch, "max_wait": factor + patience}
        self.max_wait = options.get("max_wait", 1)
        self.max_prefill_tokens = max_prefill_tokens
        self.served = engine(
            self.policy,
            num_slots,
            model=model(),
            costs=costs(NUM_LAYERS),
            batch=batch,
            max_prefill_tokens=max_prefill_tokens,
            **options,
        )
        self.asked: dict[int, int] = {}
        self.told: dict[int, int] = {}
        self.last_steps: dict[OutputSequence, tuple[int, int]] = {}
        self.num_idle = 0
        self.interrupts_at: int | None = None

    @rule(index=st.integers(0, 10**6), copies=st.integers(1, 8))
    def add(self, index: int, copies: int) -> None:
        for copy in range(copies):
            place = (index + copy * (copy // 3)) % len(asks())
            request_id = asks()[place].add(self.served, on_token=self.on_token)
            self.asked[request_id] = place
            self.told[request_id] = 0

    def on_token(self, request_id: int, _index: int, _token: int) -> None:
        self.told[request_id] += 1
        self.num_idle = 0
        if self.interrupts_at is not None:
            self.interrupts_at -= 1
            if self.interrupts_at < 0:
                self.interrupts_at = None
                raise KeyboardInterrupt

    @precondition(lambda self: self.asked)
    @rule(count=st.integers(1, 24), interrupts_at=st.none() | st.integers(0, 12))
    def steps(self, count: int, interrupts_at: int | None) -> None:
        """``count`` steps, one of them broken off once ``interrupts_at`` more tokens were told."""
        self.interrupts_at = interrupts_at
        for _ in range(count):
            self.step()

    @precondition(lambda self: self.asked)
    @rule(pick=st.integers(0, 10**6))
    def abort(self, pick: int) -> None:
        # What has ended in a step that was broken off is handed out by the next.
        requests = [request_id for request_id in self.asked if request_id in self.served._requests]
        if not requests:
            return
        request_id = requests[pick % len(requests)]
        self.totals.num_aborted += 1
        self.check_output(self.served.abort(request_id), "abort")

    def step(self) -> None:
        served = self.served
        self.num_idle += 1
        num_preempted = served.scheduler.counters.num_preempted
        try:
            outputs = served.step()
        except KeyboardInterrupt:
            self.totals.num_interrupts += 1
            outputs = []
            assert served.kv.num_used == served.kv.cache.num_slots_used == 0
            self.last_steps.clear()
        else:
            self.check_waits()
            self.totals.num_preempted += served.scheduler.counters.num_preempted - num_preempted
        self.totals.num_steps += 1
        for output in outputs:
            self.check_output(output, None)
        self.check_counts()
        assert self.num_idle < 64 or not self.asked, f"no token in {self.num_idle} steps"

    def check_output(self, output: RequestOutput, reason: str | None) -> None:
        """The output is what the request becomes alone, or where it was aborted the beginning of that."""
        expected = alone(self.asked.pop(output.request_id), self.max_prefill_tokens)
        num_told = self.told.pop(output.request_id)
        assert num_told == sum(len(sample.token_ids) for sample in output.samples)
        if reason is None:
            assert same(output, expected)
            return
        for ours, theirs in zip(output.samples, expected.samples, strict=True):
            assert ours.token_ids == theirs.token_ids[: len(ours.token_ids)]
            assert ours.finish_reason == reason or ours == theirs

    def check_waits(self) -> None:
        """No running sequence waits for more steps than the policy allows, from its own last token to its next."""
        step = self.served.scheduler.step
        before, self.last_steps = self.last_steps, {}
        for state in self.served.scheduler.groups.resident_sequences():
            sequence: Any = state.owner
            num_tokens, last_step = before.get(sequence, (-1, step))
            if state.num_generated != num_tokens:
                last_step = step
            assert step - last_step < self.max_wait, f"a sequence has waited for {step - last_step} steps"
            self.totals.num_waits += step > last_step
            self.last_steps[sequence] = state.num_generated, last_step

    def check_counts(self) -> None:
        """What scheduler, pool and cache count is what is there."""
        served = self.served
        scheduler, kv, stats = served.scheduler, served.kv, served.stats()
        sequences = [sequence for request in served._requests.values() for sequence in request.sequences]
        states = [sequence.state for sequence in sequences if sequence.finish_reason is None]
        by_status = {status: [s for s in states if s.status is status] for status in Status}
        assert stats.num_waiting == len(by_status[Status.WAITING])
        assert stats.num_prefilling == len(by_status[Status.PREFILLING])
        assert stats.num_running == len(by_status[Status.RUNNING])
        residents = by_status[Status.PREFILLING] + by_status[Status.RUNNING]
        assert kv.num_free_seqs == scheduler.policy.pool - len(residents)
        assert len({state.cache_id for state in residents} - {-1}) == len(residents)
        assert all(state.cache_id == -1 for state in by_status[Status.WAITING])
        assert kv.cache.num_slots_used <= kv.num_used + kv.num_kept <= kv.num_slots
        check_slots(served)
        lens = kv.cache.context_lens
        assert kv.cache.num_slots_used <= int(lens.sum()) + kv.num_kept
        for state in residents:
            sequence: Any = state.owner
            if sequence.path is not None:
                held = state.num_prefilled if state.status is Status.PREFILLING else state.num_tokens - 1
                expected = [held if layer in sequence.path.layers else 0 for layer in range(NUM_LAYERS)]
                assert lens[:, state.cache_id].tolist() == expected
        counters = scheduler.counters
        assert counters.num_added - counters.num_finished - counters.num_aborted == len(states)
        assert len(served._requests) + len(served._outputs) == len(self.asked)

    def teardown(self) -> None:
        if not hasattr(self, "served"):
            return
        self.interrupts_at = None
        while self.served.has_unfinished:
            self.step()
        assert not self.asked
        assert_empty(self.served)
        served, totals = self.served, self.totals
        totals.num_requests += served.tally.num_requests
        totals.num_shared_tokens += served.tally.num_shared_tokens
        assert served.scheduler.counters.longest_wait <= self.max_wait


@pytest.mark.parametrize("policy", POLICIES)
def test_random_streams_equal_each_request_alone(policy: str) -> None:
    totals = Totals()
    machine = type("Machine", (EngineMachine,), {"policy": policy, "totals": totals})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=6,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
    assert totals.num_steps >= MIN_STEPS
    assert totals.num_preempted >= 100
    assert totals.num_aborted >= 20 and totals.num_interrupts >= 5
    assert totals.num_shared_tokens >= 500
    assert bool(totals.num_waits) == (policy == "cohort")
