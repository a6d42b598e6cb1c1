"""The files of a store of items: what one process appends to, and how far each was read."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MOST_OPEN = 64
_RESULT = b',"result":{'
_SECONDS = b',"seconds":'
_KEY = re.compile(r"[0-9a-f]{64}")


class Writer:
    """The files in ``folder`` that this process alone appends to, each begun with its first line.

    NAME.jsonl holds finished items, NAME.tokens.jsonl their token ids, NAME.failed.jsonl what failed. No two processes
    have one name, so that none waits for another and no file system has to keep them apart.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Processes of two containers may have one host's name and one number.
        host = re.sub(r"[^\w-]+", "-", platform.node()) or "host"
        started = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        self.name = f"{started}-{host}-{os.getpid()}-{secrets.token_hex(3)}"
        self._files: dict[str, int] = {}

    def path(self, kind: str = "") -> Path:
        """The file of finished items, or of "tokens" or "failed"."""
        return self.folder / f"{self.name}{f'.{kind}' if kind else ''}.jsonl"

    def append(self, line: bytes, kind: str = "") -> int:
        """Where ``line`` begins in the file of its kind; it is on the disk when this returns.

        Raises OSError where it cannot be written, a full disk for one; the file is then as it was before.
        """
        try:
            file = self._open(kind)
            before = os.fstat(file).st_size
            try:
                written = 0
                while written < len(line):
                    written += os.write(file, line[written:])
                os.fsync(file)
            except OSError:
                os.ftruncate(file, before)
                raise
        except OSError as error:
            raise OSError(
                error.errno,
                f"ItemStore.add: {self.path(kind)} must take {len(line)} bytes more, got: {error.strerror}. "
                "Finished items are safe; make room and start the same command again",
            ) from error
        return before

    def take_back(self, offset: int, kind: str = "") -> None:
        """Cut off what was appended from ``offset`` on."""
        os.ftruncate(self._files[kind], offset)

    def close(self) -> None:
        """Let go of the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _open(self, kind: str) -> int:
        if kind not in self._files:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files[kind] = os.open(self.path(kind), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)  # the name, too, is on the disk
            except OSError as error:
                if error.errno != errno.EINVAL:  # some network file systems know no such thing of folders
                    raise
            finally:
                os.close(folder)
        return self._files[kind]


class LineFile:
    """A file of finished items of any writer, read as far as its last whole line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self._num_lines = 0

    def heads(self, size: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Offset, length and head of each line that was not read before, where the file is ``size`` long by now.

        A line without its newline is one that is being written, or that a killed writer has left: it does not count.
        Raises ValueError for a damaged line.
        """
        if size <= self.position:
            return
        with self.path.open("rb") as file:
            file.seek(self.position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset = self.position
                self.position += len(line)
                self._num_lines += 1
                try:
                    head = _head(line)
                except (ValueError, TypeError, KeyError):
                    raise damaged(self.path, f"line {self._num_lines}") from None
                yield offset, len(line), head


class LineReader:
    """Reads lines by offset, and keeps the files that were read last open."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, offset: int, size: int) -> dict[str, Any]:
        """The line there. Raises ValueError for a damaged one."""
        if path not in self._files:
            if len(self._files) >= _MOST_OPEN:
                os.close(self._files.popitem(last=False)[1])
            self._files[path] = os.open(path, os.O_RDONLY)
        self._files.move_to_end(path)
        try:
            line: dict[str, Any] = json.loads(os.pread(self._files[path], size, offset))
        except ValueError:
            raise damaged(path, f"line at byte {offset}") from None
        return line

    def close(self) -> None:
        """Let go of the files; the next read opens its own again."""
        while self._files:
            os.close(self._files.popitem()[1])


def damaged(path: Path, where: str) -> ValueError:
    """The error that names a damaged line."""
    return ValueError(
        f"ItemStore: {path} must hold a finished item in each line, got a damaged {where}. "
        "Remove that line; its item is then done again."
    )


def encoded(line: dict[str, Any]) -> bytes:
    """The line as bytes. Raises ValueError for a number that JSON lacks."""
    return json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def split_token_ids(result: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``result`` without what stands under "token_ids" at any depth, and that alone, at the same places."""
    lean: dict[str, Any] = {}
    apart: dict[str, Any] = {}
    for name, value in result.items():
        if name == "token_ids":
            apart[name] = value
        elif isinstance(value, dict):
            lean[name], inner = split_token_ids(value)
            if inner:
                apart[name] = inner
        else:
            lean[name] = value
    return lean, apart


def _head(line: bytes) -> dict[str, Any]:
    """What stands before the result, which is not parsed; behind it older files have the seconds."""
    end = line.find(_RESULT)
    if end < 0 or not line.endswith(b"}\n"):
        raise ValueError("no result")
    head: dict[str, Any] = json.loads(line[:end] + b"}")
    if "seconds" not in head:
        head["seconds"] = float(line[line.rindex(_SECONDS) + len(_SECONDS) : -2])
    if not _KEY.fullmatch(head["key"]) or not head["seconds"] >= 0:
        raise ValueError("no key or no time")
    return head
