"""Microbenchmarks of Linear at OPT-1.3B's shapes: `pytest bench/test_linear.py`.

Every call takes the next of several equal matrices, so that none is found in a cache. The extra columns are the
bandwidth at which the matrix was read and the arithmetic that this makes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dynskip.models.linear import NATIVE_ROWS, Linear

SHAPES = {"out_proj": (2048, 2048), "fc1": (8192, 2048), "fc2": (2048, 8192)}
NUM_ROWS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 2048]
CACHE_BYTES = 200e6


def dense(linear: Linear, x: Tensor) -> Tensor:
    return functional.linear(x, linear.dense_weight(), linear.bias)


def onednn(linear: Linear, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, linear._packed_weight, linear.bias, "none", [], "")


def packed(linear: Linear, x: Tensor) -> Tensor:
    return linear(x)


def deterministic(linear: Linear, x: Tensor) -> Tensor:
    return linear(x, deterministic=True)


@pytest.mark.parametrize("way", [dense, onednn, packed, deterministic], ids=lambda way: way.__name__)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_linear(benchmark: Any, name: str, num_rows: int, way: Callable[[Linear, Tensor], Tensor]) -> None:
    if way is packed and num_rows > NATIVE_ROWS:
        pytest.skip(f"above {NATIVE_ROWS} rows Linear is oneDNN's product")
    out_features, in_features = SHAPES[name]
    weight_bytes = out_features * in_features * 2
    linears = []
    for _ in range(max(2, round(CACHE_BYTES / weight_bytes))):
        weight = torch.randn(out_features, in_features).bfloat16()
        linears.append(Linear.of(weight, torch.randn(out_features).bfloat16()))
    x = torch.randn(num_rows, in_features).bfloat16()
    exact = functional.linear(x.double(), linears[0].dense_weight().double(), linears[0].state_dict()["bias"].double())
    if way is not dense:
        for linear in linears:
            linear.pack_()
    if way is packed and linears[0].native_rows == 0:
        pytest.skip("needs the C++ extension and AVX-512 BF16")
    error = (way(linears[0], x).double() - exact).abs().max()
    assert error <= torch.finfo(torch.bfloat16).eps * exact.abs().max(), "a wrong result has no time"
    turns = itertools.cycle(linears)
    benchmark.group = f"{name} [{out_features}, {in_features}], {num_rows} rows"
    benchmark(lambda: way(next(turns), x))
    seconds = benchmark.stats.stats.min
    benchmark.extra_info["bandwidth_gbps"] = round(weight_bytes / seconds / 1e9, 1)
    benchmark.extra_info["gflops"] = round(2 * num_rows * out_features * in_features / seconds / 1e9, 1)
