"""What tests of `make gpu` share: options of runs without a card, its parts, and what a run has written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import parts, time_decode, time_drafts, time_kernels, time_prefill, time_serving
from dynskip import host

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
SMOKE = ["--device", "cpu", "--tiny", "--dtype", "float32"]


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """Those of a part."""
    return [json.loads(line) for line in (directory / "test-instead-of-a-gpu.jsonl").read_text().splitlines()]


def checks(directory: Path) -> dict[str, dict[str, Any]]:
    """Those of a smoke test, by what they look at."""
    lines = [json.loads(line) for line in (directory / "smoke.jsonl").read_text().splitlines()]
    return {line["check"]: line for line in lines}
