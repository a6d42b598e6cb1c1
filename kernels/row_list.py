"""What the kernels of a decode step are told: which rows, which LayerNorm, and where to put what they hand over."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Row counts that kernels are launched and graphs captured for. A count between two of them takes the larger one.
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# Those with constants of their own; with more rows kernels have the constants of the last.
TUNED_BUCKETS = ROW_BUCKETS[:9]


def row_bucket(num_rows: int) -> int:
    """The smallest bucket that holds ``num_rows`` rows; 0 for none."""
    if num_rows == 0:
        return 0
    for bucket in ROW_BUCKETS:
        if num_rows <= bucket:
            return bucket
    raise ValueError(f"row_bucket: num_rows must be at most {ROW_BUCKETS[-1]}, got {num_rows}. Split the batch.")


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
    """A LayerNorm, or with `rms` an RMSNorm: weight and bias, `[C]` or None, and what is added to the variance."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool = False


class Workspace(NamedTuple):
    """What programs of one kernel hand to each other; a kernel needs nothing of it from the kernel before.

    partials: `[X], float32`, undefined. counters: `[Y], int32`, zero before and after each kernel.
    """

    partials: Tensor
    counters: Tensor
