"""The scheduler on a simulated clock, the costs that it needs, and the commands simulate and calibrate."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from families import FAMILIES, family_hf, family_shape

from dynskip.cli import calibrate as calibrate_command
from dynskip.cli import main
from dynskip.costs.layer_costs import Curve, LayerCosts, MachineSpeed, PathMix
from dynskip.costs.step_costs import StepCosts
from dynskip.costs.store import cached_path, device_key, load_cached, shape_key
from dynskip.engine.engine import Engine
from dynskip.measure import calibration
from dynskip.measure.streams import Job
from dynskip.models.registry import decoder_config
from dynskip.models.shapes import SHAPES
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams
from dynskip.scheduler.outcome import Outcome, Tally, percentiles
from dynskip.scheduler.policies.make import POLICIES
from dynskip.simulation.comparison import compare
from dynskip.simulation.ideal import Ideal, least_decode_ms
from dynskip.simulation.simulate import EngineOptions, SimulatedEngine, simulate
from dynskip.simulation.workload import PAPER_MIX, Request, Workload, at_full_depth, parse_mix

L = 24
FULL = LayerPath.full(L)


def linear_costs(**changes: Any) -> StepCosts:
    """A layer takes 1 ms up to 4 rows, then in proportion; the head 2 ms; an entry a microsecond."""
    layer, head = Curve((4, 5, 8), (1.0, 1.25, 2.0)), Curve((1,), (2.0,))
    decode = LayerCosts(layer, Curve((1, 64), (2.0, 2.0)), 1e-3)
    return StepCosts(L, decode, LayerCosts(layer, head), **changes)


def paper(num_requests: int, mean_output: float, **changes: Any) -> Workload:
    return Workload(num_requests, parse_mix(PAPER_MIX, L), mean_output=mean_output, **changes)


def test_a_step_costs_what_its_layers_rows_entries_and_head_cost() -> None:
    costs = linear_costs(step_ms=0.5, step_row_ms=0.125, prefill_step_ms=0.25)
    four, eight = LayerPath.early_exit(L, 4), LayerPath.early_exit(L, 8)
    # Layers 0..3 have 8 rows and take 2 ms each, layers 4..7 have 2 and take 1.
    assert costs.decode_ms([(four, 6), (eight, 2)], num_kv_entries=100) == pytest.approx(4 * 2 + 4 + 2 + 0.5 + 1 + 0.1)
    assert costs.prefill_ms([(four, 12)], num_heads=3) == pytest.approx(4 * 3 + 3 * 2 + 0.25)
    assert costs.decode_ms([]) == costs.prefill_ms([], 0) == 0
    assert costs.of_model() == linear_costs()


def test_a_step_costs_what_the_cost_model_says() -> None:
    costs = StepCosts.h200()
    cohort = [(LayerPath.uniform(L, 4), 100), (LayerPath.uniform(L, 12), 60), (FULL, 50)]
    mix = PathMix.of([path for path, count in cohort for _ in range(count)])
    entries = sum(mix.rows_per_layer) * 40
    assert costs.decode_ms(cohort, entries) == pytest.approx(costs.decode.step_ms(mix, 40))


def test_the_h200_is_predicted_and_near_the_known_floors() -> None:
    costs = StepCosts.h200()
    assert costs.predicted
    # A layer reads 101 MB at 4.3 TB/s, the head 206 MB; arithmetic takes over at 184 rows.
    assert costs.decode.layer.at(1) == pytest.approx(0.0234, rel=0.01)
    assert costs.decode.layer.at(183) == costs.decode.layer.at(1) < costs.decode.layer.at(190)
    assert costs.decode.head.at(1) == pytest.approx(0.048, rel=0.01)
    assert 128 < costs.efficient_tokens() <= 256


def test_costs_survive_a_file(tmp_path: Path) -> None:
    costs = linear_costs(device="a card", conditions={"threads": 2})
    costs.write(tmp_path / "folder" / "costs.json")
    assert StepCosts.read(tmp_path / "folder" / "costs.json") == costs
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["costs.json"]
    for text in ("", "[]", "{}", '{"format": 1}', '{"format": 2}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"path must hold costs of format 1, got .*bad\.json"):
            StepCosts.read(tmp_path / "bad.json")


def test_one_request_takes_its_prefill_and_its_steps() -> None:
    costs = linear_costs()
    path = LayerPath.uniform(L, 6)
    engine = SimulatedEngine(costs, EngineOptions("cohort", batch=4))
    engine.run_until(3.0)
    engine.add(Request(2.5, path, 8, 4))
    engine.run_until(math.inf)
    tally = engine.close()
    prefill_s = (6 * 2 + 2) / 1e3
    decode_s = sum(6 + 2 + 6 * cached * 1e-3 for cached in (9, 10, 11)) / 1e3
    assert tally.prefill_s == pytest.approx(prefill_s)
    assert tally.decode_s == pytest.approx(decode_s)
    assert tally.queue_s == [pytest.approx(0.5)]
    assert tally.ttft_s == [pytest.approx(0.5 + prefill_s)]
    assert tally.tpot_s == [pytest.approx(decode_s / 3)]
    assert (tally.num_tokens, tally.num_decode_steps, tally.num_prefills) == (4, 3, 1)
    assert tally.peak_kv_slots == 16 * 6
    assert engine.work_ms == pytest.approx(0)


def test_a_full_batch_of_one_path_reaches_the_ideal() -> None:
    costs = linear_costs()
    requests = [Request(0.0, LayerPath.uniform(L, 8), 4, 20) for _ in range(64)]
    ideal = Ideal.of(costs, requests, batch=8, prefill_tokens=2048)
    for policy in POLICIES:
        outcome = simulate(costs, requests, EngineOptions(policy, batch=8, max_prefill_tokens=32))
        assert outcome.decode_s * 1e3 == pytest.approx(ideal.decode_ms)
        assert (outcome.rows, outcome.paths, outcome.layers, outcome.union) == (8, 1, 8, 8)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_engines", [1, 3])
@pytest.mark.parametrize("rate", [None, 50.0])
def test_every_request_ends_with_all_its_tokens(policy: str, num_engines: int, rate: float | None) -> None:
    requests = paper(300, 8, rate=rate).draw()
    options = EngineOptions(policy, batch=8, kv_slots=24 * 160, max_prefill_tokens=64)
    outcome = simulate(linear_costs(), requests, options, num_engines)
    assert outcome.num_requests == 300
    assert outcome.tokens_per_s * outcome.seconds == pytest.approx(sum(request.num_output for request in requests))
    assert outcome.peak_kv_slots <= 24 * 160
    weighted = sum(r.path.budget * (r.num_output - 1) for r in requests) / sum(r.num_output - 1 for r in requests)
    if not outcome.num_preempted:
        assert outcome.layers == pytest.approx(weighted)
    assert outcome.longest_wait <= (16 if policy == "cohort" else 1)


def test_little_memory_preempts_in_the_simulation_too() -> None:
    options = EngineOptions("cohort", batch=16, kv_slots=24 * 192)
    requests = Workload(200, ((FULL, 1.0),), num_prompt=16, mean_output=60, fixed_output=True).draw()
    assert simulate(linear_costs(), requests, options).num_preempted > 10


@pytest.mark.parametrize(
    ("costs", "num_requests", "batch", "mean_output", "share", "over_lockstep"),
    [
        # A machine of 37 GB/s and 740 GFLOP/s: two cores as they were measured.
        (StepCosts.modelled("2 cores", MachineSpeed(37, 740)), 1024, 16, 16, 0.90, 1.9),
        (StepCosts.modelled("2 cores", MachineSpeed(37, 740)), 1024, 32, 16, 0.88, 1.7),
        (StepCosts.h200(), 8192, 128, 64, 0.88, 1.4),
    ],
    ids=["2 cores, 16", "2 cores, 32", "H200, 128"],
)
def test_cohorts_reach_most_of_the_ideal(
    costs: StepCosts, num_requests: int, batch: int, mean_output: float, share: float, over_lockstep: float
) -> None:
    options = [EngineOptions(policy, batch) for policy in ("lockstep", "cohort")]
    found = compare(costs, paper(num_requests, mean_output), options)
    lockstep, cohort = found.policies
    assert cohort.decode_gain / found.ideal_decode >= share
    assert cohort.gain / found.ideal_all >= 0.85
    assert lockstep.outcome.decode_s / cohort.outcome.decode_s >= over_lockstep
    assert cohort.outcome.longest_wait <= 16


@pytest.mark.parametrize("num_requests", [1, 5, 200])
def test_no_schedule_beats_the_bound(num_requests: int) -> None:
    for seed in range(5):
        requests = paper(num_requests, 16).draw(seed)
        for costs in (linear_costs(step_ms=0.5), StepCosts.h200()):
            least = least_decode_ms(costs, requests, batch=8)
            for policy in POLICIES:
                assert simulate(costs, requests, EngineOptions(policy, 8)).decode_s * 1e3 >= least * (1 - 1e-9)
    # One sequence alone is the bound.
    costs, request = linear_costs(step_ms=0.5), Request(0.0, LayerPath.uniform(L, 6), 8, 9)
    alone = simulate(costs, [request], EngineOptions("cohort", 8))
    assert alone.decode_s * 1e3 == pytest.approx(least_decode_ms(costs, [request], 8))


def test_a_closed_batch_is_never_slower_than_in_lockstep() -> None:
    for seed in range(20):
        options = [EngineOptions(policy, 16) for policy in ("lockstep", "cohort")]
        lockstep, cohort = compare(StepCosts.h200(), paper(16, 16), options, seed=seed).policies
        assert cohort.outcome.decode_s == pytest.approx(lockstep.outcome.decode_s)


def test_engines_share_the_load_and_keep_paths_together() -> None:
    costs = linear_costs()
    mix = tuple((LayerPath.uniform(L, budget), 1.0) for budget in (4, 24))
    requests = Workload(400, mix, mean_output=8).draw()
    apart = simulate(costs, requests, EngineOptions("lockstep", 8), num_engines=2)
    together = simulate(costs, requests, EngineOptions("lockstep", 8))
    assert apart.paths < together.paths - 0.2
    assert apart.seconds < 0.55 * together.seconds


def test_workloads_are_drawn_as_asked_and_repeat() -> None:
    workload = paper(20_000, 16, rate=100.0)
    requests = workload.draw(seed=3)
    assert requests == workload.draw(seed=3) != workload.draw(seed=4)
    assert sum(r.num_output for r in requests) / 20_000 == pytest.approx(16, rel=0.03)
    assert min(r.num_output for r in requests) == 1
    assert sum(r.path.budget for r in requests) / 20_000 == pytest.approx(5.6, rel=0.03)
    assert requests[-1].arrival_s == pytest.approx(200, rel=0.03)
    closed = paper(20_000, 16).draw(seed=3)
    assert [(r.path, r.num_output) for r in closed] == [(r.path, r.num_output) for r in requests]
    assert {r.arrival_s for r in closed} == {0.0}
    assert {r.path for r in at_full_depth(closed)} == {FULL}
    assert {r.num_output for r in Workload(9, ((FULL, 1.0),), mean_output=7, fixed_output=True).draw()} == {7}


def test_mixes_are_parsed() -> None:
    assert parse_mix("layers:0,5=2,full", L) == ((LayerPath.of(L, [0, 5]), 2.0), (FULL, 1.0))
    assert parse_mix("uniform:6,full", L) == ((LayerPath.uniform(L, 6), 1.0), (FULL, 1.0))
    for text in ("full=0", "full=-1", "full=x", "full=inf", "full=nan", "full=1e308,uniform:6=1e308"):
        with pytest.raises(ValueError, match="share must be a positive number"):
            parse_mix(text, L)
    with pytest.raises(ValueError, match="path must be full"):
        parse_mix("half=1", L)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_requests": 0}, "num_requests must be at least 1"),
        ({"num_requests": 10**7}, "num_requests must be at most 1000000, got 10000000"),
        ({"num_prompt": 10**7}, "num_prompt must be at most 1000000, got 10000000"),
        ({"mean_output": 1e300}, "mean_output must be at most 1000000, got 1e[+]300"),
        ({"mean_output": math.nan}, "mean_output must be at most 1000000, got nan"),
        (
            {"num_requests": 10**5, "mean_output": 10**4},
            "num_requests must leave at most 100000000 tokens .* 1003200000",
        ),
        ({"rate": 0.0}, r"rate must lie in 1e-06\.\.1e[+]09 a second, got 0.0"),
        ({"rate": 1e-300}, r"rate must lie in"),
        ({"rate": math.nan}, r"rate must lie in"),
    ],
)
def test_workloads_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Workload(**{"num_requests": 1, "paths": ((FULL, 1.0),), **changes})
    with pytest.raises(ValueError, match="num_engines must be at least 1"):
        simulate(linear_costs(), [], EngineOptions(), 0)
    with pytest.raises(ValueError, match="num_engines must be at most 1024, got 1025"):
        compare(linear_costs(), paper(10, 4.0), [EngineOptions()], 1025)


def test_what_no_engine_can_do_is_refused_before_anything_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workload, "draw", lambda *_: pytest.fail("requests were drawn"))
    for options in (EngineOptions(batch=10**9), EngineOptions(pool=10**9), EngineOptions(kv_slots=0)):
        with pytest.raises(ValueError, match=r"must be at (most|least)"):
            compare(linear_costs(), paper(10, 4.0), [options])


def test_percentiles_are_values_that_were_there() -> None:
    assert percentiles([float(value) for value in range(100, 0, -1)]) == (50, 90, 99)
    assert percentiles([7.0]) == (7, 7, 7)
    assert percentiles([]) == (0, 0, 0)
    assert Outcome.of([Tally()]).tokens_per_s == 0


def test_the_command_prints_a_table_and_says_what_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--requests", "100", "--batch", "4"]) == 0
    out = capsys.readouterr().out
    assert "H200: predicted from a roofline. 100 requests, closed, batch 4" in out
    for name in ("full depth", *POLICIES):
        assert f"\n| {name} |" in out


def test_the_command_prints_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--arrival", "poisson:900", "--output", "fixed:5", "--paths", "full=1,uniform:3=2", "--engines", "2"]
    limits = ["--policy", "cohort", "--pool", "9", "--max-wait", "7", "--batch", "3", "--kv-slots", "5000", "--json"]
    assert main(["simulate", "--requests", "60", *arguments, *limits]) == 0
    full, cohort = map(json.loads, capsys.readouterr().out.splitlines())
    assert (full["policy"], cohort["policy"]) == ("full depth", "cohort")
    assert cohort["predicted"] is True
    assert cohort["num_requests"] == 60 and cohort["num_engines"] == 2
    assert cohort["longest_wait"] <= 7 and cohort["peak_kv_slots"] <= 5000


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--arrival", "poisson"], "--arrival must be closed or poisson:RATE"),
        (["--arrival", "poisson:-1"], "--arrival must be closed"),
        (["--output", "geometric:0.5"], "--output must be geometric:MEAN"),
        (["--output", "fixed:2.5"], "--output must be"),
        (["--arrival", "poisson:1e-300"], "rate must lie in"),
        (["--arrival", "poisson:nan"], "--arrival must be closed"),
        (["--output", "geometric:1e300"], "mean_output must be at most"),
        (["--output", "fixed:1e18"], "mean_output must be at most"),
        (["--requests", "0"], "--requests: must be a whole number in 1..1000000, got '0'"),
        (["--requests", "9" * 5000], "--requests: must be a whole number in 1..1000000, got '999"),
        (["--requests", "1000000", "--output", "fixed:1000"], "num_requests must leave at most 100000000 tokens"),
        (["--engines", "0"], "--engines: must be a whole number in 1..1024"),
        (["--engines", "1000000000"], "--engines: must be a whole number in 1..1024"),
        (["--batch", "1000000000"], "--batch: must be a whole number in 1..65536"),
        (["--pool", "1000000000"], "--pool: must be a whole number in 1..1048576"),
        (["--prompt", "1e9"], "--prompt: must be a whole number in 1..1000000, got '1e9'"),
        (["--paths", "full=1e308,uniform:4=1e308"], "share must be a positive number"),
        (["--kv-slots", "10"], "must fit into"),
        (["--device", "nowhere.json"], "nowhere.json"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and part in err, err


def test_calibrate_measures_keeps_and_simulates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from models import tiny_hf

    monkeypatch.setenv("DYNSKIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dynskip.measure.random_models.random_hf_model", lambda config, **_: tiny_hf())
    sizes = ["--rows", "4", "--prompt-len", "4", "--context", "16", "--prefill", "16", "--rounds", "2"]
    assert main(["calibrate", "--backend", "torch", *sizes, "--out", str(tmp_path / "out.json"), "--quiet"]) == 0
    out = capsys.readouterr().out
    config = decoder_config(tiny_hf().config)
    kept = cached_path(device_key(), shape_key(config, "float32"))
    assert str(kept) in out
    costs = StepCosts.read(tmp_path / "out.json")
    assert costs == load_cached(device_key(), shape_key(config, "float32"))
    assert not costs.predicted and costs.num_layers == config.num_layers
    assert costs.decode.layer.num_rows == (1, 2, 3, 4) and costs.prefill.layer.num_rows == (4, 8, 16)
    assert 0 < costs.decode.layer.ms[0] <= costs.decode.layer.ms[-1]
    assert costs.conditions["backend"] == "torch"
    assert all(f"guesses of {num_seqs} take" in out for num_seqs in costs.draft_ratios)
    besides = f"takes {costs.step_ms:.4f} ms besides, and each row {costs.step_row_ms:.4f} ms; a prefill "
    assert besides + f"{costs.prefill_step_ms:.4f} ms" in out
    paths = ["--paths", "full=1,uniform:2=3"]
    assert main(["simulate", "--device", str(tmp_path / "out.json"), "--requests", "40", "--batch", "4", *paths]) == 0
    assert "simulated from measured costs" in capsys.readouterr().out


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_is_calibrated_and_simulated(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = family_shape(family)
    monkeypatch.setenv("DYNSKIP_CACHE", str(tmp_path))
    monkeypatch.setitem(SHAPES, "tiny", shape)
    sizes = ["--rows", "2", "--prompt-len", "4", "--context", "16", "--prefill", "8", "--rounds", "1"]
    assert main(["calibrate", "--shape", "tiny", *sizes, "--quiet"]) == 0
    kept = load_cached(device_key(), shape_key(shape, "bfloat16"))
    assert kept is not None and kept.num_layers == 6 and kept.conditions["shape"] == "tiny"
    family_hf(family).save_pretrained(tmp_path / "model")
    costs = tmp_path / "costs.json"
    assert main(["calibrate", "--model", str(tmp_path / "model"), *sizes, "--out", str(costs), "--quiet"]) == 0
    assert StepCosts.read(costs).num_layers == 6 and StepCosts.read(costs) != kept
    capsys.readouterr()
    for device in (["cpu", "--shape", "tiny"], [str(costs)]):
        assert main(["simulate", "--device", *device, "--requests", "20", "--batch", "2", "--paths", "full=1"]) == 0
        assert "simulated from measured costs" in capsys.readouterr().out


def test_a_device_that_was_not_calibrated_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYNSKIP_CACHE", str(tmp_path))
    assert main(["simulate", "--device", "this", "--shape", "opt-125m"]) == 2
    assert "Run `dynskip calibrate --shape opt-125m --device cpu`" in capsys.readouterr().err


def test_a_model_or_context_that_cannot_be_measured_is_refused() -> None:
    from models import tiny_config, tiny_model

    from dynskip.measure.calibration import measure_step_costs

    assert tiny_config().max_position_embeddings == 64
    with pytest.raises(ValueError, match="context_len must leave room in 64 positions, got 60"):
        measure_step_costs(tiny_model(), "cpu", prompt_len=4, context_len=60)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--rows", "0"], "--rows: must be a whole number in 1..1024, got '0'"),
        (["--rows", "1000000"], "--rows: must be a whole number in 1..1024, got '1000000'"),
        (["--rounds", "1000000000"], "--rounds: must be a whole number in 1..1000"),
        (["--prefill", "1000000000"], "--prefill: must be a whole number in 1..65536"),
        (["--context", "2040"], "context_len must leave room in 2048 positions, got 2040, behind prompts of 32 tokens"),
        (["--prompt-len", "2048"], "context_len must leave room in 2048 positions, got 1, behind prompts of 2048"),
    ],
)
def test_calibrate_refuses_what_cannot_be_before_it_makes_a_model(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate_command, "_model", lambda _: pytest.fail("a model was made"))
    assert main(["calibrate", "--quiet", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and part in err, err


@pytest.mark.parametrize(
    ("points", "line"),
    [
        ([(15.0, 0.5), (29.0, 0.78)], (0.2, 0.02)),
        ([(15.0, 0.5), (29.0, 0.3)], (0.4, 0.0)),  # less with more rows: noise
        ([(10.0, 0.1), (20.0, 0.4)], (0.0, 0.018)),
        ([(15.0, -0.2), (29.0, -0.1)], (0.0, 0.0)),
        ([(4.0, 0.3)], (0.3, 0.0)),
    ],
)
def test_what_streams_take_besides_never_falls_with_the_rows(
    points: list[tuple[float, float]], line: tuple[float, float]
) -> None:
    assert calibration._rising_line(points) == pytest.approx(line)


@pytest.mark.parametrize(
    ("values", "rising"),
    [
        ((1.0, 2.0, 2.0, 5.0), (1.0, 2.0, 2.0, 5.0)),
        ((3.0, 1.0, 2.0), (2.0, 2.0, 2.0)),
        ((1.0, 4.0, 2.0, 6.0, 5.0), (1.0, 3.0, 3.0, 5.5, 5.5)),
        ((8.0, 1.0, 1.0, 2.0), (3.0, 3.0, 3.0, 3.0)),
    ],
)
def test_costs_rise_with_rows_and_stay_near_what_was_measured(values: Any, rising: Any) -> None:
    assert calibration._rising(values) == pytest.approx(rising)


def test_what_streams_take_longer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that takes a known time besides what the model was found to take, on a clock that is made up."""
    from models import tiny_model

    model = tiny_model()
    curve = Curve((1, 8), (1.0, 2.0))
    costs = StepCosts(model.num_layers, LayerCosts(curve, curve, 1e-3), LayerCosts(curve, curve), step_ms=9.0)

    def served(name: str, model: object, jobs: list[Job], costs: StepCosts, **options: Any) -> SimpleNamespace:
        assert costs.step_ms == 0 and all(len(job.prompt_ids) == 4 for job in jobs)
        outcome = simulate(costs, [job.request for job in jobs], EngineOptions(**options))
        assert outcome.longest_wait > 1
        decode_ms = outcome.num_decode_steps * (0.5 + 0.25 * outcome.rows)
        slower = replace(
            outcome,
            decode_s=outcome.decode_s + decode_ms / 1e3,
            prefill_s=outcome.prefill_s + outcome.num_prefills * 0.125 / 1e3,
        )
        return SimpleNamespace(progress=1, outcome=slower, engine=SimpleNamespace(close=lambda: None))

    monkeypatch.setattr(calibration, "Served", served)
    found = calibration.add_stream_costs(model, costs, [2, 6], prompt_len=4, prefill_tokens=16)
    assert found.decode == costs.decode and found.prefill_step_ms == pytest.approx(0.125)
    assert (found.step_ms, found.step_row_ms) == pytest.approx((0.5, 0.25))
    with pytest.raises(ValueError, match="batches must hold at least one size, got none"):
        calibration.add_stream_costs(model, costs, [])


def test_what_guesses_take_longer_is_found_and_forgotten_by_the_model() -> None:
    """Of batches in which they could pay by the costs; an engine with these costs begins with what was found."""
    from models import tiny_model

    model = tiny_model()
    flat, steep = Curve((1, 64), (1.0, 1.0)), Curve((1, 8), (1.0, 8.0))
    costs = StepCosts(model.num_layers, LayerCosts(flat, flat), LayerCosts(flat, flat), draft_ratios={4: (9.0, 9.0)})
    found = calibration.add_draft_costs(model, costs, [1, 2], prompt_len=4)
    assert found.decode == costs.decode and set(found.draft_ratios) == {1, 2}
    assert all(0 < ratio < 100 for ratios in found.draft_ratios.values() for ratio in ratios)
    engine = Engine(model, costs=found, batch=1)
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=6), draft=LayerPath.uniform(model.num_layers, 1))
    engine.run()
    lengths = engine.execution.drafting.lengths
    assert lengths is not None and lengths.ratios(1) == found.draft_ratios[1], "the model has forgotten the calibration"
    dear = replace(costs, decode=LayerCosts(steep, flat))
    assert calibration.add_draft_costs(model, dear, [2], prompt_len=4).draft_ratios == {2: (1.0, 1.0)}


def test_calibrate_fits_its_context_to_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYNSKIP_CACHE", str(tmp_path / "cache"))
    sizes = ["--rows", "1", "--prompt-len", "4", "--prefill", "4", "--rounds", "1", "--quiet"]
    assert main(["calibrate", "--model", "opt-mini", *sizes, "--out", str(tmp_path / "out.json")]) == 0
    assert StepCosts.read(tmp_path / "out.json").conditions["context_len"] == 512 - 4 - calibration.num_new_tokens(1)
