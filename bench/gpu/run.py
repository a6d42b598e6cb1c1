"""Everything that needs a card, in one command: `make gpu ONLY=tests,validate,... OUT=folder`.

Each part runs in a process of its own, with its own time limit and its own log in OUT. A part that fails stops no
other. The exit status is 1 where a part failed; a target that was missed is no failure. Needs no network, no virtual
environment and no installation: the extension is built in place, and everything runs from this checkout.

  python bench/gpu/run.py --only decode,prefill --out results
  python bench/gpu/run.py --dry-run                 says what would run, and tries imports and arguments without a card
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 540
SHARD = "DYNSKIP_TEST_SHARD"
MAX_SHARDS = 8
# The exit status of a part that found that it cannot run here and said why; no failure.
SKIPPED = 77
# After its limit a part has so long to write what it has.
GRACE_S = 15
DEFAULT = ("tests", "validate", "sanitizer", "kernels", "decode", "prefill", "serving")
# Tests of what no card changes, minutes of one CPU core each; `make test` runs them all.
LEFT_OUT = {
    "test_bench.py": "the benchmark of a CPU",
    "test_bits_per_byte.py": "evaluation, on a CPU",
    "test_demo.py": "the demo, on a CPU",
    "test_depth.py": "evaluation, on a CPU",
    "test_gpu_benchmark.py": "the parts of this command, with a CPU in place of the card",
    "test_offline_compile.py": "compiles for cards that need not be there: the part validate does it, too",
    "test_packaging.py": "needs pip and a virtual environment",
    "test_readme.py": "the README's examples, on a CPU",
    "test_router.py": "evaluation, on a CPU",
    "test_training.py": "training, on a CPU",
    "test_training_gradients.py": "training, on a CPU",
}


@dataclass(frozen=True)
class Part:
    """A part of the command. steps: commands, run one after the other. rehearsal: what a dry run runs instead.

    needs: a tool without which the part cannot run, or None. num_shards: so many processes run the steps at once, each
    told by DYNSKIP_TEST_SHARD which it is.
    """

    name: str
    what: str
    steps: tuple[tuple[str, ...], ...]
    rehearsal: tuple[tuple[str, ...], ...]
    needs: str | None = None
    num_shards: int = 1


@dataclass(frozen=True)
class Outcome:
    """How a part ended: status is the first exit status of its steps that is not 0, None for a stop at the limit."""

    part: str
    status: int | None
    seconds: float
    log: Path

    @property
    def verdict(self) -> str:
        """One word, or two."""
        if self.status == SKIPPED:
            return "SKIPPED"
        return "ok" if self.status == 0 else "TIME LIMIT" if self.status is None else f"FAILED ({self.status})"


def find_tool(name: str) -> str | None:
    """The path of a CUDA tool: on PATH, or where the toolkit usually stands."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
    return shutil.which(name, path=places)


def make_parts(args: argparse.Namespace) -> dict[str, Part]:
    """Every part that there is, by name."""
    python = sys.executable
    out, limit = str(args.out), str(args.limit_s)
    common = ("--out", out, "--limit-s", limit, *(("--commit", args.commit) if args.commit else ()))

    def measuring(name: str, what: str) -> Part:
        command = (python, "-m", f"bench.gpu.time_{name}", *common)
        return Part(name, what, (command,), ((*command, "--dry-run"),))

    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.gpu.shard_tests", *_test_files())
    num_shards = max(1, min(MAX_SHARDS, (os.cpu_count() or 1) // 2))
    sanitize = (python, "-m", "bench.gpu.sanitize")
    profile = (python, "-m", "bench.gpu.profile_layer")
    tools = {name: find_tool(name) for name in ("compute-sanitizer", "ncu")}
    validate = (python, "-m", "dynskip", "validate", "--quiet")
    tune = (python, "-m", "dynskip", "tune")
    build = (python, "setup.py", "build_ext", "--inplace")
    parts = [
        Part("build", "the C++ and CUDA extension, in place", (build,), ((python, "setup.py", "--version"),)),
        Part(
            "tests",
            f"pytest in {num_shards} processes, without {len(LEFT_OUT)} files",
            (pytest,),
            ((*pytest, "--collect-only"),),
            num_shards=num_shards,
        ),
        Part(
            "validate",
            "every op against float64, and every kernel compiled",
            (validate, (*validate, "--compile")),
            ((*validate, "--help"),),
        ),
        Part(
            "sanitizer",
            "compute-sanitizer over every kernel",
            tuple((*sanitize, "--tool", tool, "--sanitizer", tools["compute-sanitizer"] or "compute-sanitizer")
                  for tool in ("memcheck", "racecheck")),
            ((*sanitize, "--dry-run"),),
            "compute-sanitizer",
        ),
        measuring("kernels", "single kernels against bandwidth and cuBLAS"),
        measuring("decode", "decode steps against their roofline and against others"),
        measuring("prefill", "prompts against the ideal speed-up and the matrix peak"),
        measuring("serving", "a stream of mixed depths against the ideal speed-up"),
        Part(
            "profile",
            "ncu over the decode kernels of one layer",
            ((*profile, "--ncu", tools["ncu"] or "ncu", "--out", out),),
            ((*profile, "--dry-run"),),
            "ncu",
        ),
        Part(
            "tune",
            "the kernels' configurations for this card",
            ((*tune, "--quiet", "--minutes", f"{args.limit_s / 60 - 0.5:g}", "--out", f"{out}/tuned-configs.json"),),
            ((*tune, "--help"),),
        ),
    ]  # fmt: skip
    return {part.name: part for part in parts}


def run_part(part: Part, steps: Sequence[Sequence[str]], out: Path, limit_s: float) -> Outcome:
    """Run ``steps`` of ``part``, their output on the terminal and in the part's log."""
    log = out / f"{part.name}.log"
    begin = time.monotonic()
    status: int | None = 0
    with log.open("w", encoding="utf-8") as file:
        for command in steps:
            print(f"$ {' '.join(command)}", file=file, flush=True)
            for ended in _run(command, file, limit_s - (time.monotonic() - begin), part.num_shards):
                worse = status in (0, SKIPPED) and ended != 0
                status = ended if worse or ended is None else status
            if status is None:
                break
    return Outcome(part.name, status, time.monotonic() - begin, log)


def _run(command: Sequence[str], log: IO[str], limit_s: float, num_shards: int) -> list[int | None]:
    """The exit status of each process that ran ``command``; None where one had to be stopped."""
    if num_shards == 1:
        return [_wait(_start(command, log, "0/1"), time.monotonic() + limit_s)]
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(num_shards)]
        processes = [_start(command, output, f"{shard}/{num_shards}") for shard, output in enumerate(outputs)]
        deadline = time.monotonic() + limit_s
        statuses = [_wait(process, deadline) for process in processes]
        for shard, output in enumerate(outputs):
            output.seek(0)
            print(f"process {shard} of {num_shards}: exit status {statuses[shard]}\n{output.read()}", file=log)
    log.flush()
    return statuses


def _start(command: Sequence[str], log: IO[str], shard: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", SHARD: shard}
    if "build_ext" in command:
        environment |= {"DYNSKIP_BUILD_EXT": "1", "DYNSKIP_BUILD_CUDA": "1"}
    # A group of its own: what the part has started ends with it.
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def _wait(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    """The exit status; None where it did not end before ``deadline`` and was stopped."""
    try:
        return process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        # Tests and measurements take it as an error in what they are doing, and still say what they have.
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return None


def _test_files() -> list[str]:
    """The test files of the part ``tests``, relative to the checkout."""
    missing = [name for name in LEFT_OUT if not (ROOT / "tests" / name).is_file()]
    assert not missing, f"LEFT_OUT names files that are not there: {', '.join(missing)}"
    return [f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("test_*.py")) if path.name not in LEFT_OUT]


def why_not(part: Part) -> str | None:
    """Why ``part`` cannot run here, and what would help; None where it can."""
    if part.needs is not None and find_tool(part.needs) is None:
        return (
            f"{part.needs} was not found on PATH, in CUDA_HOME or in /usr/local/cuda. It is part of the CUDA toolkit."
        )
    return None


def _has_card() -> bool:
    check = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


def _telling_lines(log: Path, num_lines: int = 15) -> list[str]:
    """The lines of a log that name what failed, and its last ones."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    failed = [line for line in lines[:-num_lines] if line.startswith(("FAILED ", "ERROR ")) or " FAILED " in line]
    return [*failed[:40], *lines[-num_lines:]]


def summary(outcomes: Sequence[Outcome], skipped: dict[str, str]) -> str:
    """One line a part."""
    lines = [
        f"{outcome.part:<10} {outcome.verdict:<12} {outcome.seconds:>6.0f} s  {outcome.log}" for outcome in outcomes
    ]
    lines += [f"{name:<10} {'NOT RUN':<12} {reason}" for name, reason in skipped.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, has_card: Callable[[], bool] = _has_card) -> int:
    """Run the parts; the exit status is 0 where every one succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="A,B", default=",".join(DEFAULT), help="parts (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-results", metavar="DIR", help="(default: gpu-results)")
    parser.add_argument("--commit", metavar="ID", help="commit of the sources where they are no git checkout")
    parser.add_argument(
        "--limit-s", type=float, default=LIMIT_S, metavar="S", help="of each part (default: %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="run no part; say what would run and try its arguments")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    parts = make_parts(args)
    names = [name for name in args.only.split(",") if name]
    unknown = [name for name in names if name not in parts]
    if unknown or not names:
        print(f"run.py: --only must list parts of {', '.join(parts)}, got {args.only!r}.", file=sys.stderr)
        return 2
    if not args.dry_run and not has_card():
        print(
            "run.py: the machine must have a CUDA device that torch finds, got none. Run it on one with a GPU, or with "
            "--dry-run, which tries imports and arguments anywhere.",
            file=sys.stderr,
        )
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    names = ["build", *(name for name in dict.fromkeys(names) if name != "build")]
    outcomes, skipped = [], {}
    for name in names:
        part = parts[name]
        steps = part.rehearsal if args.dry_run else part.steps
        reason = None if args.dry_run else why_not(part)
        if reason is not None:
            skipped[name] = reason
            continue
        print(f"== {name}: {part.what}", flush=True)
        if args.dry_run:
            for command in part.steps:
                print(f"   {' '.join(command)}")
            missing = why_not(part)
            print(f"   here: {missing}" if missing else "", end="\n" if missing else "")
        outcomes.append(run_part(part, steps, args.out, args.limit_s))
        print(f"   {outcomes[-1].verdict} after {outcomes[-1].seconds:.0f} s", flush=True)
        if outcomes[-1].status != 0 or args.dry_run:
            print("   " + "\n   ".join(_telling_lines(outcomes[-1].log)), flush=True)
    text = summary(outcomes, skipped)
    (args.out / "summary.txt").write_text(f"{text}\n", encoding="utf-8")
    print(f"\n{text}")
    return int(bool(skipped) or any(outcome.status not in (0, SKIPPED) for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
