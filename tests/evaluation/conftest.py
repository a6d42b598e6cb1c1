"""What tests of the committed report share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).parents[2] / "bench" / "results" / "paper-smollm2"


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    """The summary of the committed run on SmolLM2."""
    summary: dict[str, Any] = json.loads((RUN / "summary.json").read_text(encoding="utf-8"))
    return summary
