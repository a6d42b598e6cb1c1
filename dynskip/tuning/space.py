"""The constants that are tried: tiles first, then one constant after the other around the best of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import ceil

import torch

from dynskip.kernels.configs import KEYS, Table, get_config, use_configs
from dynskip.tuning.tasks import Task

Constants = dict[str, int]

_LINEAR_OPS = ("linear_rows", "qkv_rows", "linear_add_rows")
# What a multiprocessor should have asked memory for at any time: 4.3 TB/s for the 0.8 us that an answer takes under
# load, over 132 of them, is 26 KB; and some more, since a program asks for a tile at a time.
_BYTES_IN_FLIGHT = 48 * 1024
_STAGES = (2, 8)
# Programs per multiprocessor: fewer leave some of them without work, more come in many waves.
_MIN_PROGRAMS, _MAX_PROGRAMS = 0.45, 24.0
# K is split to have enough of them, not for its own sake.
_MAX_SPLIT_PROGRAMS = 4.0

# Constants that mean nothing where a single row is multiplied from registers, and what stands there instead.
_UNUSED_BY_ONE_ROW = {"PREFETCH_K": 0, "num_stages": 1, "SPLIT_K": 1}

_NOTHING_TUNED: Table = {"device": None, "capability": None, "measured": None, "ops": {}}


@dataclass(frozen=True)
class Limits:
    """What a GPU has: multiprocessors, and shared memory for a program, in bytes."""

    num_processors: int
    max_shared_bytes: int


# Keys that are varied after the tiles, in this order, each around the best constants so far.
REFINED = ("num_stages", "num_warps", "PREFETCH_K", "FUSE_NORM", "SPLIT_K", "TARGET_PROGRAMS", "PDL")


def default_constants(task: Task) -> Constants:
    """What the table for devices that nobody tuned says."""
    with use_configs(_NOTHING_TUNED):
        return dict(get_config(task.op, torch.device("cpu"), task.dtype, task.max_rows, task.matrix))


def tiles(task: Task, limits: Limits) -> list[Constants]:
    """Constants with every tile worth a try, those that do not matter for tiles as they are by default."""
    found = list(_tiles(task, limits))
    # Without this a small matrix on a large GPU would have no candidates.
    return [constants for constants in found if _fills(task, constants, limits)] or found


def variations(task: Task, constants: Constants, key: str, limits: Limits) -> list[Constants]:
    """``constants`` with other values of ``key``; none where the op has no such constant, or it does not matter."""
    if key not in KEYS[task.op] or (constants.get("BLOCK_M") == 1 and key in _UNUSED_BY_ONE_ROW):
        return []
    now = constants[key]
    values: tuple[int, ...]
    if key == "num_stages":
        values = (now - 2, now - 1, now + 1, now + 2)
    elif key == "num_warps":
        values = (now // 2, now * 2)
    elif key == "PREFETCH_K":
        # In units of 64, the least that a table may ask for.
        block = max(constants["BLOCK_K"], 64)
        values = (0, block, 2 * block, 4 * block, 16 * block)
    elif key in ("SPLIT_K", "TARGET_PROGRAMS"):
        values = (now // 2, now * 2)
    else:
        values = (not now,)
    changed = [{**constants, key: value} for value in dict.fromkeys(values) if value != now]
    return [other for other in changed if _is_sensible(other, limits, task)]


def num_programs(task: Task, constants: Constants) -> int:
    """The programs of a launch of an op that multiplies by a matrix."""
    assert task.matrix is not None, "only the number of matrix tiles is known beforehand"
    tiles_m = ceil(task.max_rows / constants["BLOCK_M"])
    return tiles_m * ceil(task.matrix[0] / constants["BLOCK_N"]) * constants.get("SPLIT_K", 1)


def _tiles(task: Task, limits: Limits) -> Iterator[Constants]:
    default = default_constants(task)
    if task.op in _LINEAR_OPS:
        yield from _linear_tiles(task, default, limits)
    elif task.op == "attend_rows":
        for block_s, block_c, per_processor in product((16, 32, 64), (64, 128, 256, 512), (2, 4, 8)):
            tile = {"BLOCK_S": block_s, "BLOCK_C": block_c, "TARGET_PROGRAMS": per_processor * limits.num_processors}
            yield {**default, **tile}
    else:
        for num_warps in (1, 2, 4, 8, 16):
            yield {**default, "num_warps": num_warps}


def _linear_tiles(task: Task, default: Constants, limits: Limits) -> Iterator[Constants]:
    fuse = {"FUSE_NORM": task.max_rows <= 4} if "FUSE_NORM" in KEYS[task.op] else {}
    splits = (1, 2, 4, 8) if "SPLIT_K" in KEYS[task.op] else (1,)
    for (block_m, block_n, block_k, left, num_warps), split in product(_shapes(task.max_rows), splits):
        if task.dtype.itemsize == 4:
            block_k //= 2
        constants = {
            **default,
            **fuse,
            **({"SPLIT_K": split} if len(splits) > 1 else {}),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "WEIGHTS_LEFT": left,
            "PREFETCH_K": max(2 * block_k, 64),
            "num_warps": num_warps,
        }
        assert task.matrix is not None, "a linear op has a matrix"
        if block_k * split > 2 * task.matrix[1] or (block_m == 1 and split > 1):
            continue
        if block_m == 1:
            constants |= {key: value for key, value in _UNUSED_BY_ONE_ROW.items() if key in constants}
        else:
            constants["num_stages"] = _stages(task, constants, limits)
        if _is_sensible(constants, limits, task):
            yield constants


def _shapes(max_rows: int) -> Iterator[tuple[int, int, int, bool, int]]:
    """BLOCK_M, BLOCK_N, BLOCK_K, WEIGHTS_LEFT, num_warps for 16-bit weights."""
    if max_rows == 1:
        # 64 or 128 bytes of weights a thread, two tiles at a time.
        for block_k, num_warps in product((1024, 2048, 4096, 8192), (4, 8)):
            for tile in (4096 * num_warps // 4, 8192 * num_warps // 4):
                if tile >= block_k:
                    yield 1, tile // block_k, block_k, False, num_warps
        yield 16, 64, 256, True, 4
    elif max_rows <= 32:
        block_m = 16 if max_rows <= 16 else 32
        yield block_m, 32, 128, False, 4
        yield block_m, 64, 128, False, 4
        for block_k in (64, 128, 256, 512):
            yield block_m, 64, block_k, True, 4
        yield block_m, 128, 64, True, 4
        for block_k in (128, 256):
            yield block_m, 128, block_k, True, 8
    if 32 < max_rows <= 128:
        for block_n, block_k in product((32, 64, 128), (64, 128)):
            yield 64, block_n, block_k, False, 4
            if block_n >= 64:
                yield 64, block_n, block_k, True, 4
        yield 64, 64, 256, True, 4
        yield 64, 128, 128, True, 8
    if max_rows > 64:
        for block_n, num_warps in ((64, 4), (128, 4), (128, 8), (256, 8)):
            yield 128, block_n, 64, False, num_warps
        yield 128, 128, 64, True, 8
        yield 128, 64, 128, False, 4


def _stages(task: Task, constants: Constants, limits: Limits) -> int:
    """As many as keep memory busy, together with the other programs of the multiprocessor."""
    stage_bytes = _stage_bytes(task, constants)
    neighbours = max(1.0, num_programs(task, constants) / limits.num_processors)
    wanted = ceil(_BYTES_IN_FLIGHT / (stage_bytes * min(neighbours, 4.0))) + 1
    affordable = limits.max_shared_bytes // stage_bytes
    return max(_STAGES[0] + 1, min(wanted, affordable, _STAGES[1]))


def _stage_bytes(task: Task, constants: Constants) -> int:
    return (constants["BLOCK_M"] + constants["BLOCK_N"]) * constants["BLOCK_K"] * task.dtype.itemsize


def _is_sensible(constants: Constants, limits: Limits, task: Task) -> bool:
    """Whether a launch with ``constants`` can work at all, as far as that is known without compiling it."""
    if not 1 <= constants["num_warps"] <= 16 or constants.get("TARGET_PROGRAMS", 1) < 1:
        return False
    if task.op not in _LINEAR_OPS:
        return True
    if constants["BLOCK_M"] == 1:
        return True
    if not _STAGES[0] <= constants["num_stages"] <= _STAGES[1] or not 1 <= constants.get("SPLIT_K", 1) <= 16:
        return False
    return (constants["num_stages"] - 1) * _stage_bytes(task, constants) <= limits.max_shared_bytes


def _fills(task: Task, constants: Constants, limits: Limits) -> bool:
    if task.op not in _LINEAR_OPS:
        return True
    per_processor = num_programs(task, constants) / limits.num_processors
    if constants["BLOCK_M"] == 1:  # its programs share the tiles
        return per_processor >= _MIN_PROGRAMS
    most = _MAX_PROGRAMS if constants.get("SPLIT_K", 1) == 1 else _MAX_SPLIT_PROGRAMS
    return _MIN_PROGRAMS <= per_processor <= most
