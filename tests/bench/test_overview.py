"""The README's table: which figures of which files it shows, and what it marks as missed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.report.overview import overview
from dynskip.benchmark.report import Report, Row

CONDITIONS: dict[str, Any] = {
    "machine": "here", "cpu": "Test", "shape": "opt-1.3b", "commit": "a", "date": "2026-01-02 00:00 UTC",
    "dtype": "bfloat16", "backend": "native", "num_threads": 2, "num_cores": 2, "isa": "AVX512", "versions": {},
    "load": [0.0], "prompt_len": 64, "bandwidth_gbps": 40.0, "peak_gflops": 100.0,
}  # fmt: skip


def step(batch: int, what: str, value: float, target: float | None = None, section: str = "decode") -> Row:
    return Row(section, batch, what, value, target, "over transformers" in what, 1.0, 1.0, 4)


def cells(table: str) -> list[dict[str, str]]:
    header, *lines = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")
    )
    return [dict(zip(header, line, strict=True)) for line in lines]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def test_the_table_has_a_line_a_model_and_machine_and_marks_what_is_missed(tmp_path: Path) -> None:
    assert overview(tmp_path, []) == "Not measured yet.\n"
    floor, over = "full depth / its products, keys and values", "speed-up over transformers"
    quarter = "decode, shared 25% path, speed-up over full depth"
    steps = (
        *(step(batch, floor, value, 1.07) for batch, value in ((32, 1.08), (1, 1.03), (8, 1.07))),
        *(step(batch, over, value, 2.0) for batch, value in ((1, 1.5), (8, 2.5), (32, 3.0))),
        step(16, quarter, 3.2, section="paths"),
        step(1, "independent 50% paths", 9.0),
    )
    Report(CONDITIONS, steps, {}).write(tmp_path / "cpu")
    Report({**CONDITIONS, "cpu": "Another", "machine": "there"}, steps[:1], {}).write(tmp_path / "cpu")
    ratio = {"ours": 1.0, "theirs": 2.0, "low": 1.0, "high": 2.0}
    rows = [
        {"peer": "vLLM", "what": "decode", "batch": 1, "prompt_len": 64, **ratio, "value": 1.5},
        {"peer": "vLLM", "what": "decode", "batch": 8, "prompt_len": 64, **ratio, "value": 1.499},
        {"peer": "vLLM", "what": "decode", "batch": 32, "prompt_len": 64, "error": "out of memory"},
        {"peer": "vLLM", "what": "prefill", "batch": 1, "prompt_len": 512, **ratio, "value": 7.0},
        {"peer": "transformers", "what": "decode", "batch": 1, "prompt_len": 64, **ratio, "value": 8.0},
        {"peer": "vLLM", "what": "stream, paper's depths", **ratio, "value": 3.9},
    ]
    date = {"date": "2026-01-03 00:00 UTC", "commit": "b"}
    write(tmp_path / "peers" / "opt-1.3b-here.jsonl", [{**CONDITIONS, **date}, *rows])
    stream = {**CONDITIONS, "part": "conditions", "model": "opt-1.3b shapes with random weights"}
    cohort = {"part": "stream", "name": "cohort", "batch": 16, "decode_gain": 2.97}
    found = [
        write(tmp_path / "serving-a.jsonl", [stream, cohort, {**cohort, "batch": 32, "decode_gain": 2.84}]),
        write(tmp_path / "serving-b.jsonl", [{**stream, "machine": "old", "cpu": "Nameless"}, cohort]),
    ]
    table = overview(tmp_path, found)
    other, here = cells(table)
    assert (other["model"], other["CPU"], here["CPU"]) == ("opt-1.3b", "Another", "Test")
    assert "Nameless" not in table and "8.00" not in table and "9.00" not in table
    assert here == {
        "model": "opt-1.3b",
        "CPU": "Test",
        "mixed stream": "2.97 / 2.84 at 16 / 32",
        "step over its floor": "1.03 / 1.07 / 1.08\\*",
        "a quarter of the layers": "3.20 at 16",
        "step over transformers": "1.50\\* / 2.50 / 3.00",
        "step over vLLM": "1.50 / 1.50\\* / failed",
        "long prompts over vLLM": "7.00 at 1",
        "mixed stream over vLLM": "3.90\\*",
    }
    assert [name for name, cell in other.items() if cell][2:] == ["step over its floor"]
    assert "from 2026-01-02 00:00 UTC to 2026-01-03 00:00 UTC at 2 commits" in " ".join(table.split())
