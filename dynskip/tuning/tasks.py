"""What is tuned: an op, on one matrix if it multiplies by one, with so many rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dynskip.models.config import DecoderConfig
from dynskip.validation.op_arguments import MATRIX_OPS, OTHER_OPS, parts_of

TUNED_OPS = (*dict.fromkeys(MATRIX_OPS.values()), *OTHER_OPS)
# `TUNED_BUCKETS`: what matters most comes first, since time may run out.
BUCKETS_BY_WEIGHT = (1, 16, 64, 256, 8, 4, 32, 128, 2)

_MAX_COPIES = 24
_MAX_COPY_BYTES = 8 * 2**30


@dataclass(frozen=True)
class Task:
    """An op, and what it is launched with. part: the matrix, or the op again. context_len: of each row's sequence."""

    op: str
    part: str
    max_rows: int
    dtype_name: str
    config: DecoderConfig
    context_len: int = 1024

    def __str__(self) -> str:
        return f"{self.op} {self.part}, {self.max_rows} rows" if self.matrix else f"{self.op}, {self.max_rows} rows"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        dtype = getattr(torch, self.dtype_name)
        assert isinstance(dtype, torch.dtype), "dtype_name is the name of a torch dtype"
        return dtype

    @property
    def matrix(self) -> tuple[int, int] | None:
        """N and K, where the op multiplies by a matrix."""
        return {**self.config.layer_matrices, "head": self.config.head_matrix}.get(self.part)

    @property
    def num_bytes(self) -> int:
        """What a launch reads that differs from layer to layer: weights, or keys and values; else its rows."""
        size = self.config.hidden_size
        if self.matrix is not None:
            num_items = self.matrix[0] * self.matrix[1]
        elif self.op == "attend_rows":
            num_items = self.max_rows * self.context_len * self.config.kv_entry_size
        else:
            num_items = 2 * self.max_rows * size
        return num_items * self.dtype.itemsize

    @property
    def num_copies(self) -> int:
        """How many layers' worth of it are run in turn, so that no cache holds what the next launch reads."""
        return max(1, min(_MAX_COPIES, self.config.num_layers, _MAX_COPY_BYTES // self.num_bytes))


def plan_tasks(
    config: DecoderConfig,
    rows: Sequence[int] = BUCKETS_BY_WEIGHT,
    ops: Sequence[str] = TUNED_OPS,
    dtype: str = "bfloat16",
) -> list[Task]:
    """The tasks of a model, those that matter most first; ops that its steps do not launch are left out.

    rows: the row counts, in order of importance. Raises: ValueError for an op that is not tuned, rows < 1, or where
    nothing is left.
    """
    for op in ops:
        if op not in TUNED_OPS:
            raise ValueError(f"plan_tasks: ops must be among {', '.join(TUNED_OPS)}, got {op!r}. Choose one of these.")
    if not rows or min(rows) < 1:
        raise ValueError(f"plan_tasks: rows must be at least 1, got {list(rows)}. Name row counts of a step.")
    if not any(MATRIX_OPS.get(part, part) in ops for part in parts_of(config)):
        raise ValueError(f"plan_tasks: ops must hold one that the model launches, got {list(ops)}. Name another.")
    parts = [(part, MATRIX_OPS.get(part, part)) for part in parts_of(config)]
    return [
        Task(op, part, max_rows, dtype, config) for max_rows in dict.fromkeys(rows) for part, op in parts if op in ops
    ]
