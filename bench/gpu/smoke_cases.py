"""What the smoke test runs: ops and steps of one shape, and the tables of constants that it runs them with."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.gpu.fused_steps import FusedSteps
from bench.gpu.parts import BESIDE, VARIANTS
from bench.gpu.replays import RepeatedStep
from bench.gpu.workloads import Truth, Workload, in_float64
from dynskip.causal_lm import CausalLM
from dynskip.kernels.configs import KEYS, Table, get_entries, use_configs
from dynskip.measure.device import Device
from dynskip.measure.random_models import hf_config, random_hf_model
from dynskip.models.config import DecoderConfig, Rotary
from dynskip.models.shapes import DEFAULT_SHAPE, get_shape
from dynskip.ops.row_ops import get_row_ops
from dynskip.paths import LayerPath
from dynskip.tuning.tasks import Task, plan_tasks
from dynskip.tuning.workload import Workload as OpWorkload
from dynskip.validation.op_arguments import parts_of, plan_rows
from dynskip.validation.tensors import Arguments, PlainDraw

TILES = VARIANTS / "tiles-32.json"
AS_IT_IS = "as-it-is"
PREPARED = (AS_IT_IS, "no-pdl", "tiles-32")


@dataclass(frozen=True)
class Sizes:
    """What is checked. num_copies: layers' worth of weights that an op reads in turn, more than a cache holds."""

    shape: str = DEFAULT_SHAPE
    vocab_size: int = get_shape(DEFAULT_SHAPE).vocab_size
    rows: tuple[int, ...] = (1, 8, 64, 128)
    many_rows: int = 64
    context_len: int = 576
    num_copies: int = 8
    num_layers: int = 4
    num_replays: int = 2000
    num_more_replays: int = 8000
    num_timed: int = 20


TINY = Sizes("tiny", 64, (2,), 2, 5, 1, 1, 2, 1, 1)
# The rows of `BESIDE` that the two calls time.
_ROWS_BESIDE = (8, 64)


def tasks(sizes: Sizes, rows: int, dtype: torch.dtype) -> list[Task]:
    """Every op that is launched for each layer, and the head, for ``rows`` rows."""
    config = _decoder(sizes, sizes.num_copies)
    name = str(dtype).removeprefix("torch.")
    planned = plan_tasks(config, (rows,), dtype=name)
    # What the shape has not: heads that turn, or positions beside slots.
    others = replace(config, rotary=Rotary.plain(config.head_size, 10000), qk_norm=True, alibi=True)
    absent = tuple(part for part in parts_of(others) if part not in parts_of(config))
    if absent:
        planned += plan_tasks(others, (rows,), absent, name)
    return [replace(task, context_len=sizes.context_len) for task in planned]


def plan_arguments(sizes: Sizes, rows: int, device: torch.device) -> Arguments:
    """The arguments of `plan_rows` for all layers, every second row of which runs a layer."""
    num_layers = get_shape(sizes.shape).num_layers
    active = torch.arange(num_layers * rows, device=device).view(num_layers, rows) % 2 == 0
    context_lens = torch.zeros(num_layers, rows, dtype=torch.int32, device=device)
    free_slots = torch.arange(num_layers * rows, dtype=torch.int32, device=device).flip(0).contiguous()
    return plan_rows(PlainDraw(torch.float32, device), active, context_lens, free_slots, max_context_len=8)


def without_dependent_launches(device: torch.device) -> Table:
    """The table that is in place, with every kernel starting only when the one before it has ended."""
    found: dict[str, Any] = {}
    for op in (op for op, keys in KEYS.items() if "PDL" in keys):
        groups = found[op] = {}
        for dtype in (torch.bfloat16, torch.float32):
            entries = [
                {"max_rows": entry.max_rows, **({} if entry.shape is None else {"shape": list(entry.shape)})}
                | {**entry.config, "PDL": False}
                for entry in get_entries(op, device, dtype)
            ]
            groups[str(dtype.itemsize)] = entries
    return {"device": None, "capability": None, "measured": None, "ops": found}


def make_steps(device: Device, dtype: torch.dtype, sizes: Sizes, rows: int) -> tuple[FusedSteps, Truth]:
    """Steps of a few layers for ``rows`` sequences at full depth, and what their logits must be."""
    config = _decoder(sizes, sizes.num_layers)
    hf_model = random_hf_model(hf_config(config), dtype=dtype, device=device.device)
    model = CausalLM.from_hf(hf_model, backend="triton", pack=False)
    paths = [LayerPath.full(sizes.num_layers)] * rows
    workload = Workload.along(paths, sizes.context_len, 2, sizes.vocab_size, device.device)
    truth = Truth(hf_model, lambda: in_float64(config, dtype, device.device))
    return FusedSteps(device, model, workload, "triton"), truth


def _decoder(sizes: Sizes, num_layers: int) -> DecoderConfig:
    return replace(get_shape(sizes.shape), num_layers=num_layers, vocab_size=sizes.vocab_size)


def prepare(device: Device, dtype: torch.dtype, sizes: Sizes, rows: int, name: str) -> None:
    """Launch once what ``rows`` rows need with the table ``name``, so that it stands compiled in Triton's cache."""
    if name == AS_IT_IS:
        ops = get_row_ops("triton")
        for task in tasks(sizes, rows, dtype):
            OpWorkload(task, ops, device.device, empty=True).launch()
    constants = {
        AS_IT_IS: nullcontext,
        "no-pdl": lambda: use_configs(without_dependent_launches(device.device)),
        "tiles-32": lambda: use_configs(TILES),
    }
    with constants[name]():
        steps, _ = make_steps(device, dtype, sizes, rows)
        RepeatedStep(device, steps)


def prepare_all(dtype_name: str, sizes: Sizes) -> None:
    """`prepare` in a process for each number of rows and table: it is compilers that take the time.

    What is timed beside the default shape is compiled along with it.
    """
    tables = [(sizes.shape, rows, name) for rows in sizes.rows for name in (AS_IT_IS, "no-pdl")]
    tables += [(sizes.shape, rows, "tiles-32") for rows in sizes.rows if rows >= sizes.many_rows and TILES.is_file()]
    if sizes.shape == DEFAULT_SHAPE:
        tables += [(BESIDE, rows, AS_IT_IS) for rows in _ROWS_BESIDE]
    command = [sys.executable, "-m", "bench.gpu.smoke", "--dtype", dtype_name]
    processes = [
        subprocess.Popen([*command, "--shape", shape, "--rows", str(rows), "--prepare", name])
        for shape, rows, name in tables
    ]
    for (shape, rows, name), process in zip(tables, processes, strict=True):
        if process.wait() != 0:
            print(f"preparing {shape}, {rows} rows, {name}: exit status {process.returncode}; compiled later")
