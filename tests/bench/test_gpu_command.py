"""`make gpu`: its parts and their order, limits and logs, and its two calls rehearsed on a CPU."""

from __future__ import annotations

import importlib
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_runs import CPU_MODEL, LLAMA, checks

from bench.gpu import extension, parts, recorder, run, smoke_cases
from bench.report.device import DeviceReport
from dynskip import host
from dynskip.ops import native

pytestmark = pytest.mark.usefixtures("tiny")


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
