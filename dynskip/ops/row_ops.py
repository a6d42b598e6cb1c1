"""The sets of launchers that a fused decode step is made of, one per implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from dynskip.ops import native, row_reference


@dataclass(frozen=True)
class RowOps:
    """The parts of a decode step over lists of rows; `dynskip.ops.row_reference` specifies each. They check nothing."""

    name: str
    embed_rows: Callable[..., None]
    norm_rows: Callable[..., None]
    linear_rows: Callable[..., None]
    qkv_rows: Callable[..., None]
    rotate_rows: Callable[..., None]
    place_rows: Callable[..., None]
    attend_rows: Callable[..., None]
    linear_add_rows: Callable[..., None]
    gate_rows: Callable[..., None]
    plan_rows: Callable[..., None]
    workspace: Callable[..., Any]


ROW_OP_NAMES = tuple(field.name for field in fields(RowOps) if field.name not in ("name", "workspace"))


def why_not_triton(device: torch.device) -> str | None:
    """Why the row ops called "triton" cannot run on ``device``, where Triton itself can; None where they can."""
    if device.type != "cuda" or native.unavailable_reason() is not None:
        return native.unavailable_reason()
    return None if native.has_cuda() else native.CUDA_MISSING


def get_row_ops(name: str) -> RowOps:
    """The row ops called `name`: "triton" for the kernels, "reference" for the specification, on any device.

    Raises: ValueError for an unknown name; ImportError or RuntimeError where a part of "triton" cannot be loaded.
    """
    if name == "reference":
        launchers: dict[str, Any] = {op: getattr(row_reference, op) for op in ROW_OP_NAMES}
        return RowOps(name, workspace=lambda **sizes: None, **launchers)
    if name == "triton":
        return _load_triton()
    raise ValueError(f"get_row_ops: name must be 'triton' or 'reference', got {name!r}. Choose one of these.")


def _load_triton() -> RowOps:
    from dynskip.kernels.attend_rows import attend_rows
    from dynskip.kernels.embed_rows import embed_rows
    from dynskip.kernels.gate_rows import gate_rows
    from dynskip.kernels.linear_add_rows import linear_add_rows
    from dynskip.kernels.linear_rows import linear_rows, qkv_rows
    from dynskip.kernels.norm_rows import norm_rows
    from dynskip.kernels.place_rows import place_rows
    from dynskip.kernels.rotate_rows import rotate_rows
    from dynskip.kernels.workspace import make_workspace

    return RowOps(
        "triton",
        embed_rows,
        norm_rows,
        linear_rows,
        qkv_rows,
        rotate_rows,
        place_rows,
        attend_rows,
        linear_add_rows,
        gate_rows,
        native.plan_rows,
        make_workspace,
    )
