"""The container of a GGUF file: its metadata, and where its tensors lie; none of their numbers are read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np

from dynskip.arguments import shown

_T = TypeVar("_T")

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
# By the number of a metadata value's type: its format as `struct` has it.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", _FLOAT32: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class StoredTensor(NamedTuple):
    """Where a tensor lies. shape: as torch has it, rows first. kind: the number of its type. offset: in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What stands before the numbers of a GGUF file.

    function: what asks for it; errors begin with it. metadata: Python's own values by their keys. size: bytes of the
    file. tensors: by the file's own names.
    """

    function: str
    path: Path
    size: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @overload
    def get(self, key: str, kind: type[_T]) -> _T | None: ...

    @overload
    def get(self, key: str, kind: type[_T], default: _T) -> _T: ...

    def get(self, key: str, kind: type[_T], default: _T | None = None) -> _T | None:
        """The value of a key, or ``default`` where the file lacks it. Raises ValueError for one of another type."""
        if key not in self.metadata:
            return default
        value = self.metadata[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{self.function}: {key} of {self.path} must be {kind.__name__}, got {shown(value)}.")
        return value

    def error(self, requirement: str) -> ValueError:
        """What to raise where the file does not meet ``requirement``, which says what it must do."""
        return ValueError(f"{self.function}: {self.path} must {requirement}")

    def require(self, key: str, kind: type[_T]) -> _T:
        """The value of a key. Raises ValueError where the file lacks it, or has one of another type."""
        value = self.get(key, kind)
        if value is None:
            raise self.error(f"hold {key}, got none. Convert the model anew.")
        return value


def read_header(path: str | Path, function: str) -> GGUFHeader:
    """The header of the GGUF file at ``path``.

    Raises FileNotFoundError, or ValueError where it is no GGUF file, of another version, cut or damaged; they begin
    with ``function``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{function}: {path} must be a GGUF file, got no such file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{function}: {path} must be a GGUF file, got one that does not begin with GGUF.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                metadata, tensors = _read(_Cursor(data))
            except ValueError as error:
                raise ValueError(
                    f"{function}: {path} must be a whole GGUF file, got {error}. Download or convert it again."
                ) from error
    return GGUFHeader(function, path, size, metadata, tensors)


def _read(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata and tensors. Raises ValueError that says what is there instead."""
    version = cursor.number("I")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        found = "a big-endian file" if swapped in _VERSIONS else f"version {version}"
        raise ValueError(f"{found} where version {' or '.join(map(str, _VERSIONS))}, little-endian, should be")
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"{shown(key)} more than once")
        metadata[key] = cursor.value()
    tensors: dict[str, StoredTensor] = {}
    for _ in range(num_tensors):
        name = cursor.string()
        if name in tensors:
            raise ValueError(f"tensor {shown(name)} more than once")
        num_dimensions = cursor.number("I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {shown(name)} of {num_dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(num_dimensions))[::-1]
        tensors[name] = StoredTensor(shape, cursor.number("I"), cursor.number("Q"))
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment {shown(alignment)}")
    start = -(-cursor.offset // alignment) * alignment
    return metadata, {name: tensor._replace(offset=start + tensor.offset) for name, tensor in tensors.items()}


class _Cursor:
    """Reads one value after the other, from behind the magic. Raises ValueError at the end of ``data``."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.offset = len(_MAGIC)

    def number(self, code: str) -> Any:
        return self._numbers(1, code)[0]

    def string(self) -> str:
        return self._strings(1)[0]

    def value(self) -> Any:
        """A metadata value: a number, a truth value, a text, or a list of them."""
        kind = self.number("I")
        if kind == _ARRAY:
            kind, length = self.number("I"), self.number("Q")
            if kind == _STRING:
                return self._strings(length)
            if kind in _NUMBERS:
                return list(self._numbers(length, _NUMBERS[kind]))
            raise ValueError(f"a list of values of type {kind}")
        if kind == _STRING:
            return self.string()
        if kind not in _NUMBERS:
            raise ValueError(f"a value of type {kind}")
        number = self.number(_NUMBERS[kind])
        # 1e-5 as it was before it was stored, and not 9.999999747378752e-06: the shortest that rounds to the same.
        return float(str(np.float32(number))) if kind == _FLOAT32 else number

    def _numbers(self, length: int, code: str) -> tuple[Any, ...]:
        num_bytes = length * struct.calcsize(f"<{code}")
        if num_bytes > self.size - self.offset:
            raise ValueError(f"one that ends at byte {self.size}, in the middle of its header")
        numbers = struct.unpack_from(f"<{length}{code}", self.data, self.offset)
        self.offset += num_bytes
        return numbers

    def _strings(self, length: int) -> list[str]:
        # A vocabulary has hundreds of thousands: this loop is what the reading of a header costs.
        data, offset, size, strings = self.data, self.offset, self.size, []
        for _ in range(length):
            start = offset + 8
            offset = start + int.from_bytes(data[offset:start], "little")
            if offset > size or start > size:
                raise ValueError(f"one that ends at byte {size}, in the middle of its header")
            try:
                strings.append(data[start:offset].decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"text at byte {start} that is no UTF-8") from error
        self.offset = offset
        return strings
