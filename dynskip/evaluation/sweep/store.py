"""`WorkItem`, one piece of a sweep as plain data, and `ItemStore`, which keeps finished ones through any kill."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dynskip.evaluation.sweep.item_files import LineFile, LineReader, Writer, damaged, encoded, split_token_ids
from dynskip.evaluation.sweep.place import Place

Option = str | int | float
Kind = tuple[str, str, str, bool]
_MOST_KEPT = 512
# Tasks that do each path of an item for itself, whichever others it is done with: their results name it.
BY_PATH = frozenset(("generate", "likelihood", "states"))


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
        return _digest(self.to_dict()).hex()

    def along(self, paths: Iterable[str]) -> WorkItem:
        """The same along others, or some, of its paths."""
        return dataclasses.replace(self, path=" ".join(paths))

    @property
    def kind(self) -> Kind:
        """What items have in common that should take equally long: all but shard, seed and options."""
        return self.task, self.checkpoint, self.path, self.seed == 0

    def to_dict(self) -> dict[str, Any]:
        """The item as JSON holds it."""
        return {
            "task": self.task,
            "checkpoint": self.checkpoint,
            "path": self.path,
            "data": self.data,
            "split": self.split,
            "seed": self.seed,
            "shard": self.shard,
            "options": dict(self.options),
        }

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> WorkItem:
        """The item that :meth:`to_dict` wrote."""
        return WorkItem(**{**fields, "options": tuple(sorted(fields["options"].items()))})

    def option(self, name: str) -> Option:
        """The option called ``name``; KeyError where the item has none."""
        return dict(self.options)[name]


def _digest(fields: dict[str, Any]) -> bytes:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


class _Entry(NamedTuple):
    """Where the line of an item lies, and what is asked of it without reading it. ended: seconds since 1970."""

    path: Path
    offset: int
    size: int
    seconds: float
    ended: float
    place: Place


class ItemStore:
    """The results of finished items in ``folder``, of all processes that write there, and the right to add more.

    Each process appends to a file of its own; the store is their union, and of two results of one item the earlier
    counts. The file ``folder.jsonl`` beside it, where older versions kept all items, belongs to the union as well. A
    line counts once its newline is written. What follows the last newline of a file is the work of a writer that was
    killed: its item is missing, so that it is done again.

    Paths of a `BY_PATH` item may lie in several lines, each done along some of them: what asks for more paths of the
    same prompts has those done that are missing.

    In memory is where each line lies; a result is read when it is asked for.

    Raises ValueError for a damaged line, here or where it is read.
    """

    def __init__(self, folder: Path) -> None:
        if folder.is_file():
            raise ValueError(
                f"ItemStore: folder must be a folder, got the file {folder}. Leave its suffix out: it is read as well."
            )
        self.folder = folder
        self._entries: dict[bytes, _Entry] = {}
        self._files: dict[Path, LineFile] = {}
        self._places: dict[Place, Place] = {}  # one object for all items that were done there
        self._num_by_task: Counter[tuple[str, Place]] = Counter()
        self._seconds: defaultdict[Kind, list[float]] = defaultdict(lambda: [0.0, 0.0])
        # Of each `BY_PATH` item without its paths: the key of the line that each path is in.
        self._by_path: defaultdict[bytes, dict[str, bytes]] = defaultdict(dict)
        self._results: OrderedDict[bytes, dict[str, Any]] = OrderedDict()
        self._reader = LineReader()
        self._writer: Writer | None = Writer(folder)
        self._own = self._writer.path()
        self.refresh()

    def __enter__(self) -> ItemStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files; results stay readable."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._reader.close()

    def __contains__(self, item: WorkItem) -> bool:
        return bytes.fromhex(item.key) in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def writer(self) -> str:
        """What the files are called that this store adds to."""
        return self._open_writer().name

    def refresh(self) -> None:
        """Take in what other processes have added since."""
        paths = [self.folder.with_name(f"{self.folder.name}.jsonl")]
        if self.folder.is_dir():
            # Beside NAME.jsonl there are NAME.tokens.jsonl and NAME.failed.jsonl.
            paths += sorted(path for path in self.folder.glob("*.jsonl") if path.name.count(".") == 1)
        for path in paths:
            if path == self._own or not path.is_file():
                continue
            file = self._files.setdefault(path, LineFile(path))
            for offset, size, head in file.heads(path.stat().st_size):
                try:
                    self._keep(file.path, offset, size, head)
                except (TypeError, KeyError, ValueError):
                    raise damaged(path, f"line at byte {offset}") from None

    def result(self, item: WorkItem) -> dict[str, Any]:
        """What the item gave, but for its token ids."""
        key = bytes.fromhex(item.key)
        if key not in self._results:
            self._results[key] = self._gathered(item, lambda line: split_token_ids(line["result"])[0])
            if len(self._results) > _MOST_KEPT:
                self._results.popitem(last=False)
        self._results.move_to_end(key)
        return self._results[key]

    def token_ids(self, item: WorkItem) -> dict[str, Any]:
        """What stands under "token_ids" in what the item gave, at the same places; nothing else."""
        return self._gathered(item, self._token_ids_of)

    def _token_ids_of(self, line: dict[str, Any]) -> dict[str, Any]:
        if "apart" not in line:
            return split_token_ids(line["result"])[1]
        apart = line["apart"]
        found = self._reader.read(self.folder / apart["file"], apart["offset"], apart["size"])
        if found["key"] != line["key"]:
            raise damaged(self.folder / apart["file"], f"line at byte {apart['offset']}")
        token_ids: dict[str, Any] = found["result"]
        return token_ids

    def column(self, items: Iterable[WorkItem], name: str) -> list[Any]:
        """What the shards of one split gave under ``name``, row by row, in the order of the split."""
        return [value for item in sorted(items, key=lambda item: item.shard) for value in self.result(item)[name]]

    @property
    def total_seconds(self) -> float:
        """How long all items took, one after another."""
        return sum(entry.seconds for entry in self._entries.values())

    def seconds_like(self, kind: Kind) -> float | None:
        """How long finished items of ``kind`` took, the mean; None without any."""
        count, total = self._seconds.get(kind, (0, 0.0))
        return total / count if count else None

    def missing(self, items: Iterable[WorkItem]) -> list[WorkItem]:
        """The items without a result, in order, each once.

        A `BY_PATH` item is left with the paths that neither the store has nor an item before it.
        """
        left: dict[WorkItem, None] = {}
        planned: defaultdict[bytes, set[str]] = defaultdict(set)
        for item in dict.fromkeys(items):
            if item in self:
                continue
            if item.task not in BY_PATH:
                left[item] = None
                continue
            prompts = _digest(item.along(()).to_dict())
            known = self._by_path.get(prompts, {}).keys() | planned[prompts]
            paths = [path for path in item.path.split() if path not in known]
            planned[prompts].update(paths)
            if paths:
                left[item.along(paths)] = None
        return [*left]

    def places(self, without: Collection[str] = ()) -> Counter[Place]:
        """How many items were done where, but for those of the tasks ``without``."""
        found: Counter[Place] = Counter()
        for (task, place), count in self._num_by_task.items():
            if task not in without and count:
                found[place] += count
        return found

    def add(self, item: WorkItem, result: dict[str, Any], seconds: float, place: Place | None = None) -> None:
        """Append the result of ``item``, on the disk when this returns. place: where it was done (default: here).

        Raises OSError where it cannot be written, a full disk for one; the files are then as they were before.
        """
        writer = self._open_writer()
        if item in self:
            raise ValueError(f"ItemStore.add: the item must be new, got one that has a result: {item}.")
        place = place or Place.here()
        lean, apart = split_token_ids(result)
        head = {"key": item.key, "item": item.to_dict(), "seconds": round(seconds, 3)}
        head |= {"host": place.host, "isa": place.isa, "ended": round(time.time(), 3)}
        content = encoded({**head, "result": lean})
        if apart:
            tokens = encoded({"key": item.key, "result": apart})
            at = writer.append(tokens, "tokens")
            head["apart"] = {"file": writer.path("tokens").name, "offset": at, "size": len(tokens)}
            content = encoded({**head, "result": lean})
        try:
            offset = writer.append(content)
        except OSError:
            if apart:
                writer.take_back(at, "tokens")
            raise
        self._keep(self._own, offset, len(content), head)

    def fail(self, item: WorkItem, error: str, trace: str, num_tries: int, place: Place) -> Path:
        """Note that ``item`` failed ``num_tries`` times, at last with ``error``; where that is noted."""
        writer = self._open_writer()
        line = {"key": item.key, "item": item.to_dict(), "tries": num_tries, "error": error, "trace": trace}
        line |= {"host": place.host, "isa": place.isa, "ended": round(time.time(), 3)}
        writer.append(encoded(line), "failed")
        return writer.path("failed")

    def lines(self) -> Iterator[dict[str, Any]]:
        """The line of each finished item, as one file of all of them would hold it."""
        for entry in self._entries.values():
            yield self._reader.read(entry.path, entry.offset, entry.size)

    def _open_writer(self) -> Writer:
        if self._writer is None:
            raise ValueError("ItemStore.add: the store must be open, got a closed one.")
        return self._writer

    def _gathered(self, item: WorkItem, read: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """What ``read`` finds in the line of ``item``, or in those that have its paths, as one would have it.

        KeyError where it has no result.
        """
        key = bytes.fromhex(item.key)
        if key in self._entries:
            line = self._line(key)
            if line["item"] != item.to_dict():
                raise self._damaged(key)
            return read(line)
        known = self._by_path.get(_digest(item.along(()).to_dict()), {})
        lines = {path: known[path] for path in item.path.split()}
        found: dict[str, Any] = {}
        by_path: dict[str, dict[str, Any]] = {}
        for other in dict.fromkeys(lines.values()):
            line = self._line(other)
            paths = {*line["item"]["path"].split()}
            for name, value in read(line).items():
                if isinstance(value, dict) and value.keys() <= paths:
                    own = {path: value[path] for path in value if lines.get(path) == other}
                    by_path[name] = by_path.get(name, {}) | own
                elif found.setdefault(name, value) != value:  # they are of the same prompts
                    raise self._damaged(other)
        return found | {name: {path: each[path] for path in lines if path in each} for name, each in by_path.items()}

    def _line(self, key: bytes) -> dict[str, Any]:
        entry = self._entries[key]
        return self._reader.read(entry.path, entry.offset, entry.size)

    def _damaged(self, key: bytes) -> ValueError:
        entry = self._entries[key]
        return damaged(entry.path, f"line at byte {entry.offset}")

    def _keep(self, path: Path, offset: int, size: int, head: dict[str, Any]) -> None:
        """Enter a line, unless its item has an earlier one: by time, then by the name of its file."""
        key, fields = bytes.fromhex(head["key"]), head["item"]
        place = Place(head.get("host", ""), head.get("isa", ""))
        place = self._places.setdefault(place, place)
        kind = (fields["task"], fields["checkpoint"], fields["path"], fields["seed"] == 0)
        entry = _Entry(path, offset, size, float(head["seconds"]), float(head.get("ended", 0.0)), place)
        old = self._entries.get(key)
        if old is not None:
            if (old.ended, old.path) <= (entry.ended, entry.path):
                return
            self._count(kind, old, -1)
            self._results.pop(key, None)
        self._entries[key] = entry
        self._count(kind, entry, 1)
        if fields["task"] in BY_PATH:
            known = self._by_path[_digest({**fields, "path": ""})]
            for name in fields["path"].split():
                other = self._entries.get(known.get(name, b""))
                if other is None or (entry.ended, entry.path) < (other.ended, other.path):
                    known[name] = key

    def _count(self, kind: Kind, entry: _Entry, sign: int) -> None:
        self._num_by_task[kind[0], entry.place] += sign
        sums = self._seconds[kind]
        sums[0] += sign
        sums[1] += sign * entry.seconds
