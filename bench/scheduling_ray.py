"""Writes what the placement of requests on replicas gains over round robin, as the simulation predicts it.

python bench/scheduling_ray.py                  writes bench/results/scheduling-ray.md, in a few minutes
python bench/scheduling_ray.py --out page.md    writes another file
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dynskip.costs.layer_costs import MachineSpeed
from dynskip.costs.step_costs import StepCosts
from dynskip.scheduler.outcome import Outcome
from dynskip.scheduler.placement import place
from dynskip.simulation.simulate import Choose, EngineOptions, SimulatedEngine, least_work_then_path, simulate
from dynskip.simulation.workload import PAPER_MIX, Request, Workload, parse_mix

ROOT = Path(__file__).resolve().parents[1]
# As in bench/scheduling.py: 37 GB/s were read on two cores, and 64 rows through OPT-1.3B's matrices took 228 ms.
CORES = StepCosts.modelled("2 cores", MachineSpeed(bandwidth_gbps=37, peak_gflops=740))
SETTINGS = ((CORES, 16, 1500), (StepCosts.h200(), 64, 6000))
PAPER = parse_mix(PAPER_MIX, 24)
LOADS = (None, 0.25, 0.5, 0.8)
NUM_ENGINES = (2, 4)
NUM_PREFIXES = 100
HEADINGS = (
    *("load", "rule", "tokens/s", "TTFT ms p50/p90/p99", "ms a token mean, p50/p90/p99"),
    *("rows", "paths", "union", "copies"),
)

_HEAD = """# Requests of many depths on several replicas: predicted

Written by `python bench/scheduling_ray.py`: the engines' own scheduler against simulated clocks. **Every figure on this
page is predicted; no device was timed.** Shapes of OPT-1.3B in bfloat16; 74/18/6/2 % of the requests along uniform:4,
uniform:8, uniform:12 and all 24 layers, prompts of 32 tokens, outputs geometric with a mean of 16 tokens; policy
`cohort`. A step costs the roofline of its layers' rows, head and key-value reads. "2 cores": 37 GB/s, 740 GFLOP/s,
batch 16; "H200": 4.3 TB/s, 790 TFLOP/s, batch 64. A replica has such a device of its own.

- `round robin`: each request goes to the next replica.
- `least work`: to the replica with the least decode time of requests, as costs predict it; most of its path breaks ties
  of about a batch.
- `path and prefix`: `dynskip/scheduler/placement.py`, which is what `dynskip serve --replicas` does.

Load 100 % is what so many replicas serve of a queue that is there from the beginning, under round robin. Copies: on how
many replicas, in the mean, a prompt's beginning is run along a path, of 100 beginnings of Zipf's frequencies.
"""


class Prefixes:
    """Gives each request a prefix, and counts on how many engines each came to be run."""

    def __init__(self, choose: Choose | None) -> None:
        self._choose = choose
        self._draw = random.Random(0)
        self._weights = [1 / rank for rank in range(1, NUM_PREFIXES + 1)]
        self._where: dict[object, set[int]] = {}

    def __call__(self, engines: Sequence[SimulatedEngine], request: Request) -> SimulatedEngine:
        """The engine of ``request``."""
        (prefix,) = self._draw.choices(range(NUM_PREFIXES), self._weights)
        engine = by_placement(engines, request, str(prefix)) if self._choose is None else self._choose(engines, request)
        self._where.setdefault((request.path, prefix), set()).add(id(engine))
        return engine

    @property
    def copies(self) -> float:
        """Engines that have run a prefix along a path, in the mean."""
        return sum(map(len, self._where.values())) / len(self._where)


def round_robin() -> Choose:
    """Engine after engine."""
    numbers = itertools.count()
    return lambda engines, request: engines[next(numbers) % len(engines)]


def by_placement(engines: Sequence[SimulatedEngine], request: Request, prefix: str) -> SimulatedEngine:
    """As replicas are chosen."""
    by_name = {f"replica-{index}": engine for index, engine in enumerate(engines)}
    batch = engines[0].scheduler.policy.batch
    return by_name[place({name: each.num_of_path for name, each in by_name.items()}, request.path, prefix, batch)]


def rules() -> dict[str, Prefixes]:
    """What is compared."""
    return {
        "round robin": Prefixes(round_robin()),
        "least work": Prefixes(least_work_then_path),
        "path and prefix": Prefixes(None),
    }


def tables() -> Iterator[str]:
    """A table for each device and number of replicas."""
    for costs, batch, num_requests in SETTINGS:
        options = EngineOptions("cohort", batch)
        for num_engines in NUM_ENGINES:
            total = num_requests * num_engines
            closed = simulate(costs, Workload(total, PAPER).draw(), options, num_engines, choose=round_robin())
            capacity = total / closed.seconds
            yield f"## {costs.device}, {num_engines} replicas: 100 % are {capacity:,.3g} requests/s\n"
            yield f"| {' | '.join(HEADINGS)} |"
            yield "|---" * len(HEADINGS) + "|"
            for load in LOADS:
                rate = None if load is None else load * capacity
                requests = Workload(total, PAPER, rate=rate).draw()
                for name, rule in rules().items():
                    outcome = simulate(costs, requests, options, num_engines, choose=rule)
                    shown = "queue" if load is None else f"{load:.0%}"
                    yield f"| {shown} | {name} | {' | '.join(_cells(outcome))} | {rule.copies:.2f} |"
            yield ""


def _cells(outcome: Outcome) -> Iterator[str]:
    yield f"{outcome.tokens_per_s:,.0f}"
    yield "/".join(f"{1e3 * value:.3g}" for value in outcome.ttft_s)
    yield f"{outcome.mean_tpot_ms:.3g}, " + "/".join(f"{value:.3g}" for value in outcome.tpot_ms)
    yield from (f"{value:.2f}" for value in (outcome.rows, outcome.paths, outcome.union))


def main(argv: list[str] | None = None) -> int:
    """Simulate and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "scheduling-ray.md")
    args = parser.parse_args(argv)
    lines = [_HEAD]
    for line in tables():
        print(line, flush=True)
        lines.append(line)
    args.out.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
