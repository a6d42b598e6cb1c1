"""`make gpu` and its parts, on a CPU with shapes that take no time: no line of them is first run on a card."""

from __future__ import annotations

import copy
import gc
import json
import os
import re
import stat
import sys
import textwrap
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import profile_layer, recorder, run, sanitize, time_decode, time_kernels, time_prefill, time_serving
from bench.gpu.floors import WorkDone, floor_ms
from bench.gpu.workloads import Truth, Workload
from dynskip import LayerPath, OPTForCausalLM, native
from dynskip.benchmark import device, machine, models
from dynskip.benchmark.device_report import DeviceReport
from dynskip.benchmark.models import opt_config, random_hf_model
from dynskip.benchmark.products import model_shape
from dynskip.cost import MachineSpeed, PathMix, roofline_ms
from dynskip.row_ops import get_row_ops

NO_DEVICE = ["--device", "cpu", "--tiny"]
PARTS: dict[str, Callable[[Sequence[str]], int]] = {
    "kernels": time_kernels.main,
    "decode": time_decode.main,
    "prefill": time_prefill.main,
    "serving": time_serving.main,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and memory that take no time."""
    monkeypatch.setitem(models.SHAPES, "tiny", (32, 64, 4, 2))
    monkeypatch.setattr(device, "_COPY_BYTES", 2**16)
    monkeypatch.setattr(device, "_GEMM_SIZE", 16)
    monkeypatch.setattr(machine, "cpu_model", lambda: "Test")


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
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # from torch.compile
def test_every_question_of_a_part_is_answered(
    part: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert PARTS[part]([*NO_DEVICE, "--dry-run"]) == 0
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
    assert conditions["commit"] == "abc123" and conditions["shape"] == "tiny"
    page = (tmp_path / "test-instead-of-a-gpu.md").read_text()
    assert page == DeviceReport.read(tmp_path / "test-instead-of-a-gpu.jsonl").page()
    sections = {row["conditions"]["part"] for row in rows}
    assert page.count("\n## ") == len(sections) and page.count("\n| ") == len(rows) + len(sections)


@pytest.mark.parametrize(
    ("part", "sections"), [("kernels", "matrices,attention,movement"), ("decode", "skipped,masks")]
)
def test_the_kernels_run_in_the_parts_that_time_them(
    part: str, sections: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the interpreter, which knows no bfloat16: what the parts hand to the kernels is what they take."""
    if native.unavailable_reason() is not None:
        pytest.skip(f"no plan_rows: {native.unavailable_reason()}")
    if torch.cuda.is_available():
        pytest.skip("the parts themselves run on this machine's GPU")
    monkeypatch.setitem(models.SHAPES, "tiny", (32, 64, 2, 2))
    few = {"num_rounds": 1, "num_repeats": 1, "context_len": 3, "mask_batches": (2,)}
    monkeypatch.setattr(time_decode, "TINY", replace(time_decode.TINY, **few))
    options = ["--sections", sections, "--dtype", "float32", "--out", str(tmp_path)]
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
        arguments[6].add_(1)

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


def test_processes_of_one_run_share_its_conditions(tmp_path: Path) -> None:
    options = ["--ops", "reference", "--out", str(tmp_path), "--sections", "matrices"]
    for arguments in (["--rows", "1", "--run", "a"], ["--rows", "3", "--run", "a"], ["--rows", "1", "--run", "b"]):
        assert time_kernels.main([*NO_DEVICE, *options, *arguments]) == 0
    first, second, other = (
        next(row["conditions"] for row in read_rows(tmp_path) if (row["batch"], row["conditions"]["run"]) == key)
        for key in ((1, "a"), (3, "a"), (1, "b"))
    )
    assert first == second and first["bandwidth_gbps"] != other["bandwidth_gbps"]
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
    model = OPTForCausalLM.from_hf(random_hf_model(opt_config("tiny", 128)), backend="torch", pack=False)
    shape, speed = model_shape(model), MachineSpeed(10.0, 1.0)
    mix = PathMix.of([LayerPath.of(4, [0, 2]), LayerPath.of(4, [2]), LayerPath.of(4, [1, 2])])
    rows = tuple(map(float, mix.rows_per_layer))
    work = WorkDone(rows, rows, sum(rows) * 7, 3)
    embedding = speed.ms(2 * 3 * 32 * 2, 0)
    assert floor_ms(work, shape, speed) == pytest.approx(roofline_ms(mix, shape, speed, 7) + embedding)
    assert work.mean_layers == mix.mean_layers
    # With PROPAGATE a row that skips a layer still costs the products of its key and value, and reads their matrices.
    idle = WorkDone((0.0,) * 4, (3.0,) * 4, 0, 3)
    none = WorkDone((0.0,) * 4, (0.0,) * 4, 0, 3)
    key_value = speed.ms(2 * 32 * 32 * 2, 3 * 2 * 2 * 32 * 32)
    assert floor_ms(idle, shape, speed) - floor_ms(none, shape, speed) == pytest.approx(4 * key_value)
    assert WorkDone.mean([idle, none]).kv_rows == (1.5,) * 4


def test_the_truth_knows_masks_and_gates() -> None:
    hf_model = random_hf_model(opt_config("tiny", 128))
    model = OPTForCausalLM.from_hf(hf_model, backend="torch", pack=False)
    truth = Truth(model, lambda: OPTForCausalLM.from_hf(copy.deepcopy(hf_model).double(), backend="torch", pack=False))
    cpu = torch.device("cpu")
    workload = Workload.along([LayerPath.random(4, 2, seed) for seed in range(5)], 6, 2, 128, cpu)
    logits = model(workload.prompts, paths=list(workload.paths or ())).logits[:, -1]
    assert truth.check("ours", workload, logits).share <= 1
    assert truth.check("ours", workload, logits).complaint == ""
    wrong = truth.check("full depth", workload, model(workload.prompts).logits[:, -1])
    assert wrong.share > 1 and re.match(r"full depth: the logits must be within .* of float64, got", wrong.complaint)
    assert "got nan" in truth.check("NaN", workload, torch.full_like(logits, torch.nan)).complaint


# The tools


def test_the_profile_launches_a_layer(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--shape", "tiny", "--vocab-size", "64", "--context-len", "5", "--ops", "reference"]
    assert profile_layer.main(arguments) == 0
    assert capsys.readouterr().out.count("one layer, plan and head launched") == len(profile_layer.BATCHES)


def test_the_sanitizer_sees_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--backend", "torch", "--dtype", "float32", "--cases", "2"]
    assert sanitize.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count(": ok") == 10 and "all results are within their error budgets" in printed
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


def test_ncu_leaves_the_clocks_alone(tmp_path: Path) -> None:
    script = "import sys; open(sys.argv[sys.argv.index('--log-file') + 1], 'w').write(' '.join(sys.argv))"
    tool = fake_tool(tmp_path, "ncu", script)
    assert profile_layer.main(["--ncu", str(tool), "--out", str(tmp_path / "out")]) == 0
    written = (tmp_path / "out" / "profile.txt").read_text()
    assert "--clock-control none" in written and "--profile-from-start off" in written


# The command


def test_parts_are_known_and_their_order_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--only", "decode,nothing", "--out", str(tmp_path)]) == 2
    assert "--only must list parts of build, tests, " in capsys.readouterr().err
    assert run.main(["--only", "", "--out", str(tmp_path)]) == 2
    capsys.readouterr()
    assert run.main(["--out", str(tmp_path / "out")], has_card=lambda: False) == 2
    assert "must have a CUDA device that torch finds, got none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_file_left_out_is_there_and_says_why() -> None:
    files = run._test_files()
    assert len(files) + len(run.LEFT_OUT) == len(list((run.ROOT / "tests").glob("test_*.py")))
    assert all(run.LEFT_OUT.values())
    assert {"tests/test_kernels.py", "tests/test_replay.py", "tests/test_prompt_attention.py"} <= set(files)


def python(*code: str) -> tuple[tuple[str, ...], ...]:
    return tuple((sys.executable, "-c", part) for part in code)


@pytest.mark.parametrize(
    ("code", "status", "verdict"),
    [
        (["print('one')", "print('two')"], 0, "ok"),
        (["import sys; sys.exit(3)", "print('two')"], 3, "FAILED (3)"),
        (["import sys; sys.exit(77)", "print('two')"], 77, "SKIPPED"),
        (["import sys; sys.exit(77)", "import sys; print('two'); sys.exit(4)"], 4, "FAILED (4)"),
        (["import time; time.sleep(60)", "print('two')"], None, "TIME LIMIT"),
    ],
)
def test_a_part_has_a_log_a_limit_and_a_verdict(
    code: list[str], status: int | None, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "GRACE_S", 1)
    part = run.Part("decode", "x", python(*code), ())
    outcome = run.run_part(part, part.steps, tmp_path, limit_s=60 if status is not None else 1)
    assert (outcome.status, outcome.verdict) == (status, verdict)
    assert ("two" in outcome.log.read_text().splitlines()) == (status is not None)
    assert verdict in run.summary([outcome], {"profile": "ncu was not found"})


def test_shards_run_every_test_once(tmp_path: Path) -> None:
    (tmp_path / "test_five.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(5))\ndef test(n): print('ran', n); assert n != 3\n"
    )
    command = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "bench.gpu.shard_tests",
        str(tmp_path),
        "-c",
        "/dev/null",
    )
    part = run.Part("tests", "x", (command,), (), num_shards=2)
    outcome = run.run_part(part, part.steps, tmp_path, limit_s=300)
    log = outcome.log.read_text()
    assert outcome.verdict == "FAILED (1)"
    assert sorted(re.findall(r"ran (\d)", log)) == list("01234")
    assert "process 0 of 2: exit status 0" in log and "process 1 of 2: exit status 1" in log
    assert any(line.startswith("FAILED ") for line in run._telling_lines(outcome.log))
    assert "3 passed, 2 deselected" in log and "1 failed, 1 passed, 3 deselected" in log


def test_a_part_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {
        "build": run.Part("build", "x", python("print('built')"), ()),
        "one": run.Part("one", "x", python("raise SystemExit('went wrong')"), ()),
        "two": run.Part("two", "x", python("import os; print(os.environ['PYTHONPATH'])"), ()),
        "tool": run.Part("tool", "x", python("print('never')"), (), needs="no-such-tool"),
    }
    monkeypatch.setattr(run, "make_parts", lambda args: parts)
    assert run.main(["--only", "one,tool,two", "--out", str(tmp_path)], has_card=lambda: True) == 1
    printed = capsys.readouterr().out
    assert "went wrong" in printed
    summary = (tmp_path / "summary.txt").read_text()
    assert [line.split()[0] for line in summary.splitlines()] == ["build", "one", "two", "tool"]
    assert "NOT RUN" in summary and "no-such-tool was not found on PATH" in summary
    assert str(run.ROOT) in (tmp_path / "two.log").read_text()
    assert run.main(["--only", "two", "--out", str(tmp_path)], has_card=lambda: True) == 0


def test_a_limit_reached_becomes_a_row_with_a_reason(tmp_path: Path) -> None:
    """The signal at the end of a part's time is an error in what runs then, and the page is still written."""
    import signal

    with recorder._time_limit("decode"), pytest.raises(recorder.OutOfTimeError, match="time limit of the part decode"):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_dry_run_tries_every_part_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = "validate,decode"  # the others' arguments are tried above
    status = run.main(["--dry-run", "--only", only, "--out", str(tmp_path), "--commit", "abc"], has_card=lambda: False)
    printed = capsys.readouterr().out
    assert status == 0, printed
    for name in ("build", *only.split(",")):
        assert (tmp_path / f"{name}.log").is_file()
    assert (
        "bench.gpu.time_decode" in printed
        and "--commit abc" in printed
        and "a skipped layer, us" in (tmp_path / "decode.log").read_text()
    )
