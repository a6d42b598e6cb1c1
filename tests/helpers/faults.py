"""What goes wrong in tests of the engine: at a call, at a layer, once, by an interrupt."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from streams import Parity
from torch import Tensor

import dynskip
from dynskip.controllers import TokenContext
from dynskip.engine.engine import Engine


class Broken(RuntimeError):
    """What the faults of these tests raise."""


class FailsAt(Parity):
    """A per-token controller that breaks at one layer of the token at one position."""

    def __init__(self, layer: int, position: int, error: BaseException) -> None:
        self.layer, self.position, self.error = layer, position, error

    def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
        if layer == self.layer and bool((context.position_ids == self.position).any()):
            raise self.error
        return super().active(layer, hidden_states, context)


class Interrupt:
    """Counts the lines that run in the engine, and raises KeyboardInterrupt at one of them."""

    folder = str(Path(dynskip.__file__).parent)
    files: tuple[str, ...] = (
        "engine/engine.py",
        "execution.py",
        "scheduler.py",
        "groups.py",
        "kv_pool.py",
        "prefixes.py",
        "prefix_tree.py",
        "slot_pool.py",
        "ops/choice.py",
    )

    def __init__(self, at: int) -> None:
        self.at, self.num_lines, self.where = at, 0, ""

    def trace(self, frame: FrameType, event: str, _argument: object) -> Any:
        """What `sys.settrace` calls for each new frame, and then for its lines."""
        name = frame.f_code.co_filename
        if not name.startswith(self.folder) or not name.endswith(self.files):
            return None
        if event == "line":
            self.num_lines += 1
            if self.num_lines == self.at:
                self.where = f"{Path(name).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self.trace

    def advance(self, served: Engine) -> bool:
        """Whether steps until the end were interrupted."""
        before = sys.gettrace()
        # What the collector ends in between, such as engines of other tests, has lines, too, and swallows interrupts.
        gc.disable()
        sys.settrace(self.trace)
        try:
            while served.scheduler.has_unfinished:
                served.advance()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
            gc.enable()
        return False


class Once:
    """Raises KeyboardInterrupt when it is called for the n-th time, and in the next calls of as many as asked for."""

    def __init__(self, at: int, times: int = 1) -> None:
        self.at, self.times, self.num_calls = at, times, 0

    def __call__(self, *_: object) -> float:
        self.num_calls += 1
        if self.at <= self.num_calls < self.at + self.times:
            raise KeyboardInterrupt
        return float(self.num_calls)
