"""Where the parts of `make gpu` put what they measured: every question gets a row, a figure or the reason why not."""

from __future__ import annotations

import argparse
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dynskip.benchmark.device import NUM_SPEED_SAMPLES, Device, describe_device, get_device, measure_device_speed
from dynskip.benchmark.device_report import append_row, write_page
from dynskip.benchmark.report import Row
from dynskip.benchmark.timing import Samples
from dynskip.cost import MachineSpeed

# What is left of the time limit when nothing new is begun.
_RESERVE_S = 20


@dataclass(frozen=True)
class Question:
    """One row to come. what: ends with ", us" for a time, holds "share of" for a percentage. target: None asks only."""

    batch: int
    what: str
    target: float | None = None
    at_least: bool = True

    def __str__(self) -> str:
        bound = "" if self.target is None else f"  {'>=' if self.at_least else '<='} {self.target:g}"
        return f"{self.batch:>5} rows  {self.what}{bound}"


class OutOfTimeError(RuntimeError):
    """The part's time limit is reached."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every measuring part has."""
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), metavar="DIR", help="(default: gpu-results)")
    parser.add_argument("--limit-s", type=float, default=540, metavar="S", help="time limit (default: 540)")
    parser.add_argument("--commit", metavar="ID", help="commit of the sources (default: git's)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try it out")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="shapes that take no time, to try it out")
    parser.add_argument("--dry-run", action="store_true", help="print the questions and end")


class Recorder:
    """Appends rows to ``<card>.jsonl`` as they are measured, under the conditions of one run of one part."""

    def __init__(self, part: str, device: Device, args: argparse.Namespace, described: dict[str, Any]) -> None:
        self.part = part
        self.device = device
        self.directory: Path = args.out
        self.deadline = time.monotonic() + args.limit_s - _RESERVE_S
        self.dtype: torch.dtype = getattr(torch, args.dtype)
        self.speed: MachineSpeed = measure_device_speed(
            device, self.dtype, num_samples=2 if args.tiny else NUM_SPEED_SAMPLES
        )
        self.conditions = {
            **describe_device(device, args.commit),
            "part": part,
            "dtype": args.dtype,
            "bandwidth_gbps": round(self.speed.bandwidth_gbps, 1),
            "peak_gflops": round(self.speed.peak_gflops, 1),
            **described,
        }
        self.num_failed = 0
        self._open: dict[tuple[int, str], Question] = {}
        self._data: Path | None = None
        print(f"{device.name}: {self.speed.bandwidth_gbps:.0f} GB/s, {self.speed.peak_gflops / 1e3:.1f} TFLOP/s")

    def answer(self, batch: int, what: str, value: float, ours: Samples, other: Samples | float) -> None:
        """Record the value of the question ``(batch, what)``; other: samples, or the milliseconds of a bound."""
        question = self._open.pop((batch, what))
        other_ms = other if isinstance(other, float) else other.ms
        row = Row(
            self.part,
            batch,
            what,
            round(value, 5),
            question.target,
            question.at_least,
            round(ours.ms, 6),
            round(other_ms, 6),
            ours.num_samples,
        )
        self._append(row)

    def share(self, batch: int, what: str, ours: Samples, floor_ms: float) -> None:
        """Record which share of the speed of a bound was reached."""
        self.answer(batch, what, floor_ms / ours.ms, ours, floor_ms)

    def speedup(self, batch: int, what: str, ours: Samples, other: Samples) -> None:
        """Record how many times faster than ``other`` ours is."""
        self.answer(batch, what, other.over(ours), ours, other)

    def attempt(self, questions: Sequence[Question], work: Callable[[], None]) -> None:
        """Answer ``questions`` by ``work``. Those that an error leaves open are recorded as failed, with it."""
        self._open = {(question.batch, question.what): question for question in questions}
        try:
            if time.monotonic() > self.deadline:
                raise OutOfTimeError(f"no time was left of the limit of the part {self.part}")
            work()
            if self._open:
                raise AssertionError(f"nothing answered {', '.join(map(str, self._open.values()))}")
        except Exception as error:
            if not isinstance(error, OutOfTimeError):
                traceback.print_exc()
            self._fail(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
        finally:
            if self.device.device.type == "cuda":
                torch.cuda.empty_cache()

    def fail_one(self, batch: int, what: str, error: Exception) -> None:
        """Record that the question ``(batch, what)`` cannot be answered, and go on."""
        question = self._open.pop((batch, what))
        self._append_failed(question, f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")

    def note(self, text: str) -> None:
        """Print something that belongs to no row."""
        print(f"  {text}", flush=True)

    def close(self) -> int:
        """Write the page; the exit status: 1 where a question was not answered."""
        if self._data is not None:
            print(f"written: {self._data}, {write_page(self._data)}")
        return int(self.num_failed > 0)

    def _fail(self, reason: str) -> None:
        for question in self._open.values():
            self._append_failed(question, reason)
        self._open = {}

    def _append_failed(self, question: Question, reason: str) -> None:
        self.num_failed += 1
        self._append(Row.failed(self.part, question.batch, question.what, question.target, question.at_least, reason))

    def _append(self, row: Row) -> None:
        self._data = append_row(self.directory, row, self.conditions)
        us = "" if row.failure else f"{row.ours_ms * 1e3:10.1f} us against {row.other_ms * 1e3:10.1f} us"
        reason = f"  {row.failure}" if row.failure else ""
        print(
            f"{row.batch:>5} rows  {row.what:<75} {row.show(row.value):>8} {row.shown_target:<9} {row.verdict:<7}{us}"
            f"{reason}",
            flush=True,
        )


def run_part(
    part: str,
    description: str,
    questions: Callable[[argparse.Namespace], Sequence[Question]],
    measure: Callable[[argparse.Namespace, Device], int],
    argv: Sequence[str] | None,
    extra: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """The main function of a measuring part; returns its exit status."""
    parser = argparse.ArgumentParser(prog=f"bench.gpu.{part}", description=description)
    add_arguments(parser)
    if extra is not None:
        extra(parser)
    args = parser.parse_args(argv)
    if args.dry_run:
        asked = questions(args)
        print(f"{part}: {len(asked)} questions, to {args.out}/<card>.jsonl and <card>.md")
        for question in asked:
            print(question)
        return 0
    device = get_device(args.device)
    with _time_limit(part), torch.no_grad():
        return measure(args, device)


@contextmanager
def _time_limit(part: str) -> Iterator[None]:
    """Inside the block the signal that ends the part, sent when its time is up, becomes an error in what runs then."""

    def stop(signal_number: int, frame: object) -> None:
        raise OutOfTimeError(f"the time limit of the part {part} was reached")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
