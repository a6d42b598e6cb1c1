"""Drafts in all at once: policies, small memory, shared prompts, chunks, aborts in callbacks, stops, many outputs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable
from dataclasses import replace

import pytest
from drafts import asks_of, draw_lengths, random_draft, with_draft
from models import NUM_LAYERS, random_prompts
from streams import Ask, assert_empty, engine, same

from dynskip.engine.request import RequestOutput
from dynskip.scheduler.policies.make import POLICIES

NUM_SEEDS = 9
# What all seeds together have to reach, or they prove little.
LEAST = {"drafted": 100, "accepted": 20, "shared": 50, "preempted": 1, "aborted": 10}


def mixed(draw: random.Random, seed: int, chunk: int) -> list[Ask]:
    """Requests of which most begin alike; every fourth ends at a token that it would give."""
    asks = asks_of(14, seed, changes_logits=seed % 3 == 0)
    (common,) = random_prompts([40], seed)
    for index, ask in enumerate(asks):
        if draw.random() < 0.6:
            prompt = [*common[: draw.randint(4, 36)], *ask.prompt[: draw.randint(0, 4)]]
            asks[index] = replace(ask, prompt=prompt)
    for index, ask in list(enumerate(asks))[::4]:
        tokens = ask.alone(max_prefill_tokens=chunk, prefix_caching=False).token_ids
        asks[index] = replace(ask, params=replace(ask.params, stop_token_ids=(draw.choice(tokens),)))
    return asks


def is_beginning(output: RequestOutput, whole: RequestOutput) -> bool:
    """Whether each output of an aborted request is how the whole one begins."""
    return all(
        part.token_ids == all_.token_ids[: len(part.token_ids)]
        and (part.logprobs or []) == (all_.logprobs or [])[: len(part.token_ids)]
        for part, all_ in zip(output.samples, whole.samples, strict=True)
    )


def serve_mix(seed: int) -> Counter[str]:
    """Serve the requests of ``seed`` and compare each with what it is alone; what has happened meanwhile."""
    draw = random.Random(seed)
    chunk = draw.choice([8, 16, 2048])
    asks = mixed(draw, seed, chunk)
    alone = [ask.alone(max_prefill_tokens=chunk, prefix_caching=False) for ask in asks]
    needed = max(NUM_LAYERS * (len(ask.prompt) + ask.params.n * ask.params.max_tokens) for ask in asks)
    policy, num_slots = [*POLICIES][seed % len(POLICIES)], (needed, None)[seed // len(POLICIES) % 2]
    served = engine(policy, num_slots, batch=draw.choice([3, 6]), max_prefill_tokens=chunk)
    ids: list[Hashable] = []
    outputs: dict[Hashable, RequestOutput] = {}
    aborted: set[Hashable] = set()

    def on_token(*_: object) -> None:
        live = [each for each in ids if each not in aborted and each not in outputs]
        if live and draw.random() < 0.04:
            doomed = draw.choice(live)
            try:
                outputs[doomed] = served.abort(doomed)
            except ValueError:
                return  # it ends with this step
            aborted.add(doomed)

    for index, ask in enumerate(asks):
        told = ask if index % 5 == 4 else with_draft(ask, random_draft(draw, ask.path))
        ids.append(told.add(served, on_token=on_token))
        for _ in range(draw.choice([0, 0, 1, 2])):
            outputs |= {output.request_id: output for output in served.step()}
    outputs |= {output.request_id: output for output in served.run()}
    for request_id, whole in zip(ids, alone, strict=True):
        found = outputs[request_id]
        assert found.error is None, (seed, request_id)
        equal = is_beginning if request_id in aborted else same
        assert equal(found, whole), (seed, request_id, policy, num_slots)
    tally, num_preempted = served.tally, served.stats().outcome.num_preempted
    assert_empty(served)
    return Counter(
        drafted=tally.num_drafted,
        accepted=tally.num_accepted,
        shared=tally.num_shared_tokens,
        preempted=num_preempted,
        aborted=len(aborted),
    )


def test_whatever_comes_together_each_request_has_what_it_has_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_lengths(monkeypatch)
    seen: Counter[str] = Counter()
    for seed in range(NUM_SEEDS):
        seen += serve_mix(seed)
    assert all(seen[name] >= least for name, least in LEAST.items()), seen
