"""A device's table of constants: one candidate alone, to try it; and all that was found, to keep it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynskip.files import write_text
from dynskip.kernels.configs import DEFAULT, FOLDER, Table, read_table
from dynskip.tuning.space import Constants
from dynskip.tuning.tasks import Task


def candidate_table(task: Task, constants: Constants) -> Table:
    """A table in which `task` runs with `constants`, whatever its shape and rows."""
    entry = {"max_rows": None, **constants}
    return _table(None, None, None, {task.op: {str(task.dtype.itemsize): [entry]}})


def merge(
    before: Table | None,
    device: str,
    capability: int,
    measured: dict[str, Any],
    found: dict[Task, tuple[Constants, dict[str, float]]],
) -> Table:
    """The table `before` with what was found: constants, and the figures measured with them.

    Entries for other matrices stay. Those for any matrix are the default's.
    """
    ops: dict[str, dict[str, Any]] = {op: dict(groups) for op, groups in (before or {"ops": {}})["ops"].items()}
    defaults = json.loads((FOLDER / f"{DEFAULT}.json").read_text(encoding="utf-8"))["ops"]
    for task, (constants, figures) in found.items():
        itemsize = str(task.dtype.itemsize)
        group = ops.setdefault(task.op, {}).setdefault(itemsize, defaults[task.op][itemsize])
        entry: dict[str, Any] = {"max_rows": task.max_rows}
        if task.matrix is not None:
            entry["shape"] = list(task.matrix)
        kept = [other for other in group if _place(other) != _place(entry)]
        ops[task.op][itemsize] = sorted([*kept, {**entry, **constants, "measured": figures}], key=_order)
    return _table(device, capability, measured, ops)


def write_table(path: Path, table: Table) -> None:
    """Puts `table` into the file at `path`, all of it or nothing. Raises: ValueError for one that cannot be read."""
    read_table(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, format_table(table))


def format_table(table: Table) -> str:
    """The table as JSON, an entry a line, so that a change of it can be read."""
    lines = [f"  {json.dumps(key)}: {json.dumps(table[key])},\n" for key in ("device", "capability", "measured")]
    return "{\n" + "".join(lines) + f'  "ops": {_broken(table["ops"], 3, "  ")}\n}}\n'


def _broken(value: Any, depth: int, indent: str) -> str:
    """JSON in which lists and objects down to `depth` have a line for each of their entries."""
    if depth == 0:
        return json.dumps(value)
    pairs = value.items() if isinstance(value, dict) else ((None, entry) for entry in value)
    parts = [(_broken(entry, depth - 1, f"{indent}  "), name) for name, entry in pairs]
    entries = ",\n".join(f"{indent}  {part if name is None else f'{json.dumps(name)}: {part}'}" for part, name in parts)
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{entries}\n{indent}{closing}" if entries else f"{opening}\n{indent}{closing}"


def _table(device: str | None, capability: int | None, measured: dict[str, Any] | None, ops: dict[str, Any]) -> Table:
    return {"device": device, "capability": capability, "measured": measured, "ops": ops}


def _place(entry: dict[str, Any]) -> tuple[Any, Any]:
    """What an entry is for."""
    shape = entry.get("shape")
    return entry["max_rows"], None if shape is None else tuple(shape)


def _order(entry: dict[str, Any]) -> tuple[bool, tuple[int, ...], float]:
    max_rows, shape = _place(entry)
    return shape is None, shape or (), float("inf") if max_rows is None else max_rows
