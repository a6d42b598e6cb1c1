"""Results of a card: how time is measured there, and a file of rows that loses none, not even a failed one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.report.device import DeviceReport, append_row, write_page
from dynskip.benchmark.report import Row
from dynskip.measure import device
from dynskip.measure.device import Cpu, RepeatedLaunches, describe_device, get_device, measure_device_speed

ROW = Row("decode", 8, "full depth, share of its roofline", 0.81, 0.8, True, 0.75, 0.61, 7)
SPEEDUP = Row("decode", 8, "full depth, speed-up over transformers sdpa eager", 4.5, 1.0, True, 0.75, 3.4, 7)
SKIPPED = Row("decode", 1, "a skipped layer, us", 1.25, 1.0, False, 0.31, 0.3, 7)
FAILED = Row.failed("decode", 64, "full depth, share of its roofline", 0.8, True, "OutOfMemoryError: no room")
CONDITIONS = {
    "machine": "nvidia-test",
    "gpu": "NVIDIA Test",
    "gpu_memory_gib": 80.0,
    "versions": {"torch": "2.13", "cuda": None},
    "commit": "abc",
    "date": "2026-01-01 00:00 UTC",
    "part": "decode",
    "shape": "tiny",
    "dtype": "bfloat16",
    "bandwidth_gbps": 4000.0,
    "peak_gflops": 700_000.0,
    "notes": ["Context 4."],
}


def written(directory: Path, *rows: Row, **changes: Any) -> Path:
    for row in rows:
        path = append_row(directory, row, CONDITIONS | changes)
    return path


def test_rows_survive_their_file_run_by_run(tmp_path: Path) -> None:
    path = written(tmp_path, ROW, FAILED)
    assert path.name == "nvidia-test.jsonl"
    written(tmp_path, SKIPPED, part="prefill")
    written(tmp_path, replace(ROW, value=0.9), commit="def")
    written(tmp_path, replace(ROW, batch=77), commit="ghi")
    report = DeviceReport.read(path)
    assert [run.part for run in report.runs] == ["decode", "prefill", "decode", "decode"]
    first, failed = report.runs[0].rows
    assert first == ROW
    assert failed.failure == FAILED.failure and failed.value != failed.value and failed.passed is None
    # A later run takes the place of rows of the same batch, and of no others.
    assert [run.conditions["commit"] for run in report.latest] == ["abc", "def", "ghi", "abc"]
    assert [run.rows for run in report.latest[:2]] == [report.runs[0].rows[1:], report.runs[2].rows]
    # Another shape is no later run of the same.
    latest = DeviceReport.read(written(tmp_path, ROW, shape="other")).latest
    assert [run.title for run in latest] == [*["tiny, decode"] * 3, "tiny, prefill", "other, decode"]


def test_a_failed_row_is_valid_json_without_numbers(tmp_path: Path) -> None:
    line = written(tmp_path, FAILED).read_text()
    assert "NaN" not in line
    found = json.loads(line)
    assert (found["value"], found["verdict"], found["failure"]) == (None, "FAILED", "OutOfMemoryError: no room")
    assert "failure" not in ROW.line()


def test_the_page_shows_every_row_of_the_last_run(tmp_path: Path) -> None:
    written(tmp_path, SPEEDUP, commit="old")
    path = written(tmp_path, ROW, SKIPPED, FAILED)
    page = write_page(path).read_text()
    assert page.startswith("# NVIDIA Test\n\n## tiny, decode\n")
    assert "old" not in page and "transformers sdpa eager" not in page
    assert "copies 4000 GB/s, multiplies 700 TFLOP/s" in page and "Context 4." in page and "commit abc" in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert "|    8 | full depth, share of its roofline |        750 |      610 |   81.0% | >= 80%  | met     |" in lines
    assert "|    1 | a skipped layer, us               |        310 |      300 | 1.25 us | <= 1 us | MISSED  |" in lines
    assert "- full depth, share of its roofline, 64 rows: OutOfMemoryError: no room" in page


def test_the_summary_has_a_line_a_question_and_a_column_a_row_count(tmp_path: Path) -> None:
    untargeted = replace(SPEEDUP, target=None, what="for information")
    path = written(tmp_path, ROW, FAILED, SKIPPED, untargeted)
    summary = DeviceReport.read(path).summary()
    assert "for information" not in summary
    assert [cell.strip() for cell in summary.splitlines()[0].split("|")[2:5]] == ["1 rows", "8 rows", "64 rows"]
    line = next(line for line in summary.splitlines() if "share of its roofline" in line)
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "tiny, decode: full depth, share of its roofline",
        "",
        "81.0%",
        "failed",
        ">= 80%",
    ]
    assert "1.25 us (missed)" in summary
    # What was measured with a switch is another line, and what differs in the conditions is said.
    written(tmp_path, ROW, part="decode full, DYNSKIP_PDL=0", commit="def", bandwidth_gbps=4100.0)
    summary = " ".join(DeviceReport.read(path).summary().split())
    assert "| tiny, decode, DYNSKIP_PDL=0: full depth, share of its roofline |" in summary
    assert "copies 4000 to 4100 GB/s" in summary and "at best in these runs" in summary
    assert "commit abc, 2026-01-01 00:00 UTC; def, 2026-01-01 00:00 UTC." in summary


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "card.jsonl"
    row = json.dumps(ROW.line() | {"conditions": {"gpu": "x", "part": "p"}})
    for text, message in (
        ("", "at least one row, got none"),
        ("\n", "must hold rows of a device's report, got line 1"),
        ('{"skipped": "a", "reason": "b", "conditions": {"cpu": "c"}}', "rows of a device's report, got line 1"),
        (f'{row}\n{{"conditions": {{}}}}\n', "must hold rows of a device's report, got line 2"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            DeviceReport.read(path)


def test_a_cpu_stands_in_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_COPY_BYTES", 2**16)
    monkeypatch.setattr(device, "_GEMM_SIZE", 16)
    cpu = get_device("cpu")
    assert isinstance(cpu, Cpu)
    speed = measure_device_speed(cpu, num_samples=2)
    assert speed.bandwidth_gbps > 0 and speed.peak_gflops > 0
    calls: list[int] = []
    assert cpu.time(lambda: calls.append(1), 5) >= 0 and len(calls) == 5
    again = cpu.captured(lambda: calls.append(2))
    again()
    assert calls[5:] == [2, 2]
    graphs = RepeatedLaunches()
    graphs.replay(graphs.capture(lambda: calls.append(3), lambda: calls.append(4)))
    assert calls[7:] == [3, 4]
    samples = device.time_in_turns(cpu, {"a": lambda: None, "b": lambda: None}, num_rounds=3, num_repeats=2)
    assert [sample.num_samples for sample in samples.values()] == [3, 3]
    described = describe_device(cpu, "0123abc")
    assert described["commit"] == "0123abc" and described["machine"].endswith("instead-of-a-gpu")
    assert {"torch", "triton", "transformers"} <= described["versions"].keys()
    with pytest.raises(ValueError, match="must be 'cuda' or 'cpu', got 'tpu'"):
        get_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="must be a CUDA device that this machine has, got none"):
            get_device("cuda")


def test_what_is_asked_of_cuda_comes_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU: torch.cuda is asked for what it has, in the order that a measurement needs."""
    log: list[str] = []

    class Fake:
        """Whatever torch.cuda would make: writes down what is asked of it."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.name = f"{args[0]}" if args else "thing"

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: log.append(name) or 12.0

        def __enter__(self) -> None:
            log.append("enter")

        def __exit__(self, *error: object) -> None:
            log.append("exit")

    for name in ("Event", "Stream", "CUDAGraph", "stream", "graph", "current_stream"):
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, Fake)
    for name, result in (
        ("is_available", True),
        ("current_device", 0),
        ("get_device_name", "NVIDIA Test"),
        ("get_device_capability", (9, 0)),
        ("get_device_properties", SimpleNamespace(total_memory=2**37)),
        ("get_sync_debug_mode", 0),
    ):
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, lambda *args, result=result: result)
    for name in ("synchronize", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name: log.append(f"{name} {args[0]}"))
    gpu = get_device("cuda")
    assert gpu.time(lambda: log.append("task"), 3) == 4.0
    assert log == ["synchronize cuda:0", "record", "task", "task", "task", "record", "synchronize", "elapsed_time"]
    log.clear()
    gpu.captured(lambda: log.append("launch"))()
    assert log == [
        *("wait_stream", "enter", "launch", "exit", "wait_stream", "synchronize cuda:0"),
        *("enter", "launch", "exit", "replay"),
    ]
    log.clear()
    with gpu.no_waiting():
        log.append("step")
    assert log == ["set_sync_debug_mode error", "step", "set_sync_debug_mode 0"]
    described = describe_device(gpu, None)
    assert (described["machine"], described["capability"], described["gpu_memory_gib"]) == ("nvidia-test", "9.0", 128.0)


@pytest.mark.gpu
def test_a_gpu_measures_by_its_own_clock() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    gpu = get_device("cuda")
    buffer = torch.zeros(2**28, dtype=torch.uint8, device=gpu.device)
    other = torch.empty_like(buffer)
    copy_ms = gpu.time(lambda: other.copy_(buffer), 10)
    assert 2**29 / 1e13 < copy_ms / 1e3 < 2**29 / 1e10, "between 10 GB/s and 10 TB/s"
    counter = torch.zeros(1, dtype=torch.int64, device=gpu.device)
    again = gpu.captured(lambda: counter.add_(1))
    before = int(counter)
    again()
    assert int(counter) == before + 1
    with gpu.no_waiting():
        again()
        with pytest.raises(RuntimeError, match="synchroniz"):
            counter.item()
    counter.item()
