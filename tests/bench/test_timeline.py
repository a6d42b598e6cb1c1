"""The picture of a stream: it shows what the engine did, each token once, at its time and in a place of its own."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from models import NUM_LAYERS, random_prompts, tiny_model

from bench import timeline
from bench.timeline import Step, Timeline, median_run, record
from dynskip import LayerPath
from dynskip.costs.step_costs import StepCosts
from dynskip.evaluation.report.drawing import svg
from dynskip.measure.streams import Job
from dynskip.simulation.workload import Request

COSTS = dataclasses.replace(StepCosts.h200(), num_layers=NUM_LAYERS)
PATHS = [LayerPath.uniform(NUM_LAYERS, 2), LayerPath.uniform(NUM_LAYERS, 3), LayerPath.full(NUM_LAYERS)]


def jobs() -> list[Job]:
    """Forty requests of three depths and several lengths."""
    prompts = random_prompts([5 + index % 4 for index in range(40)])
    return [
        Job(prompt, Request(0.0, PATHS[index % 5 % 3], len(prompt), 1 + 2 * (index % 7)))
        for index, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def recorded() -> list[Timeline]:
    """Those requests under both policies."""
    model = tiny_model()
    return [record(model, jobs(), COSTS, policy, batch=4) for policy in timeline.POLICIES]


def test_each_token_is_recorded_once_in_its_step(recorded: list[Timeline]) -> None:
    for run in recorded:
        for number, job in enumerate(jobs()):
            assert sum(step.prefilled.count(number) for step in run.steps) == 1
            decoded = [index for index, step in enumerate(run.steps) if number in step.decoded]
            assert len(decoded) == job.request.num_output - 1
            if decoded:
                assert run.ends[number] == decoded[-1]
        assert max(len(step.decoded) for step in run.steps) == 4
        end_ms = run.steps[-1].end_ms
        assert run.num_tokens(0, end_ms) == sum(job.request.num_output for job in jobs())
        for step, following in zip(run.steps, run.steps[1:], strict=False):
            assert step.end_ms == following.begin_ms
    lockstep, cohort = recorded
    assert (lockstep.pool, cohort.pool) == (4, 16)


def test_no_two_residents_share_a_place(recorded: list[Timeline]) -> None:
    for run in recorded:
        places = run.places()
        resident: set[int] = set()
        for number, step in enumerate(run.steps):
            resident |= set(step.prefilled)
            assert set(step.decoded) <= resident
            taken = [places[request] for request in resident]
            assert len(set(taken)) == len(taken)
            assert all(0 <= place < run.pool for place in taken)
            resident -= {request for request, end in run.ends.items() if end == number}


def test_a_usual_stretch_is_as_fast_as_the_run() -> None:
    steps = [Step(10.0 * i, 0.0, 10.0, (), tuple(range(1 + (i % 10 == 4)))) for i in range(100)]
    run = Timeline("lockstep", 2, 2, [PATHS[0]] * 2, steps)
    begin_ms = run.usual_begin_ms(100.0)
    assert run.num_tokens(begin_ms, begin_ms + 100.0) == 11
    assert 150 <= begin_ms <= 650
    with pytest.raises(ValueError, match="the run must be longer than 2000 ms"):
        run.usual_begin_ms(2000.0)


def test_steps_take_their_medians() -> None:
    runs = []
    for times in ((1.0, 9.0), (2.0, 3.0), (5.0, 4.0)):
        steps = [Step(0.0, 0.0, times[0], (), (0,)), Step(times[0], times[1], 0.0, (1,), ())]
        runs.append(Timeline("cohort", 1, 4, [PATHS[0]] * 2, steps, {0: 0, 1: 1}))
    found = median_run(runs)
    assert [(step.begin_ms, step.prefill_ms, step.decode_ms) for step in found.steps] == [(0, 0, 2), (2, 4, 0)]
    runs[1].steps[0] = dataclasses.replace(runs[1].steps[0], decoded=(1,))
    with pytest.raises(RuntimeError, match="runs must decide alike, got others in step 0"):
        median_run(runs)


def test_the_readme_says_of_the_picture_what_it_says_itself() -> None:
    root = Path(__file__).parents[2]
    picture = (root / "docs" / "serving-timeline.svg").read_text(encoding="utf-8")
    found = re.search(r"medians of (\d+) runs; [^<]*, (\d+ threads?)<", picture)
    assert found is not None
    readme = " ".join((root / "README.md").read_text(encoding="utf-8").split())
    assert f"its median over {found[1]} runs with {found[2]}." in readme


def test_the_picture_shows_both_policies(recorded: list[Timeline]) -> None:
    length_ms = 0.3 * min(run.steps[-1].end_ms for run in recorded)
    text = svg("timeline", lambda figure: timeline.draw(figure, recorded, "a title", length_ms))
    for name, run in zip(("lock-step", "cohort"), recorded, strict=True):
        begin_ms = run.usual_begin_ms(length_ms)
        count = run.num_tokens(begin_ms, begin_ms + length_ms)
        assert re.search(rf"{name}: {count} tokens in {length_ms:.0f} ms", text)
    for depth in (2, 3, 6):
        assert f"a token through {depth} layers" in text
