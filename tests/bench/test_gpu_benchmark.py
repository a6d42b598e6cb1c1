"""`make gpu` and its parts, on a CPU with shapes that take no time: no line of them is first run on a card."""

from __future__ import annotations

import copy
import gc
import importlib
import json
import os
import re
import stat
import sys
import textwrap
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.gpu import (
    extension,
    parts,
    profile_layer,
    recorder,
    run,
    sanitize,
    smoke,
    smoke_cases,
    time_decode,
    time_drafts,
    time_kernels,
    time_prefill,
    time_serving,
)
from bench.gpu.floors import WorkDone, floor_ms
from bench.gpu.replays import RepeatedStep
from bench.gpu.workloads import Truth, Workload
from bench.report.device import DeviceReport
from dynskip import LayerPath, OPTForCausalLM, host
from dynskip.costs.layer_costs import MachineSpeed, ModelBytes, PathMix, roofline_ms
from dynskip.kernels.configs import FOLDER, KEYS, get_entries, use_configs
from dynskip.measure import device
from dynskip.measure.device import get_device
from dynskip.measure.random_models import hf_config, random_hf_model
from dynskip.models.opt import opt_shape
from dynskip.models.shapes import SHAPES, get_shape
from dynskip.ops import native
from dynskip.ops.row_ops import ROW_OP_NAMES, get_row_ops

NO_DEVICE = ["--device", "cpu", "--tiny"]
BESIDE = ["--shape", parts.BESIDE]
CPU_MODEL = host.cpu_model
LLAMA = f"tiny-{parts.BESIDE}"
PARTS: dict[str, Callable[[Sequence[str]], int]] = {
    "kernels": time_kernels.main,
    "decode": time_decode.main,
    "prefill": time_prefill.main,
    "serving": time_serving.main,
    "drafts": time_drafts.main,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and memory that take no time."""
    monkeypatch.setitem(SHAPES, "tiny", opt_shape(4, 32, 2, 64))
    monkeypatch.setitem(SHAPES, LLAMA, recorder.tiny_shape(get_shape(parts.BESIDE)))
    monkeypatch.setattr(device, "_COPY_BYTES", 2**16)
    monkeypatch.setattr(device, "_GEMM_SIZE", 16)
    monkeypatch.setattr(host, "cpu_model", lambda: "Test")


def read_rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "test-instead-of-a-gpu.jsonl").read_text().splitlines()]


# The measuring parts


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


# The tools


@pytest.mark.parametrize("shape", ["tiny", LLAMA])
def test_the_profile_launches_a_layer(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--shape", shape, "--vocab-size", "64", "--context-len", "5", "--ops", "reference"]
    assert profile_layer.main(arguments) == 0
    assert capsys.readouterr().out.count("one layer, plan and head launched") == len(profile_layer.BATCHES)
    assert profile_layer.main([*NO_DEVICE, *BESIDE, "--dry-run"]) == 0
    assert f"one layer of {LLAMA}, context 5, at 1,16,64 rows" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "tiny"])
def test_every_shape_has_a_tiny_one(name: str) -> None:
    """All that it is made of stays; transformers has a model of it."""
    shape, small = SHAPES[name], recorder.tiny_shape(SHAPES[name])
    sizes = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_size", "ffn_size", "embedding_size",
             "rotary", "window")  # fmt: skip
    assert replace(small, **{field: getattr(shape, field) for field in sizes}) == shape
    assert (small.num_kv_heads < small.num_heads) == (shape.num_kv_heads < shape.num_heads)
    assert (small.rotary_size * shape.head_size == shape.rotary_size * small.head_size) and small.hidden_size == 32
    model = OPTForCausalLM.from_hf(random_hf_model(hf_config(small, 64)), backend="torch", pack=False)
    assert replace(model.decoder_config, rotary=None) == replace(small, vocab_size=64, rotary=None)


def test_the_sanitizer_sees_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--backend", "torch", "--dtype", "float32", "--cases", "2"]
    assert sanitize.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count(": ok") == 14 and "all results are within their error budgets" in printed
    assert sanitize.main(["--dry-run"]) == 0
    assert "plan_rows: " in capsys.readouterr().out


def fake_tool(directory: Path, name: str, script: str) -> Path:
    path = directory / name
    path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(script))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        ("print('ERROR SUMMARY: 0 errors')", 0, "memcheck: ok"),
        ("import sys; print('Invalid read'); sys.exit(99)", 99, "memcheck: FAILED (99)"),
        ("import sys; print('Error: Device not supported. x'); sys.exit(1)", 77, "SKIPPED: memcheck cannot watch"),
        ("import os; print(os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'] * 3)", 0, "111"),
        ("import sys; print(sys.argv[-11:])", 0, "'-m', 'bench.gpu.sanitize', '--cases', '3'"),
    ],
)
def test_what_the_sanitizer_says_is_understood(
    script: str, status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = fake_tool(tmp_path, "compute-sanitizer", script)
    assert sanitize.main(["--sanitizer", str(tool)]) == status
    assert said in capsys.readouterr().out


def test_one_op_can_be_watched_alone(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--backend", "torch", "--dtype", "float32", "--cases", "2", "--op", "kv_store"]
    assert sanitize.main(arguments) == 0
    assert capsys.readouterr().out.count(": ok") == 2


def test_ncu_leaves_the_clocks_alone(tmp_path: Path) -> None:
    script = "import sys; open(sys.argv[sys.argv.index('--log-file') + 1], 'w').write(' '.join(sys.argv))"
    tool = fake_tool(tmp_path, "ncu", script)
    assert profile_layer.main(["--ncu", str(tool), "--out", str(tmp_path / "out"), *BESIDE]) == 0
    written = (tmp_path / "out" / "profile.txt").read_text()
    assert f"--shape {parts.BESIDE} --batches 1,16,64" in written
    assert "--clock-control none" in written and "--profile-from-start off" in written


# The smoke test


SMOKE = ["--device", "cpu", "--tiny", "--dtype", "float32"]


@pytest.fixture
def interpreted() -> None:
    if native.unavailable_reason() is not None:
        pytest.skip(f"no plan_rows: {native.unavailable_reason()}")
    if torch.cuda.is_available():
        pytest.skip("the smoke test itself runs on this machine's GPU")


def checks(directory: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "smoke.jsonl").read_text().splitlines()]
    return {line["check"]: line for line in lines}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("options", [[], BESIDE], ids=["opt", "llama"])
def test_the_smoke_test_checks_every_op_and_replays_a_step(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoke, "TILES", FOLDER / "generic.json")
    assert smoke.main([*SMOKE, *options, "--out", str(tmp_path), "--commit", "abc123"]) == 0
    found = checks(tmp_path)
    assert {line["verdict"] for line in found.values()} == {"ok"}
    assert {name.split()[0] for name in found} >= {*ROW_OP_NAMES, "step", "dependent", "counters", "tiles", "more"}
    assert all(found[name]["us"] > 0 for name in found if name.split()[0] in ROW_OP_NAMES)
    assert found["qkv_rows qkv"]["conditions"]["commit"] == "abc123"


@pytest.mark.usefixtures("interpreted")
def test_a_wrong_op_fails_the_smoke_test_and_the_others_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoke.Smoke, "check_step", lambda self, rows, kept: None)  # tried above
    assert smoke.main([*SMOKE, "--out", str(tmp_path), "--inject-fault", "norm_rows"]) == 1
    verdicts = {name: line["verdict"] for name, line in checks(tmp_path).items()}
    assert verdicts["norm_rows"] == "FAILED" and list(verdicts.values()).count("FAILED") == 1
    assert list(verdicts)[-1] == "plan_rows"


def test_a_smoke_test_of_a_broken_device_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(self: smoke.Smoke, task: Any, fault: str | None) -> None:
        asked.append(task.op)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def broken(self: device.Cpu) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(smoke.Smoke, "check_op", refuse)
    monkeypatch.setattr(device.Cpu, "synchronize", broken)
    assert smoke.main([*SMOKE, "--out", str(tmp_path)]) == 1
    found = checks(tmp_path)
    assert len(asked) == 1 and {line["verdict"] for line in found.values()} == {"FAILED"}
    assert "illegal memory access" in found["linear_rows fc1"]["found"]
    assert found["plan_rows"]["found"] == "not checked: the device serves this process no more"


def test_without_time_the_smoke_test_fails_but_not_for_what_is_extra(tmp_path: Path) -> None:
    assert smoke.main([*SMOKE, "--out", str(tmp_path), "--limit-s", "0"]) == 1
    assert {line["verdict"] for line in checks(tmp_path).values()} == {"FAILED"}
    journal = smoke.Journal(tmp_path, {})
    checker = smoke.Smoke(get_device("cpu"), torch.float32, smoke_cases.TINY, journal, deadline=0.0)
    checker.attempt("more replays", 2, lambda: None, if_time=True)
    assert journal.num_failed == 0 and checks(tmp_path)["more replays"]["verdict"] == "NOT RUN"


class Steps:
    """Stands for `FusedSteps`: one row whose step adds its token to its logits, ``drift`` more in each later run."""

    def __init__(self, drift: float = 0.0) -> None:
        integers = [torch.zeros(1, dtype=torch.int64) for _ in range(4)]
        self.workload = SimpleNamespace(batch=1)
        self.shape = SimpleNamespace(max_rows=1)
        self.cache = SimpleNamespace(
            context_lens=integers[0],
            slot_cursor=integers[1],
            k_cache=torch.zeros(2, 1, 4),
            v_cache=torch.zeros(2, 1, 4),
        )
        self.fused = SimpleNamespace(run=self.run, head=lambda rows: None)
        self.fused.buffers = SimpleNamespace(
            token_ids=integers[2] + 5,
            position_ids=integers[3],
            slots=torch.zeros(1, 1, dtype=torch.int32),
            logits=torch.zeros(1, 8),
            hidden_states=torch.zeros(1, 4),
        )
        self.drift, self.num_runs = drift, 0

    def run(self, work: object) -> None:
        buffers = self.fused.buffers
        self.num_runs += 1
        buffers.token_ids.add_(1)
        self.cache.context_lens.add_(1)
        buffers.logits.copy_(buffers.token_ids + self.cache.context_lens + self.drift * (self.num_runs > 3))
        self.cache.k_cache[0] = buffers.logits[0, 0]


@pytest.mark.parametrize(("drift", "num_different"), [(0.0, 0), (1e-3, 6)])
def test_replays_start_from_one_state_and_other_bits_are_counted(drift: float, num_different: int) -> None:
    steps = Steps(drift)
    repeated = RepeatedStep(get_device("cpu"), steps)  # type: ignore[arg-type]
    assert repeated.logits.tolist() == [[7.0] * 8]
    graph = repeated.captured()  # runs once
    assert repeated.count_different(graph, 7) == num_different
    assert steps.num_runs == 9 and int(steps.cache.context_lens) == 1


def test_a_zero_of_another_sign_is_other_bits() -> None:
    steps = Steps()
    repeated = RepeatedStep(get_device("cpu"), steps)  # type: ignore[arg-type]
    steps.fused.head = lambda rows: steps.fused.buffers.hidden_states.mul_(-1.0)
    assert repeated.count_different(repeated.captured(), 1) == 0, "two runs: minus zero, and zero again"
    assert repeated.count_different(repeated.captured(), 2) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_dependent_launches_all_else_stays(dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    before = {op: get_entries(op, cpu, dtype) for op in KEYS}
    with use_configs(smoke_cases.without_dependent_launches(cpu)):
        for op, entries in before.items():
            after = get_entries(op, cpu, dtype)
            assert [(entry.max_rows, entry.shape) for entry in after] == [(e.max_rows, e.shape) for e in entries]
            for one, other in zip(entries, after, strict=True):
                changed = {"PDL": False} if "PDL" in one.config else {}
                assert dict(other.config) == {**one.config, **changed}


# The command


def test_parts_are_known_and_their_order_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--only", "decode,nothing", "--out", str(tmp_path)]) == 2
    assert "--only must be first, second, or parts of build, smoke, " in capsys.readouterr().err
    assert run.main(["--only", "", "--out", str(tmp_path)]) == 2
    capsys.readouterr()
    assert run.main(["--out", str(tmp_path / "out")], has_card=lambda: False) == 2
    assert "must have a CUDA device that torch finds, got none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_plans_name_parts_and_leave_time_within_seven_minutes(tmp_path: Path) -> None:
    made = parts.make_parts(tmp_path, "now")
    for plan in run.PLANS.values():
        assert set(re.split(r"[,+]", plan.order)) <= set(made)
        assert plan.limit_s + 2 * run.GRACE_S <= 420
    commands = [" ".join(command) for part in made.values() for command in part.steps]
    assert not [command for command in commands if "--compile" in command or "pip" in command]
    decode = [re.findall(r"--batches (\S+)", command) for command in commands if "time_decode" in command]
    assert all(len(batches) <= 1 and "," not in "".join(batches) for batches in decode), "a process for each batch"


def test_the_second_shape_is_measured_after_the_first(tmp_path: Path) -> None:
    """Where time runs out, it is the second shape's that is cut, and the tuner's, which keeps what it found."""
    made = parts.make_parts(tmp_path, "now")
    beside = {name for name, part in made.items() if all(parts.BESIDE in command for command in part.steps)}
    assert beside == {f"{name}-llama" for name in ("kernels", "matrices", "decode", "full", "mixes", "prefill")}
    for order in (parts.DEFAULT, *(plan.order for plan in run.PLANS.values())):
        names = [name for name in re.split(r"[,+]", order) if name != "tune-few"]
        num_beside = sum(name in beside for name in names)
        assert num_beside and set(names[-num_beside:]) <= beside, order
    for name in beside:
        for commands in (made[name].steps, made[name].rehearsal):
            assert all(command[-2:] == ("--shape", parts.BESIDE) for command in commands)
    # A table of tiles for many rows is timed there alone.
    assert [command[-1] for command in made["table-tiles-32"].steps] == ["64"]


def test_what_is_beside_is_compiled_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, ...]] = []

    def start(command: list[str]) -> SimpleNamespace:
        started.append(tuple(command[command.index("--shape") + 1 :: 2]))
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(smoke_cases.subprocess, "Popen", start)
    smoke_cases.prepare_all("bfloat16", smoke_cases.Sizes())
    assert started[-2:] == [(parts.BESIDE, "8", "as-it-is"), (parts.BESIDE, "64", "as-it-is")]
    assert {shape for shape, _, _ in started[:-2]} == {"opt-1.3b"}
    del started[:]
    smoke_cases.prepare_all("bfloat16", replace(smoke_cases.Sizes(), shape=parts.BESIDE))
    assert {shape for shape, _, _ in started} == {parts.BESIDE}


def test_what_the_tests_and_the_deterministic_algorithms_need_on_a_card(tmp_path: Path) -> None:
    (command,) = parts.make_parts(tmp_path, "now")["tests"].steps
    text = " ".join(command)
    assert "-m gpu" in text and "-W default" in text and "test_cuda_extension" not in text
    warnings.warn(
        "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
        UserWarning,
        stacklevel=1,
    )
    with pytest.raises(UserWarning, match="another"):
        warnings.warn("another", UserWarning, stacklevel=1)
    seen = run_command(tmp_path, "import os; print(os.environ['CUBLAS_WORKSPACE_CONFIG'])")
    assert ":4096:8" in seen


def test_every_test_that_needs_a_card_is_marked() -> None:
    files = parts.marked_test_files()
    for path in sorted((run.ROOT / "tests").rglob("test_*.py")):
        if path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8")
        needs = re.findall(r"(?:@pytest.mark.gpu\n)?@needs_gpu\n", text)
        assert all(mark.startswith("@pytest.mark.gpu") for mark in needs), path
        for before in text.split('pytest.skip("no GPU")')[:-1]:
            function = before[before.rindex("\ndef ") :]
            marks = before.removesuffix(function)[-200:].rpartition("\n\n")[2]
            assert "@pytest.mark.gpu" in marks, function
    assert {"tests/execution/test_replay.py", "tests/ops/test_plan_rows.py", "tests/ops/test_row_linear.py"} <= set(
        files
    )
    assert "tests/ops/test_cuda_extension.py" not in files and "tests/training/test_training.py" not in files


def python(*code: str) -> tuple[tuple[str, ...], ...]:
    return tuple((sys.executable, "-c", part) for part in code)


def run_command(directory: Path, *code: str, limit_s: float = 60, num_processes: int = 1) -> str:
    """What ``code`` printed as a part."""
    part = parts.Part("decode", "x", limit_s, python(*code), (), num_processes=num_processes)
    run.run_part(part, part.steps, run.Log(directory / "log.txt"), limit_s)
    return (directory / "log.txt").read_text()


@pytest.mark.parametrize(
    ("code", "status", "verdict"),
    [
        (["print('one')", "print('two')"], 0, "ok"),
        (["import sys; sys.exit(3)", "print('two')"], 3, "FAILED (3)"),
        (["import sys; sys.exit(77)", "print('two')"], 77, "SKIPPED"),
        (["import sys; sys.exit(77)", "import sys; print('two'); sys.exit(4)"], 4, "FAILED (4)"),
        (["import os; os.kill(os.getpid(), 9)", "print('two')"], -9, "FAILED (-9)"),
    ],
)
def test_a_part_has_a_log_and_a_verdict_and_a_step_stops_no_other(
    code: list[str], status: int, verdict: str, tmp_path: Path
) -> None:
    part = parts.Part("decode", "x", 60, python(*code), ())
    outcome = run.run_part(part, part.steps, run.Log(tmp_path / "log.txt"), 60)
    assert (outcome.status, outcome.verdict) == (status, verdict)
    assert verdict in str(outcome)
    assert "decode| two" in (tmp_path / "log.txt").read_text().splitlines()


def test_a_step_that_hangs_leaves_time_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "GRACE_S", 1)
    hangs = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True); time.sleep(60)"
    )
    part = parts.Part("decode", "x", 6, python(hangs, "print('two')", "print('three')", "print('four')"), ())
    outcome = run.run_part(part, part.steps, run.Log(tmp_path / "log.txt"), 6)
    assert outcome.verdict == "TIME LIMIT" and outcome.seconds < 30
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert {"decode| begun", "decode| stopped at its time limit", "decode| two", "decode| four"} <= set(lines)


def test_what_a_process_left_behind_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
        "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); print(child.pid)"
    )
    pid = int(re.findall(r"decode\| (\d+)$", run_command(tmp_path, code), re.MULTILINE)[0])
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
        if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            break  # dead, and nobody has asked for its status yet
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists()


def test_lines_are_in_the_log_before_their_process_ends(tmp_path: Path) -> None:
    """A run that is killed from outside leaves what it had."""
    log = tmp_path / "log.txt"
    waits = (
        f"import pathlib, time; print('said'); log = pathlib.Path({str(log)!r})\n"
        "for _ in range(600):\n"
        "    if 'decode| said' in log.read_text(): print('seen'); break\n"
        "    time.sleep(0.05)\n"
    )
    assert "decode| seen" in run_command(tmp_path, waits)


def test_shards_run_every_test_once(tmp_path: Path) -> None:
    (tmp_path / "test_five.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(5))\ndef test(n): print('ran', n); assert n != 3\n"
    )
    options = ("-q", "-s", "-p", "bench.gpu.shard_tests", str(tmp_path), "-c", "/dev/null")
    part = parts.Part("tests", "x", 300, ((sys.executable, "-m", "pytest", *options),), (), num_processes=2)
    outcome = run.run_part(part, part.steps, run.Log(tmp_path / "log.txt"), 300)
    log = (tmp_path / "log.txt").read_text()
    assert outcome.verdict == "FAILED (1)"
    assert sorted(re.findall(r"ran (\d)", log)) == list("01234")
    assert "tests 1| exit status 1" in log and "tests 0| exit status" not in log
    assert any(line.startswith("FAILED ") for line in outcome.failed)
    assert "3 passed, 2 deselected" in log and "1 failed, 1 passed, 3 deselected" in log


def test_a_part_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {
        "build": parts.Part("build", "x", 60, python("print('built')"), ()),
        "one": parts.Part("one", "x", 60, python("raise SystemExit('went wrong')"), ()),
        "two": parts.Part("two", "x", 60, python("import os; print(os.environ['PYTHONPATH'])"), ()),
        "tool": parts.Part("tool", "x", 60, python("print('never')"), (), needs=("no-such-tool",)),
        "table": parts.Part("table", "x", 60, python("print('never')"), (), needs=(str(tmp_path / "table.json"),)),
    }
    monkeypatch.setattr(run, "make_parts", lambda out, run, commit: made)
    only = ["--only", "one+tool,table,two"]
    assert run.main([*only, "--out", str(tmp_path)], has_card=lambda: True) == 1
    printed = capsys.readouterr().out
    assert "went wrong" in printed
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert lines[0].split()[0] == "build" and sorted(line.split()[0] for line in lines[1:3]) == ["one", "tool"]
    assert [line.split()[0] for line in lines[3:]] == ["table", "two"]
    assert "NOT RUN" in lines[3] and "table.json is not there" in lines[3]
    assert any("no-such-tool was not found on PATH" in line for line in lines)
    assert str(run.ROOT) in (tmp_path / "log.txt").read_text()
    assert run.main(["--only", "two", "--out", str(tmp_path)], has_card=lambda: True) == 0
    assert run.main(["--only", "two", "--out", str(tmp_path), "--limit-s", "1"], has_card=lambda: True) == 1
    assert "no time was left" in (tmp_path / "summary.txt").read_text().splitlines()[-1]


def test_a_limit_reached_becomes_a_row_with_a_reason(tmp_path: Path) -> None:
    """The signal at the end of a part's time is an error in what runs then, and the page is still written."""
    import signal

    with recorder._time_limit("decode"), pytest.raises(recorder.OutOfTimeError, match="time limit of the part decode"):
        os.kill(os.getpid(), signal.SIGINT)


def rehearse(
    only: str, directory: Path, monkeypatch: pytest.MonkeyPatch, here: Sequence[str] = (), **broken: parts.Part
) -> dict[str, str]:
    """The verdicts of a rehearsal of ``only``, a CPU in place of the card, with ``broken`` parts in place of theirs.

    here: parts whose commands run in this process: those that another part starts in one of its own, asked otherwise.
    """
    made: dict[str, parts.Part] = {}

    def make_parts(*arguments: Any, make: Callable[..., dict[str, parts.Part]] = parts.make_parts) -> Any:
        made.update(make(*arguments))
        stubs = {name: replace(made[name], rehearsal=python("print('in the process of the tests')")) for name in here}
        return made | broken | stubs

    monkeypatch.setattr(run, "make_parts", make_parts)
    status = run.main(["--dry-run", "--only", only, "--out", str(directory), "--commit", "abc"])
    lines = (directory / "summary.txt").read_text().splitlines()
    found = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert status == int(any(not verdict.startswith("ok") for verdict in found.values()))
    monkeypatch.setattr(host, "cpu_model", CPU_MODEL)  # to the files of those processes
    for name in here:
        for interpreter, option, module, *arguments in made[name].rehearsal:
            assert (interpreter, option) == (sys.executable, "-m")
            assert importlib.import_module(module).main(arguments) == 0
    files = sorted(path for path in directory.rglob("*"))
    assert len(files) <= 8 and all(re.fullmatch(r"[A-Za-z0-9._-]+", path.name) for path in files), files
    return found


@pytest.mark.usefixtures("interpreted")
def test_the_first_call_is_rehearsed_with_a_crash_in_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies, as after an error that its device does not survive: what it had recorded stays."""
    crash = "import os; print('begun', flush=True); os.abort()"
    broken = parts.Part("matrices", "x", 60, (), python(crash))
    verdicts = rehearse("first", tmp_path, monkeypatch, ["full-llama"], matrices=broken)
    assert list(verdicts)[:4] == ["build", "smoke", "paths", "matrices"]
    assert verdicts.pop("matrices").startswith("FAILED (-6)")
    assert all(verdict.startswith("ok") for verdict in verdicts.values()), (tmp_path / "log.txt").read_text()
    assert set(verdicts) == {"build", "smoke", "paths", "validate", "tests", "full-llama"}
    assert checks(tmp_path)["step of 1 layers"]["conditions"]["commit"] == "abc"
    (data,) = (path for path in tmp_path.glob("*.jsonl") if path.name != "smoke.jsonl")
    assert {row.what for run in DeviceReport.read(data).runs for row in run.rows} >= {
        "full depth, share of its roofline"
    }
    log = (tmp_path / "log.txt").read_text()
    assert "matrices| begun" in log and re.search(r"^tests( 0)?\| .* passed", log, re.MULTILINE)


@pytest.mark.usefixtures("interpreted")
def test_the_second_call_is_rehearsed_with_a_hang_in_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "GRACE_S", 1)
    broken = parts.Part("full", "x", 0.1, (), python("import time; time.sleep(600)"))
    rehearsed_above = parts.Part("smoke", "x", 60, (), python("print('in the first call')"))
    here = ["mixes", "layer", "mixes-llama"]
    verdicts = rehearse("second", tmp_path, monkeypatch, here, full=broken, smoke=rehearsed_above)
    assert list(verdicts) == ["build", *re.split(r"[,+]", run.PLANS["second"].order)]
    assert verdicts.pop("full").startswith("TIME LIMIT")
    for name in [name for name in verdicts if name.startswith("table-") and name != "table-no-pdl"]:
        if not (parts.VARIANTS / f"{name.removeprefix('table-')}.json").is_file():
            assert "is not there" in verdicts.pop(name)
    assert all(verdict.startswith("ok") for verdict in verdicts.values()), (tmp_path / "log.txt").read_text()
    (data,) = (path for path in tmp_path.glob("*.jsonl") if path.name != "smoke.jsonl")
    measured = {run.title for run in DeviceReport.read(data).runs}
    assert measured >= {"tiny, decode full, DYNSKIP_PDL=0", "tiny, decode mixes"}
    assert measured >= {f"{LLAMA}, decode mixes", f"{LLAMA}, kernels matrices"}


def test_an_extension_that_serves_is_not_built_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[Any] = []

    def record(command: Any, **options: Any) -> Any:
        commands.append((command, options.get("env") or {}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(extension.subprocess, "run", record)
    monkeypatch.setattr(native, "unavailable_reason", lambda: None)
    monkeypatch.setattr(native, "has_cuda", lambda: True)
    assert extension.main([]) == 0 and not commands
    monkeypatch.setattr(native, "has_cuda", lambda: False)
    assert extension.main(["--device", "cpu"]) == 0 and not commands
    assert extension.main(["--only-check"]) == 1
    assert "was built without its CUDA sources" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert extension.main([]) == 0
    (built, environment), (checked, _) = commands
    assert "build_ext" in built and "--force" in built and "--only-check" in checked
    assert environment["DYNSKIP_BUILD_CUDA"] == "1" and environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
