"""Where the parts of `make gpu` put what they measured: every question gets a row, a figure or the reason why not."""

from __future__ import annotations

import argparse
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from bench.report.device import append_row, conditions_of_run, write_page
from dynskip.benchmark.report import Row
from dynskip.costs.layer_costs import MachineSpeed
from dynskip.measure import device as devices
from dynskip.measure.device import NUM_SPEED_SAMPLES, Device, describe_device, get_device, measure_device_speed
from dynskip.measure.timing import Samples
from dynskip.models.config import DecoderConfig, Rotary
from dynskip.models.shapes import DEFAULT_SHAPE, SHAPES, get_shape

# What is left of the time limit when nothing new is begun: this, or a quarter of a short limit.
_RESERVE_S = 20
# Environment variables that change what the kernels do: a result says which were set.
_SWITCHES = ("DYNSKIP_PDL", "DYNSKIP_CONFIGS", "DYNSKIP_CARVEOUT")


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


def add_arguments(parser: argparse.ArgumentParser, limit_s: float) -> None:
    """The options that every part has whose results are kept."""
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), metavar="DIR", help="(default: gpu-results)")
    about = f"time limit (default: {limit_s})"
    parser.add_argument("--limit-s", type=float, default=limit_s, metavar="S", help=about)
    parser.add_argument("--commit", metavar="ID", help="commit of the sources (default: git's)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try it out")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add_shape(parser)


def add_shape(parser: argparse.ArgumentParser) -> None:
    """The options that say of which shape a model is."""
    parser.add_argument("--shape", choices=tuple(SHAPES), default=DEFAULT_SHAPE, help="(default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a shape that takes no time, to try it out")


def make_tiny(shape: str) -> str:
    """Add a tiny shape of the architecture of ``shape`` to `SHAPES`, for --tiny; returns its name.

    The memory by which a device's speed is measured becomes small, too.
    """
    name = "tiny" if shape == DEFAULT_SHAPE else f"tiny-{shape}"
    SHAPES.setdefault(name, tiny_shape(get_shape(shape)))
    devices._COPY_BYTES, devices._GEMM_SIZE = 2**16, 16
    return name


def tiny_shape(config: DecoderConfig) -> DecoderConfig:
    """What ``config`` is made of, in four small layers; its vocabulary is as it was."""
    is_grouped = config.num_kv_heads < config.num_heads
    turning = 16 * config.rotary_size // config.head_size
    return replace(
        config,
        num_layers=4,
        hidden_size=32,
        num_heads=2,
        num_kv_heads=1 if is_grouped else 2,
        head_size=16,
        ffn_size=32 * config.ffn_size // config.hidden_size // 16 * 16,
        embedding_size=32,
        rotary=None if config.rotary is None else Rotary.plain(turning, 1e4),
        window=min(config.window, 4),
        window_layers=None,
    )


def numbers(text: str) -> tuple[int, ...]:
    """The positive numbers that ``text`` lists, such as 1,8,64, for argparse. Raises: ArgumentTypeError."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"must list positive numbers, such as 1,8,64, got {text!r}")
    return tuple(map(int, parts))


def switches() -> dict[str, str]:
    """The environment variables that are set and change what the kernels do."""
    return {name: os.environ[name] for name in _SWITCHES if os.environ.get(name)}


class Recorder:
    """Appends rows to ``<card>.jsonl`` as they are measured, under the conditions of one run of one part.

    Its parts are called after ``part``, the section that was entered, and the switches that are set.
    """

    def __init__(self, part: str, device: Device, args: argparse.Namespace, described: dict[str, Any]) -> None:
        self.base = self.part = part
        self.device = device
        self.directory: Path = args.out
        self.deadline = time.monotonic() + args.limit_s - min(_RESERVE_S, args.limit_s / 4)
        self.dtype: torch.dtype = getattr(torch, args.dtype)
        self.conditions = describe_device(device, args.commit)
        before = None if args.run is None else conditions_of_run(args.out, self.conditions["machine"], args.run)
        if before is None:
            self.speed = measure_device_speed(device, self.dtype, num_samples=2 if args.tiny else NUM_SPEED_SAMPLES)
        else:
            self.speed = MachineSpeed(before["bandwidth_gbps"], before["peak_gflops"])
        self.conditions |= {
            "date": self.conditions["date"] if before is None else before["date"],
            "dtype": args.dtype,
            "bandwidth_gbps": round(self.speed.bandwidth_gbps, 1),
            "peak_gflops": round(self.speed.peak_gflops, 1),
            **({} if args.run is None else {"run": args.run}),
            **({"switches": switches()} if switches() else {}),
            **described,
        }
        self.enter("")
        self.num_failed = 0
        self._broken = ""
        self._open: dict[tuple[int, str], Question] = {}
        self._data: Path | None = None
        print(f"{device.name}: {self.speed.bandwidth_gbps:.0f} GB/s, {self.speed.peak_gflops / 1e3:.1f} TFLOP/s")

    def enter(self, section: str) -> None:
        """What is recorded from now on belongs to ``section`` of the part."""
        names = [f"{name}={Path(value).name}" for name, value in switches().items()]
        self.part = ", ".join(filter(None, [f"{self.base} {section}".strip(), *names]))
        self.conditions = {**self.conditions, "part": self.part}

    def answer(
        self, batch: int, what: str, value: float, ours: Samples, other: Samples | float, wrong: str = ""
    ) -> None:
        """Record the value of the question ``(batch, what)``.

        other: samples, or the milliseconds of a bound. wrong: what was wrong with the results of what was timed.
        """
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
            wrong=wrong,
        )
        self.num_failed += bool(wrong)
        self._append(row)

    def share(self, batch: int, what: str, ours: Samples, floor_ms: float, wrong: str = "") -> None:
        """Record which share of the speed of a bound was reached."""
        self.answer(batch, what, floor_ms / ours.ms, ours, floor_ms, wrong)

    def speedup(self, batch: int, what: str, ours: Samples, other: Samples, wrong: str = "") -> None:
        """Record how many times faster than ``other`` ours is."""
        self.answer(batch, what, other.over(ours), ours, other, wrong)

    def attempt(self, questions: Sequence[Question], work: Callable[[], None]) -> None:
        """Answer ``questions`` by ``work``. Those that an error leaves open are recorded as failed, with it."""
        self._open = {(question.batch, question.what): question for question in questions}
        try:
            if time.monotonic() > self.deadline:
                raise OutOfTimeError(f"no time was left of the limit of the part {self.part}")
            if self._broken:
                raise RuntimeError(f"the device serves this process no more: {self._broken}")
            work()
            if self._open:
                raise AssertionError(f"nothing answered {', '.join(map(str, self._open.values()))}")
        except Exception as error:
            if not isinstance(error, OutOfTimeError):
                traceback.print_exc()
            self._fail(_in_words(error))
            self._broken = self._broken or self._why_broken()
        if self.device.device.type == "cuda" and not self._broken:
            torch.cuda.empty_cache()

    def fail_one(self, batch: int, what: str, error: Exception) -> None:
        """Record that the question ``(batch, what)`` cannot be answered, and go on."""
        question = self._open.pop((batch, what))
        self._append_failed(question, _in_words(error))

    def note(self, text: str) -> None:
        """Print something that belongs to no row."""
        print(f"  {text}", flush=True)

    def close(self) -> int:
        """Write the page; the exit status: 1 where a question was not answered, or by something that computes wrong."""
        if self._data is not None:
            print(f"written: {self._data}, {write_page(self._data)}")
        return int(self.num_failed > 0)

    def _why_broken(self) -> str:
        """What a device answers after an error that no call in this process survives; "" where it still serves."""
        try:
            self.device.synchronize()
        except Exception as error:
            return _in_words(error)
        return ""

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
        reason = f"  {row.failure or row.wrong}" if row.failure or row.wrong else ""
        print(
            f"{row.batch:>5} rows  {row.what:<75} {row.show(row.value):>8} {row.shown_target:<9} {row.verdict:<7}{us}"
            f"{reason}",
            flush=True,
        )


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


@dataclass(frozen=True)
class Sizes:
    """What a part measures; each adds its own fields."""

    shape: str = DEFAULT_SHAPE
    vocab_size: int = get_shape(DEFAULT_SHAPE).vocab_size

    def of_shape(self, name: str) -> Self:
        """The same of another shape, with the vocabulary of that."""
        return replace(self, shape=name, vocab_size=get_shape(name).vocab_size)

    @property
    def lengths(self) -> dict[str, Any]:
        """The contexts or prompts that stand in the conditions of a row."""
        return {name: value for name, value in vars(self).items() if name == "prompt_len"}

    @property
    def note(self) -> str:
        """What a reader of the rows needs to know besides."""
        raise NotImplementedError


# Questions, and the method of a benchmark that answers them, with its arguments.
Group = tuple[Sequence[Question], Callable[..., None], tuple[Any, ...]]


class Benchmark:
    """A measuring part: what it asks, and how it answers.

    name: of the part. sections: of its questions; none where it is timed through a backend instead of row ops.
    default_sections: of a run that names none. counts: the option that sets row counts. counted: the fields of its
    sizes that this option sets.
    """

    name: ClassVar[str]
    sections: ClassVar[tuple[str, ...]] = ()
    default_sections: ClassVar[tuple[str, ...]] = ("",)
    counts: ClassVar[str] = ""
    counted: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def asked(cls, sizes: Any, section: str) -> Iterator[Group]:
        """The questions of a section, in the order in which they are answered."""
        raise NotImplementedError

    def __init__(self, recorder: Recorder, device: Device, sizes: Any, timed: str) -> None:
        """timed: the row ops or the backend."""
        self.recorder, self.device, self.sizes = recorder, device, sizes

    @classmethod
    def run(cls, sizes: Sizes, tiny: Sizes, description: str | None, argv: Sequence[str] | None) -> int:
        """The main function of the part; returns its exit status. tiny: the sizes of --tiny."""
        args = cls._parser(description).parse_args(argv)
        sizes = replace(tiny, shape=make_tiny(args.shape)) if args.tiny else sizes.of_shape(args.shape)
        if cls.counted and args.counts is not None:
            sizes = replace(sizes, **dict.fromkeys(cls.counted, args.counts))
        sections = cls._chosen(args.sections) if cls.sections else cls.default_sections
        groups = [(section, group) for section in sections for group in cls.asked(sizes, section)]
        if args.dry_run:
            asked = [question for _, (questions, _, _) in groups for question in questions]
            print(f"{cls.name}: {len(asked)} questions, to {args.out}/<card>.jsonl and <card>.md")
            for question in asked:
                print(question)
            return 0
        device = get_device(args.device)
        described = {"shape": sizes.shape, **sizes.lengths, "row_ops" if cls.sections else "backend": args.timed}
        with _time_limit(cls.name), torch.no_grad():
            recorder = Recorder(cls.name, device, args, described | {"notes": [sizes.note]})
            try:
                benchmark = cls(recorder, device, sizes, args.timed)
                for section, (questions, work, arguments) in groups:
                    recorder.enter(section)
                    recorder.attempt(questions, partial(work, benchmark, *arguments))
            finally:
                status = recorder.close()
        return status

    @classmethod
    def _parser(cls, description: str | None) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog=f"bench.gpu.{cls.name}", description=description)
        add_arguments(parser, limit_s=540)
        parser.add_argument("--run", metavar="ID", help="processes of one ID are one run: the first measures the card")
        parser.add_argument("--dry-run", action="store_true", help="print the questions and end")
        other = "reference" if cls.sections else "torch"
        about = "row ops (default: triton)" if cls.sections else "(default: triton)"
        option = "--ops" if cls.sections else "--backend"
        parser.add_argument(option, dest="timed", choices=("triton", other), default="triton", help=about)
        if cls.sections:
            default = "all" if cls.default_sections == cls.sections else "all but the first"
            about = f"of {','.join(cls.sections)} (default: {default})"
            parser.add_argument("--sections", metavar="A,B", help=about)
            about = "(default: those that each section has)"
            parser.add_argument(cls.counts, dest="counts", type=numbers, metavar="A,B", help=about)
        return parser

    @classmethod
    def _chosen(cls, text: str | None) -> tuple[str, ...]:
        """The sections that ``text`` lists. Raises: ValueError for one that is not known."""
        chosen = cls.default_sections if text is None else tuple(text.split(","))
        if not set(chosen) <= set(cls.sections):
            raise ValueError(f"--sections must list sections of {', '.join(cls.sections)}, got {text!r}.")
        return chosen


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
