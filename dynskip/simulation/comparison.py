"""Policies on one stream of requests, beside the same stream at full depth and beside the ideal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dynskip.costs.step_costs import StepCosts
from dynskip.scheduler.outcome import PERCENTILES, Outcome
from dynskip.simulation.ideal import Ideal
from dynskip.simulation.simulate import EngineOptions, check_engines, simulate
from dynskip.simulation.workload import Workload, at_full_depth

_HEADINGS = (
    "policy | decode gain | of ideal | with prefill | of ideal | tokens/s | "
    f"TTFT ms p{'/'.join(map(str, PERCENTILES))} | ms/token mean, p{'/'.join(map(str, PERCENTILES))} | "
    "rows | paths | layers | union | longest wait | preempted"
)


@dataclass(frozen=True)
class Compared:
    """One policy. decode_gain, gain: how much faster than at full depth, without and with prefill."""

    options: EngineOptions
    outcome: Outcome
    decode_gain: float
    gain: float


@dataclass(frozen=True)
class Comparison:
    """Policies on one stream. ideal_decode, ideal_all: the gain of full batches of one path each.

    full: the stream at full depth, under the one of `lockstep` and `cohort` whose engine was busy for less time.
    """

    costs: StepCosts
    workload: Workload
    full: Outcome
    ideal_decode: float
    ideal_all: float
    policies: tuple[Compared, ...]

    def table(self) -> str:
        """The policies and full depth, as a Markdown table.

        A stream that comes slower than it is served has small batches whatever the policy: no share of the ideal.
        """
        rows = [f"| {_HEADINGS} |", "|" + "---|" * len(_HEADINGS.split("|"))]
        rows.append(_row("full depth", self.full, ("1.00x", "", "1.00x", "")))
        for compared in self.policies:
            closed = self.workload.rate is None
            shares = (
                f"{compared.decode_gain:.2f}x",
                f"{compared.decode_gain / self.ideal_decode:.0%}" if closed else "-",
                f"{compared.gain:.2f}x",
                f"{compared.gain / self.ideal_all:.0%}" if closed else "-",
            )
            rows.append(_row(compared.options.policy, compared.outcome, shares))
        return "\n".join(rows)

    def lines(self) -> list[dict[str, Any]]:
        """What JSON lines hold of it: one a policy, full depth first."""
        common = {
            "device": self.costs.device,
            "predicted": self.costs.predicted,
            "ideal_decode": self.ideal_decode,
            "ideal_all": self.ideal_all,
        }
        lines = [{**common, "policy": "full depth", **self.full.line()}]
        for compared in self.policies:
            options = compared.options
            lines.append(
                {
                    **common,
                    "policy": options.policy,
                    "batch": options.batch,
                    "decode_gain": compared.decode_gain,
                    "gain": compared.gain,
                    **compared.outcome.line(),
                }
            )
        return lines


def compare(
    costs: StepCosts, workload: Workload, options: Sequence[EngineOptions], num_engines: int = 1, seed: int = 0
) -> Comparison:
    """Each of ``options`` on the requests that ``workload`` draws, beside the same at full depth."""
    check_engines(num_engines)
    for option in options:
        option.scheduler(costs)  # raises, before anything is drawn, where such an engine cannot be
    requests = workload.draw(seed)
    first = options[0]
    ideal_decode, ideal_all = Ideal.speedups(costs, requests, first.batch, first.max_prefill_tokens)
    deep = at_full_depth(requests)
    fulls = [
        simulate(costs, deep, replace(first, policy=policy, pool=None, max_wait=None), num_engines)
        for policy in ("lockstep", "cohort")
    ]
    full_decode_s = min(full.decode_s for full in fulls)
    full = min(fulls, key=lambda full: full.decode_s + full.prefill_s)
    policies = []
    for option in options:
        outcome = simulate(costs, requests, option, num_engines)
        gain = (full.decode_s + full.prefill_s) / (outcome.decode_s + outcome.prefill_s)
        decode_gain = full_decode_s / outcome.decode_s if outcome.decode_s else 1.0
        policies.append(Compared(option, outcome, decode_gain, gain))
    return Comparison(costs, workload, full, ideal_decode, ideal_all, tuple(policies))


def _row(name: str, outcome: Outcome, gains: Sequence[str]) -> str:
    ttft = "/".join(f"{1e3 * value:.3g}" for value in outcome.ttft_s)
    tpot = "/".join(f"{value:.3g}" for value in outcome.tpot_ms)
    cells = (
        name,
        *gains,
        f"{outcome.tokens_per_s:,.0f}",
        ttft,
        f"{outcome.mean_tpot_ms:.3g}, {tpot}",
        f"{outcome.rows:.1f}",
        f"{outcome.paths:.2f}",
        f"{outcome.layers:.1f}",
        f"{outcome.union:.1f}",
        f"{outcome.longest_wait}",
        f"{outcome.num_preempted}",
    )
    return f"| {' | '.join(cells)} |"
