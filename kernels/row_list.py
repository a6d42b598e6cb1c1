"""What the kernels of a decode step are told: which rows, which LayerNorm, and where to put what they hand over."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowList(NamedTuple):
    """Rows of `[M, ...]` buffers that a kernel works on; their number is known on the device only.

    ids: `[M], int32`, contiguous; the first `num[0]` are the rows, distinct; behind them stands -1, up to `max_rows`:
    kernels find the end of the list there. num: `[1], int32`: kernels take it as a hint only, before it is up to date.
    max_rows: what the host knows: num[0] <= max_rows <= M. It sizes the grid, and as much of the list is read.
    """

    ids: Tensor
    num: Tensor
    max_rows: int


class RowNorm(NamedTuple):
    """A LayerNorm: weight and bias, `[C]` or None, and what is added to the variance."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Workspace(NamedTuple):
    """What programs of one kernel hand to each other; a kernel needs nothing of it from the kernel before.

    partials: `[X], float32`, undefined. counters: `[Y], int32`, zero before and after each kernel.
    """

    partials: Tensor
    counters: Tensor
