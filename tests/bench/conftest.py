"""Fixtures of the tests of `make gpu`."""

from __future__ import annotations

import pytest
import torch
from gpu_runs import LLAMA

from bench.gpu import parts, recorder
from dynskip import host
from dynskip.measure import device
from dynskip.models.opt import opt_shape
from dynskip.models.shapes import SHAPES, get_shape
from dynskip.ops import native


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and memory that take no time."""
    monkeypatch.setitem(SHAPES, "tiny", opt_shape(4, 32, 2, 64))
    monkeypatch.setitem(SHAPES, LLAMA, recorder.tiny_shape(get_shape(parts.BESIDE)))
    monkeypatch.setattr(device, "_COPY_BYTES", 2**16)
    monkeypatch.setattr(device, "_GEMM_SIZE", 16)
    monkeypatch.setattr(host, "cpu_model", lambda: "Test")


@pytest.fixture
def interpreted() -> None:
    """Skips without the extension, which plans rows, and where there is a card."""
    if native.unavailable_reason() is not None:
        pytest.skip(f"no plan_rows: {native.unavailable_reason()}")
    if torch.cuda.is_available():
        pytest.skip("the smoke test itself runs on this machine's GPU")
