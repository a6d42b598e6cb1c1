"""``dynskip simulate``: what a stream of requests would take under each policy, on a simulated clock."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from dynskip.cli.options import UserError, add_number
from dynskip.models.shapes import DEFAULT_SHAPE, SHAPES, get_shape
from dynskip.scheduler.policies.make import POLICIES
from dynskip.simulation.workload import PAPER_MIX, Workload, parse_mix

if TYPE_CHECKING:
    from dynskip.costs.step_costs import StepCosts
    from dynskip.simulation.comparison import Comparison

HELP = "predict throughput and latency of a stream of requests"
DESCRIPTION = "Run the engine's scheduler against a simulated clock, beside the same requests at full depth."
EXAMPLES = """examples:
  dynskip simulate                              the mix of arXiv 2410.20022 in batches of 16, on an H200 (predicted)
  dynskip simulate --batch 128 --requests 8192 --output geometric:64
  dynskip simulate --arrival poisson:2000 --engines 4 --policy cohort
  dynskip simulate --device this                on this machine, from what `dynskip calibrate` measured
  dynskip simulate --paths uniform:6=1,full=1 --kv-slots 100000 --json

Figures for an H200 are predicted: its costs are a roofline, not what a card took. "of ideal" holds the gain over the
same requests at full depth against batches that are always full and of one path.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``simulate``."""
    load = parser.add_argument_group("load")
    add_number(load, "--requests", "N", 1, 10**6, 1024, "how many")
    load.add_argument("--paths", metavar="SPEC", help=f"PATH=SHARE,PATH=SHARE,... (default: {PAPER_MIX})")
    load.add_argument(
        "--arrival", default="closed", metavar="A", help="closed (default), or poisson:RATE in requests a second"
    )
    add_number(load, "--prompt", "N", 1, 10**6, 32, "tokens of a prompt")
    lengths = "geometric:MEAN or fixed:N, in tokens (default: %(default)s)"
    load.add_argument("--output", default="geometric:16", metavar="O", help=lengths)
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--policy", choices=POLICIES, action="append", help="repeatable (default: all)")
    add_number(engine, "--batch", "N", 1, 2**16, 16, "most rows of a decode step")
    add_number(engine, "--pool", "N", 1, 2**20, None, "most resident sequences of cohort (default: 4 x batch)")
    wait = "most steps between two tokens under cohort (default: 3 x pool / batch, at least 12)"
    add_number(engine, "--max-wait", "W", 1, 10**9, None, wait)
    add_number(engine, "--kv-slots", "N", 1, 2**62, None, "key-value entries in memory (default: no limit)")
    add_number(engine, "--engines", "N", 1, 1024, 1, "how many share the load")
    parser.add_argument(
        "--device",
        default="h200",
        metavar="D",
        help="h200 (predicted); this, cpu or cuda, measured by `dynskip calibrate` (this: the GPU, if there is one); "
        "or a file of it",
    )
    parser.add_argument("--shape", choices=tuple(SHAPES), default=DEFAULT_SHAPE, help="with --device this, cpu or cuda")
    parser.add_argument("--json", action="store_true", help="print JSON lines, one a policy, in place of a table")


def run(args: argparse.Namespace) -> int:
    """Simulate and print."""
    from dynskip.simulation.comparison import compare
    from dynskip.simulation.simulate import UNLIMITED_SLOTS, EngineOptions

    costs = _costs(args.device, args.shape)
    mean_output, fixed = _output(args.output)
    workload = Workload(
        num_requests=args.requests,
        paths=parse_mix(args.paths or PAPER_MIX, costs.num_layers),
        num_prompt=args.prompt,
        mean_output=mean_output,
        fixed_output=fixed,
        rate=_rate(args.arrival),
    )
    slots = UNLIMITED_SLOTS if args.kv_slots is None else args.kv_slots
    of_cohort = {"pool": args.pool, "max_wait": args.max_wait}
    options = [
        EngineOptions(policy, args.batch, kv_slots=slots, **(of_cohort if policy == "cohort" else {}))
        for policy in dict.fromkeys(args.policy or POLICIES)
    ]
    comparison = compare(costs, workload, options, args.engines, args.seed)
    if args.json:
        for line in comparison.lines():
            print(json.dumps(line))
    else:
        _print(comparison, args)
    return 0


def _print(comparison: Comparison, args: argparse.Namespace) -> None:
    costs = comparison.costs
    kind = "predicted from a roofline" if costs.predicted else "simulated from measured costs"
    print(
        f"{costs.device}: {kind}. {args.requests} requests, {args.arrival}, batch {args.batch}, engines {args.engines}"
    )
    ideals = f"decode {comparison.ideal_decode:.2f}x, with prefill {comparison.ideal_all:.2f}x"
    print(f"ideal speed-up over full depth: {ideals}")
    print(comparison.table())


def _costs(device: str, shape: str) -> StepCosts:
    from dynskip.costs.step_costs import StepCosts

    if device == "h200":
        return StepCosts.h200()
    if device not in ("this", "cpu", "cuda"):
        return StepCosts.read(Path(device))
    import torch

    from dynskip.costs.store import cached_path, device_key, load_cached, shape_key

    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "this" else device
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch must see a GPU, got none. Use cpu, h200 or a file.")
    key = shape_key(get_shape(shape), "bfloat16")
    found = load_cached(device_key(kind), key)
    if found is None:
        raise UserError(
            f"--device {device}: {shape} must have been calibrated here, got no {cached_path(device_key(kind), key)}. "
            f"Run `dynskip calibrate --shape {shape} --device {kind}`."
        )
    return found


def _rate(text: str) -> float | None:
    if text == "closed":
        return None
    kind, _, rate = text.partition(":")
    value = _number(rate)
    if kind != "poisson" or value is None:
        raise UserError(f"--arrival must be closed or poisson:RATE with a positive rate, got {text!r}")
    return value


def _output(text: str) -> tuple[float, bool]:
    kind, _, length = text.partition(":")
    value = _number(length)
    whole = value is not None and value >= 1 and (kind == "geometric" or value == int(value))
    if kind not in ("geometric", "fixed") or not whole:
        raise UserError(f"--output must be geometric:MEAN or fixed:N with at least 1 token, got {text!r}")
    assert value is not None, "checked above"
    return value, kind == "fixed"


def _number(text: str) -> float | None:
    """The positive number that ``text`` is, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < math.inf else None
