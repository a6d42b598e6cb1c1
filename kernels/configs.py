"""The constants that kernels are launched with, such as tile sizes: data, in one JSON table for each tuned device."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from dynskip.kernels import switches
from dynskip.kernels.launches import compute_capability

Config = Mapping[str, int]
Table = dict[str, Any]

FOLDER = Path(__file__).with_name("configs")
DEFAULT = "generic"

_TILES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "WEIGHTS_LEFT")
_LINEAR = (*_TILES, "PREFETCH_K", "PREFETCH_MIB", "PDL", "num_warps", "num_stages")
KEYS: dict[str, tuple[str, ...]] = {
    "embed_rows": ("PDL", "num_warps"),
    "norm_rows": ("PDL", "num_warps"),
    "linear_rows": (*_LINEAR, "FUSE_NORM"),
    "qkv_rows": (*_LINEAR, "FUSE_NORM"),
    "rotate_rows": ("PDL", "num_warps"),
    "place_rows": ("PDL", "num_warps"),
    "attend_rows": ("BLOCK_S", "BLOCK_C", "BLOCK_P", "TARGET_PROGRAMS", "SPLIT_TOKENS", "PDL", "num_warps", "maxnreg"),
    "linear_add_rows": (*_LINEAR, "SPLIT_K"),
    "gate_rows": ("PDL", "num_warps"),
    "prefill_attention": ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
}
"""The constants of each op. An entry of a table has them all, and `max_rows`, and perhaps `shape`."""

_SWITCHES = ("FUSE_NORM", "PDL", "WEIGHTS_LEFT")
_POWERS_OF_TWO = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_S", "BLOCK_C", "BLOCK_P", "num_warps")
_MAY_BE_ZERO = ("PREFETCH_K",)
_TABLE_KEYS = {"device", "capability", "measured", "ops"}
_ITEMSIZES = ("2", "4")
_DETERMINISTIC = "deterministic"


class Entry(NamedTuple):
    """A config and what it is for: launches of at most `max_rows` rows, on matrices of `shape`; None: of any."""

    max_rows: int | None
    shape: tuple[int, int] | None
    config: Config


_Entries = dict[tuple[str, int, bool], list[Entry]]

_override: _Entries | None = None
_found: dict[tuple[object, ...], Config] = {}


def get_config(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    max_rows: int,
    shape: tuple[int, int] | None = None,
    deterministic: bool = False,
) -> Config:
    """The constants to launch `op` with on `device`, for tensors of `dtype` and at most `max_rows` rows.

    shape: N and K of the matrix, where the op multiplies by one. deterministic: one config for every number of rows.
    Raises: ValueError for an unknown op or dtype. Cost: a look-up, after the first call.
    """
    key = (op, device, dtype, max_rows, shape, deterministic, os.environ.get(switches.CONFIGS))
    config = _found.get(key)
    if config is None:
        config = _found[key] = _choose(get_entries(op, device, dtype, deterministic), max_rows, shape)
    return config


def get_entries(op: str, device: torch.device, dtype: torch.dtype, deterministic: bool = False) -> list[Entry]:
    """All configs that `get_config` may choose from, by rising `max_rows`, those for one shape first.

    They are those of `use_configs`, else of DYNSKIP_CONFIGS, else of the device's table.
    """
    if op not in KEYS:
        raise ValueError(f"get_config: op must be one of {', '.join(KEYS)}, got {op!r}. Name one of these.")
    if str(dtype.itemsize) not in _ITEMSIZES:
        raise ValueError(f"get_config: dtype must have 2 or 4 bytes, got {dtype}. Use bfloat16, float16 or float32.")
    return _entries_for(device)[op, dtype.itemsize, deterministic]


def config_names() -> list[str]:
    """The names of the tables that are there: `generic`, and one for each device that was tuned."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def device_slug(name: str) -> str:
    """The name of the table of a device that calls itself `name`: "NVIDIA H200" has `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@contextmanager
def use_configs(table: Path | str | Table) -> Iterator[None]:
    """Inside the block every device has the configs of `table`, a JSON file or its content; not safe across threads.

    What the table leaves out is that of `generic`. Raises: ValueError for a table that is not well-formed.
    """
    global _override
    before = _override
    _override = _with_default(read_table(table))
    _found.clear()
    try:
        yield
    finally:
        _override = before
        _found.clear()


def pdl_options(config: Config, device: torch.device) -> dict[str, bool]:
    """Launch options: whether a kernel may start while the one before it ends, which GPUs can since sm_90."""
    use_pdl = bool(config["PDL"]) and compute_capability(device) >= 90 and switches.pdl()
    return {"USE_PDL": use_pdl, "launch_pdl": use_pdl}


def read_table(table: Path | str | Table) -> _Entries:
    """The entries of `table` by op, bytes of an item and whether deterministic.

    Raises: ValueError for an unknown op or key, a missing one, or a value that no kernel takes.
    """
    source = "the table" if isinstance(table, dict) else str(table)
    content = table if isinstance(table, dict) else json.loads(Path(table).read_text(encoding="utf-8"))
    _require(set(content) == _TABLE_KEYS, source, f"have the keys {', '.join(sorted(_TABLE_KEYS))}", sorted(content))
    found: _Entries = {}
    for op, groups in content["ops"].items():
        _require(op in KEYS, source, f"name ops of {', '.join(KEYS)}", op)
        _require(
            set(groups) <= {*_ITEMSIZES, _DETERMINISTIC}, source, "group entries by 2, 4, deterministic", sorted(groups)
        )
        for itemsize in _ITEMSIZES:
            if itemsize in groups:
                found[op, int(itemsize), False] = _read_group(op, groups[itemsize], source)
        for itemsize, entry in groups.get(_DETERMINISTIC, {}).items():
            _require(itemsize in _ITEMSIZES, source, "group deterministic entries by 2 and 4", itemsize)
            # One entry for every number of rows; and LayerNorm in the kernel would add up by another number of rows.
            _require(not entry.get("FUSE_NORM"), source, f"not fuse LayerNorm in deterministic {op}", entry)
            found[op, int(itemsize), True] = _read_group(op, [{"max_rows": None, **entry}], source)
    return found


def _choose(entries: list[Entry], max_rows: int, shape: tuple[int, int] | None) -> Config:
    for entry in entries:
        if entry.shape in (None, shape) and (entry.max_rows is None or max_rows <= entry.max_rows):
            return entry.config
    raise AssertionError("the last entry of a group is for any shape and number of rows")


def _entries_for(device: torch.device) -> _Entries:
    if _override is not None:
        return _override
    path = switches.configs()
    if path is not None:
        return _with_default(_read_once(path))
    name = DEFAULT
    if device.type == "cuda":
        slug = device_slug(torch.cuda.get_device_name(device))
        name = slug if slug in config_names() else DEFAULT
    return _with_default(_read_once(FOLDER / f"{name}.json"))


@functools.cache
def _read_once(path: Path) -> _Entries:
    return read_table(path)


def _with_default(entries: _Entries) -> _Entries:
    return _read_once(FOLDER / f"{DEFAULT}.json") | entries


def _read_group(op: str, group: list[dict[str, Any]], source: str) -> list[Entry]:
    """The entries of `group`, those for one shape first, each part by rising number of rows, checked."""
    entries = [_read_entry(op, dict(entry), source) for entry in group]
    by_shape: dict[tuple[int, int] | None, list[float]] = {}
    for entry in entries:
        by_shape.setdefault(entry.shape, []).append(float("inf") if entry.max_rows is None else entry.max_rows)
    for limits in by_shape.values():
        _require(limits == sorted(set(limits)), source, f"list {op} by rising max_rows", limits)
    last = by_shape.get(None, [0.0])[-1]
    _require(last == float("inf"), source, f"end {op} with an entry of any shape whose max_rows is null", group[-1:])
    return sorted(entries, key=lambda entry: entry.shape is None)


def _read_entry(op: str, entry: dict[str, Any], source: str) -> Entry:
    known = {"max_rows", *KEYS[op]}
    _require(set(entry) - {"shape", "measured"} == known, source, f"give {op} {', '.join(sorted(known))}", entry)
    max_rows, shape = entry.pop("max_rows"), entry.pop("shape", None)
    entry.pop("measured", None)  # the tuner's figures
    _require(max_rows is None or (type(max_rows) is int and max_rows > 0), source, "have max_rows > 0", max_rows)
    _require(shape is None or len(shape) == 2, source, "give shape as [N, K]", shape)
    for key, value in entry.items():
        if key in _SWITCHES:
            _require(type(value) is bool, source, f"have {key} true or false in {op}", value)
        else:
            least = 0 if key in _MAY_BE_ZERO else 1
            _require(type(value) is int and value >= least, source, f"have {key} >= {least} in {op}", value)
        if key == "PREFETCH_K":
            # A line of L2 has 128 bytes.
            is_whole = value == 0 or (value >= 64 and value & (value - 1) == 0)
            _require(is_whole, source, f"have 0 or 64 * 2**n as {key}", value)
        if key in _POWERS_OF_TWO:
            _require(value & (value - 1) == 0, source, f"have a power of two as {key} of {op}", value)
    return Entry(max_rows, None if shape is None else (shape[0], shape[1]), MappingProxyType(entry))


def _require(satisfied: bool, source: str, requirement: str, actual: object) -> None:
    if not satisfied:
        raise ValueError(f"read_table: {source} must {requirement}, got {actual!r}. Mend it or remove it.")
