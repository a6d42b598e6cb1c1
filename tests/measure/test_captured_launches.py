"""Launches that a GPU runs again from a graph: the memory that they use stays theirs as long as the call is kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dynskip.measure.device import Gpu


def test_a_captured_call_keeps_what_its_launch_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph knows addresses alone: a workspace that went back to the device would be read all the same."""
    replays: list[str] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextmanager
    def entered(*arguments: Any) -> Iterator[None]:
        yield

    for name, stand_in in {
        "is_available": lambda: True,
        "get_device_name": lambda device: "a card",
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": entered,
        "graph": entered,
        "synchronize": lambda device: None,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: replays.append("again")),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def captured() -> tuple[Any, weakref.ref[torch.Tensor]]:
        workspace = torch.zeros(4)
        launches: list[None] = []

        def launch() -> None:
            workspace.add_(1)
            launches.append(None)

        call = Gpu(torch.device("cpu")).captured(launch)
        assert len(launches) == 2, "once to compile, and once into the graph"
        return call, weakref.ref(workspace)

    call, workspace = captured()
    gc.collect()
    assert workspace() is not None
    call()
    assert replays == ["again"]
    del call
    gc.collect()
    assert workspace() is None
