"""The process that compiles kernels for a GPU that need not be there: see `offline_compile`, which starts it.

The launchers themselves are called, on CPU tensors of OPT's shapes that nothing reads, and each launch becomes a
compilation: so what is compiled has the constants and the alignment hints of a real run. Triton's interpreter must be
off here: python -m dynskip.offline_worker '{"capability": 90, ...}' prints a JSON list, one object a kernel.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dynskip.backends import get_backend
from dynskip.cubin import read_resources
from dynskip.kernels.launches import compile_only

_MATRIX_PRODUCT = re.compile(r"tt\.dot .*: tensor<[\dx]+x(\w+)>")


class Shape(NamedTuple):
    """The shape of a model."""

    name: str
    hidden_size: int
    num_heads: int


# The smallest, the benchmarked one, the one whose heads fill no power of two, one of wider heads, the widest.
SHAPES = (
    Shape("125m", 768, 12),
    Shape("1.3b", 2048, 32),
    Shape("2.7b", 2560, 32),
    Shape("6.7b", 4096, 32),
    Shape("66b", 9216, 72),
)


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


def compile_all(capability: int, dtype_names: list[str], op_names: list[str]) -> list[dict[str, Any]]:
    """What each kernel that a launch may need takes of a GPU, or why it does not compile."""
    driver.set_active(OfflineDriver(capability))
    found: dict[str, dict[str, Any]] = {}
    for dtype_name in dtype_names:
        for call in make_calls(getattr(torch, dtype_name)):
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
    return list(found.values())


def describe(kernel: Any) -> dict[str, Any]:
    """What a compiled kernel is made of."""
    resources = read_resources(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    return {
        "kernel": kernel.metadata.name,
        "registers": resources.registers,
        "spilled_bytes": resources.spilled_bytes,
        "shared_bytes": kernel.metadata.shared,
        "tensor_core_instructions": resources.tensor_core_instructions,
        "products": sorted(set(_MATRIX_PRODUCT.findall(kernel.asm["ttir"]))),
        "num_waits": ptx.count("griddepcontrol.wait"),
        "num_signals": ptx.count("griddepcontrol.launch_dependents"),
        "overlaps_the_kernel_before": kernel.metadata.launch_pdl,
    }


def make_calls(dtype: torch.dtype) -> Iterator[Call]:
    """Every launcher with the shapes of OPT."""
    for shape in SHAPES:
        yield from _op_calls(dtype, shape)


def _op_calls(dtype: torch.dtype, shape: Shape) -> Iterator[Call]:
    backend = get_backend("triton")
    floats = functools.partial(torch.empty, dtype=dtype)
    size, head_size = shape.hidden_size, shape.hidden_size // shape.num_heads
    x, y, parameter = floats(8, size), floats(4, size), floats(size)
    qkv: Tensor = floats(8, 3, shape.num_heads, head_size)
    q, k, v = qkv.unbind(1)
    cache = floats(64, shape.num_heads, head_size)
    scale = head_size**-0.5

    def call(op: str, *args: object) -> Call:
        return Call(op, f"OPT-{shape.name}", functools.partial(getattr(backend, op), *args))

    yield call("gather_layer_norm", x, _index(4), parameter, parameter, 1e-5)
    yield call("gather_layer_norm", x, None, parameter, parameter, 1e-5)
    yield call("scatter_add", x, _index(4), y)
    yield call("kv_store", k, v, cache, cache, _index(8))
    yield call("decode_attention", q, cache, cache, _index(4, 256), _index(8), _index(8), scale)
    yield call("prefill_attention", q, k, v, _index(5), _index(5), _index(8), scale)


def _index(*sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=torch.int32)


if __name__ == "__main__":
    assert not triton.knobs.runtime.interpret, "the interpreter has nothing to compile"
    print(json.dumps(compile_all(**json.loads(sys.argv[1]))))
