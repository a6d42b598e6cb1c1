"""The tensors that a task's op runs on, and whether it computes right on them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from dynskip.ops.row_ops import RowOps
from dynskip.tuning.tasks import Task
from dynskip.validation.op_arguments import RowArguments, bind, draw_rows, make_workspace
from dynskip.validation.tensors import Arguments, Case, EmptyDraw, PlainDraw, map_tensors
from dynskip.validation.validate import validate_row_case

_NUM_UNLISTED = 2


class Workload:
    """The arguments of a task's launches, one for each layer's worth, on a device."""

    def __init__(self, task: Task, ops: RowOps, device: torch.device, empty: bool = False) -> None:
        """empty: tensors hold whatever they hold, and there is one layer's worth: for compiling only."""
        self.task = task
        self.ops = ops
        draw = EmptyDraw(task.dtype, device=device) if empty else PlainDraw(task.dtype, device)
        rows = draw_rows(draw, task.max_rows, task.max_rows + _NUM_UNLISTED, task.max_rows, shuffled=True)
        first = RowArguments(draw, rows).of_decoder(task.part, task.config, task.context_len, task.context_len)
        # What a layer reads and no other does, with values of its own.
        owned = ("k_cache", "v_cache") if task.op == "attend_rows" else ("norm", "weight", "bias")
        self.layers: list[Arguments] = [first]
        for layer in range(1, 1 if empty else task.num_copies):
            rolled = partial(torch.roll, shifts=layer, dims=-1)
            self.layers.append(first | {name: map_tensors(rolled, first[name]) for name in owned if name in first})

    def launch(self) -> None:
        """Launches every layer's worth once, with the constants that are in place."""
        self.launch_with(self.make_workspace())

    def launch_with(self, workspace: Any) -> None:
        """The same with a workspace made before: nothing is allocated."""
        for arguments in self.layers:
            bind(self.ops, self.task.op, arguments, workspace)()

    def make_workspace(self) -> Any:
        """A workspace for the constants that are in place; None for an op without one."""
        return make_workspace(self.ops, self.layers[0])

    def complaint(self) -> str | None:
        """What is wrong with the results of the constants that are in place; None if nothing is."""
        case = Case(self.task.op, str(self.task), self.layers[0])
        return validate_row_case(self.ops, self.task.dtype, case).failure
