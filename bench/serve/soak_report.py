"""What a soak of the server has come to: samples, how memory grew, what is wrong, and the page that tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np

from dynskip.benchmark.report import markdown_table
from dynskip.evaluation.stats.intervals import Interval, bootstrap

# What comes before this share of the time has passed warms caches and fills the pool.
WARM_UP = 0.25
# By so much of itself memory may grow in the measured time: an allocator's noise.
RSS_SHARE = 0.02
# Neighbouring samples that stand for one in the interval: single ones know of each other.
_NUM_BLOCKS = 16
LEAST_SAMPLES = 16


@dataclass(frozen=True)
class Sample:
    """What is seen of the server at one time; counts are those since the beginning."""

    seconds: float
    cpu_s: float
    rss_bytes: int
    num_running: float
    num_waiting: float
    kv_share: float
    num_tokens: float
    num_preempted: float
    num_aborted: float
    num_shared_tokens: float


@dataclass(frozen=True)
class Soaked:
    """A whole run. outcomes: requests by how they ended. left: what the server still held behind the last of them.

    unequal: kinds of each request whose answer was not the library's. log_errors: lines of the server's log.
    """

    conditions: dict[str, Any]
    samples: Sequence[Sample]
    outcomes: dict[str, int]
    num_sent: int
    num_retries: int
    num_tokens: int
    refused: dict[str, int]
    answered_kinds: dict[str, int]
    checked_kinds: dict[str, int]
    num_checked: int
    lost: Sequence[str]
    unequal: Sequence[str]
    left: dict[str, float]
    paused_s: float
    exit_status: int
    log_errors: Sequence[str]

    @property
    def warm(self) -> list[Sample]:
        """The samples behind the warm-up."""
        end_s = self.samples[-1].seconds if self.samples else 0.0
        return [sample for sample in self.samples if sample.seconds >= WARM_UP * end_s]

    @property
    def rss_slope(self) -> Interval:
        """MiB an hour by which resident memory grew behind the warm-up: least squares, an interval over blocks."""
        return slope([sample.seconds / 3600 for sample in self.warm], [s.rss_bytes / 2**20 for s in self.warm])

    @property
    def rss_growth(self) -> float:
        """The same as a share of the mean, over the measured time."""
        warm = self.warm
        hours = (warm[-1].seconds - warm[0].seconds) / 3600
        return self.rss_slope.value * hours / mean(sample.rss_bytes / 2**20 for sample in warm)

    def verdict(self) -> list[str]:
        """What is wrong, in words; nothing where all is as it should be."""
        last, wrong = self.samples[-1], []
        if self.rss_growth > RSS_SHARE:
            wrong.append(f"resident memory grew by {self.rss_growth:.1%}")
        if self.lost:
            wrong.append(f"{len(self.lost)} requests were lost, the first: {self.lost[0]}")
        if sum(self.outcomes.values()) + len(self.lost) != self.num_sent:
            wrong.append(f"{self.num_sent} requests were sent, {sum(self.outcomes.values())} ended")
        if held := [f"{name} {value:g}" for name, value in self.left.items() if value]:
            wrong.append(f"behind the last request the server still held: {', '.join(held)}")
        if self.unequal:
            wrong.append(f"{len(self.unequal)} answers were not the library's: {'; '.join(self.unequal)}")
        if self.exit_status:
            wrong.append(f"the server ended with status {self.exit_status}")
        if self.log_errors:
            wrong.append(f"the server's log has errors: {'; '.join(self.log_errors)}")
        few = [name for name in ("answered", "refused", "left", "other") if not self.outcomes.get(name)]
        few += [name for name in ("num_retries", "num_checked") if not getattr(self, name)]
        counted = ("num_tokens", "num_preempted", "num_aborted", "num_shared_tokens")
        few += [name for name in counted if not getattr(last, name)]
        if few:
            wrong.append(f"the run says little: {', '.join(few)} must not be 0")
        return wrong

    def line(self) -> dict[str, Any]:
        """All of it for JSON, with what follows from it."""
        found = {
            "verdict": self.verdict(),
            "rss_slope_mib_per_hour": self.rss_slope.row(),
            "rss_growth": self.rss_growth,
        }
        return {"found": found, **vars(self), "samples": [vars(sample) for sample in self.samples]}

    @staticmethod
    def of_line(line: dict[str, Any]) -> Soaked:
        """The run that `line` was made of."""
        own = {name: value for name, value in line.items() if name != "found"}
        return Soaked(**{**own, "samples": [Sample(**sample) for sample in line["samples"]]})


def slope(xs: Sequence[float], ys: Sequence[float]) -> Interval:
    """The least-squares slope of ``ys`` over ``xs``, with a 95 % interval by bootstrap over blocks of neighbours."""
    size = max(1, len(xs) // _NUM_BLOCKS)
    ends = range(size, len(xs) + 1, size)
    blocks = np.array([[mean(xs[end - size : end]), mean(ys[end - size : end])] for end in ends])

    def of(points: Any) -> Any:
        centred = points - points.mean(0)
        square = (centred[:, 0] ** 2).sum()
        return (centred[:, 0] * centred[:, 1]).sum() / square if square else np.nan

    return bootstrap(of, blocks)


def page(run: Soaked) -> str:
    """The run as Markdown."""
    told, warm, last = run.conditions, run.warm, run.samples[-1]
    quarters = [warm[len(warm) * i // 4 : len(warm) * (i + 1) // 4] for i in range(4)]
    rows = [
        ["tokens/s", *(f"{_rate(part, 'num_tokens'):.0f}" for part in quarters)],
        ["processor seconds a second", *(f"{_rate(part, 'cpu_s'):.2f}" for part in quarters)],
        ["resident memory, MiB", *(f"{mean(s.rss_bytes for s in part) / 2**20:.1f}" for part in quarters)],
        ["running", *(f"{mean(s.num_running for s in part):.1f}" for part in quarters)],
        ["waiting", *(f"{mean(s.num_waiting for s in part):.1f}" for part in quarters)],
        ["keys and values in use", *(f"{mean(s.kv_share for s in part):.0%}" for part in quarters)],
        ["preemptions", *(f"{part[-1].num_preempted - part[0].num_preempted:,.0f}" for part in quarters)],
    ]
    table = markdown_table(("quarter of the time behind the warm-up", "1", "2", "3", "4"), rows, {1, 2, 3, 4})
    rss = run.rss_slope
    kinds = ", ".join(f"{name} {run.checked_kinds.get(name, 0)}" for name in sorted(run.answered_kinds))
    refused = ", ".join(f"{name} {count}" for name, count in sorted(run.refused.items()))
    wrong = run.verdict()
    grew = ", and still growing" if rss.low > 0 else ""
    held = f"resident memory {run.rss_growth:+.2%} of {RSS_SHARE:.0%} allowed{grew}"
    return f"""# A server under random requests, {told["minutes"]:g} minutes

Written by `make soak-serve`. {told["cpu"]}, {told["num_cores"]} cores, torch {told["versions"]["torch"]}, commit \
{told["commit"]}, {told["date"]}; `dynskip serve {told["model"]}` in a process of its own, deterministic, \
{told["threads"]} thread, batch {told["batch"]}, queue {told["max_queue"]}, {told["kv_mib"]:.1f} MiB for keys and \
values; {told["clients"]} clients in another process on the same cores, seed {told["seed"]}. {len(run.samples)} samples.

{table}
- {run.num_sent:,} requests: {run.outcomes.get("answered", 0):,} answered, {run.outcomes.get("refused", 0):,} refused \
as they had to be, {run.outcomes.get("left", 0):,} whose clients went away, {run.outcomes.get("other", 0):,} of other \
routes, {run.outcomes.get("turned away", 0):,} turned away until their clients gave up, {len(run.lost):,} lost. \
{run.num_retries:,} times the queue was full, and the request was sent again.
- The server had {last.num_tokens:,.0f} tokens made, {last.num_aborted:,.0f} outputs aborted, \
{last.num_preempted:,.0f} preempted; {last.num_shared_tokens:,.0f} prompt tokens were another request's.
- It was stopped for {run.paused_s:.0f} s in the middle (SIGSTOP, SIGCONT), with requests on their way.
- Resident memory: {rss.value:+.1f} MiB an hour (95 % interval {rss.low:+.1f} to {rss.high:+.1f}), \
{run.rss_growth:+.2%} in the measured time.
- Behind the last request: {", ".join(f"{name} {value:g}" for name, value in run.left.items())}. SIGTERM then ended it \
with status {run.exit_status}.
- {run.num_checked} answers, drawn from all, were made again by the library, each prompt alone: \
{run.num_checked - len(run.unequal)} had the same text, reasons to end, token ids and bits of log-probabilities.

Of these: {kinds}.

Refused: {refused}.

Verdict: {"; ".join(wrong) if wrong else f"{held}, no request lost, nothing held, all answers the library's"}.
"""


def _rate(part: Sequence[Sample], name: str) -> float:
    """How much of a count came a second."""
    seconds = part[-1].seconds - part[0].seconds
    return (getattr(part[-1], name) - getattr(part[0], name)) / seconds if seconds else 0.0
