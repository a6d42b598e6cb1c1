"""The tensors that a task's op runs on, and whether it computes right on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dynskip.kernels.row_list import RowList, RowNorm
from dynskip.ops.row_ops import RowOps
from dynskip.tuning.tasks import Task
from dynskip.validation.tensors import Arguments, Case
from dynskip.validation.validate_rows import validate_row_case

_NUM_UNLISTED = 2


class Workload:
    """The arguments of a task's launches, one for each layer's worth, on a device."""

    def __init__(self, task: Task, ops: RowOps, device: torch.device, empty: bool = False) -> None:
        """empty: tensors hold whatever they hold, and there is one layer's worth: for compiling only."""
        self.task = task
        self.ops = ops
        self.layers: list[Arguments] = list(_Maker(task, device, empty).layers(1 if empty else task.num_copies))

    def launch(self) -> None:
        """Launches every layer's worth once, with the constants that are in place."""
        self.launch_with(self.make_workspace())

    def launch_with(self, workspace: Any) -> None:
        """The same with a workspace made before: nothing is allocated."""
        op = getattr(self.ops, self.task.op)
        for arguments in self.layers:
            op(*({**arguments, "workspace": workspace} if "workspace" in arguments else arguments).values())

    def make_workspace(self) -> Any:
        """A workspace for the constants that are in place; None for an op without one."""
        task, arguments = self.task, self.layers[0]
        if "workspace" not in arguments:
            return None
        config = task.config
        return self.ops.workspace(
            max_rows=task.max_rows + _NUM_UNLISTED,
            num_heads=config.num_heads,
            head_size=config.head_size,
            sizes=[task.matrix or (16, 16)],
            max_context_len=task.context_len,
            device=arguments["rows"].ids.device,
        )

    def complaint(self) -> str | None:
        """What is wrong with the results of the constants that are in place; None if nothing is."""
        result = validate_row_case(self.ops, self.task.dtype, Case(self.task.op, str(self.task), self.layers[0]))
        if result.passed:
            return None
        return result.complaint or f"its error is {result.max_error:.1e}, allowed is {result.allowed_error:.1e}"


class _Maker:
    """Random tensors for the arguments of an op; rows that are not listed hold NaN."""

    def __init__(self, task: Task, device: torch.device, empty: bool) -> None:
        self.task = task
        self.device = device
        self.empty = empty
        self.generator = torch.Generator(device).manual_seed(0)
        self.num_rows = task.max_rows + _NUM_UNLISTED
        order = torch.randperm(self.num_rows, generator=self.generator, device=device)
        self.rows = RowList(order.int(), self.integers(task.max_rows), task.max_rows)
        self.listed = order[: task.max_rows]

    def layers(self, num_layers: int) -> Iterator[Arguments]:
        """The arguments of as many launches: what a layer owns is its own, the rest is shared."""
        shared = getattr(self, f"_{self.task.op}_buffers")()
        for _ in range(num_layers):
            owned = getattr(self, f"_{self.task.op}_layer")()
            # In the order of the op's arguments, in which row ops are called.
            yield {name: owned.get(name, buffer) for name, buffer in shared.items()}

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.task.dtype
        if self.empty:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randn(shape, generator=self.generator, dtype=dtype, device=self.device).mul_(scale)

    def integers(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def input(self, width: int) -> Tensor:
        """`[M, width]`: normal in listed rows, NaN in the others."""
        x = self.output(width)
        x[self.listed] = self.normal(self.task.max_rows, width)
        return x

    def output(self, width: int) -> Tensor:
        return torch.full((self.num_rows, width), float("nan"), dtype=self.task.dtype, device=self.device)

    def norm(self, width: int) -> RowNorm:
        return RowNorm(self.normal(width), self.normal(width), 1e-5)

    def _weights(self) -> Arguments:
        assert self.task.matrix is not None, "an op with weights has a matrix"
        num_columns, depth = self.task.matrix
        return {"weight": self.normal(num_columns, depth, scale=depth**-0.5), "bias": self.normal(num_columns)}

    def _linear_rows_buffers(self) -> Arguments:
        assert self.task.matrix is not None, "an op with weights has a matrix"
        num_columns, depth = self.task.matrix
        is_head = self.task.part == "head"
        return {
            "x": self.input(depth),
            "rows": self.rows,
            "norm": self.norm(depth),
            "weight": None,
            "bias": None,
            "relu": not is_head,
            "out": self.output(num_columns),
            "normed": self.output(depth),
        }

    def _linear_rows_layer(self) -> Arguments:
        weights = self._weights()
        return {**weights, "bias": None} if self.task.part == "head" else weights

    def _qkv_rows_buffers(self) -> Arguments:
        config = self.task.config
        size, heads = config.hidden_size, (config.num_heads, config.head_size)
        return {
            "x": self.input(size),
            "rows": self.rows,
            "num_run": self.rows.num,
            "norm": self.norm(size),
            "weight": None,
            "bias": None,
            "q": self.output(size),
            "k_cache": self.output(size).view(-1, *heads),
            "v_cache": self.output(size).view(-1, *heads),
            "slots": self.rows.ids.flip(0).contiguous(),
            "normed": self.output(size),
        }

    _qkv_rows_layer = _weights

    def _linear_add_rows_buffers(self) -> Arguments:
        assert self.task.matrix is not None, "an op with weights has a matrix"
        num_columns, depth = self.task.matrix
        return {
            "x": self.input(depth),
            "rows": self.rows,
            "weight": None,
            "bias": None,
            "residual": self.input(num_columns),
            "workspace": None,
        }

    _linear_add_rows_layer = _weights

    def _attend_rows_buffers(self) -> Arguments:
        task, size = self.task, self.task.config.hidden_size
        num_slots = task.max_rows * task.context_len
        slots = torch.randperm(num_slots, generator=self.generator, device=self.device).int()
        slot_table = torch.full((self.num_rows, task.context_len), -1, dtype=torch.int32, device=self.device)
        slot_table[self.listed] = slots.view(task.max_rows, task.context_len)
        return {
            "q": self.input(size),
            "rows": self.rows,
            "k_cache": None,
            "v_cache": None,
            "slot_table": slot_table,
            "seq_ids": torch.arange(self.num_rows, dtype=torch.int32, device=self.device),
            "key_limits": torch.full_like(self.rows.ids, task.context_len),
            "scale": task.config.head_size**-0.5,
            "out": self.output(size),
            "workspace": None,
        }

    def _attend_rows_layer(self) -> Arguments:
        task, config = self.task, self.task.config
        shape = (task.max_rows * task.context_len, config.num_heads, config.head_size)
        return {"k_cache": self.normal(*shape), "v_cache": self.normal(*shape)}

    def _norm_rows_buffers(self) -> Arguments:
        size = self.task.config.hidden_size
        return {"x": self.input(size), "rows": self.rows, "norm": self.norm(size), "out": self.output(size)}

    def _norm_rows_layer(self) -> Arguments:
        return {"norm": self.norm(self.task.config.hidden_size)}

    def _embed_rows_buffers(self) -> Arguments:
        config = self.task.config
        ids = torch.arange(self.num_rows, device=self.device)
        return {
            "token_ids": ids * 97 % config.vocab_size,
            "position_ids": ids,
            "rows": self.rows,
            "token_table": self.normal(config.vocab_size, config.hidden_size),
            "position_table": self.normal(self.num_rows + 2, config.hidden_size),
            "position_offset": 2,
            "out": self.output(config.hidden_size),
        }

    def _embed_rows_layer(self) -> Arguments:
        return {}

    def _gate_rows_buffers(self) -> Arguments:
        active = torch.zeros(self.num_rows, dtype=torch.bool, device=self.device)
        size = self.task.config.hidden_size
        return {"x": self.input(size), "rows": self.rows, "weight": None, "bias": None, "active": active}

    def _gate_rows_layer(self) -> Arguments:
        size = self.task.config.hidden_size
        return {"weight": self.normal(2, size, dtype=torch.float32), "bias": self.normal(2, dtype=torch.float32)}
