"""`MetricsLog`: what an engine does, at an interval: as JSON lines in a file, and as a live line on a terminal."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from dynskip.engine.stats import EngineStats
from dynskip.scheduler.outcome import Tally

if TYPE_CHECKING:
    from dynskip.engine.engine import Engine


@dataclass(frozen=True)
class Metrics:
    """An engine at one moment.

    seconds: since the log began. stats: totals, and what the engine holds now.
    The rest is of the window since the metrics before: its length, generated tokens and finished requests a second;
    means over its decode steps of rows, of layers that a row ran, and of the union that a step read; preemptions.
    """

    seconds: float
    stats: EngineStats
    window_s: float
    tokens_per_s: float
    requests_per_s: float
    rows: float
    layers: float
    union: float
    num_preempted: int

    def line(self) -> dict[str, Any]:
        """What a JSON line holds of it, flat; all that is of the window begins with ``window_``."""
        window = asdict(self)
        seconds = window.pop("seconds")
        del window["stats"]
        names = {name: name if name.startswith("window_") else f"window_{name}" for name in window}
        return {"elapsed_s": seconds, **{names[name]: value for name, value in window.items()}, **self.stats.line()}

    def __str__(self) -> str:
        """One line for a terminal, the most important first."""
        stats, outcome = self.stats, self.stats.outcome
        ttft_s, tpot_ms = outcome.ttft_s, outcome.tpot_ms
        return (
            f"{self.seconds:.0f} s: {self.tokens_per_s:.0f} tokens/s ({outcome.tokens_per_s:.0f} since the start) | "
            f"{outcome.num_requests} done, {stats.num_running} running, {stats.num_waiting} waiting | "
            f"rows {self.rows:.1f} | layers {self.layers:.1f} of union {self.union:.1f} | "
            f"KV {stats.kv_bytes / 2**20:.0f}/{stats.kv_capacity_bytes / 2**20:.0f} MiB | "
            f"TTFT {ttft_s[0]:.2f}/{ttft_s[2]:.2f} s | token {tpot_ms[0]:.1f}/{tpot_ms[2]:.1f} ms | "
            f"preempted {outcome.num_preempted}"
        )


class MetricsLog:
    """Writes the metrics of ``engine`` every ``every_s`` seconds; to be told of each step with `update`.

    path: a file to which JSON lines are appended; None: no file.
    live: also show a line on ``stream`` (default: stderr). On a terminal it overwrites itself.
    clock: the time in seconds; a clock that goes back is taken to stand still.

    A context manager: leaving it writes what has come up since the last line.
    Raises what writing raises, OSError as a rule, and writes no more after that.
    """

    def __init__(
        self,
        engine: Engine,
        path: Path | str | None = None,
        every_s: float = 1.0,
        live: bool = False,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not every_s > 0:
            raise ValueError(f"MetricsLog: every_s must be positive, got {every_s}.")
        self._engine = engine
        self._every_s = every_s
        self._stream = (stream or sys.stderr) if live else None
        self._clock = clock
        # Unbuffered: each line is there as soon as it is written, and whole.
        self._file = None if path is None else Path(os.path.expanduser(path)).open("ab", buffering=0)  # noqa: SIM115  # `close` is below
        self._begin_s = self._now_s = self._last_s = clock()
        self._before = self._tally()

    def update(self) -> None:
        """Write, if the last line is ``every_s`` old."""
        if self._now() - self._last_s >= self._every_s:
            self.write()

    def write(self) -> Metrics:
        """The metrics of now, which are written, too."""
        metrics = self._measure()
        try:
            if self._file is not None:
                self._file.write(json.dumps({"time_s": time.time(), **metrics.line()}).encode() + b"\n")
            if self._stream is not None:
                if self._stream.isatty():
                    width = shutil.get_terminal_size().columns - 1
                    self._stream.write(f"\r{str(metrics)[:width]}\x1b[K")
                else:
                    self._stream.write(f"{metrics}\n")
                self._stream.flush()
        except Exception:
            self._end()
            raise
        return metrics

    def close(self) -> None:
        """Write a last line, if anything has happened since the last one, and close the file."""
        if self._stream is None and self._file is None:
            return
        try:
            if self._tally() != self._before:
                self.write()
            if self._stream is not None and self._stream.isatty():
                self._stream.write("\n")
        finally:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _end(self) -> None:
        self._stream = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _measure(self) -> Metrics:
        stats = self._engine.stats()
        now_s, tally, before = self._now(), self._tally(), self._before
        window_s = now_s - self._last_s
        num_steps = max(tally.num_decode_steps - before.num_decode_steps, 1)
        num_rows = tally.num_rows - before.num_rows
        self._last_s, self._before = now_s, tally
        return Metrics(
            seconds=now_s - self._begin_s,
            stats=stats,
            window_s=window_s,
            tokens_per_s=(tally.num_tokens - before.num_tokens) / window_s if window_s else 0.0,
            requests_per_s=(tally.num_requests - before.num_requests) / window_s if window_s else 0.0,
            rows=num_rows / num_steps,
            layers=(tally.num_row_layers - before.num_row_layers) / max(num_rows, 1),
            union=(tally.num_union_layers - before.num_union_layers) / num_steps,
            num_preempted=tally.num_preempted - before.num_preempted,
        )

    def _tally(self) -> Tally:
        """A copy of the engine's sums; without the waits of single requests, which stats have."""
        num_preempted = self._engine.scheduler.counters.num_preempted
        return replace(self._engine.tally, num_preempted=num_preempted, ttft_s=[], queue_s=[], tpot_s=[])

    def _now(self) -> float:
        self._now_s = max(self._now_s, self._clock())
        return self._now_s
