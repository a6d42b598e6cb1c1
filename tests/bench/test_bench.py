"""The benchmark measures what it says: turns, medians, products, verdicts, and the gate before them."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import ModuleType

import pytest
import torch
from families import cut_family
from models import cpu_backend
from transformers import OPTForCausalLM as HFOPTForCausalLM

from bench import serving
from bench.report.choosing import choosing_tables
from bench.report.cpu import cpu_tables
from bench.report.device import append_row
from bench.report.serving import key_table, serving_tables
from dynskip import CausalLM, LayerPath, OPTForCausalLM
from dynskip.benchmark import ctranslate2_runner, parts, suite
from dynskip.benchmark.report import Report, Row, markdown_table
from dynskip.cli import main
from dynskip.costs.layer_costs import ModelBytes, PathMix
from dynskip.measure import machine, random_models, timing
from dynskip.measure.agreement import Gate
from dynskip.measure.products import Products
from dynskip.measure.random_models import hf_config, random_hf_model
from dynskip.measure.runners import DynskipRunner, TransformersRunner
from dynskip.measure.timing import Samples, interleave, interval_over_rounds
from dynskip.models.bloom import bloom_shape
from dynskip.models.gpt2 import gpt2_shape
from dynskip.models.gpt_neox import gpt_neox_shape
from dynskip.models.linear import Linear
from dynskip.models.llama import llama_shape
from dynskip.models.opt import opt_shape
from dynskip.models.phi import phi_shape
from dynskip.models.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[2]
ROW = Row("decode", 8, "full depth / its products", 1.2, 1.25, False, 12.0, 10.0, 6)
CONDITIONS = {
    "machine": "test-2-cores",
    "cpu": "Test",
    "num_cores": 2,
    "num_threads": 2,
    "isa": "AVX512",
    "versions": {"torch": "2.13", "ctranslate2": None},
    "commit": "abc",
    "date": "2026-01-01 00:00 UTC",
    "load": [0.1, 0.2, 0.3],
    "shape": "tiny",
    "dtype": "bfloat16",
    "backend": "native",
    "prompt_len": 4,
    "bandwidth_gbps": 40.0,
    "peak_gflops": 700.0,
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a shape that takes no time."""
    monkeypatch.setitem(SHAPES, "tiny", opt_shape(4, 32, 2, 64))
    monkeypatch.setattr(machine, "_READ_BYTES", 2**16)
    monkeypatch.setattr(machine, "_GEMM_SIZE", 16)
    return "tiny"


# A small one of each architecture that differs.
OTHERS = {
    "llama": llama_shape(4, 32, 4, 2, 48, 128, 64, 1e4),
    "mistral": llama_shape(4, 32, 4, 2, 48, 128, 64, 1e4, architecture="mistral", window=3),
    "qwen2": llama_shape(4, 32, 4, 2, 48, 128, 64, 1e4, architecture="qwen2"),
    "qwen3": llama_shape(4, 32, 4, 2, 48, 128, 64, 1e4, architecture="qwen3", head_size=16),
    "gpt_neox": gpt_neox_shape(4, 32, 2, 64, 128),
    "bloom": bloom_shape(4, 32, 2),
    "gpt2": gpt2_shape(4, 32, 2),
    "phi": phi_shape(4, 32, 2, 128),
}


@pytest.fixture
def hf_model(tiny: str) -> HFOPTForCausalLM:
    return random_hf_model(hf_config(tiny, vocab_size=128))


# Timing


def test_tasks_take_turns_and_the_first_one_changes() -> None:
    calls: list[str] = []
    tasks: dict[str, timing.Task] = {name: lambda name=name: calls.append(name) for name in "abc"}  # type: ignore[misc]
    samples = interleave(tasks, num_rounds=3, num_repeats=2, num_warm_ups=1)
    assert "".join(calls) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"
    assert [sample.num_samples for sample in samples.values()] == [6, 6, 6]


def test_a_ratio_compares_within_rounds() -> None:
    ours, theirs = Samples([[1.0, 3.0], [40.0, 80.0], [4.0, 4.0]]), Samples([[1.0], [20.0], [2.0]])
    assert ours.over(theirs) == 2.0  # of 2, 3 and 2, although one round was twenty times slower
    assert ours.ms == 4.0
    assert ours.range_ms == (1.0, 80.0)
    assert theirs.plus(1.0).rounds == [[2.0], [21.0], [3.0]]


def test_an_interval_is_that_of_rounds_drawn_whole() -> None:
    rounds = [0.9 + 0.01 * number for number in range(21)]
    low, high = interval_over_rounds(median, rounds)
    # The 95 % interval of the median of 21 is that from the 6th to the 16th, by the binomial distribution.
    assert low == pytest.approx(0.95, abs=0.021) and high == pytest.approx(1.05, abs=0.021)
    assert interval_over_rounds(median, rounds) == (low, high)
    with pytest.raises(ValueError, match="rounds must be at least 6, got 5"):
        interval_over_rounds(median, rounds[:5])


def test_parts_of_a_call_are_those_of_the_calls_that_were_timed(hf_model: HFOPTForCausalLM) -> None:
    model = CausalLM.from_hf(hf_model, backend="torch")
    runner = DynskipRunner(model, torch.zeros(1, 4, dtype=torch.int64), [LayerPath.full(4)], 2)
    inside = suite._Inside(runner, runner.prefill)
    # A warm-up, and three rounds of a lead-in and two calls: products, attention, and the rest of each.
    warm_up, lead_in = (99.0, 9.0, 9.0), (50.0, 5.0, 5.0)
    rounds = [
        [(1.0, 2.0, 3.0), (2.0, 2.0, 3.0)],
        [(3.0, 1.0, 3.0), (4.0, 1.0, 3.0)],
        [(5.0, 2.0, 1.0), (6.0, 2.0, 1.0)],
    ]
    inside.calls = [warm_up, *(call for calls in rounds for call in (lead_in, *calls))]
    whole = Samples([[10.0, 10.0]] * 3)
    assert inside.samples(whole, "products", 1).rounds == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    parts_ms = inside.parts(whole, 1)
    assert parts_ms == {"products": 3.5, "attention": 2.0, "rest of the call": 3.0, "outside of the call": 1.5}
    inside.calls = inside.calls[-2:]
    with pytest.raises(AssertionError, match="each call was counted"):
        inside.samples(whole, "products", 1)


def test_a_task_may_measure_itself() -> None:
    assert timing.timed(lambda: 12.5) == 12.5
    assert timing.timed(lambda: None) > 0


# Products


@pytest.mark.parametrize("name", ["opt", *OTHERS])
def test_products_are_those_of_the_model(name: str, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every multiplication of a real step is in the products, with the same rows, and no other."""
    config = hf_config(OTHERS.get(name, tiny), vocab_size=128)
    model = CausalLM.from_hf(random_hf_model(config), backend="torch")
    prompts = torch.randint(0, 128, (5, 4))
    paths = [LayerPath.random(4, 2, seed=seed) for seed in range(5)]
    runner = DynskipRunner(model, prompts, paths, max_new_tokens=4)
    seen: list[tuple[int, int, int]] = []
    forward = Linear.forward

    def record(self: Linear, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        seen.append((self.in_features, self.out_features, x.shape[0]))
        return forward(self, x, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Linear, "forward", record)
    for run, mix in ((runner.prefill, PathMix.of(paths, 4)), (runner.step, PathMix.of(paths))):
        seen.clear()
        run()
        real = sorted(seen)
        products = Products(model, mix)
        seen.clear()
        products.run()
        assert sorted(seen) == real
        assert products.flops == sum(2 * a * b * rows for a, b, rows in real)


def test_the_shape_of_a_model_is_counted_from_its_weights(hf_model: HFOPTForCausalLM) -> None:
    shape = ModelBytes.of(OPTForCausalLM.from_hf(hf_model, pack=False).decoder_config)
    assert shape.layer_bytes == (4 * 32 * 32 + 2 * 32 * 64) * 2
    assert shape.layer_flops_per_row == shape.layer_bytes  # two operations and two bytes a weight
    assert shape.head_bytes == 128 * 32 * 2
    assert shape.kv_entry_bytes == 2 * 32 * 2


def test_random_models_repeat_and_tie_their_head(tiny: str) -> None:
    config = hf_config(tiny, vocab_size=128)
    first, second, other = (random_hf_model(config, seed) for seed in (0, 0, 1))
    assert first.lm_head.weight is first.model.decoder.embed_tokens.weight
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same) and len(same) > 16 * 4
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert random_models.weight_bytes(config) == sum(p.numel() * 2 for p in first.parameters())
    assert not first.model.decoder.final_layer_norm.weight.isnan().any()
    with pytest.raises(ValueError, match=r"get_shape: name must be one of opt-1.3b, .*, got 'opt-13'"):
        hf_config("opt-13")


# Runners and gate


def test_runners_choose_the_same_tokens(hf_model: HFOPTForCausalLM) -> None:
    prompts = torch.randint(0, 128, (3, 5))
    float32 = hf_model.float()
    ours = DynskipRunner(OPTForCausalLM.from_hf(float32), prompts, [LayerPath.full(4)] * 3, max_new_tokens=4)
    ours.prefill()
    chosen = []
    for cache in ("dynamic", "static"):
        theirs = TransformersRunner(float32, prompts, max_new_tokens=4, cache=cache)
        theirs.prefill()
        tokens = [theirs.token_ids]
        for _ in range(3):
            theirs.step()
            tokens.append(theirs.token_ids)
        chosen.append(torch.cat(tokens, dim=1).tolist())
    for _ in range(3):
        ours.step()
    assert ours.generation is not None
    assert [sequence.token_ids for sequence in ours.generation.sequences] == chosen[0] == chosen[1]
    with pytest.raises(ValueError, match="cache must be 'dynamic' or 'static', got 'paged'"):
        TransformersRunner(float32, prompts, 4, cache="paged")


def test_the_gate_passes_the_model_and_stops_another(hf_model: HFOPTForCausalLM) -> None:
    paths = [LayerPath.full(4), LayerPath.uniform(4, budget=2), LayerPath.of(4, [3])]
    gate = Gate(hf_model, paths)
    agreements = gate.check_model(OPTForCausalLM.from_hf(hf_model))
    assert [agreement.what for agreement in agreements] == ["dynskip, prefill", "dynskip, decode"]
    assert all(0 < agreement.error <= agreement.allowed for agreement in agreements)
    gate.paths[1] = LayerPath.full(4)  # what it computes now is not what the gate knows
    with pytest.raises(RuntimeError, match=r"logits of dynskip, prefill must be within .* Nothing was timed"):
        gate.check_model(OPTForCausalLM.from_hf(hf_model))
    with pytest.raises(RuntimeError, match="got nan"):
        gate.check("NaN", torch.full_like(gate.truth, float("nan")))


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_every_architecture_are_made_checked_and_run(name: str) -> None:
    config = hf_config(OTHERS[name], vocab_size=128)
    hf_model = random_hf_model(config)
    assert not any(tensor.is_meta for tensor in (*hf_model.parameters(), *hf_model.buffers()))
    assert random_models.weight_bytes(config) == sum(p.numel() * 2 for p in hf_model.parameters())
    is_tied = hf_model.get_output_embeddings().weight is hf_model.get_input_embeddings().weight
    assert is_tied == (name not in ("gpt_neox", "phi"))
    paths = [LayerPath.full(4), LayerPath.uniform(4, budget=2), LayerPath.of(4, [3])]
    gate = Gate(hf_model, paths)
    with torch.no_grad():
        for truth, token_ids, path in zip(gate.truth, gate.prompts, paths, strict=True):
            with cut_family(copy.deepcopy(hf_model).double(), path) as cut:
                exact = cut(token_ids[None], use_cache=False).logits[0]
            torch.testing.assert_close(truth, exact)
    assert all(agreement.error > 0 for agreement in gate.check_model(CausalLM.from_hf(hf_model)))
    prompts, float32 = gate.prompts, hf_model.float()
    ours = DynskipRunner(CausalLM.from_hf(float32), prompts, [LayerPath.full(4)] * 3, max_new_tokens=4)
    theirs = TransformersRunner(float32, prompts, max_new_tokens=4)
    ours.prefill()
    theirs.prefill()
    tokens = [theirs.token_ids]
    for _ in range(3):
        ours.step()
        theirs.step()
        tokens.append(theirs.token_ids)
    assert ours.generation is not None
    assert [sequence.token_ids for sequence in ours.generation.sequences] == torch.cat(tokens, dim=1).tolist()


# Parts of a step


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_parts_add_up_and_leave_no_trace(hf_model: HFOPTForCausalLM, backend: str) -> None:
    model = OPTForCausalLM.from_hf(hf_model, backend=cpu_backend(backend))
    paths = [LayerPath.random(4, 2, seed=seed) for seed in range(4)]
    runner = DynskipRunner(model, torch.randint(0, 128, (4, 5)), paths, max_new_tokens=8)
    runner.prefill()
    forward, launchers = Linear.forward, model.executor().backend  # type: ignore[union-attr]
    found = parts.measure_parts(runner, num_steps=3)
    assert Linear.forward is forward and model.executor().backend is launchers  # type: ignore[union-attr]
    assert len(found.steps) == 3
    names = {"planning", "sampling", "products", "attention", "other"}
    names |= {"rest of the call"} if backend == "native" else {"gather", "scatter", "kv store", "layer norm"}
    of_llama = set() if backend == "native" else {"rotary", "activation"}
    for step in found.steps:
        assert set(step) == names | {"step"}
        assert step["step"] == pytest.approx(sum(step[name] for name in names))
        assert all(ms > 0 for name, ms in step.items() if name != "gather")
    assert 0 < found.overhead_share < 1
    assert found.parts[0] == "step"
    llama = CausalLM.from_hf(random_hf_model(hf_config(OTHERS["llama"])), backend=cpu_backend(backend))
    runner = DynskipRunner(llama, torch.randint(0, 128, (4, 5)), paths, max_new_tokens=4)
    runner.prefill()
    assert set(parts.measure_parts(runner, num_steps=1).steps[0]) == names | {"step"} | of_llama


def test_time_inside_a_part_counts_once() -> None:
    clock = parts._Clock()
    outer = clock.wrap("outer", lambda: inner())
    inner = clock.wrap("inner", lambda: sum(range(200_000)))
    outer()
    assert clock.parts["outer"] < clock.parts["inner"]


# Reports


@pytest.mark.parametrize(
    ("row", "passed", "verdict", "target"),
    [
        (ROW, True, "met", "<= 1.25x"),
        (replace(ROW, value=1.26), False, "MISSED", "<= 1.25x"),
        (replace(ROW, at_least=True), False, "MISSED", ">= 1.25x"),
        (replace(ROW, at_least=True, value=1.25), True, "met", ">= 1.25x"),
        (replace(ROW, target=None), None, "-", ""),
        (replace(ROW, section="overhead", target=0.03, value=0.02), True, "met", "<= 3%"),
        (replace(ROW, value=float("nan")), False, "MISSED", "<= 1.25x"),
    ],
)
def test_verdicts(row: Row, passed: bool | None, verdict: str, target: str) -> None:
    assert (row.passed, row.verdict, row.shown_target) == (passed, verdict, target)


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    report = Report(CONDITIONS, (ROW, replace(ROW, batch=32, value=1.3)), {"ctranslate2": "Not installed."})
    data, page = report.write(tmp_path)
    assert (data.name, page.name) == ("tiny-test-2-cores.jsonl", "tiny-test-2-cores.md")
    assert Report.read(data) == report
    text = page.read_text()
    assert "| decode  |     8 | full depth / its products |" in text and "MISSED" in text
    assert "Not measured: ctranslate2. Not installed." in text


def test_parts_stand_beside_their_roofline() -> None:
    parts_ms = {"full 8": {"step": 12.0, "products": 10.0}, "mix 8": {"step": 9.0, "products": 7.0, "gather": 0.5}}
    text = Report(CONDITIONS | {"parts_ms": parts_ms, "roofline_ms": {"8": 9.5}}, (ROW,), {}).markdown()
    assert "| gather   |   0.00 |  0.50 |" in text
    assert "| roofline |   9.50 |       |" in text


def test_a_miss_says_where_its_time_went(tmp_path: Path) -> None:
    lost = {"products": 1.5, "attention": -0.5, "rest of the call": 0.25, "outside of the call": 0.75}
    row = replace(ROW, what="share of the allowed speed-up", value=0.9, target=0.95, at_least=True, low=0.88, high=0.96)
    met = replace(row, batch=32, value=0.97)
    report = Report(CONDITIONS, (replace(row, lost_ms=lost), replace(met, lost_ms=lost)), {})
    text = report.markdown()
    assert "|     8 | share of the allowed speed-up |       12.0 |     10.0 | 90.0% | 88.0% to 96.0% |" in text
    (missed,) = (line for line in text.splitlines() if "+1.50" in line)
    cells = [cell.strip() for cell in missed.strip("|").split("|")]
    assert cells == ["share of the allowed speed-up", "8", "+2.00", "+1.50", "-0.50", "+0.25", "+0.75"]
    assert Report.read(report.write(tmp_path)[0]) == report


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold at least one row, got none"),
        ("{}\n", "must hold rows of a report, got line 1"),
        ("[]\n", "must hold rows of a report, got line 1"),
        ('{"skipped": "a", "reason": "b", "conditions": {}}\nno json', "must hold rows of a report, got line 2"),
        (
            '{"skipped": "a", "reason": "b", "conditions": {}}\n{"skipped": "c", "reason": "", "conditions": {"x": 1}}',
            "must hold one run, got other conditions in line 2",
        ),
    ],
)
def test_a_damaged_report_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Report.read(path)


def test_tables_are_aligned() -> None:
    table = markdown_table(("name", "x"), [("a", "1.0"), ("longer", "10.25")], right={1})
    assert table == "| name   |     x |\n|--------|------:|\n| a      |   1.0 |\n| longer | 10.25 |\n"


# The whole suite


def test_the_suite_answers_every_question(tiny: str) -> None:
    reason = ctranslate2_runner.unavailable_reason("opt")
    options = suite.Options(
        shape=tiny, batches=(1, 3), prompt_len=4, num_rounds=2, num_prefill_rounds=2, mix_batch=3, vocab_size=128,
        long_prompt_len=9, progress=False,
    )  # fmt: skip
    report = suite.Suite(options).run()
    assert (report.skipped == {}) if reason is None else (report.skipped == {"ctranslate2": reason})
    questions = [(row.section, row.batch, row.what) for row in report.rows]
    assert len(set(questions)) == len(questions)
    is_one_call = report.conditions["backend"] == "native"  # which counts what is in it
    per_batch = {"decode": 2 + is_one_call, "prefill": 3, "paths": 8, "overhead": 3, "ctranslate2": int(reason is None)}
    for size in (1, 3):
        for section, count in per_batch.items():
            extra = int((section, size) in (("decode", 1), ("overhead", 3)))  # reading the weights; the mix's overhead
            assert sum(row.section == section and row.batch == size for row in report.rows) == count + extra, section
    assert [row.batch for row in report.rows if row.section == "mix"] == [3, 3, 3]
    assert all(row.value > 0 and row.ours_ms > 0 and row.other_ms > 0 and row.num_samples > 0 for row in report.rows)
    assert report.conditions["errors"].keys() >= {"dynskip, prefill", "dynskip, decode"}
    timed_in_turns = [row for row in report.rows if row.section not in ("overhead", "ctranslate2")]
    for row in timed_in_turns:
        is_prefill = row.section == "prefill" or row.what.startswith("prefill")  # of which short ones have many rounds
        assert (row.low is not None) == is_prefill
        assert row.low is None or row.low <= row.value <= (row.high or 0)
    lost = {row.what: row.lost_ms for row in report.rows if row.lost_ms}
    if is_one_call:
        shares = {what for what in lost if what.endswith("share of the allowed speed-up")}
        assert len(shares) == 5 and len(lost) == 7, "of each phase and path, of the mix, of both floors"
        inside = {"products", "attention", "rest of the call", "outside of the call"}
        assert all(set(row.lost_ms) == inside for row in report.rows if row.lost_ms)
        of_prefill = report.conditions["prefill_parts_ms"]
        assert set(of_prefill) == {f"{name} {size}" for name in ("full", "50%", "25%") for size in (1, 3)}
    json.dumps(report.lines())


def test_only_what_was_asked_for_runs(tiny: str) -> None:
    options = suite.Options(
        shape=tiny, batches=(2,), sections=("mix",), prompt_len=4, num_rounds=1, mix_batch=2, vocab_size=128,
        progress=False,
    )  # fmt: skip
    report = suite.Suite(options).run()
    assert {row.section for row in report.rows} == {"mix"}
    assert report.skipped == {}


def test_many_rounds_begin_anew_so_that_contexts_stay_short(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prefilled: list[int] = []
    prefill = DynskipRunner.prefill

    def counted(self: DynskipRunner) -> None:
        prefill(self)
        assert self.generation is not None
        prefilled.append(len(self.prompts))

    monkeypatch.setattr(DynskipRunner, "prefill", counted)
    options = suite.Options(
        shape=tiny, batches=(2,), sections=("decode",), prompt_len=4, num_rounds=18, vocab_size=128, progress=False
    )
    report = suite.Suite(options).run()
    assert options.max_new_tokens == replace(options, num_rounds=8).max_new_tokens
    assert prefilled == [2, 2, 2], "before the first 8 rounds, the second, and the last 2"
    rows = {row.what: row for row in report.rows}
    over = rows["speed-up over transformers"]
    assert over.num_samples == 36 and over.low is not None


def test_ctranslate2_is_skipped_by_name(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctranslate2_runner.importlib.util, "find_spec", lambda name: None)
    options = suite.Options(
        shape=tiny, batches=(1,), sections=("ctranslate2",), prompt_len=4, vocab_size=128, progress=False
    )
    report = suite.Suite(options).run()
    assert report.rows == ()
    assert "ctranslate2 is not installed. Install it: pip install" in report.skipped["ctranslate2"]


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_architecture_is_measured_without_ctranslate2(
    name: str, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, tiny, OTHERS[name])
    options = suite.Options(
        shape=tiny, batches=(2,), prompt_len=4, num_rounds=1, num_prefill_rounds=1, mix_batch=2, progress=False
    )
    report = suite.Suite(options).run()
    assert {row.section for row in report.rows} == {"decode", "prefill", "paths", "mix", "overhead"}
    assert report.skipped == {
        "ctranslate2": f"ctranslate2 is compared on models of type opt only, got {name}. Choose a --shape of OPT."
    }
    shape = OTHERS[name]
    assert report.conditions["kv_entry_bytes"] == 2 * shape.num_kv_heads * shape.head_size * 2


def test_too_little_memory_is_said_before_it_is_taken(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "available_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"must have .* GiB of free memory, got .* Choose a smaller --shape"):
        suite.Suite(suite.Options(shape=tiny, vocab_size=128, progress=False)).run()


def test_the_machine_is_described() -> None:
    found = machine.describe()
    assert found["machine"].endswith("cores") and " " not in found["machine"]
    assert found["versions"]["torch"] == torch.__version__
    assert len(found["load"]) == 3


def test_speed_is_plausible(tiny: str) -> None:
    speed = machine.measure_speed(num_samples=2)
    assert 0.01 < speed.bandwidth_gbps < 1e5
    assert 1e-3 < speed.peak_gflops < 1e6


# The command line, and the README


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "decode,nothing"], "--only must list sections of decode, .*, got 'nothing'"),
        (["--batch", "0"], "argument --batch: must be a whole number in 1..1024, got '0'"),
        (["--batch", "100000000"], "argument --batch: must be a whole number in 1..1024, got '100000000'"),
        (["--prompt-len", "4096"], "argument --prompt-len: must be a whole number in 1..1024, got '4096'"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--quick", "--rounds", "40"], "argument --rounds: not allowed with argument --quick"),
    ],
)
def test_mistakes_end_with_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_quick_times_each_prefill_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[suite.Options] = []

    class Asked(suite.Suite):
        def __init__(self, options: suite.Options) -> None:
            asked.append(options)
            super().__init__(options)

        def run(self) -> Report:
            return Report(CONDITIONS, (ROW,), {})

    monkeypatch.setattr(suite, "Suite", Asked)
    assert main(["bench", "--quick"]) == main(["bench", "--rounds", "9"]) == 0
    quick, many = asked
    assert (quick.num_rounds, quick.num_prefill_rounds, quick.prefill_s) == (2, 1, 0)
    assert (many.num_rounds, many.prefill_s) == (9, 30)


def table_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("table", ROOT / "bench" / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_show_the_committed_results(capsys: pytest.CaptureFixture[str]) -> None:
    table = table_script()
    assert sorted(path.name for path in table.PAGES) == ["README.md", "measured.md", "serving.md", "speculation.md"]
    for path, fill in table.PAGES.items():
        text = path.read_text(encoding="utf-8")
        assert fill(text, ROOT / "bench" / "results") == text, f"{path.name}: run `python -m bench.table`"
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (path.parent / target).exists(), f"{path.name} links to {target}, which is not there"
    assert table.main(["--check"]) == 0


def test_a_page_that_is_behind_is_noticed_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_script()
    page = tmp_path / "page.md"
    marks = (
        (table.KEY_BEGIN, table.KEY_END),
        (table.SERVING_BEGIN, table.SERVING_END),
        (table.SERVED_BEGIN, table.SERVED_END),
    )
    page.write_text("\n".join(f"{begin}\nold\n{end}" for begin, end in marks), encoding="utf-8")
    monkeypatch.setattr(table, "PAGES", {page: table.fill_serving})
    assert table.main(["--check"]) == 1 and "old" in page.read_text(encoding="utf-8")
    assert table.main([]) == 0 and "old" not in page.read_text(encoding="utf-8")
    assert table.main(["--check"]) == 0


def test_the_pages_show_the_committed_results() -> None:
    results = ROOT / "bench" / "results"
    reports, streams = sorted((results / "cpu").glob("*.jsonl")), sorted(results.glob(table_script().SERVING_FILES))
    assert reports and streams and streams == sorted(results.glob("*.jsonl"))
    for path in reports:
        report = Report.read(path)
        assert path.stem == f"{report.conditions['shape']}-{report.conditions['machine']}"
        assert path.with_suffix(".md").read_text(encoding="utf-8") == report.page()
    for path in streams:
        conditions, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        del conditions["part"]
        # A title may say which part a file holds.
        shown = path.with_suffix(".md").read_text(encoding="utf-8").partition("\n")[2]
        assert shown == serving.page(conditions, lines).partition("\n")[2]


def test_a_page_shows_every_row_of_every_report() -> None:
    page = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    shown = page.split(table_script().BEGIN)[1].split(table_script().END)[0]
    tables: dict[str, dict[str, dict[str, str]]] = {}  # by machine, question and column
    for title, text in re.findall(r"^\*\*(.+)\*\*\n\n((?:\|.*\n)+)", shown, re.MULTILINE):
        header, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
        tables[title] = {line[0]: dict(zip(header[1:], line[1:], strict=True)) for line in lines}
    reports = [Report.read(path) for path in sorted((ROOT / "bench" / "results" / "cpu").glob("*.jsonl"))]
    assert {"opt-1.3b", "llama-3.2-1b", "smollm2-135m"} <= {report.conditions["shape"] for report in reports}
    assert any(row.passed is False for report in reports for row in report.rows)
    num_cells = sum(bool(cell) for table in tables.values() for line in table.values() for cell in line.values())
    num_targets = sum(bool(line["target"]) for table in tables.values() for line in table.values())
    assert num_cells - num_targets == sum(len(report.rows) for report in reports)
    flat = " ".join(shown.split())
    for report in reports:
        found = report.conditions
        for row in report.rows:
            what = next(words for words in (row.what, f"{row.section}, {row.what}", f"decode, {row.what}")
                        if words in tables[found["cpu"]])  # fmt: skip
            cell = tables[found["cpu"]][what][f"{found['shape']}, batch {row.batch}"]
            assert cell == row.show(row.value) + (" (missed)" if row.verdict == "MISSED" else "")
        assert " ".join(report.conditions_words().split()) in flat


def test_reports_of_one_machine_share_a_table(tmp_path: Path) -> None:
    """A further file is a further column, or further rows of a model that is there; targets that differ say whose."""
    speedup = replace(ROW, what="speed-up over transformers", value=1.5, target=2.0, at_least=True)
    other = replace(speedup, target=1.4, batch=1)
    library = replace(ROW, section="llama.cpp", what="speed-up over llama.cpp", value=0.5, target=1.0, at_least=True)
    reports = {
        Path("a.jsonl"): Report(CONDITIONS, (ROW, speedup), {"ctranslate2": "Not installed."}),
        Path("b.jsonl"): Report(CONDITIONS | {"shape": "other"}, (other,), {}),
        Path("c.jsonl"): Report(CONDITIONS | {"prompt_len": 512}, (library,), {}),
        Path("d.jsonl"): Report(CONDITIONS | {"machine": "another", "cpu": "Another"}, (ROW,), {}),
    }
    first, second = cpu_tables(reports, "here").split("\n**Another**\n")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines() if line.startswith("| ")]
    assert first.startswith("**Test**\n") and lines == [
        ["", "tiny, batch 8", "other, batch 1", "target"],
        ["decode, full depth / its products", "1.20x", "", "<= 1.25x"],
        ["decode, speed-up over transformers", "1.50x (missed)", "1.50x", "tiny: >= 2x; other: >= 1.4x"],
        ["decode, speed-up over llama.cpp", "0.50x (missed)", "", ">= 1x"],
    ]
    assert "\n- [a](here/a.md): tiny shapes, random bfloat16 weights, prompt 4" in first
    assert "Not measured: ctranslate2. Not installed." in " ".join(first.split())
    assert "\n- [b](here/b.md): other shapes" in first and "\n- [c](here/c.md): tiny shapes" in first
    assert " 1.20x | <= 1.25x |" in second and "[d](here/d.md)" in second
    reports[Path("e.jsonl")] = reports[Path("b.jsonl")]
    with pytest.raises(ValueError, match=r"b.jsonl and e.jsonl must answer different questions of other .* in both"):
        cpu_tables(reports, "here")


def test_the_table_of_streams_says_what_was_missed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="paths must name a file, got none"):
        serving_tables([])
    conditions = {
        **CONDITIONS, "part": "conditions", "commit": "streams", "model": "opt-mini",
        "dtype": "bfloat16", "backend": "torch", "requests": 1024,
        "prompts": "prompts of 32 tokens", "mean_output": 16.0, "mean_layers": 5.5, "num_layers": 24,
        "versions": {"dynskip": "0.1", "torch": "2.13"}, "date": "today",
    }  # fmt: skip
    stream = {
        "part": "stream",
        "batch": 16,
        "layers": 5.58,
        "union": 8.0,
        "longest_wait": 9,
        "max_wait": 12,
        "ideal_all": 4.0,
    }
    lines = [
        conditions,
        {**stream, "name": "lockstep", "decode_s": 8.8, "tokens_per_s": 100},
        {**stream, "name": "cohort", "decode_s": 5.0, "tokens_per_s": 170, "decode_gain": 3.0, "ideal_decode": 3.2,
         "gain": 3.6},
    ]  # fmt: skip
    closed = {"part": "closed", "batch": 16, "name": "cohort", "over_lockstep": 1.01}
    static = {"part": "static", "batch": 16, "requests": 48, "name": "engine, cohort", "over_static": 1.2,
              "over_transformers": 8.0}  # fmt: skip
    overhead = {"part": "overhead", "name": "engine", "batch": 64, "resident": 250.0, "share": 0.012}
    queue = {"part": "queues", "batch": 16, "name": "32, calibrated", "requests": 32, "costs": "calibrated",
             "over_lockstep": 0.97}  # fmt: skip
    others = {**conditions, "commit": "others"}
    paths = [tmp_path / "serving-a.jsonl", tmp_path / "serving-b.jsonl"]
    paths[0].write_text("".join(f"{json.dumps(line)}\n" for line in (others, closed, static)), encoding="utf-8")
    with pytest.raises(ValueError, match="must hold a stream, got other parts only"):
        serving_tables(paths[:1])
    paths[1].write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, overhead, queue]), encoding="utf-8")
    found = serving_tables(paths)
    rows = dict(re.findall(r"^\| (\S.*?) +\| +(\S.*?) \| +(?:.*?)\|$", found, re.MULTILINE))
    assert rows["decode, cohort over lockstep"] == "1.76x (missed)"
    assert rows["decode, share of the ideal"] == "94%"
    assert rows["a closed batch, cohort over lockstep"] == "1.01x"
    assert rows["a queue of 32, costs calibrated, cohort over lockstep"] == "0.97x (missed)"
    assert "tokens/s, full depth" not in rows
    assert ">= 1.90x" in found and "[serving-b.md](bench/results/serving-b.md)" in found
    note = " ".join(found.split())
    assert "Streams: 1,024 requests" in note and "5.50 per request, 5.58 per decoded row; commit streams" in note
    assert "the first 16 of these requests, and nobody after them; commit others" in note
    assert "the first 48 of these requests at full depth, in batches of 16; transformers' generate pads" in note
    assert "its longest output; commit others" in note and "at most 3%); commit streams" in note
    assert "More than 100%" not in note
    assert key_rows(paths) == [
        ["model", "CPU", "mean layers", "batch", "decode, cohort over full depth", "decode, share of the ideal",
         "decode, cohort over lockstep", "worst queue, cohort over lockstep"],
        ["opt-mini", "Test", "5.5 of 24", "16", "3.00x", "94%", "1.76x (missed)", "0.97x (missed)"],
        ["target", "", "", "16", "", ">= 90%", ">= 1.90x", ">= 0.98x"],
    ]  # fmt: skip
    assert "1,024 requests, all there" in (note := " ".join(key_table(paths).split())) and "More than" not in note
    lines[-1] |= {"decode_gain": 3.3}
    lines[0]["calibrated"] = {"date": "the day before"}
    paths[1].write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    assert "More than 100% of the ideal is possible" in (note := " ".join(serving_tables(paths).split()))
    assert "calibrated before (the day before)" in note
    assert key_table(paths).endswith("from costs that were calibrated before.\n")
    other = {**conditions, "cpu": "Another", "machine": "another", "requests": 256, "mean_layers": 6.0}
    small, deep = ({**line, "batch": 32} for line in lines[1:])
    paths.append(tmp_path / "serving-c.jsonl")
    paths[2].write_text("".join(f"{json.dumps(line)}\n" for line in (other, small, deep)), encoding="utf-8")
    assert key_rows(paths)[1:] == [
        ["opt-mini", "Another", "6.0 of 24", "32", "3.30x", "103%", "1.76x", ""],
        ["opt-mini", "Test", "5.5 of 24", "16", "3.30x", "103%", "1.76x (missed)", ""],
        ["target", "", "", "16 / 32", "", ">= 90% / >= 88%", ">= 1.90x / >= 1.70x", ""],  # no queue was timed
    ]
    assert "256 or 1,024 requests" in " ".join(key_table(paths).split())
    large = {**other, "model": "opt-1.3b shapes with random weights"}
    deep["decode_gain"] = 2.9  # 91 % of the ideal
    paths.append(tmp_path / "serving-d.jsonl")
    paths[3].write_text("".join(f"{json.dumps(line)}\n" for line in (other, small, deep)), encoding="utf-8")
    paths[2].write_text("".join(f"{json.dumps(line)}\n" for line in (large, small, deep)), encoding="utf-8")
    shares = [row[5] for row in key_rows(paths)[1:]]
    assert shares == ["91% (missed)", "91%", "103%", ">= 95% / >= 94%", ">= 90% / >= 88%"]
    assert [row[0] for row in key_rows(paths)[4:]] == [
        "target, opt-1.3b shapes with random weights",
        "target, opt-mini",
    ]


def test_the_table_of_draws_says_what_was_missed(tmp_path: Path) -> None:
    conditions = {"cpu": "Test", "num_threads": 2, "commit": "c", "date": "today"}
    line = {"shape": "small", "vocab_size": 4096, "batch": 32, "draw": "top_p 0.9", "ms": 4.3, "greedy_ms": 4.0,
            "cost": 0.0637, "interval": [0.02, 0.09], "rounds": 7, "target": 0.05,
            "conditions": conditions}  # fmt: skip
    lines = [line, {**line, "draw": "top_k 50", "cost": 0.05}, {**line, "shape": "large", "cost": 0.01}]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in lines), encoding="utf-8")
    found = choosing_tables([tmp_path / "a.jsonl"])
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in found.splitlines() if row.startswith("|")]
    assert cells[0] == ["", "small, 4,096 words", "large, 4,096 words"]
    assert cells[2:] == [
        ["top_p 0.9", "+6.4% [2.0, 9.0] (missed)", "+1.0% [2.0, 9.0]"],
        ["top_k 50", "+5.0% [2.0, 9.0]", ""],
    ]
    assert "a decode step of 32 rows on Test" in found and "target: at most 5%" in found


def key_rows(paths: list[Path]) -> list[list[str]]:
    """The cells of the table of key figures, without its rule."""
    lines = [line for line in key_table(paths).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_an_old_table_is_noticed(tmp_path: Path) -> None:
    table = table_script()
    with pytest.raises(ValueError, match="must hold a report, got none"):
        table.render(tmp_path)
    Report(CONDITIONS, (ROW,), {}).write(tmp_path / "cpu")
    card = {"part": "decode", "gpu": "NVIDIA Test", "gpu_memory_gib": 80.0}
    append_row(tmp_path / "gpu", replace(ROW, what="of a card", value=1.1), CONDITIONS | card)
    readme = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    new = table.insert(readme, table.render(tmp_path))
    assert new.startswith("before\n") and new.endswith("\nafter\n")
    assert "old" not in new and "1.20x" in new and "1.10x" in new and "on NVIDIA Test" in new
    assert table.insert(new, table.render(tmp_path)) == new
    with pytest.raises(ValueError, match="once each"):
        table.insert("no marks", "table")
