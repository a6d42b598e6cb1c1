"""The measuring parts of `make gpu`, on a CPU with shapes that take no time: no line is first run on a card."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import BESIDE, LLAMA, NO_DEVICE, PARTS, read_rows

from bench.gpu import parts, recorder, time_decode, time_kernels
from bench.gpu.floors import WorkDone, floor_ms
from bench.gpu.workloads import Truth, Workload
from bench.report.device import DeviceReport
from dynskip import LayerPath, OPTForCausalLM
from dynskip.costs.layer_costs import MachineSpeed, ModelBytes, PathMix, roofline_ms
from dynskip.measure import device
from dynskip.measure.random_models import hf_config, random_hf_model
from dynskip.models.shapes import SHAPES, get_shape
from dynskip.ops import native
from dynskip.ops.row_ops import get_row_ops

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("kernels", ["--ops", "reference"]),
        ("decode", ["--ops", "reference"]),
        ("prefill", ["--backend", "torch"]),
        ("serving", ["--backend", "torch"]),
        ("drafts", ["--backend", "torch"]),
        ("kernels", ["--ops", "reference", *BESIDE]),
        ("decode", ["--ops", "reference", *BESIDE]),
        ("prefill", ["--backend", "torch", *BESIDE]),
        ("serving", ["--backend", "torch", *BESIDE]),
        ("drafts", ["--backend", "torch", *BESIDE]),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # from torch.compile
def test_every_question_of_a_part_is_answered(
    part: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = LLAMA if parts.BESIDE in options else "tiny"
    assert PARTS[part]([*NO_DEVICE, *options, "--dry-run"]) == 0
    asked = capsys.readouterr().out.splitlines()[1:]
    status = PARTS[part]([*NO_DEVICE, *options, "--out", str(tmp_path), "--commit", "abc123"])
    rows = read_rows(tmp_path)
    assert [row["failure"] for row in rows if "failure" in row] == [] and status == 0
    answered = sorted(f"{row['batch']} rows  {row['what']}" for row in rows)
    assert sorted(line.partition("  >=")[0].partition("  <=")[0].strip() for line in asked) == answered
    assert len(set(answered)) == len(answered)
    assert all(row["value"] > 0 and row["num_samples"] > 0 for row in rows if not row["what"].endswith(", us"))
    conditions = rows[0]["conditions"]
    assert conditions["part"].split()[0] == part
    assert conditions["commit"] == "abc123" and conditions["shape"] == shape
    page = (tmp_path / "test-instead-of-a-gpu.md").read_text()
    assert page == DeviceReport.read(tmp_path / "test-instead-of-a-gpu.jsonl").page()
    sections = {row["conditions"]["part"] for row in rows}
    assert page.count("\n## ") == len(sections) and page.count("\n| ") == len(rows) + len(sections)


@pytest.mark.parametrize(
    ("part", "sections", "options"),
    [
        ("kernels", "matrices,attention,movement", []),
        ("decode", "skipped,masks", []),
        ("kernels", "matrices", BESIDE),
        ("decode", "full", BESIDE),
    ],
)
def test_the_kernels_run_in_the_parts_that_time_them(
    part: str, sections: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the interpreter, which knows no bfloat16: what the parts hand to the kernels is what they take."""
    if native.unavailable_reason() is not None:
        pytest.skip(f"no plan_rows: {native.unavailable_reason()}")
    if torch.cuda.is_available():
        pytest.skip("the parts themselves run on this machine's GPU")
    for name in ("tiny", LLAMA):
        monkeypatch.setitem(SHAPES, name, replace(SHAPES[name], num_layers=2))
    few = {"num_rounds": 1, "num_repeats": 1, "context_len": 3, "batches": (2,), "mask_batches": (2,), "vocab_size": 16}
    monkeypatch.setattr(time_decode, "TINY", replace(time_decode.TINY, **few))
    # Two copies, each launch made thrice: rounds and repeats are the same code with the reference's ops, above.
    few = {"num_rounds": 1, "num_repeats": 1, "movement_bytes": 2**12}
    monkeypatch.setattr(time_kernels, "TINY", replace(time_kernels.TINY, **few))
    options = [*options, "--sections", sections, "--dtype", "float32", "--out", str(tmp_path)]
    status = PARTS[part]([*NO_DEVICE, *options])
    assert [row["failure"] for row in read_rows(tmp_path) if "failure" in row] == [] and status == 0


def test_a_provider_that_fails_is_a_row_and_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(time_decode.MaskEverything, "__init__", refuse)
    options = ["--ops", "reference", "--sections", "providers", "--out", str(tmp_path)]
    assert time_decode.main([*NO_DEVICE, *options]) == 1
    rows = read_rows(tmp_path)
    failed = [row for row in rows if "failure" in row]
    assert len(rows) == 6 and len(failed) == 2
    assert {row["failure"] for row in failed} == {"RuntimeError: no such luck"}
    assert {row["verdict"] for row in failed} == {"FAILED"}
    assert all("mask-everything" in row["what"] and row["value"] is None for row in failed)


def test_wrong_logits_are_timed_and_their_rows_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_step = time_decode.GatherWithToList.first_step
    monkeypatch.setattr(time_decode.GatherWithToList, "first_step", lambda self: first_step(self) + 1)
    options = ["--ops", "reference", "--sections", "providers", "--out", str(tmp_path)]
    assert time_decode.main([*NO_DEVICE, *options]) == 1
    rows = read_rows(tmp_path)
    wrong = [row for row in rows if "wrong" in row]
    assert len(rows) == 6 and len(wrong) == 2 and not [row for row in rows if "failure" in row]
    for row in wrong:
        assert row["verdict"] == "WRONG" and ".tolist()" in row["what"] and "must be within" in row["wrong"]
        assert row["value"] > 0 and row["num_samples"] > 0, "it was timed all the same"
    page = (tmp_path / "test-instead-of-a-gpu.md").read_text()
    assert "\nWrong results, timed all the same:\n" in page and page.count("| WRONG ") == 2


def test_a_wrong_step_of_ours_marks_all_that_it_was_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_step = time_decode.FusedSteps.first_step

    def spoiled(self: time_decode.FusedSteps) -> tuple[torch.Tensor, torch.Tensor]:
        logits, active = first_step(self)
        return logits + 1, active

    monkeypatch.setattr(time_decode.FusedSteps, "first_step", spoiled)
    options = ["--ops", "reference", "--sections", "full,paths,mixes", "--batches", "3", "--out", str(tmp_path)]
    assert time_decode.main([*NO_DEVICE, *options]) == 1
    rows = read_rows(tmp_path)
    assert {row["verdict"] for row in rows} == {"WRONG"} and all(row["value"] > 0 for row in rows)
    assert {row["batch"] for row in rows} == {3}


def test_a_wrong_kernel_is_timed_and_its_row_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = get_row_ops("reference")

    def spoiled(*arguments: Any) -> None:
        ops.linear_rows(*arguments)
        arguments[7].add_(1)

    sound = dict.fromkeys(["reference"], ops)
    wrong = replace(ops, linear_rows=spoiled)
    found = [wrong, sound["reference"]]
    monkeypatch.setattr(time_kernels, "get_row_ops", lambda name: found.pop(0))
    options = ["--ops", "reference", "--sections", "matrices", "--rows", "3", "--out", str(tmp_path)]
    assert time_kernels.main([*NO_DEVICE, *options]) == 1
    verdicts = {row["what"]: row["verdict"] for row in read_rows(tmp_path)}
    assert {what for what, verdict in verdicts.items() if verdict == "WRONG"} == {
        what for what in verdicts if what.startswith(("the four", "linear_rows"))
    }


def test_two_caches_at_a_time_and_no_float64_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a batch of 256 leaves no room for: only counted here, on a tiny one."""
    alive: dict[type, weakref.WeakSet[Any]] = {}

    def count(cls: type) -> None:
        alive[cls] = weakref.WeakSet()
        init = cls.__init__  # type: ignore[misc]

        def counted(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            alive[cls].add(self)
            gc.collect()
            assert sum(map(len, alive.values())) <= 2, alive
            assert not [model for model in exact if model() is not None], "the float64 weights were let go of"

        monkeypatch.setattr(cls, "__init__", counted)

    exact: list[weakref.ref[Any]] = []
    in_float64 = time_decode.in_float64

    def remembered(*args: Any) -> OPTForCausalLM:
        exact.append(weakref.ref(model := in_float64(*args)))
        return model

    monkeypatch.setattr(time_decode, "in_float64", remembered)
    for cls in (time_decode.FusedSteps, time_decode.MaskEverything, time_decode.GatherWithToList):
        count(cls)
    options = ["--ops", "reference", "--sections", "mixes", "--batches", "3", "--out", str(tmp_path)]
    assert time_decode.main([*NO_DEVICE, *options]) == 0, read_rows(tmp_path)
    assert len(exact) == 1


def test_processes_of_one_run_share_its_conditions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = iter([MachineSpeed(50.0, 900.0), MachineSpeed(60.0, 900.0)])
    monkeypatch.setattr(recorder, "measure_device_speed", lambda *_, **__: next(speeds))
    options = ["--ops", "reference", "--out", str(tmp_path), "--sections", "matrices"]
    for arguments in (["--rows", "1", "--run", "a"], ["--rows", "3", "--run", "a"], ["--rows", "1", "--run", "b"]):
        assert time_kernels.main([*NO_DEVICE, *options, *arguments]) == 0
    first, second, other = (
        next(row["conditions"] for row in read_rows(tmp_path) if (row["batch"], row["conditions"]["run"]) == key)
        for key in ((1, "a"), (3, "a"), (1, "b"))
    )
    assert first == second and (first["bandwidth_gbps"], other["bandwidth_gbps"]) == (50.0, 60.0)
    report = DeviceReport.read(tmp_path / "test-instead-of-a-gpu.jsonl")
    assert [len(run.rows) for run in report.runs] == [14, 7]


def test_switches_are_told_with_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNSKIP_PDL", "0")
    options = ["--ops", "reference", "--out", str(tmp_path), "--sections", "matrices", "--rows", "1"]
    assert time_kernels.main([*NO_DEVICE, *options]) == 0
    conditions = read_rows(tmp_path)[0]["conditions"]
    assert conditions["switches"] == {"DYNSKIP_PDL": "0"}
    assert conditions["part"] == "kernels matrices, DYNSKIP_PDL=0"


def test_a_device_that_broke_is_asked_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that every later call meets: rows say so, and the page is written."""
    broken = RuntimeError("CUDA error: an illegal memory access was encountered")

    def refuse(*args: object) -> None:
        raise broken

    asked: list[int] = []
    monkeypatch.setattr(device.Cpu, "synchronize", refuse)
    monkeypatch.setattr(time_kernels.KernelBenchmark, "_movement", lambda self, rows: asked.append(rows))
    monkeypatch.setattr(time_kernels.KernelBenchmark, "_matrices", refuse)
    options = ["--ops", "reference", "--out", str(tmp_path), "--sections", "matrices,movement"]
    assert time_kernels.main([*NO_DEVICE, *options]) == 1
    failures = [row["failure"] for row in read_rows(tmp_path)]
    assert len(failures) == 16 and not asked
    assert "illegal memory access" in failures[0] and "serves this process no more" in failures[-1]
    assert (tmp_path / "test-instead-of-a-gpu.md").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sections", "matrices,typo"], "must list sections of matrices, attention, movement, got 'matrices,typo'"),
        (["--rows", "1,x"], "must list positive numbers, such as 1,8,64, got '1,x'"),
        (["--rows", "0"], "must list positive numbers, such as 1,8,64, got '0'"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ValueError, SystemExit)) as caught:
        time_kernels.main([*NO_DEVICE, "--dry-run", *options])
    assert message in str(caught.value) + capsys.readouterr().err


def test_no_time_left_is_a_reason(tmp_path: Path) -> None:
    assert time_kernels.main([*NO_DEVICE, "--ops", "reference", "--out", str(tmp_path), "--limit-s", "0"]) == 1
    rows = read_rows(tmp_path)
    assert rows and all("no time was left" in row["failure"] for row in rows)


def test_without_a_card_a_part_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(RuntimeError, match="must be a CUDA device that this machine has, got none"):
        time_decode.main(["--out", str(tmp_path)])


def test_the_bound_of_paths_is_the_roofline_of_their_mix() -> None:
    config, speed = replace(get_shape("tiny"), vocab_size=128), MachineSpeed(10.0, 1.0)
    shape = ModelBytes.of(config, 2)
    mix = PathMix.of([LayerPath.of(4, [0, 2]), LayerPath.of(4, [2]), LayerPath.of(4, [1, 2])])
    rows = tuple(map(float, mix.rows_per_layer))
    work = WorkDone(rows, rows, sum(rows) * 7, 3)
    embedding = speed.ms(2 * 3 * 32 * 2, 0)
    assert floor_ms(work, config, 2, speed) == pytest.approx(roofline_ms(mix, shape, speed, 7) + embedding)
    assert work.mean_layers == mix.mean_layers
    # With PROPAGATE a row that skips a layer still costs the products of its key and value, and reads their matrices.
    idle = WorkDone((0.0,) * 4, (3.0,) * 4, 0, 3)
    none = WorkDone((0.0,) * 4, (0.0,) * 4, 0, 3)
    key_value = speed.ms(2 * 32 * 32 * 2, 3 * 2 * 2 * 32 * 32)
    assert floor_ms(idle, config, 2, speed) - floor_ms(none, config, 2, speed) == pytest.approx(4 * key_value)
    # One group of heads has half of the keys and values.
    grouped = replace(config, num_kv_heads=1)
    key_value = speed.ms(2 * 32 * 16 * 2, 3 * 2 * 2 * 32 * 16)
    assert floor_ms(idle, grouped, 2, speed) - floor_ms(none, grouped, 2, speed) == pytest.approx(4 * key_value)
    assert WorkDone.mean([idle, none]).kv_rows == (1.5,) * 4


def test_the_truth_knows_masks_and_gates() -> None:
    hf_model = random_hf_model(hf_config("tiny", 128))
    model = OPTForCausalLM.from_hf(hf_model, backend="torch", pack=False)
    truth = Truth(
        hf_model, lambda: OPTForCausalLM.from_hf(copy.deepcopy(hf_model).double(), backend="torch", pack=False)
    )
    cpu = torch.device("cpu")
    workload = Workload.along([LayerPath.random(4, 2, seed) for seed in range(5)], 6, 2, 128, cpu)
    logits = model(workload.prompts, paths=list(workload.paths or ())).logits[:, -1]
    assert truth.check("ours", workload, logits).share <= 1
    assert truth.check("ours", workload, logits).complaint == ""
    wrong = truth.check("full depth", workload, model(workload.prompts).logits[:, -1])
    assert wrong.share > 1 and re.match(r"full depth: the logits must be within .* of float64, got", wrong.complaint)
    assert "got nan" in truth.check("NaN", workload, torch.full_like(logits, torch.nan)).complaint
