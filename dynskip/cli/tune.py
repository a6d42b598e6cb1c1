"""``dynskip tune``: the constants with which the kernels of a decode step run fastest on this GPU."""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynskip.cli.options import DTYPES, LazyChoices, UserError, check_writable, file_path

if TYPE_CHECKING:
    from dynskip.tuning.search import Outcome
    from dynskip.tuning.tasks import Task

# Multiprocessors of the card that a dry run stands for: A100, H200, B200.
_NUM_PROCESSORS = {80: 108, 90: 132, 100: 148}
HELP = "find the kernels' fastest constants for this GPU"
DESCRIPTION = "Compile candidates, hold each against float64, time those that are right, and keep the fastest."
EXAMPLES = """examples:
  dynskip tune                                     OPT-1.3B's shapes, every kernel and row count, on this GPU
  dynskip tune --model opt-6.7b --rows 1,16        two row counts of another model
  dynskip tune --minutes 8 --out h200.json         stops in time; another file than the package's own
  dynskip tune --dry-run --rows 1 --op qkv_rows    which candidates there are, and which compile; needs no GPU

Tiles come first, for all kernels, and then one constant after the other around the best: so what is found when time is
up is worth having. The table goes into the package, kernels/configs/<device>.json, where the kernels look for it.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``tune``."""
    parser.add_argument(
        "--model",
        default="opt-1.3b",
        metavar="NAME",
        help="shape, folder, GGUF file or name (default: opt-1.3b)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=f"(default: {DTYPES[0]})")
    parser.add_argument(
        "--rows", metavar="A,B,...", help="row counts, those that matter most first (default: 1 to 256)"
    )
    parser.add_argument(
        "--op", action="append", choices=LazyChoices(_ops), metavar="OP", help="repeatable (default: all)"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="stop then, with the best so far (default: never)")
    parser.add_argument("--out", type=file_path, metavar="FILE", help="(default: the device's table in the package)")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that compile (default: one a CPU)")
    parser.add_argument("--dry-run", action="store_true", help="only list and compile the candidates")
    parser.add_argument(
        "--capability", type=int, choices=tuple(_NUM_PROCESSORS), default=90, help="of a dry run (default: 90)"
    )
    parser.add_argument("--quiet", action="store_true", help="only the result")


def _ops() -> tuple[str, ...]:
    from dynskip.tuning.tasks import TUNED_OPS

    return TUNED_OPS


def run(args: argparse.Namespace) -> int:
    """Tune and write the table; exit status 1 if the GPU failed, or if a dry run finds a task without a candidate."""
    if args.minutes is not None and args.minutes <= 0:
        raise UserError(f"--minutes must be positive, got {args.minutes:g}")
    num_jobs = args.jobs if args.jobs is not None else os.cpu_count() or 1
    if num_jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {num_jobs}")
    deadline = float("inf") if args.minutes is None else time.monotonic() + 60 * args.minutes
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        raise UserError("no CUDA GPU was found, and only on one can be timed. --dry-run compiles the candidates here")
    try:
        import triton  # noqa: F401  # only to say in one line that it is missing
    except ImportError as error:
        raise UserError(f"triton must be installed to tune its kernels: {error}") from error

    from dynskip.kernels.launches import compute_capability
    from dynskip.models.registry import read_decoder_config
    from dynskip.tuning.compiling import CompilerPool
    from dynskip.tuning.tasks import BUCKETS_BY_WEIGHT, plan_tasks

    tasks = plan_tasks(
        read_decoder_config(args.model),
        BUCKETS_BY_WEIGHT if args.rows is None else _rows(args.rows),
        args.op or _ops(),
        args.dtype,
    )
    capability = args.capability if args.dry_run else compute_capability(torch.device("cuda"))
    with CompilerPool(capability, num_jobs) as compiler:
        if args.dry_run:
            return _dry_run(args, tasks, compiler, deadline)
        return _tune(args, tasks, compiler, deadline, capability)


def _rows(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--rows must list numbers of rows, such as 1,16, got {text!r}") from error


def _dry_run(args: argparse.Namespace, tasks: list[Task], compiler: Any, deadline: float) -> int:
    from dynskip.tuning.space import REFINED, Limits, default_constants, tiles, variations
    from dynskip.validation.offline.compile_kernels import MAX_SHARED_BYTES

    limits = Limits(_NUM_PROCESSORS[args.capability], MAX_SHARED_BYTES[args.capability])
    print(f"sm_{args.capability}, {limits.num_processors} multiprocessors: candidates, and how many of them fit")
    print(f"{'task':<36}{'tiles':>7}{'others':>8}{'fit':>6}{'untried':>9}  why others do not")
    all_fit = True
    for task in tasks:
        default = default_constants(task)
        first = tiles(task, limits)
        others = [other for key in REFINED for other in variations(task, default, key, limits)]
        compiled = [(constants, compiler.submit(task, constants)) for constants in (default, *first, *others)]
        complaints, num_untried = [], 0
        for constants, usage in compiled:
            # Equal constants share what compiles them, and so are given up together.
            if usage.cancelled() or (time.monotonic() >= deadline and not usage.done()):
                num_untried += usage.cancel()
                continue
            complaint = usage.result().complaint(limits.max_shared_bytes)
            if complaint is not None:
                complaints.append((constants, complaint))
        num_fit = len(compiled) - len(complaints) - num_untried
        all_fit &= num_fit > 0 or num_untried > 0
        reasons = ", ".join(sorted({re.split(r":| \d", complaint)[0] for _, complaint in complaints}))
        print(f"{task!s:<36}{len(first):>7}{len(others):>8}{num_fit:>6}{num_untried:>9}  {reasons}", flush=True)
        if not args.quiet:
            for constants, complaint in complaints:
                print(f"    {complaint}: {constants}")
    return 0 if all_fit else 1


def _tune(args: argparse.Namespace, tasks: list[Task], compiler: Any, deadline: float, capability: int) -> int:
    import torch

    from dynskip.kernels.configs import FOLDER, device_slug
    from dynskip.measure.device import get_device, measure_device_speed
    from dynskip.ops.row_ops import get_row_ops
    from dynskip.tuning.search import Search
    from dynskip.tuning.space import Limits
    from dynskip.validation.offline.compile_kernels import MAX_SHARED_BYTES

    if capability not in MAX_SHARED_BYTES:
        raise UserError(
            f"the GPU's capability must be one of {', '.join(map(str, MAX_SHARED_BYTES))}, got {capability}"
        )
    device = get_device("cuda")
    num_processors = torch.cuda.get_device_properties(device.device).multi_processor_count
    limits = Limits(num_processors, MAX_SHARED_BYTES[capability])
    bandwidth_gbps = measure_device_speed(device).bandwidth_gbps
    path = args.out or FOLDER / f"{device_slug(device.name)}.json"
    check_writable(path, "Set --out to a file in a folder of your own.")
    print(f"{device.name}: {bandwidth_gbps:.0f} GB/s; {len(tasks)} tasks", flush=True)
    search = Search(
        device,
        get_row_ops("triton"),
        compiler,
        limits,
        deadline,
        report=(lambda text: None) if args.quiet else (lambda text: print(text, flush=True)),
        # After every stage: a run that is killed leaves what it found.
        keep=lambda found: save(path, found, device.name, capability, args, bandwidth_gbps),
    )
    outcomes = search.run(tasks)
    num_written = save(path, outcomes, device.name, capability, args, bandwidth_gbps)
    print_outcomes(outcomes, bandwidth_gbps)
    print(f"wrote {num_written} entries to {path}" if num_written else f"found nothing to write to {path}")
    if search.failure is not None:
        print(f"the GPU failed, so the search ended early: {search.failure}")
        return 1
    return 0


def save(
    path: Path, outcomes: list[Outcome], device: str, capability: int, args: argparse.Namespace, bandwidth_gbps: float
) -> int:
    """How many entries were written to the table at ``path``: one for each task that was timed."""
    import datetime
    import importlib.metadata
    import json

    from dynskip.host import commit
    from dynskip.tuning.table import merge, write_table

    found = {}
    for outcome in outcomes:
        if outcome.us is None or outcome.default_us is None:
            continue
        figures = {"us": round(outcome.us, 3), "default_us": round(outcome.default_us, 3)}
        share = outcome.task.num_bytes / bandwidth_gbps / 1e3 / outcome.us
        found[outcome.task] = outcome.best, figures | {"bandwidth_share": round(share, 4)}
    if not found:
        return 0
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    measured = {
        "torch": importlib.metadata.version("torch"),
        "triton": importlib.metadata.version("triton"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "model": args.model,
        "dtype": args.dtype,
        "bandwidth_gbps": round(bandwidth_gbps, 1),
    }
    write_table(path, merge(before, device, capability, measured, found))
    return len(found)


def print_outcomes(outcomes: list[Outcome], bandwidth_gbps: float) -> None:
    """A line a task: what a launch takes with the default's constants and with the best, and which these are."""
    titles = f"{'default us':>11}{'best us':>9}{'of bandwidth':>14}{'timed':>7}{'discarded':>11}{'untried':>9}"
    print(f"{'task':<36}{titles}  best")
    for outcome in outcomes:
        share = "-"
        if outcome.us is not None:
            share = f"{outcome.task.num_bytes / bandwidth_gbps / 1e3 / outcome.us:.1%}"
        default_us, us = (f"{value:.2f}" if value is not None else "-" for value in (outcome.default_us, outcome.us))
        counts = f"{outcome.num_timed:>7}{sum(outcome.discarded.values()):>11}{outcome.num_untried:>9}"
        changed = [f"{key}={value}" for key, value in outcome.best.items() if value != outcome.default[key]]
        print(f"{outcome.task!s:<36}{default_us:>11}{us:>9}{share:>14}{counts}  {' '.join(changed) or 'default'}")
    num_untried = sum(outcome.num_untried for outcome in outcomes)
    if num_untried:
        print(f"time was up: {num_untried} candidates were not tried")
