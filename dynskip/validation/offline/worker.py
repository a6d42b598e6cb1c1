"""The process that compiles kernels for a GPU that need not be there: see `compile_offline`, which starts it.

The launchers themselves are called, on CPU tensors of decoders' shapes that nothing reads, and each launch becomes a
compilation: so what is compiled has the constants and the alignment hints of a real run. Triton's interpreter must be
off here: python -m dynskip.validation.offline.worker '[{"capability": 90, ...}]' prints for each job, all of them for
one capability, an object a kernel.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dynskip.kernels.choose_tokens import choose_tokens
from dynskip.kernels.configs import KEYS, get_entries, use_configs
from dynskip.kernels.launches import compile_only
from dynskip.kernels.row_list import TUNED_BUCKETS
from dynskip.models.shapes import DEFAULT_SHAPE, SHAPES
from dynskip.ops.backends import get_backend
from dynskip.ops.row_ops import get_row_ops
from dynskip.validation import op_arguments as make
from dynskip.validation.offline.compile_kernels import MISALIGNED
from dynskip.validation.offline.resources import count_tensor_core_instructions, read_resources
from dynskip.validation.offline.waits import acts_before_wait
from dynskip.validation.op_arguments import MATRIX_OPS, RowArguments, bind, draw_rows, make_workspace, parts_of
from dynskip.validation.tensors import EmptyDraw

_MATRIX_PRODUCT = re.compile(r"tt\.dot .*: tensor<[\dx]+x(\w+)>")


# The smallest, the benchmarked one, the one whose heads fill no power of two, one of wider heads, the widest.
COMPILED_SHAPES = ("opt-125m", "opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-66b")
FEWER_SHAPES = ("opt-1.3b", "opt-2.7b", "opt-66b")
FEW_ROWS = 4


class OfflineDriver:
    """Stands for a GPU of a given compute capability, as far as compiling for it goes."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Call(NamedTuple):
    """A call of a launcher, and what it stands for."""

    op: str
    case: str
    run: Callable[[], object]


def compile_all(
    capability: int,
    config_path: str,
    dtype_name: str,
    op_names: list[str],
    everywhere: bool,
    shapes: list[str],
    rows: list[int],
) -> dict[str, dict[str, Any]]:
    """What each kernel that a launch may need takes of a GPU, or why it does not compile; by the kernel's hash."""
    driver.set_active(OfflineDriver(capability))
    found: dict[str, dict[str, Any]] = {}
    with use_configs(config_path):
        for call in make_calls(getattr(torch, dtype_name), everywhere, shapes, rows):
            if call.op not in op_names:
                continue
            about = {"op": call.op, "dtype": dtype_name, "case": call.case}

            def receive(op: str, kernel: Any, about: dict[str, Any] = about) -> None:
                if kernel.hash not in found:
                    found[kernel.hash] = about | {"op": op} | describe(kernel)

            try:
                with compile_only(capability, receive):
                    call.run()
            except Exception as error:  # whatever the compiler raises is reported as a violation
                text = " ".join(f"{type(error).__name__}: {error}".split())
                found[repr(about)] = about | {"kernel": call.op, "error": text}
    return found


@functools.cache
def describe(kernel: Any) -> dict[str, Any]:
    """What a compiled kernel is made of."""
    ptx, products = kernel.asm["ptx"], sorted(set(_MATRIX_PRODUCT.findall(kernel.asm["ttir"])))
    resources = read_resources(kernel.asm["cubin"])
    return {
        "kernel": kernel.metadata.name,
        "num_warps": kernel.metadata.num_warps,
        "registers": resources.registers,
        "spilled_bytes": resources.spilled_bytes,
        "shared_bytes": kernel.metadata.shared,
        "tensor_core_instructions": count_tensor_core_instructions(ptx),
        "products": products,
        "num_waits": ptx.count("griddepcontrol.wait"),
        "acts_before_wait": acts_before_wait(ptx) if kernel.metadata.launch_pdl else [],
        "num_signals": ptx.count("griddepcontrol.launch_dependents"),
        "overlaps_the_kernel_before": kernel.metadata.launch_pdl,
    }


def make_calls(
    dtype: torch.dtype, everywhere: bool, shapes: Sequence[str] = (), rows: Sequence[int] = ()
) -> Iterator[Call]:
    """Every launcher: see `CompileJob` for the shapes, and for the bounds of rows of row ops."""
    for name in shapes:
        yield from _op_calls(dtype, name)
        for max_rows in rows:
            yield from _row_op_calls(dtype, name, max_rows, deterministic=False)
        yield from _row_op_calls(dtype, name, rows[-1], deterministic=True)
    if shapes:
        return
    for name in COMPILED_SHAPES:
        if everywhere or name in FEWER_SHAPES:
            yield from _op_calls(dtype, name)
        if everywhere:
            for max_rows in TUNED_BUCKETS:
                for deterministic in (False, True):
                    yield from _row_op_calls(dtype, name, max_rows, deterministic)
        elif name == DEFAULT_SHAPE:
            for max_rows, deterministic, op_names in _entries(dtype):
                calls = _row_op_calls(dtype, name, max_rows, deterministic)
                yield from (call for call in calls if call.op in op_names)
        elif name in FEWER_SHAPES:
            yield from _row_op_calls(dtype, name, FEW_ROWS, deterministic=False)


def _entries(dtype: torch.dtype) -> Iterator[tuple[int, bool, set[str]]]:
    """Bounds of rows, modes and ops, such that each entry of the table in use is met, at the most rows that have it."""
    op_names: dict[tuple[int, bool], set[str]] = {}
    for op in KEYS:
        for deterministic in (False, True):
            for entry in get_entries(op, torch.device("cpu"), dtype, deterministic):
                met = (entry.max_rows or TUNED_BUCKETS[-1], deterministic)
                op_names.setdefault(met, set()).add(op)
    for (max_rows, deterministic), names in sorted(op_names.items()):
        yield max_rows, deterministic, names


def _op_calls(dtype: torch.dtype, name: str) -> Iterator[Call]:
    backend, shape, draw = get_backend("triton"), SHAPES[name], EmptyDraw(dtype)
    heads, size, is_rms = (shape.num_heads, shape.head_size), shape.hidden_size, shape.norm == "rms"
    kv_heads = shape.num_kv_heads, shape.head_size
    seen: dict[str, Any] = {"num_kv_heads": shape.num_kv_heads, "slopes": shape.alibi, "window": shape.window}
    x, row_ids = draw.normal(8, size), draw.index(*range(4))
    for op, arguments in (
        ("gather_layer_norm", make.gather_layer_norm(draw, x, row_ids) | {"rms": is_rms}),
        ("gather_layer_norm", make.gather_layer_norm(draw, x, None) | {"rms": is_rms}),
        ("scatter_add", {"x": x, "row_ids": row_ids, "y": draw.normal(4, size)}),
        ("kv_store", make.kv_store(draw, *kv_heads, list(range(8)))),
        ("decode_attention", make.decode_attention(draw, *heads, [247] * 4, [0, 1, 2, 3] * 2, **seen)),
        ("prefill_attention", make.prefill_attention(draw, *heads, [2] * 4, strided=True, **seen)),
        ("rotate", make.rotate(draw, draw.normal(8, *heads), shape.rotary_size or None, weight=shape.qk_norm)),
        ("activate", {"x": draw.normal(8, 8 * size), "activation": shape.activation, "gated": shape.gated}),
    ):
        yield Call(op, name, functools.partial(getattr(backend, op), *arguments.values()))
    dtypes = (torch.float64, torch.int64, *[torch.float64] * 2, *[torch.int64] * 3)
    columns = [torch.zeros(4, dtype=dtype) for dtype in dtypes]
    yield Call("choose_tokens", name, functools.partial(choose_tokens, draw.normal(4, shape.vocab_size), *columns))


def _row_op_calls(dtype: torch.dtype, name: str, max_rows: int, deterministic: bool) -> Iterator[Call]:
    row_ops, config = get_row_ops("triton"), SHAPES[name]
    mode = ", deterministic" if deterministic else ""

    # Lists and counts stand in buffers of all layers: those of one layer are aligned, those of the next are not.
    for offset in (0, 1):
        case = f"{name}, {max_rows} rows{mode}{MISALIGNED if offset else ''}"
        draw = EmptyDraw(dtype, offset)
        rows = RowArguments(draw, draw_rows(draw, max_rows, max_rows))
        for part in parts_of(config):
            op = MATRIX_OPS.get(part, part)
            arguments = rows.of_decoder(part, config, num_keys=1, max_context_len=config.max_positions)
            workspace = make_workspace(row_ops, arguments)
            yield Call(op, case, bind(row_ops, op, arguments, workspace, deterministic))


if __name__ == "__main__":
    assert not triton.knobs.runtime.interpret, "the interpreter has nothing to compile"
    print(json.dumps([compile_all(**job) for job in json.loads(sys.argv[1])]))
