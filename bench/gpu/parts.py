"""The parts of `make gpu` as data: what each runs, on a card and in a rehearsal, and how long it may take."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ROOT / "bench" / "gpu" / "tables"
MARK = "pytest.mark.gpu"
MAX_TEST_PROCESSES = 10
# A shape that is timed beside the default one, in parts of its own, and what these are called.
BESIDE, _SUFFIX = "llama-3.2-1b", "-llama"
DEFAULT = (
    "smoke,tests,validate,sanitizer,kernels,decode,prefill,serving,drafts,kernels-llama,decode-llama,prefill-llama"
)
# Tables of constants that are worth comparing on a card: files in VARIANTS. What else is there can be asked for, too.
_TABLES = ("tiles-32",)

Command = tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """A part of the command.

    limit_s: how long all of it may take. steps: commands, each a process of its own, one after the other; one that
    fails stops none. rehearsal: what a dry run runs instead: the same on a CPU, with shapes that take no time.
    needs: programs, and files by their path, without which the part cannot run. num_processes: so many run the steps
    at once, each told by DYNSKIP_TEST_SHARD which it is.
    """

    name: str
    what: str
    limit_s: float
    steps: tuple[Command, ...]
    rehearsal: tuple[Command, ...]
    needs: tuple[str, ...] = ()
    num_processes: int = 1


@dataclass(frozen=True)
class Plan:
    """Parts in their order: "a,b+c" runs a, and then b and c side by side. limit_s: of all of them together."""

    order: str
    limit_s: float


PLANS = {
    # Timings before tests, whose compilers would disturb them; what is beside comes last, so that a cut costs no other.
    "first": Plan("smoke,paths,matrices,validate+tests,full-llama", 400),
    # The tuner comes last: it keeps what it found, whenever it is stopped.
    "second": Plan(
        "smoke,full,table-no-pdl,table-tiles-32,mixes,layer,mixes-llama,matrices-llama,tune-few",
        400,
    ),
}  # fmt: skip


def make_parts(out: Path, run: str, commit: str | None = None) -> dict[str, Part]:
    """Every part that there is, by name. out: the folder of all results. run: what their rows call this run."""
    python = sys.executable
    options = ("--out", str(out), *(("--commit", commit) if commit else ()))
    measuring = (*options, "--run", run)
    on_cpu = ("--device", "cpu", "--tiny")
    interpreted = ("env", "TRITON_INTERPRET=1", python)

    def module(name: str, *arguments: str) -> Command:
        return (python, "-m", f"bench.gpu.{name}", *arguments)

    def timed(
        name: str,
        what: str,
        limit_s: float,
        questions: Sequence[str],
        *switches: str,
        needs: tuple[str, ...] = (),
        module_name: str = "time_decode",
        counts: tuple[str, str] = ("--batches", "2"),
    ) -> Part:
        """A process for each of ``questions``, sections and row counts such as "paths 8"; the first is rehearsed.

        counts: the option that says how many rows, and how many a rehearsal has.
        """
        environment = ("env", *switches) if switches else ()
        asked = [question.split() for question in questions]
        limit = ("--limit-s", f"{limit_s:g}")
        steps = []
        for section, count in asked:
            rows = () if count == "-" else (counts[0], count)
            steps.append((*environment, *module(module_name, *measuring, *limit, "--sections", section, *rows)))
        few = (*on_cpu, "--ops", "reference", "--sections", asked[0][0], *counts)
        rehearsal = (*environment, *module(module_name, *measuring, *few))
        return Part(name, what, limit_s, tuple(steps), (rehearsal,), needs)

    def kernels(name: str, what: str, limit_s: float, questions: Sequence[str]) -> Part:
        return timed(name, what, limit_s, questions, module_name="time_kernels", counts=("--rows", "3"))

    def measure(name: str, what: str, limit_s: float) -> Part:
        command = module(f"time_{name}", *measuring, "--limit-s", f"{limit_s:g}")
        return Part(name, what, limit_s, (command,), ((*command, *on_cpu, "--backend", "torch"),))

    def beside(part: Part) -> Part:
        """The same with the shape `BESIDE`."""
        steps, rehearsal = (
            tuple((*command, "--shape", BESIDE) for command in commands) for commands in (part.steps, part.rehearsal)
        )
        name, what = f"{part.name}{_SUFFIX}", f"{BESIDE}: {part.what}"
        return replace(part, name=name, what=what, steps=steps, rehearsal=rehearsal)

    def table(name: str) -> Part:
        path = VARIANTS / f"{name}.json"
        what = f"full depth with the constants of {path.relative_to(ROOT)}"
        return timed(f"table-{name}", what, 30, ["full 64"], f"DYNSKIP_CONFIGS={path}", needs=(str(path),))

    def profile(name: str, what: str, limit_s: float, few: Command, rehearsal: Command) -> Part:
        """ncu over the launches of the rows that ``few`` names."""
        command = module("profile_layer", "--ncu", "ncu", "--out", str(out), *few)
        return Part(name, what, limit_s, (command,), (module("profile_layer", *rehearsal, *few),), ("ncu",))

    def tuned(name: str, what: str, limit_s: float, options: Command, rehearsal: Command) -> Part:
        return Part(name, what, limit_s, ((*tune, *options, "--out", str(out / "tuned.json")),), ((*tune, *rehearsal),))

    pytest = (python, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider")
    sharded = (*pytest, "-p", "bench.gpu.shard_tests")
    validate = (python, "-m", "dynskip", "validate", "--backend", "triton")
    tune = (python, "-m", "dynskip", "tune", "--quiet")
    products = tuple(option for op in ("linear_rows", "linear_add_rows", "qkv_rows") for option in ("--op", op))
    sanitize = module("sanitize", "--sanitizer", "compute-sanitizer")
    full = [f"full {batch}" for batch in (8, 64, 1)]
    paths = [f"paths {batch}" for batch in (8, 1, 64)]
    mixes = [f"mixes {batch}" for batch in (8, 64, 256)]
    others = [f"{section} {batch}" for section in ("providers", "compiled") for batch in (1, 8, 64)]
    everything = [*paths, *mixes, "skipped -", "masks 64", *others]
    matrices = [f"matrices {rows}" for rows in (1, 16, 64, 256)]
    attention = [f"attention {rows}" for rows in (64, 256)]
    movement = [f"movement {rows}" for rows in (4096, 16384, 65536)]
    tables = dict.fromkeys([*_TABLES, *sorted(path.stem for path in VARIANTS.glob("*.json"))])
    parts = [
        Part(
            "build",
            "the C++ and CUDA extension, where the one that is there does not load",
            120,
            (module("extension"),),
            (module("extension", "--device", "cpu"),),
        ),
        Part(
            "smoke",
            "every row op, right and in time; replays of a step, bit for bit",
            80,
            (module("smoke", *options),),
            ((*interpreted, "-m", "bench.gpu.smoke", *options, *on_cpu, "--dtype", "float32", "--limit-s", "600"),),
        ),
        Part(
            "tests",
            "the tests that say something about a card",
            110,
            ((*sharded, *marked_test_files()),),
            ((*sharded, "tests/ops/test_embed_rows.py", "tests/execution/test_replay.py"),),
            num_processes=max(1, min(MAX_TEST_PROCESSES, (os.cpu_count() or 1) * 5 // 8)),
        ),
        Part(
            "validate",
            "every op against float64",
            110,
            ((*validate, "--dtype", "bfloat16"),),
            ((*validate, "--dtype", "float32", "--op", "norm_rows"),),
        ),
        Part(
            "sanitizer",
            "compute-sanitizer over every kernel",
            540,
            tuple((*sanitize, "--tool", tool) for tool in ("memcheck", "racecheck")),
            (module("sanitize", "--dry-run"),),
            needs=("compute-sanitizer",),
        ),
        kernels("kernels", "single kernels against bandwidth and cuBLAS", 540, [*matrices, *attention, *movement]),
        kernels("matrices", "the four matrix kernels against bandwidth and cuBLAS", 80, matrices),
        timed("decode", "decode steps against their roofline and against others", 540, everything),
        timed("paths", "full depth and shared paths against their roofline", 120, paths),
        timed("full", "full depth against its roofline", 80, full),
        timed("mixes", "mixed paths, skipped layers and masks", 150, [*mixes[:2], "skipped -", "masks 8", "masks 64"]),
        timed("table-no-pdl", "full depth without dependent launches", 80, full, "DYNSKIP_PDL=0"),
        *map(table, tables),
        measure("prefill", "prompts against the ideal speed-up and the matrix peak", 540),
        measure("serving", "a stream of mixed depths against the ideal speed-up", 540),
        measure("drafts", "guesses of drafts against steps without any", 300),
        beside(kernels("kernels", "single kernels against bandwidth and cuBLAS", 540, [*matrices, *attention])),
        beside(kernels("matrices", "the four matrix kernels against bandwidth and cuBLAS", 30, ["matrices 64"])),
        beside(timed("decode", "decode steps against their roofline and against others", 540, everything)),
        beside(timed("full", "full depth against its roofline", 60, full[:2])),
        beside(timed("mixes", "mixed paths", 45, ["mixes 64"])),
        beside(measure("prefill", "prompts against the ideal speed-up and the matrix peak", 540)),
        profile("profile", "ncu over the decode kernels of one layer", 540, (), ("--dry-run",)),
        profile(
            "layer",
            "ncu over the decode kernels of one layer, 8 rows",
            45,
            ("--batches", "8"),
            (*on_cpu, "--ops", "reference"),
        ),
        tuned("tune", "the kernels' constants for this card", 540, ("--minutes", "8.5"), ("--help",)),
        tuned(
            "tune-few",
            "the constants of the three products for 8, 64 rows and one",
            75,
            (*products, "--rows", "8,64,1", "--minutes", "1"),
            ("--dry-run", "--op", "norm_rows", "--rows", "8", "--jobs", "1", "--minutes", "0.1"),
        ),
    ]
    return {part.name: part for part in parts}


def marked_test_files() -> list[str]:
    """The files with tests that say something about a card, relative to the checkout."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if MARK in path.read_text(encoding="utf-8")]
