"""Metrics at an interval: totals beside the last window, as JSON lines and as a live line."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from models import NUM_LAYERS, random_prompts, tiny_model

from dynskip import LLM, AsyncLLM, Engine, LayerPath, SamplingParams
from dynskip.costs.step_costs import StepCosts
from dynskip.engine.metrics import MetricsLog
from dynskip.engine.worker import MetricsWarning

COSTS = dataclasses.replace(StepCosts.h200(), num_layers=NUM_LAYERS)
SHALLOW = LayerPath.uniform(NUM_LAYERS, 2)
PARAMS = SamplingParams(max_tokens=9, ignore_eos=True)


class Clock:
    """A clock that goes where it is told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def engine() -> Any:
    """An engine with three requests through all layers and one through two."""
    engine = Engine(tiny_model(), policy="lockstep", batch=4)
    for prompt, path in zip(random_prompts([4, 5, 6, 7]), [None, None, None, SHALLOW], strict=True):
        engine.add_request(prompt, PARAMS, path)
    yield engine
    engine.close()


def lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_has_the_window_beside_the_totals(engine: Engine, tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "metrics.jsonl"
    with MetricsLog(engine, path, every_s=1.0, clock=clock) as log:
        for step in range(4):  # steps of 0.4 s: the third is the first that ends a second or more after the beginning
            engine.step()
            clock.now_s += 0.4
            log.update()
            assert path.stat().st_size == 0 or step >= 2
        (first,) = lines(path)
        engine.run()
    _, second = lines(path)
    # A step gives each of the four a token; the prefill does it, too, and the first decode step comes beside it.
    assert first["elapsed_s"] == first["window_s"] == pytest.approx(1.2)
    assert first["window_tokens_per_s"] == pytest.approx(first["window_s"] and _tokens(first) / 1.2)
    assert first["rows"] == first["window_rows"] == 4
    assert first["layers"] == first["window_layers"] == pytest.approx((3 * 6 + 2) / 4)
    assert first["union"] == first["window_union"] == 6
    assert (first["num_running"], first["num_waiting"], first["num_requests"]) == (4, 0, 0)
    assert first["kv_bytes"] > 0
    assert second["window_s"] == pytest.approx(0.4)
    assert second["elapsed_s"] == pytest.approx(1.6)
    assert second["window_tokens_per_s"] == pytest.approx((4 * 9 - _tokens(first)) / 0.4)
    assert second["window_requests_per_s"] == pytest.approx(4 / 0.4)
    assert (second["num_running"], second["num_requests"], second["kv_bytes"]) == (0, 4, 0)
    assert len(second["ttft_s"]) == len(second["tpot_ms"]) == 3
    assert second["time_s"] > 1e9


def _tokens(line: dict[str, Any]) -> int:
    """The tokens of a line, by its totals."""
    tokens = line["tokens_per_s"] * line["seconds"]
    assert tokens == pytest.approx(round(tokens))
    return round(tokens)


def test_nothing_new_is_no_last_line(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(engine, path) as log:
        engine.run()
        log.write()
    assert len(lines(path)) == 1
    with MetricsLog(engine, path):
        pass
    assert len(lines(path)) == 1, "a file is gone on with, and nothing has happened"


def test_preemptions_are_counted_in_their_window(tmp_path: Path) -> None:
    model = tiny_model()
    engine = Engine(model, kv_bytes=60 * NUM_LAYERS * model.kv_entry_bytes, policy="lockstep", batch=4)
    for prompt in random_prompts([8] * 4):
        engine.add_request(prompt, SamplingParams(max_tokens=24, ignore_eos=True))
    log = MetricsLog(engine)
    engine.run()
    metrics = log.write()
    assert metrics.num_preempted == metrics.stats.outcome.num_preempted > 0
    assert log.write().num_preempted == 0
    engine.close()


def test_a_clock_that_goes_back_stands_still(engine: Engine) -> None:
    clock = Clock()
    log = MetricsLog(engine, clock=clock)
    engine.step()
    clock.now_s -= 50
    metrics = log.write()
    assert (metrics.window_s, metrics.tokens_per_s, metrics.seconds) == (0.0, 0.0, 0.0)
    clock.now_s += 52
    engine.step()
    metrics = log.write()
    assert metrics.window_s == metrics.seconds == pytest.approx(2.0)
    assert metrics.tokens_per_s == pytest.approx(4 / 2.0)


def test_a_terminal_has_one_line_that_fits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    with MetricsLog(engine, live=True, stream=terminal) as log:
        engine.step()
        log.write()
        engine.run()
    first, second, end = re.split(r"\x1b\[K", terminal.getvalue())
    assert first[0] == second[0] == "\r"
    assert end == "\n"
    assert len(first) == len(second) == 1 + 79
    assert "4 running" in first


def test_elsewhere_each_line_stands_for_itself(engine: Engine) -> None:
    stream = io.StringIO()
    with MetricsLog(engine, live=True, stream=stream) as log:
        engine.run()
        log.write()
    (line,) = stream.getvalue().splitlines()
    for part in (
        "tokens/s",
        "4 done, 0 running, 0 waiting",
        "rows 4.0",
        "layers 5.0 of union 6.0",
        "TTFT",
        "preempted 0",
    ):
        assert part in line


def test_bad_arguments_are_refused(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"MetricsLog: every_s must be positive, got 0"):
        MetricsLog(engine, every_s=0)
    with pytest.raises(FileNotFoundError):
        MetricsLog(engine, tmp_path / "nowhere" / "metrics.jsonl")


# In a thread


def test_async_metrics_are_written_while_requests_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    async def main() -> None:
        llm = LLM(tiny_model())
        async with AsyncLLM(llm, batch=4, costs=COSTS, metrics_path=path, metrics_every_s=1e-6) as served:
            await asyncio.gather(*(served.generate(prompt, PARAMS) for prompt in random_prompts([4, 5, 6])))

    asyncio.run(main())
    found = lines(path)
    assert len(found) >= 9
    assert found[-1]["num_requests"] == 3
    assert max(line["num_running"] for line in found) == 3


def test_a_log_that_cannot_be_written_costs_no_request() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full: it is Linux's")

    async def main() -> Any:
        llm = LLM(tiny_model())
        async with AsyncLLM(llm, batch=4, costs=COSTS, metrics_path=full, metrics_every_s=1e-6) as served:
            return await served.generate([5, 6, 7], PARAMS)

    with pytest.warns(MetricsWarning, match=r"metrics end here, the log cannot be written: .*No space left"):
        output = asyncio.run(main())
    assert len(output.token_ids) == 9
