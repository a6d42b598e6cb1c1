"""Everything that needs a card, in one command: `make gpu ONLY=first`, `ONLY=second`, `ONLY=smoke,decode,...`.

Each part runs in processes of its own, within its own time limit. A part that fails stops no other. What the parts
print goes to OUT/log.txt line by line, their results to other files there, at most eight in all, as they come: a run
that is killed leaves what it found. The exit status is 1 where a part failed; a target that was missed is no failure.
Needs no network, no virtual environment and no installation: everything runs from this checkout, and the extension is
built in place where the one that is there does not load.

  python -m bench.gpu.run --only first --out results --commit abc123     the first minutes on a card
  python -m bench.gpu.run --only smoke,tests+validate                     some parts, the last two side by side
  python -m bench.gpu.run --only second --dry-run                         the same on a CPU, with tiny shapes
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu.parts import DEFAULT, PLANS, ROOT, Part, make_parts

SHARD = "DYNSKIP_TEST_SHARD"
# The exit status of a part that found that it cannot run here and said why; no failure.
SKIPPED = 77
# A CPU in place of a card, perhaps a busy one, gets so many times the limit of a part.
PATIENCE = 10
# After its limit a process has so long to write what it has.
GRACE_S = 5
# A step that hangs leaves the others of its part something: it gets as many times its share of the part's limit.
_SHARES = 2


class Log:
    """One file for what all processes print, each line after the name of its part, and written at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def write(self, name: str, line: str) -> None:
        """Append ``line`` of ``name``."""
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(f"{name}| {line}\n")


@dataclass
class Outcome:
    """How a part ended: status is the worst exit status of its steps, None for a stop at the limit."""

    part: str
    status: int | None = 0
    seconds: float = 0.0
    failed: list[str] = field(default_factory=list)
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=15))

    @property
    def verdict(self) -> str:
        """One word, or two."""
        if self.status == SKIPPED:
            return "SKIPPED"
        return "ok" if self.status == 0 else "TIME LIMIT" if self.status is None else f"FAILED ({self.status})"

    def heard(self, line: str) -> None:
        """Keep ``line`` where it tells what failed, and as one of the last."""
        if (line.startswith(("FAILED ", "ERROR ")) or " FAILED" in line) and len(self.failed) < 40:
            self.failed.append(line)
        self.tail.append(line)

    def ended(self, status: int | None) -> None:
        """A process of the part ended with ``status``; None where it had to be stopped."""
        if status is None or (self.status in (0, SKIPPED) and status != 0):
            self.status = status

    def __str__(self) -> str:
        return f"{self.part:<24} {self.verdict:<12} {self.seconds:>6.0f} s"


def run_part(part: Part, steps: Sequence[Sequence[str]], log: Log, limit_s: float) -> Outcome:
    """Run ``steps`` of ``part`` one after the other, in ``limit_s`` seconds at most."""
    outcome = Outcome(part.name)
    begin = time.monotonic()
    share_s = _SHARES * limit_s / len(steps)
    for command in steps:
        left_s = limit_s - (time.monotonic() - begin)
        if left_s <= 0:
            log.write(part.name, f"no time was left for: {' '.join(command)}")
            outcome.ended(None)
            continue
        log.write(part.name, f"$ {' '.join(command)}")
        _run(command, part, log, outcome, min(left_s, share_s))
    outcome.seconds = time.monotonic() - begin
    return outcome


def _run(command: Sequence[str], part: Part, log: Log, outcome: Outcome, limit_s: float) -> None:
    """Run ``command`` in as many processes as the part wants, and tell ``outcome`` what they print and how they end."""
    num, deadline = part.num_processes, time.monotonic() + limit_s
    processes = []
    for shard in range(num):
        process = _start(command, f"{shard}/{num}")
        name = part.name if num == 1 else f"{part.name} {shard}"
        reader = threading.Thread(target=_read, args=(process, name, log, outcome), daemon=True)
        reader.start()
        processes.append((name, process, reader))
    for name, process, reader in processes:
        status = _wait(process, deadline)
        reader.join(GRACE_S)
        outcome.ended(status)
        if status != 0:
            log.write(name, "stopped at its time limit" if status is None else f"exit status {status}")


def _start(command: Sequence[str], shard: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PATH": _search_path(),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        # Torch reads it once, before a test or a validation asks for deterministic algorithms.
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
        SHARD: shard,
    }
    # A group of its own: what the part has started ends with it.
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _read(process: subprocess.Popen[str], name: str, log: Log, outcome: Outcome) -> None:
    assert process.stdout is not None, "it was started with a pipe"
    with process.stdout:
        for line in process.stdout:
            log.write(name, line.rstrip("\n"))
            outcome.heard(line.rstrip("\n"))


def _wait(process: subprocess.Popen[str], deadline: float) -> int | None:
    """The exit status; None where it did not end before ``deadline`` and was stopped."""
    try:
        return process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        # Tests and measurements take it as an error in what they are doing, and still say what they have.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        return None
    finally:
        # Whatever the process has started and left behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _search_path() -> str:
    """PATH, and behind it where the CUDA toolkit usually stands."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])


def why_not(part: Part, rehearsal: bool = False) -> str | None:
    """Why ``part`` cannot run here, and what would help; None where it can. A rehearsal needs no programs."""
    for need in part.needs:
        if "/" in need:
            if not Path(need).is_file():
                return f"{need} is not there: a table of constants to compare with."
        elif not rehearsal and shutil.which(need, path=_search_path()) is None:
            return f"{need} was not found on PATH, in CUDA_HOME or in /usr/local/cuda. It is part of the CUDA toolkit."
    return None


def _has_card() -> bool:
    check = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


class Runner:
    """Runs groups of parts, and appends a line about each to OUT/summary.txt as it ends."""

    def __init__(self, out: Path, rehearsal: bool, limit_s: float) -> None:
        self.out = out
        self.rehearsal = rehearsal
        self.deadline = time.monotonic() + limit_s
        self.log = Log(out / "log.txt")
        self.all_ran = True

    def run(self, group: Sequence[Part]) -> None:
        """Run the parts of ``group`` side by side."""
        with ThreadPoolExecutor(len(group)) as pool:
            list(pool.map(self._run, group))

    def _run(self, part: Part) -> None:
        reason = why_not(part, self.rehearsal)
        left_s = self.deadline - time.monotonic()
        if reason is None and left_s <= GRACE_S:
            reason = "no time was left."
        if reason is not None:
            self._tell(f"{part.name:<24} {'NOT RUN':<12} {reason}", failed=True)
            return
        print(f"== {part.name}: {part.what}", flush=True)
        steps = part.rehearsal if self.rehearsal else part.steps
        limit_s = part.limit_s * (PATIENCE if self.rehearsal else 1)
        outcome = run_part(part, steps, self.log, min(limit_s, left_s - GRACE_S))
        self._tell(str(outcome), failed=outcome.status not in (0, SKIPPED))
        if outcome.status != 0:
            print("   " + "\n   ".join([*outcome.failed, *outcome.tail]), flush=True)

    def _tell(self, line: str, failed: bool) -> None:
        self.all_ran &= not failed
        with (self.out / "summary.txt").open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        print(line, flush=True)


def main(argv: Sequence[str] | None = None, has_card: Callable[[], bool] = _has_card) -> int:
    """Run the parts; the exit status is 0 where every one succeeded, 1 where one failed or could not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", metavar="A,B+C", default=DEFAULT, help=f"{', '.join(PLANS)}, or parts (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-results", metavar="DIR", help="(default: gpu-results)")
    parser.add_argument("--commit", metavar="ID", help="commit of the sources where they are no git checkout")
    parser.add_argument("--limit-s", type=float, metavar="S", help="of all parts together (default: each has its own)")
    parser.add_argument("--dry-run", action="store_true", help="run the parts on a CPU, with shapes that take no time")
    args = parser.parse_args(argv)
    started = time.monotonic()
    plan = PLANS.get(args.only)
    limit_s = args.limit_s or (float("inf") if plan is None or args.dry_run else plan.limit_s)
    out = args.out.resolve()
    parts = make_parts(out, time.strftime("%Y%m%d-%H%M%S"), args.commit)
    groups = [group.split("+") for group in (args.only if plan is None else plan.order).split(",") if group]
    unknown = [name for group in groups for name in group if name not in parts]
    if unknown or not groups:
        known = f"{', '.join(PLANS)}, or parts of {', '.join(parts)}"
        print(f"run.py: --only must be {known}, got {args.only!r}.", file=sys.stderr)
        return 2
    if not args.dry_run and not has_card():
        print(
            "run.py: the machine must have a CUDA device that torch finds, got none. Run it on one with a GPU, or with "
            "--dry-run, which rehearses the parts on a CPU.",
            file=sys.stderr,
        )
        return 2
    out.mkdir(parents=True, exist_ok=True)
    runner = Runner(out, args.dry_run, limit_s - (time.monotonic() - started))
    for group in ([] if groups[0] == ["build"] else [["build"]]) + groups:
        runner.run([parts[name] for name in group])
    return int(not runner.all_ran)


if __name__ == "__main__":
    sys.exit(main())
