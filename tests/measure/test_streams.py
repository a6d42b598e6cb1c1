"""Streams through the engine: what of their seconds is in which part of its native calls."""

from __future__ import annotations

import pytest
import torch
from families import native_model

from bench import serving
from dynskip import LayerPath
from dynskip.costs.defaults import predicted_costs
from dynskip.measure.streams import Job, Served
from dynskip.ops import native
from dynskip.scheduler.outcome import CallTimes
from dynskip.simulation.workload import Request

pytestmark = pytest.mark.skipif(native.unavailable_reason() is not None, reason="needs the C++ extension")


def served(times_calls: bool) -> Served:
    model = native_model("opt", "pre-norm", torch.bfloat16)
    paths = [LayerPath.uniform(model.num_layers, 2), LayerPath.full(model.num_layers)]
    jobs = [Job([3, 4, 5, 6], Request(0.0, paths[index % 2], 4, 2 + index)) for index in range(6)]
    stream = Served("cohort", model, jobs, predicted_costs(model), times_calls=times_calls, batch=3)
    while stream.progress < 1:
        stream.advance()
    return stream


def test_the_parts_of_a_streams_seconds_are_its_seconds() -> None:
    stream = served(times_calls=True)
    tally, parts = stream.engine.tally, stream.parts_s
    for phase, whole_s in (("prefill", tally.prefill_s), ("decode", tally.decode_s)):
        assert sum(parts[phase].values()) == pytest.approx(whole_s)
        assert all(own_s > 0 for own_s in parts[phase].values()), parts
    stream.engine.close()
    line = {"name": "cohort", "parts_s": parts, "num_decode_steps": tally.num_decode_steps}
    prompts, steps = serving._parts_of(line)
    assert prompts["phase"] == "prefill" and "(" not in prompts["products"]
    assert steps["whole"] == pytest.approx(tally.decode_s)
    per_step = float(steps["outside"].split("(")[1].rstrip(")"))
    assert per_step == pytest.approx(1e3 * parts["decode"]["outside_s"] / tally.num_decode_steps, abs=0.006)


def test_calls_are_timed_where_that_is_asked_for() -> None:
    stream = served(times_calls=False)
    assert stream.parts_s == {} and stream.engine.tally.decode_calls == CallTimes()
    stream.engine.close()
    assert list(serving._parts_of({"name": "older"})) == []
