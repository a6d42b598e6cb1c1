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


def test_a_line_a_model_and_machine_and_what_is_missed_is_marked(tmp_path: Path) -> None:
    assert overview(tmp_path, []) == "Not measured yet.\n"
    floor = "full depth / its products, keys and values"
    steps = (
        *(step(batch, floor, value, 1.07) for batch, value in ((32, 1.08), (1, 1.03), (8, 1.07))),
        step(16, "decode, shared 25% path, speed-up over full depth", 3.2, section="paths"),
        step(1, "independent 50% paths", 9.0),
    )
    Report(CONDITIONS, steps, {}).write(tmp_path / "cpu")
    Report({**CONDITIONS, "cpu": "Another", "machine": "there"}, steps[:1], {}).write(tmp_path / "cpu")
    ratio = {"ours": 1.0, "theirs": 2.0, "low": 1.0, "high": 2.0}
    rows = [
        {"peer": "dynskip", "what": "load", "settings": "cohort, costs calibrated"},
        {"peer": "vLLM", "what": "decode", "batch": 1, "prompt_len": 64, **ratio, "value": 1.5},
        {"peer": "vLLM", "what": "decode", "batch": 8, "prompt_len": 64, **ratio, "value": 1.499},
        {"peer": "vLLM", "what": "decode", "batch": 32, "prompt_len": 64, "error": "out of memory"},
        {"peer": "vLLM", "what": "prefill", "batch": 1, "prompt_len": 512, **ratio, "value": 0.9},
        {"peer": "CTranslate2 int8", "what": "decode", "batch": 1, "prompt_len": 64, **ratio, "value": 0.8},
        {"peer": "CTranslate2 float32", "what": "decode", "batch": 1, "prompt_len": 64, **ratio, "value": 8.0},
        {"peer": "vLLM", "what": "stream", **ratio, "value": 1.31},
        {"peer": "vLLM", "what": "stream, paper's depths", **ratio, "value": 3.9},
    ]
    date = {"date": "2026-01-03 00:00 UTC", "commit": "b"}
    peers = tmp_path / "peers" / "opt-1.3b-here.jsonl"
    write(peers, [{**CONDITIONS, **date}, *rows])
    stream = {**CONDITIONS, "part": "conditions", "model": "opt-1.3b shapes with random weights"}
    stream |= {"mean_layers": 5.49, "num_layers": 24}
    cohort = {"part": "stream", "name": "cohort", "batch": 16, "decode_gain": 2.97}
    found = [
        write(tmp_path / "serving-a.jsonl", [stream, cohort, {**cohort, "batch": 32, "decode_gain": 2.84}]),
        write(tmp_path / "serving-b.jsonl", [{**stream, "machine": "old", "cpu": "Nameless"}, cohort]),
    ]
    text = overview(tmp_path, found)
    saved, _, beside = text.partition("\n| model")
    beside = f"| model{beside}"
    other, here = cells(saved)[:2]
    assert "Nameless" not in text and "8.00" not in text and "9.00" not in text
    columns = {"model": "opt-1.3b", "CPU": "Test"}
    assert here == columns | {
        "mixed stream, mean layers": "5.5 of 24",
        "mixed stream, decode": "2.97 / 2.84 at 16 / 32",
        "a quarter of the layers, decode": "3.20 at 16",
        "step time over its floor": "1.03 / 1.07 / 1.08\\*",
    }
    assert other["CPU"] == "Another" and [name for name, cell in other.items() if cell][2:] == [
        "step time over its floor"
    ]
    assert cells(beside) == [
        columns
        | {
            "decode over vLLM": "1.50 / 1.50\\* / failed",
            "decode over CTranslate2 int8": "0.80 at 1",
            "prompts of 512 over vLLM": "0.90\\* at 1",
            "stream over vLLM": "1.31",
            "mixed stream over vLLM": "3.90\\*",
        }
    ]
    flat = " ".join(text.split())
    assert "from 2026-01-02 00:00 UTC to 2026-01-03 00:00 UTC at 2 commits" in flat
    assert "Those of opt-1.3b on Test are one stream each, with prefix caching in dynskip alone" in flat
    assert "Speed is not quality" not in flat
    rows[0]["settings"] += ", no prefix caching"
    write(peers, [{**CONDITIONS, **date}, *rows])
    loss = {"what": "loss", "model": "tuned", "rule": "found", "num_rows": 100, "layers": 6, "value": 2.0}
    losses = [loss, {**loss, "layers": 3, "value": 2.5}, {**loss, "layers": 3, "num_rows": 48, "value": 7.0}]
    losses.append({**loss, "model": "untuned", "rule": "uniform", "num_rows": 48, "layers": 3, "value": 13.76})
    write(tmp_path / "paths" / "smollm2-135m-paths.jsonl", losses)
    flat = " ".join(overview(tmp_path, found).split())
    assert "one stream each" not in flat
    assert "is 2.00 / 2.50 nats a token along its paths of 6 / 3 layers (100 references)" in flat
    assert "along a uniform path of 3, 13.8," in flat
