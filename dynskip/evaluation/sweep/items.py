"""`WorkItem`: one piece of a sweep, as plain data with a key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

Option = str | int | float


@dataclass(frozen=True, slots=True)
class WorkItem:
    """What one piece of work depends on; equal items give equal results, whoever asks for them.

    task: the name of the function that does it. checkpoint: the hash of the weights.
    path: the layer paths, or the controller, as text. data: the hash of the data file. split: "train", "validation",
    "test". seed: what is drawn with; 0 where nothing is. shard: which prompts of the split.
    options: what else a task needs to know, as sorted pairs.
    """

    task: str
    checkpoint: str
    path: str
    data: str
    split: str
    seed: int
    shard: int
    options: tuple[tuple[str, Option], ...] = ()

    def __post_init__(self) -> None:
        if list(self.options) != sorted(self.options):
            raise ValueError(f"WorkItem: options must be sorted by name, got {self.options}. Use sorted(...).")

    @property
    def key(self) -> str:
        """The SHA-256 of the item's content: the same in every process and on every machine."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The item as JSON holds it."""
        return dataclasses.asdict(self) | {"options": dict(self.options)}

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> WorkItem:
        """The item that :meth:`to_dict` wrote."""
        return WorkItem(**{**fields, "options": tuple(sorted(fields["options"].items()))})

    def option(self, name: str) -> Option:
        """The option called ``name``; KeyError where the item has none."""
        return dict(self.options)[name]
