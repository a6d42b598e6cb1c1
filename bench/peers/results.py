"""The rows of one shape on one machine: written one by one as they are measured, and read again to go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What must be equal for rows of two runs to stand in one file.
_SAME = ("machine", "commit", "shape", "rounds", "budget_s", "requests", "mix")
Row = dict[str, Any]


def key_of(row: Row) -> tuple[Any, ...]:
    """What a row is about."""
    return tuple(row.get(name) for name in ("peer", "what", "batch", "prompt_len"))


class Results:
    """A JSON-lines file: the conditions, then rows. A row that failed may be followed by another of the same key."""

    def __init__(self, path: Path, conditions: Row) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            found, self.rows = read(path)
            different = [name for name in _SAME if found.get(name) != conditions.get(name)]
            if different:
                old, new = ({name: each.get(name) for name in different} for each in (found, conditions))
                raise ValueError(
                    f"peers: {path} must be of this state to go on with it, got {old} instead of {new}. "
                    "Begin anew with --fresh, or write to another folder with --out."
                )
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(conditions) + "\n", encoding="utf-8")

    def add(self, row: Row) -> None:
        """Write ``row``, and print it."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = (f"{name} {value}" for name, value in row.items() if not isinstance(value, list | dict))
        print(", ".join(shown), flush=True)

    def has(self, **about: Any) -> bool:
        """True where such a row was measured; one that failed is tried again."""
        return key_of(about) in {key_of(row) for row in self.rows if "error" not in row}

    def failed(self, peer: str) -> bool:
        """True where the last row of something about ``peer`` is a failure."""
        return any("error" in row for row in {key_of(row): row for row in self.rows if row["peer"] == peer}.values())


def read(path: Path) -> tuple[Row, list[Row]]:
    """The conditions, and of each key the last row."""
    conditions, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return conditions, list({key_of(row): row for row in rows}.values())
