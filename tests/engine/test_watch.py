"""What an engine tells of its last steps: all of them once it was asked, and none before or long after."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest
from models import NUM_LAYERS, random_prompts, tiny_model
from streams import guess_three

from dynskip import Engine, LayerPath, SamplingParams
from dynskip.costs.step_costs import StepCosts
from dynskip.engine import watch
from dynskip.engine.watch import Watched

COSTS = dataclasses.replace(StepCosts.h200(), num_layers=NUM_LAYERS)
FULL = LayerPath.full(NUM_LAYERS)
PATHS = [FULL, LayerPath.uniform(NUM_LAYERS, 2), LayerPath.of(NUM_LAYERS, [0, 1, 3, 5])]


@pytest.fixture
def engine() -> Any:
    with Engine(tiny_model(), batch=3, pool=5, costs=COSTS) as engine:
        yield engine


def add(engine: Engine, count: int, max_tokens: int = 7, **options: Any) -> list[Any]:
    prompts = random_prompts([3 + number % 5 for number in range(count)])
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return [
        engine.add_request(prompt, params, options.get("path", PATHS[number % 3]), draft=options.get("draft"))
        for number, prompt in enumerate(prompts)
    ]


def test_every_token_is_in_a_step_and_every_step_is_told_once(engine: Engine) -> None:
    assert engine.watch().steps == ()
    add(engine, 11)
    steps, since, last = [], 0, engine.watch()
    while engine.has_unfinished:
        engine.step()
        if random.Random(since).random() < 0.4 or not engine.has_unfinished:
            last = engine.watch(since)
            assert all(step.number > since for step in last.steps)
            steps += last.steps
            since = last.num_steps
    assert [step.number for step in steps] == list(range(1, last.num_steps + 1))
    num_first = sum(len(step.prompts) for step in steps)  # each prompt runs in one chunk, and gives a token
    assert num_first == 11
    assert num_first + sum(row.num_tokens for step in steps for row in step.rows) == last.num_tokens == 77
    assert sum(row.num_tokens for step in steps for row in step.prompts) == sum(3 + number % 5 for number in range(11))
    assert {row.path for step in steps for row in (*step.prompts, *step.rows)} == set(PATHS)
    for earlier, step in itertools.pairwise(steps):
        assert earlier.begin_s + earlier.prefill_s + earlier.decode_s <= step.begin_s + 1e-6
        assert min(step.prefill_s, step.decode_s) >= 0
        for rows in (step.prompts, step.rows):
            places = [row.place for row in rows]
            assert len(set(places)) == len(places)
            assert all(0 <= place < 5 for place in places), "no more places than the pool has"
    assert last.time_s >= steps[-1].begin_s
    assert engine.watch(since).steps == ()
    assert len(engine.watch().steps) == len(steps), "another one that looks gets them, too"


def test_it_says_what_the_stats_say(engine: Engine) -> None:
    add(engine, 9)
    for _ in range(4):
        engine.step()
    watched, stats = engine.watch(), engine.stats()
    for name in ("num_waiting", "num_prefilling", "num_running", "kv_bytes", "kv_capacity_bytes"):
        assert getattr(watched, name) == getattr(stats, name), name
    assert watched.num_waiting > 0
    assert watched.kv_bytes > 0


def test_a_sequence_keeps_its_place_and_an_aborted_one_gives_it_back(engine: Engine) -> None:
    engine.watch()
    first, second, *_ = add(engine, 3, max_tokens=20)
    for _ in range(4):
        engine.step()
    begun = engine.watch()
    (prompts,) = (step.prompts for step in begun.steps if step.prompts)
    assert sorted(row.place for row in prompts) == [0, 1, 2]
    engine.abort(second)
    add(engine, 2, max_tokens=20)
    engine.step()
    later = engine.watch(begun.num_steps)
    assert sorted(row.place for step in later.steps for row in step.prompts) == [1, 3], "the lowest that are free"
    engine.abort(first)


def test_nothing_is_kept_before_a_look_or_long_after(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    add(engine, 3)
    engine.step()
    assert engine.watch().steps == ()
    engine.step()
    assert len(engine.watch().steps) == 1
    monkeypatch.setattr(watch, "_IDLE_S", -1.0)
    engine.step()
    monkeypatch.undo()
    engine.step()
    assert engine.watch().steps == (), "it had stopped"
    engine.step()
    assert len(engine.watch().steps) == 1


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_MOST_ROWS", 2)
    with Engine(tiny_model(), policy="lockstep", batch=4) as engine:
        engine._watch._steps = type(engine._watch._steps)(maxlen=3)
        engine.watch()
        add(engine, 4)
        engine.run()
        steps = engine.watch().steps
    assert len(steps) == 3
    assert all(len(step.rows) == 2 for step in steps)


def test_guesses_are_told_with_their_draft(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    guess_three(monkeypatch)
    engine.watch()
    add(engine, 2, max_tokens=20, path=FULL, draft=PATHS[2])
    outputs = engine.run()
    rows = [row for step in engine.watch().steps for row in step.rows]
    assert sum(row.num_tokens for row in rows) == 2 * 19
    assert sum(row.num_guesses for row in rows) == sum(output.num_drafted for output in outputs) > 0
    assert {row.draft for row in rows if row.num_guesses} == {PATHS[2]}
    assert all(row.draft is None for row in rows if not row.num_guesses)
    assert all(1 <= row.num_tokens <= 1 + row.num_guesses for row in rows)


def test_looking_changes_no_token() -> None:
    outputs = []
    for looks in (False, True):
        with Engine(tiny_model(), batch=3, pool=5, costs=COSTS) as engine:
            add(engine, 9)
            while engine.has_unfinished:
                if looks:
                    assert isinstance(engine.watch(), Watched)
                outputs += engine.step()
    assert sorted(outputs[:9], key=lambda output: output.request_id) == sorted(
        outputs[9:], key=lambda output: output.request_id
    )
