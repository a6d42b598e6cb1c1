"""ncu over the kernels of one decode layer, its plan and its head. Without --ncu: only the launches it watches."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.gpu.fused_steps import FusedSteps
from bench.gpu.recorder import add_shape, make_tiny, numbers
from bench.gpu.workloads import Workload
from dynskip.causal_lm import CausalLM
from dynskip.measure.device import Device, get_device
from dynskip.measure.random_models import hf_config, random_hf_model
from dynskip.models.shapes import get_shape
from dynskip.paths import LayerPath

BATCHES = (1, 16, 64)


def profile(ncu: str, out: Path, command: Sequence[str]) -> int:
    """The exit status of ``command`` under ncu, whose report is ``profile.txt`` in ``out``.

    Clocks are left as they are, caches are flushed before each pass: weights come from memory as in a step.
    """
    out.mkdir(parents=True, exist_ok=True)
    report = out / "profile.txt"
    options = ("--clock-control", "none", "--cache-control", "all", "--profile-from-start", "off", "--set", "full")
    status = subprocess.run([ncu, *options, "--log-file", str(report), *command], check=False).returncode
    print(f"ncu: exit status {status}; {report}")
    return status


@torch.no_grad()
def launch_layer(device: Device, shape: str, vocab_size: int, batch: int, context_len: int, ops: str) -> None:
    """One step of one layer of ``batch`` rows, twice; the second time is the one that is watched."""
    config = replace(get_shape(shape), num_layers=1, vocab_size=vocab_size)
    hf_model = random_hf_model(hf_config(config), device=device.device)
    model = CausalLM.from_hf(hf_model, backend="triton" if ops == "triton" else "torch", pack=False)
    workload = Workload.along([LayerPath.full(1)] * batch, context_len, 4, vocab_size, device.device)
    steps = FusedSteps(device, model, workload, ops)
    steps.fused.run(steps.shape)
    steps.fused.head(steps.shape.max_rows)
    device.synchronize()
    watched = torch.cuda.profiler.profile() if device.device.type == "cuda" else contextlib.nullcontext()
    with watched:
        steps.fused.run(steps.shape)
        steps.fused.head(steps.shape.max_rows)
        device.synchronize()
    print(f"{batch} rows: one layer, plan and head launched")


def main(argv: Sequence[str] | None = None) -> int:
    """The parts ``profile`` and ``layer`` of `make gpu`."""
    parser = argparse.ArgumentParser(prog="bench.gpu.profile_layer", description=__doc__)
    parser.add_argument("--ncu", metavar="PATH", help="the program ncu")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), metavar="DIR", help="(default: gpu-results)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try it out")
    parser.add_argument("--batches", type=numbers, default=BATCHES, metavar="A,B", help="rows of a step")
    add_shape(parser)
    parser.add_argument("--vocab-size", type=int, metavar="V", help="(default: the shape's own)")
    parser.add_argument("--context-len", type=int, default=512, metavar="T")
    parser.add_argument("--ops", choices=("triton", "reference"), default="triton", help="row ops (default: triton)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be launched and end")
    args = parser.parse_args(argv)
    if args.tiny:
        args.shape, args.vocab_size, args.context_len = make_tiny(args.shape), 64, 5
    batches = ",".join(map(str, args.batches))
    if args.dry_run:
        print(f"one layer of {args.shape}, context {args.context_len}, at {batches} rows")
        return 0
    if args.ncu is not None:
        command = [sys.executable, "-m", "bench.gpu.profile_layer", "--shape", args.shape, "--batches", batches]
        return profile(args.ncu, args.out, command)
    device, vocab_size = get_device(args.device), args.vocab_size or get_shape(args.shape).vocab_size
    for batch in args.batches:
        launch_layer(device, args.shape, vocab_size, batch, args.context_len, args.ops)
    return 0


if __name__ == "__main__":
    sys.exit(main())
