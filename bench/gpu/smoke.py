"""Half a minute on a card: is every kernel of a decode step right, does it stay right, and how long does it take?

Every row op at a model's shape against float64, with its microseconds; a step of a few layers against float64, with
dependent launches on and off bit for bit, and replayed thousands of times bit for bit; nothing left in the workspaces.
Results are appended to OUT/smoke.jsonl as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu.recorder import add_arguments, make_tiny, numbers, switches
from bench.gpu.replays import RepeatedStep
from bench.gpu.smoke_cases import (
    PREPARED,
    TILES,
    TINY,
    Sizes,
    make_steps,
    plan_arguments,
    prepare,
    prepare_all,
    tasks,
    without_dependent_launches,
)
from dynskip.kernels.configs import use_configs
from dynskip.kernels.launches import compute_capability
from dynskip.measure.device import Device, describe_device, get_device
from dynskip.models.shapes import get_shape
from dynskip.ops.row_ops import ROW_OP_NAMES, RowOps, get_row_ops
from dynskip.tuning.tasks import Task
from dynskip.tuning.workload import Workload as OpWorkload
from dynskip.validation.tensors import Case
from dynskip.validation.validate import validate_row_case

_PREDICTIONS = Path(__file__).with_name("predictions.json")
# Nothing new is begun when so much of the limit is left.
_RESERVE_S = 2.0


class Journal:
    """Prints what was found, and appends it to OUT/smoke.jsonl, a line a check."""

    def __init__(self, out: Path, conditions: dict[str, Any]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "smoke.jsonl"
        self.conditions = conditions
        self.num_failed = 0
        foretold = json.loads(_PREDICTIONS.read_text(encoding="utf-8"))
        is_foretold = conditions.get("shape") in (foretold["shape"], "tiny")
        self.predicted: dict[str, dict[str, float]] = foretold["us"] if is_foretold else {}
        print(f"{'check':<44}{'rows':>5}  {'verdict':<8}{'us':>9}{'predicted':>11}  what was found")

    def write(
        self,
        check: str,
        rows: int,
        complaint: str | None,
        us: float | None = None,
        found: str = "",
        not_run: bool = False,
    ) -> None:
        """A check of ``rows`` rows: complaint says what is wrong, None where nothing is.

        not_run: there was no time for it, which is no failure.
        """
        verdict = "NOT RUN" if not_run else "ok" if complaint is None else "FAILED"
        self.num_failed += verdict == "FAILED"
        predicted = self.predicted.get(check, {}).get(str(rows))
        line = {
            "check": check,
            "rows": rows,
            "verdict": verdict,
            "us": None if us is None else round(us, 3),
            "predicted_us": predicted,
            "found": complaint or found,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "conditions": self.conditions}) + "\n")
        shown, expected = ("-" if value is None else f"{value:.2f}" for value in (us, predicted))
        print(f"{check:<44}{rows:>5}  {verdict:<8}{shown:>9}{expected:>11}  {complaint or found}", flush=True)


@dataclass
class Smoke:
    """All checks, each of which stops no other unless the device serves the process no more."""

    device: Device
    dtype: torch.dtype
    sizes: Sizes
    journal: Journal
    deadline: float
    ops: RowOps = field(default_factory=partial(get_row_ops, "triton"))
    broken: bool = False

    def run(self, fault: str | None = None) -> None:
        """Check everything. fault: an op whose results are falsified, to prove that this would be noticed."""
        for rows in self.sizes.rows:
            for task in tasks(self.sizes, rows, self.dtype):
                self.attempt(_name(task), rows, lambda task=task: self.check_op(task, fault))
            self.attempt("plan_rows", rows, lambda rows=rows: self.check_plan(rows, fault))
        steps: dict[int, RepeatedStep] = {}
        for rows in self.sizes.rows:
            self.attempt("step", rows, lambda rows=rows: self.check_step(rows, steps))
        for rows in (rows for rows in self.sizes.rows if rows >= self.sizes.many_rows and rows in steps):
            # The tiles of many rows go to the tensor cores by another way, where rare errors are conceivable.
            self.attempt("tiles of 32 rows", rows, lambda rows=rows: self.check_tiles(rows), if_time=True)
            replays = partial(self.replay, "more replays", rows, steps[rows], self.sizes.num_more_replays)
            self.attempt("more replays", rows, replays, if_time=True)

    def attempt(self, check: str, rows: int, work: Callable[[], None], if_time: bool = False) -> None:
        """Do ``work``; an error is a failed check, and where the device is broken the rest are, too.

        if_time: having no time left for it is no failure.
        """
        if self.broken:
            self.journal.write(check, rows, "not checked: the device serves this process no more")
            return
        if time.monotonic() > self.deadline:
            self.journal.write(check, rows, "not checked: no time was left", not_run=if_time)
            return
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.journal.write(check, rows, f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
            try:
                self.device.synchronize()
            except Exception as broken:
                print(f"the device serves this process no more: {broken}")
                self.broken = True

    def check_op(self, task: Task, fault: str | None) -> None:
        """One op against float64, and the time of a launch."""
        workload = OpWorkload(task, self.ops, self.device.device)
        case = Case(task.op, str(task), workload.layers[0])
        result = validate_row_case(self.ops, self.dtype, case, falsify=task.op == fault)
        workspace = workload.make_workspace()
        graph = self.device.captured(lambda: workload.launch_with(workspace))
        us = self.device.time(graph, self.sizes.num_timed) * 1e3 / len(workload.layers)
        complaint = result.failure
        if workspace is not None and bool(workspace.counters.any()):
            complaint = "the counters of the workspace are not zero"
        self.journal.write(_name(task), task.max_rows, complaint, us, _found(result))

    def check_plan(self, rows: int, fault: str | None) -> None:
        """The lists of all layers against the specification, bit for bit, and the time of the launch."""
        arguments = plan_arguments(self.sizes, rows, self.device.device)
        result = validate_row_case(self.ops, self.dtype, Case("plan_rows", "", arguments), falsify=fault == "plan_rows")
        cursor, lengths = arguments["slot_cursor"], arguments["context_lens"]

        def launch() -> None:
            self.ops.plan_rows(*arguments.values())
            cursor.zero_()
            lengths.zero_()

        us = self.device.time(self.device.captured(launch), self.sizes.num_timed) * 1e3
        self.journal.write("plan_rows", rows, result.failure, us, _found(result))

    def check_step(self, rows: int, kept: dict[int, RepeatedStep]) -> None:
        """A step against float64, with dependent launches on and off, and replayed; its workspace afterwards."""
        steps, truth = make_steps(self.device, self.dtype, self.sizes, rows)
        repeated = RepeatedStep(self.device, steps)
        verdict = truth.check("step", steps.workload, repeated.logits)
        us = self.device.time(repeated.uncompared(), self.sizes.num_timed) * 1e3
        found = f"{verdict.share:.0%} of the allowed error"
        self.journal.write(f"step of {self.sizes.num_layers} layers", rows, verdict.complaint or None, us, found)
        if compute_capability(self.device.device) in range(1, 90) or os.environ.get("DYNSKIP_PDL") == "0":
            print("dependent launches are off here: not compared")
        else:
            without = repeated.captured(use_configs(without_dependent_launches(self.device.device)))
            num_runs = max(1, self.sizes.num_replays // 100)
            num = repeated.count_different(without, num_runs)
            complaint = f"{num} of {num_runs} replays gave other bits" if num else None
            self.journal.write("dependent launches off: the same bits", rows, complaint, found=f"{num_runs} replays")
        self.replay(f"{self.sizes.num_replays} replays", rows, repeated, self.sizes.num_replays)
        workspace = steps.fused.workspace
        dirty = workspace is not None and bool(workspace.counters.any())
        complaint = "the counters of the workspace are not zero" if dirty else None
        self.journal.write("counters after all replays", rows, complaint)
        kept[rows] = repeated

    def replay(self, check: str, rows: int, repeated: RepeatedStep, num_replays: int) -> None:
        """Replays of a step, compared bit for bit on the device; stops when time is up."""
        graph, num_done, num_different = repeated.captured(), 0, 0
        while num_done < num_replays and (num_done == 0 or time.monotonic() < self.deadline):
            num_runs = min(max(1, num_replays // 10), num_replays - num_done)
            num_different += repeated.count_different(graph, num_runs)
            num_done += num_runs
        complaint = f"{num_different} of {num_done} gave other bits than the first" if num_different else None
        self.journal.write(check, rows, complaint, found=f"{num_done} replays, all the same bits")

    def check_tiles(self, rows: int) -> None:
        """The step with tiles of 32 rows: against float64, and beside the step as it is."""
        if not TILES.is_file():
            self.journal.write("tiles of 32 rows", rows, f"{TILES} is not there", not_run=True)
            return
        with use_configs(TILES):
            steps, truth = make_steps(self.device, self.dtype, self.sizes, rows)
            repeated = RepeatedStep(self.device, steps)
            verdict = truth.check("step with tiles of 32 rows", steps.workload, repeated.logits)
            us = self.device.time(repeated.uncompared(), self.sizes.num_timed) * 1e3
        found = f"{verdict.share:.0%} of the allowed error"
        self.journal.write("tiles of 32 rows", rows, verdict.complaint or None, us, found)


def _name(task: Task) -> str:
    return task.op if task.part == task.op else f"{task.op} {task.part}"


def _found(result: Any) -> str:
    return f"error {result.max_error:.1e} of {result.allowed_error:.1e}" if result.allowed_error else "exact"


def main(argv: Sequence[str] | None = None) -> int:
    """The part ``smoke`` of `make gpu`; the exit status is 1 where a check failed."""
    parser = argparse.ArgumentParser(prog="bench.gpu.smoke", description=__doc__)
    add_arguments(parser, limit_s=35)
    parser.add_argument("--rows", type=numbers, metavar="A,B", help="row counts (default: 1,8,64,128)")
    parser.add_argument("--inject-fault", choices=ROW_OP_NAMES, metavar="OP", help="falsify the results of this op")
    parser.add_argument("--prepare", choices=PREPARED, help="only compile, for this table")
    args = parser.parse_args(argv)
    # Torch reads it once, and deterministic algorithms refuse to multiply without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if args.tiny:
        sizes = replace(TINY, shape=make_tiny(args.shape))
    else:
        sizes = replace(Sizes(), shape=args.shape, vocab_size=get_shape(args.shape).vocab_size)
    sizes = sizes if args.rows is None else replace(sizes, rows=args.rows)
    device, dtype = get_device(args.device), getattr(torch, args.dtype)
    with torch.no_grad():
        if args.prepare is not None:
            for rows in sizes.rows:
                prepare(device, dtype, sizes, rows, args.prepare)
            return 0
        if args.device == "cuda":
            prepare_all(args.dtype, sizes)
        described = describe_device(device, args.commit)
        kept = {name: described[name] for name in ("gpu", "versions", "commit", "date")}
        conditions = {**kept, "dtype": args.dtype, "shape": sizes.shape, "switches": switches()}
        journal = Journal(args.out, conditions)
        # From here on: on a machine that has just started, reading Python's packages takes longer than all checks.
        deadline = time.monotonic() + args.limit_s - _RESERVE_S
        Smoke(device, dtype, sizes, journal, deadline).run(args.inject_fault)
    print(f"{journal.num_failed} checks failed; written: {journal.path}")
    return int(journal.num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
