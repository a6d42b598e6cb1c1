"""`WorkItem`, one piece of a sweep as plain data, and `ItemStore`, which keeps finished ones through any kill."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
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

    @property
    def kind(self) -> tuple[str, str, str, bool]:
        """What items have in common that should take equally long: all but shard, seed and options."""
        return self.task, self.checkpoint, self.path, self.seed == 0

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


class ItemStore:
    """The results of finished items in ``path``, and the right to add more.

    A line counts once its newline is written. What follows the last newline is the work of a writer that was killed: it
    is cut off, and its item is missing, so that it is done again. One process at a time may hold a store open.

    Raises: ValueError for a damaged line, RuntimeError where another process holds the store.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[str, dict[str, Any]] = {}
        self._seconds: defaultdict[tuple[Any, ...], list[float]] = defaultdict(list)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ItemStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; results stay readable."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __contains__(self, item: WorkItem) -> bool:
        return item.key in self._lines

    def __len__(self) -> int:
        return len(self._lines)

    def result(self, item: WorkItem) -> dict[str, Any]:
        """What the item gave."""
        result: dict[str, Any] = self._lines[item.key]["result"]
        return result

    def column(self, items: Iterable[WorkItem], name: str) -> list[Any]:
        """What the shards of one split gave under ``name``, row by row, in the order of the split."""
        return [value for item in sorted(items, key=lambda item: item.shard) for value in self.result(item)[name]]

    @property
    def total_seconds(self) -> float:
        """How long all items took, one after another."""
        return sum(float(line["seconds"]) for line in self._lines.values())

    def seconds_like(self, item: WorkItem) -> float | None:
        """How long finished items like ``item`` took, those of other shards and seeds; None without any."""
        found = self._seconds.get(item.kind)
        return sum(found) / len(found) if found else None

    def missing(self, items: Iterable[WorkItem]) -> list[WorkItem]:
        """The items without a result, in order, each once."""
        return [item for item in dict.fromkeys(items) if item not in self]

    def add(self, item: WorkItem, result: dict[str, Any], seconds: float) -> None:
        """Append the result of ``item``, on the disk when this returns.

        Raises OSError where it cannot be written, a full disk for one; the file is then as it was before.
        """
        if self._file < 0:
            raise ValueError("ItemStore.add: the store must be open, got a closed one.")
        if item in self:
            raise ValueError(f"ItemStore.add: the item must be new, got one that has a result: {item}.")
        entry = {"key": item.key, "item": item.to_dict(), "result": result, "seconds": round(seconds, 3)}
        line = json.dumps(entry, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        before = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, before)
            raise OSError(
                error.errno,
                f"ItemStore.add: {self.path} must take {len(line)} bytes more, got: {error.strerror}. "
                "Finished items are safe; make room and start the same command again",
            ) from error
        self._keep(item, entry)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"ItemStore: {self.path} must belong to one process at a time, got a second one. "
                "Wait for the other, or name another folder."
            ) from None

    def _read(self) -> None:
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.ftruncate(self._file, end)
        for number, line in enumerate(content[:end].splitlines(), start=1):
            try:
                entry = json.loads(line)
                item = WorkItem.from_dict(entry["item"])
                sound = item.key == entry["key"] and isinstance(entry["result"], dict) and entry["seconds"] >= 0
            except (ValueError, TypeError, KeyError):
                sound = False
            if not sound:
                raise ValueError(
                    f"ItemStore: {self.path} must hold a finished item in each line, got a damaged line {number}. "
                    "Remove that line; its item is then done again."
                )
            if item not in self:
                self._keep(item, entry)

    def _keep(self, item: WorkItem, entry: dict[str, Any]) -> None:
        self._lines[item.key] = entry
        self._seconds[item.kind].append(float(entry["seconds"]))
