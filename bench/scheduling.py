"""Writes what the scheduler's simulation predicts, as one page of tables: nothing in it was measured on a device.

python bench/scheduling.py                  writes bench/results/scheduling-predicted.md, in a few minutes
python bench/scheduling.py --out page.md    writes another file
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from dynskip.costs.layer_costs import MachineSpeed
from dynskip.costs.step_costs import StepCosts
from dynskip.paths import LayerPath
from dynskip.scheduler.outcome import Outcome
from dynskip.scheduler.policies.make import POLICIES
from dynskip.simulation.comparison import Compared, Comparison, compare
from dynskip.simulation.ideal import least_decode_ms
from dynskip.simulation.simulate import EngineOptions, simulate
from dynskip.simulation.workload import PAPER_MIX, Workload, parse_mix

ROOT = Path(__file__).resolve().parents[1]
H200 = StepCosts.h200()
# 37 GB/s were read on two cores, and 64 rows through OPT-1.3B's matrices took 228 ms.
CORES = StepCosts.modelled("2 cores", MachineSpeed(bandwidth_gbps=37, peak_gflops=740))
PAPER = parse_mix(PAPER_MIX, 24)
MIXES = {
    "74/18/6/2 % of ULS-4/8/12/full": PAPER,
    "half ULS-6, half full": parse_mix("uniform:6,full", 24),
    "12 unrelated paths of 6 layers": tuple(
        (LayerPath.random(24, 6, seed, keep_first=True), 1.0) for seed in range(12)
    ),
    "200 unrelated paths of 6 layers": tuple(
        (LayerPath.random(24, 6, seed, keep_first=True), 1.0) for seed in range(200)
    ),
}
NEVER = 10**6

_HEAD = """# What scheduling by path gains: predicted

Written by `python bench/scheduling.py`: the engine's own scheduler against a simulated clock. **Every figure on this
page is predicted; no device was timed.** Shapes of OPT-1.3B in bfloat16, prompts of 32 tokens, geometric outputs.
A step costs the roofline of its layers' rows, head and key-value reads, and nothing for launches or for the scheduler.
"H200": 4.3 TB/s, 790 TFLOP/s. "2 cores": 37 GB/s, 740 GFLOP/s.

Gains are over the same requests at full depth, under the better of `lockstep` and `cohort`. The ideal is the ratio of
the mean costs of rows in full batches of one path each. Full depth drains at the end of a run too, and its own prompts
do not come in ideal prefills: a share may exceed 100 %. A pool is 4 x the batch and W 12 steps unless a table says
otherwise.
"""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def policies(batch: int, names: Sequence[str] = POLICIES) -> list[EngineOptions]:
    """The policies of those names, with batches of that size."""
    return [EngineOptions(name, batch) for name in names]


def settings() -> str:
    """Closed queues of the paper's mix."""
    rows = []
    cases = [(H200, 2048, 64, 64), (H200, 8192, 128, 64), (H200, 8192, 128, 16)]
    cases += [(CORES, 1024, 16, 64), (CORES, 256, 16, 64), (CORES, 1024, 16, 16), (CORES, 1024, 32, 16)]
    for costs, num_requests, batch, output in cases:
        workload = Workload(num_requests, PAPER, mean_output=output)
        found = [compare(costs, workload, policies(batch), seed=seed) for seed in range(3)]
        row = [f"{costs.device}, {num_requests:,}, {batch}, {output}", f"{mean(one.ideal_decode for one in found):.2f}"]
        for index in range(len(POLICIES)):
            gain = mean(one.policies[index].decode_gain for one in found)
            share = mean(one.policies[index].decode_gain / one.ideal_decode for one in found)
            row.append(f"{gain:.2f} ({share:.0%})")
        row.append(f"{mean(_over(one, 'lockstep') for one in found):.2f}")
        row.append(f"{mean(_cohort(one).gain / one.ideal_all for one in found):.0%}")
        row.append(f"{max(_cohort(one).outcome.longest_wait for one in found)}")
        bounds = [least_decode_ms(costs, workload.draw(seed), batch) / 1e3 for seed in range(len(found))]
        row.append(f"{mean(b / _cohort(one).outcome.decode_s for b, one in zip(bounds, found, strict=True)):.0%}")
        rows.append(row)
    headings = [
        "requests, batch, mean output",
        "ideal",
        *POLICIES,
        "cohort over lockstep",
        "end to end",
        "longest wait",
    ]
    title = "## Closed queues, three draws each: gain in decode seconds (share of the ideal)"
    note = (
        "End to end: the share of the ideal with prefill. Of the bound: what no schedule can go below, as the longest "
        "sequence of a path takes its steps one by one, over the decode seconds of `cohort`."
    )
    return f"{title}\n\n{textwrap.fill(note, 120)}\n\n{table([*headings, 'of the bound'], rows)}"


def waits() -> str:
    """What the bound on waiting costs."""
    bounds = (4, 6, 8, 12, 16, 24, 32, NEVER)
    rows = []
    for costs, num_requests, batch in ((CORES, 1024, 16), (H200, 4096, 64)):
        for name in ("74/18/6/2 % of ULS-4/8/12/full", "12 unrelated paths of 6 layers"):
            workload = Workload(num_requests, MIXES[name])
            shares = []
            for bound in bounds:
                options = [EngineOptions("cohort", batch, max_wait=bound)]
                found = [compare(costs, workload, options, seed=seed) for seed in range(3)]
                shares.append(mean(_cohort(one).decode_gain / one.ideal_decode for one in found))
            rows.append(
                [f"{costs.device}, {batch}, {name}", *(f"{share / shares[-1] - 1:+.1%}" for share in shares[:-1])]
            )
    headings = ["batch and paths", *(f"W = {bound}" for bound in bounds[:-1])]
    return "## Throughput against no bound on waiting (decode, pool 4 x)\n\n" + table(headings, rows)


def pools() -> str:
    """Mixes and pool sizes."""
    rows = []
    for costs, num_requests, batch in ((CORES, 1024, 16), (H200, 4096, 64)):
        for name, mix in MIXES.items():
            workload = Workload(num_requests, mix)
            options = [*policies(batch, ("lockstep", "by_path"))]
            options += [EngineOptions("cohort", batch, pool=factor * batch) for factor in (1, 2, 4, 8)]
            found = compare(costs, workload, options)
            shares = [f"{compared.decode_gain / found.ideal_decode:.0%}" for compared in found.policies]
            rows.append([f"{costs.device}, {batch}, {name}", f"{found.ideal_decode:.2f}", *shares])
    headings = ["batch and paths", "ideal", "lockstep", "by_path", *(f"cohort, pool {f} x" for f in (1, 2, 4, 8))]
    return "## Mixes and pools: share of the ideal (decode)\n\n" + table(headings, rows)


def loads() -> str:
    """Poisson streams on one engine and on several."""
    batch, num_requests = 128, 20_000
    closed = simulate(H200, Workload(num_requests, PAPER).draw(), EngineOptions("cohort", batch))
    capacity = num_requests / closed.seconds
    rows = []
    for share in (0.25, 0.5, 0.8, 0.95):
        requests = Workload(num_requests, PAPER, rate=share * capacity).draw()
        for name in POLICIES:
            outcome = simulate(H200, requests, EngineOptions(name, batch))
            rows.append([f"{share:.0%}", name, "1", *_latency(outcome)])
    for num_engines in (2, 4):
        requests = Workload(2 * num_requests, PAPER, rate=0.8 * num_engines * capacity).draw()
        for name in ("lockstep", "cohort"):
            outcome = simulate(H200, requests, EngineOptions(name, batch), num_engines)
            rows.append(["80%", name, f"{num_engines}", *_latency(outcome)])
    headings = ["load", "policy", "engines", "tokens/s", "TTFT ms p50/p90/p99", "ms a token mean, p50/p90/p99"]
    title = f"## Poisson streams, H200, batch {batch}\n\nLoad 100 % is what `cohort` served of a closed queue: "
    title += f"{capacity:,.0f} requests/s an engine."
    return f"{title}\n\n{table([*headings, 'rows', 'paths', 'union'], rows)}"


def memory() -> str:
    """What happens when key-value memory, and not the pool, bounds who is resident."""
    batch, num_requests = 64, 4096
    rows = []
    for slots in (2**15, 2**16, 2**17, 2**18):
        workload = Workload(num_requests, PAPER, mean_output=64)
        options = [replace(option, kv_slots=slots) for option in policies(batch)]
        found = compare(H200, workload, options)
        cells = [
            f"{compared.decode_gain / found.ideal_decode:.0%}, {compared.outcome.num_preempted:,}"
            for compared in found.policies
        ]
        rows.append([f"{slots:,}", f"{found.full.num_preempted:,}", *cells])
    headings = [
        "slots (token entries)",
        "preempted at full depth",
        *(f"{name}: of ideal, preempted" for name in POLICIES),
    ]
    intro = "Full depth gets the same memory: there a gain counts what shallow paths leave free as well."
    return f"## Little memory, H200, batch {batch}, outputs of 64 in pages of 16\n\n{intro}\n\n{table(headings, rows)}"


def _cohort(found: Comparison) -> Compared:
    return next(compared for compared in found.policies if compared.options.policy == "cohort")


def _over(found: Comparison, name: str) -> float:
    other = next(compared for compared in found.policies if compared.options.policy == name)
    return _cohort(found).decode_gain / other.decode_gain


def _latency(outcome: Outcome) -> Iterator[str]:
    yield f"{outcome.tokens_per_s:,.0f}"
    yield "/".join(f"{1e3 * value:.3g}" for value in outcome.ttft_s)
    yield f"{outcome.mean_tpot_ms:.3g}, " + "/".join(f"{value:.3g}" for value in outcome.tpot_ms)
    yield from (f"{value:.1f}" for value in (outcome.rows, outcome.paths, outcome.union))


SECTIONS: tuple[Callable[[], str], ...] = (settings, waits, pools, loads, memory)


def main(argv: list[str] | None = None) -> int:
    """Simulate and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "scheduling-predicted.md")
    args = parser.parse_args(argv)
    parts = [_HEAD.strip()]
    for section in SECTIONS:
        parts.append(section())
        print(parts[-1], flush=True)
    args.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
