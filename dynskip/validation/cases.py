"""The shapes at which every op is validated: small and awkward, with NaN wherever an op has no business to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from dynskip.kernels.row_list import RowList
from dynskip.ops.reference import ACTIVATIONS
from dynskip.ops.row_reference import ABSENT, EVICT, PROPAGATE, SHARE
from dynskip.validation.op_arguments import (
    RowArguments,
    decode_attention,
    draw_rows,
    gather_layer_norm,
    kv_store,
    plan_rows,
    prefill_attention,
    rotate,
)
from dynskip.validation.tensors import Arguments, Case, Draw

Cases = Iterator[tuple[str, Arguments]]


def make_cases(op: str, dtype: torch.dtype, device: torch.device | str) -> list[Case]:
    """The cases of `op` in `dtype` on `device`; the same at every call."""
    draw = Draw(dtype, torch.device(device))
    return [Case(op, name, arguments) for name, arguments in _makers[op](draw)]


_NUM_ROWS = 7
_ROW_COUNTS = (0, 1, _NUM_ROWS - 1, _NUM_ROWS)
_LIST_LENGTHS = (0, 1, 5, _NUM_ROWS)
# Heads and head sizes: OPT's 64, 80 and 128, opt-mini's 48 and the smallest, with odd and even numbers of heads.
_HEADS = ((3, 16), (2, 48), (2, 64), (3, 80), (1, 128))
# Query heads that share key-value heads, and key-value heads: Llama's, SmolLM's, one for all, and groups of five.
_GROUPS = ((8, 2, 64), (9, 3, 64), (4, 1, 128), (10, 2, 48), (6, 2, 20))
_GROUPED_ROWS = ((6, 2, 48), (9, 3, 64), (8, 2, 128), (34, 2, 8))
# Of matrices, [N, K]: OPT's own are multiples of 64; tiles of the kernels are 16 to 128 wide.
_SHAPES = ((96, 192), (33, 97), (130, 130), (16, 600))


def _gather_layer_norm(draw: Draw) -> Cases:
    for num_columns in (1, 16, 97, 192, 768):
        yield f"all rows, C={num_columns}", gather_layer_norm(draw, draw.normal(_NUM_ROWS, num_columns), None)
        for num_chosen in _ROW_COUNTS:
            row_ids = draw.row_ids(num_chosen, _NUM_ROWS)
            x = draw.nan(_NUM_ROWS, num_columns)
            x[row_ids.long()] = draw.normal(num_chosen, num_columns)
            yield (
                f"R={num_chosen} of {_NUM_ROWS}, C={num_columns}, NaN in other rows",
                gather_layer_norm(draw, x, row_ids),
            )
    yield "strided rows", gather_layer_norm(draw, draw.strided(_NUM_ROWS, 97), draw.row_ids(5, _NUM_ROWS))
    yield "strided rows, all", gather_layer_norm(draw, draw.strided(_NUM_ROWS, 192), None)
    yield (
        "rows in any order",
        gather_layer_norm(draw, draw.normal(_NUM_ROWS, 192), draw.index(*draw.permutation(_NUM_ROWS))),
    )
    yield (
        "no weight, no bias",
        gather_layer_norm(draw, draw.normal(_NUM_ROWS, 97), draw.row_ids(5, _NUM_ROWS), affine=False),
    )
    no_bias = gather_layer_norm(draw, draw.normal(_NUM_ROWS, 97), None)
    yield "no bias", no_bias | {"bias": None}
    yield "constant rows", gather_layer_norm(draw, draw.normal(_NUM_ROWS, 1).expand(-1, 192).contiguous(), None)
    yield "mean far from zero", gather_layer_norm(draw, draw.normal(_NUM_ROWS, 192) + 300, None)
    yield "tiny values", gather_layer_norm(draw, draw.normal(_NUM_ROWS, 192) * 1e-3, None)
    for num_chosen in _ROW_COUNTS:
        x, row_ids = draw.nan(_NUM_ROWS, 192), draw.row_ids(num_chosen, _NUM_ROWS)
        x[row_ids.long()] = draw.normal(num_chosen, 192) + 1
        yield f"R={num_chosen} of {_NUM_ROWS}, RMS", gather_layer_norm(draw, x, row_ids, rms=True) | {"bias": None}
    for num_columns in (1, 16, 97, 768):
        x = draw.strided(_NUM_ROWS, num_columns)
        yield f"RMS with a bias, strided rows, C={num_columns}", gather_layer_norm(draw, x, None, rms=True)
    yield "RMS alone", gather_layer_norm(draw, draw.normal(_NUM_ROWS, 97) * 1e-3, None, affine=False, rms=True)


def _scatter_add(draw: Draw) -> Cases:
    for num_columns in (1, 16, 97, 192, 1500):
        x, y = draw.normal(_NUM_ROWS, num_columns), draw.normal(_NUM_ROWS, num_columns)
        yield f"all rows, C={num_columns}", {"x": x, "row_ids": None, "y": y}
        for num_chosen in _ROW_COUNTS:
            row_ids = draw.row_ids(num_chosen, _NUM_ROWS)
            x = draw.nan(_NUM_ROWS, num_columns)
            x[row_ids.long()] = draw.normal(num_chosen, num_columns)
            name = f"R={num_chosen} of {_NUM_ROWS}, C={num_columns}, NaN in other rows"
            yield name, {"x": x, "row_ids": row_ids, "y": draw.normal(num_chosen, num_columns)}
    yield "strided x", {"x": draw.strided(7, 97), "row_ids": draw.row_ids(5, 7), "y": draw.normal(5, 97)}
    yield "strided y", {"x": draw.normal(7, 97), "row_ids": draw.row_ids(5, 7), "y": draw.strided(5, 97)}
    yield "strided, all rows", {"x": draw.strided(7, 192), "row_ids": None, "y": draw.strided(7, 192)}
    yield "any order", {"x": draw.normal(7, 192), "row_ids": draw.index(*draw.permutation(7)), "y": draw.normal(7, 192)}


def _kv_store(draw: Draw) -> Cases:
    for num_heads, head_size in _HEADS:
        for num_rows in _ROW_COUNTS:
            slots = draw.permutation(2 * _NUM_ROWS)[:num_rows]
            yield (
                f"R={num_rows}, H={num_heads}, D={head_size}, slots in any order",
                kv_store(draw, num_heads, head_size, slots),
            )
    some = [slot if slot % 3 else -1 for slot in draw.permutation(2 * _NUM_ROWS)[:_NUM_ROWS]]
    yield "some rows not stored", kv_store(draw, 3, 48, some)
    yield "no row stored", kv_store(draw, 3, 48, [-1] * 5)
    yield "contiguous rows", kv_store(draw, 4, 16, draw.permutation(2 * _NUM_ROWS)[:_NUM_ROWS], projection=False)
    yield "more values than a block", kv_store(draw, 20, 80, draw.permutation(2 * _NUM_ROWS)[:3])


def _decode_attention(draw: Draw) -> Cases:
    lengths = [1, 2, 17, 63, 64, 65, 131]
    every = list(range(len(lengths)))
    for num_heads, head_size in _HEADS:
        yield (
            f"H={num_heads}, D={head_size}, ragged contexts",
            decode_attention(draw, num_heads, head_size, lengths, every),
        )
    for num_rows in (0, 1, len(lengths) - 1):
        seq_ids = sorted(draw.permutation(len(lengths))[:num_rows])
        yield f"R={num_rows} of {len(lengths)}", decode_attention(draw, 2, 48, lengths, seq_ids)
    yield "rows in any order", decode_attention(draw, 2, 48, lengths, draw.permutation(len(lengths)))
    yield "sharp scores", decode_attention(draw, 2, 64, lengths, every, sharpness=20)
    empty = decode_attention(draw, 2, 48, [5, 3, 70], [0, 1, 2])
    yield "no context for one row", empty | {"context_lens": draw.index(5, 0, 70)}
    shared = decode_attention(draw, 2, 48, [33, 33], [0, 1])
    shared["slot_table"][1, :20] = shared["slot_table"][0, 5:25]
    yield "slots shared by two sequences", shared
    shorter = decode_attention(draw, 2, 48, [9, 40], [1, 1, 0])
    yield "two rows of one sequence, part of its context", shorter | {"context_lens": draw.index(40, 39, 3)}

    for num_heads, num_kv_heads, head_size in _GROUPS:
        name = f"H={num_heads}, G={num_kv_heads}, D={head_size}"
        make = partial(decode_attention, draw, num_heads, head_size, lengths, every, num_kv_heads=num_kv_heads)
        yield name, make()
        yield f"{name}, slopes", make(slopes=True)
        yield f"{name}, a window", make(window=50)
    both = decode_attention(draw, 4, 64, [*lengths, 300], [0, 7, 3], slopes=True, window=140, num_kv_heads=2)
    yield "slopes and a window, rows in any order", both
    far = decode_attention(draw, 2, 48, lengths, every, window=3)
    far["position_ids"][::2] += 9
    yield "no key within the window of some rows", _without_keys(far, slice(None, None, 2))


def _without_keys(arguments: Arguments, rows: slice) -> Arguments:
    """The arguments of decode attention with NaN in every slot of the sequences of some rows."""
    seq_ids, context_lens = (arguments[name][rows].tolist() for name in ("seq_ids", "context_lens"))
    for sequence, length in zip(seq_ids, context_lens, strict=True):
        slots = arguments["slot_table"][sequence, :length].long()
        for cache in (arguments["k_cache"], arguments["v_cache"]):
            cache[slots] = float("nan")
    return arguments


def _prefill_attention(draw: Draw) -> Cases:
    for num_heads, head_size in _HEADS:
        name = f"H={num_heads}, D={head_size}, causal, ragged"
        yield name, prefill_attention(draw, num_heads, head_size, [1, 7, 33, 67], strided=head_size == 64)
    yield "one sequence of one token", prefill_attention(draw, 2, 48, [1])
    yield "no sequence", prefill_attention(draw, 2, 48, [])
    yield "sequences without tokens", prefill_attention(draw, 2, 48, [0, 5, 0, 0, 3, 0])
    yield "tile edges", prefill_attention(draw, 2, 16, [31, 32, 33, 63, 64, 65])
    yield "strided rows", prefill_attention(draw, 2, 48, [5, 37], strided=True)
    yield "sharp scores", prefill_attention(draw, 2, 64, [5, 37], sharpness=20)
    yield "fewer queries than keys", prefill_attention(draw, 2, 48, [40, 9], [[38, 39, 40], [9]])
    yield "more queries than keys", prefill_attention(draw, 2, 48, [2, 3], [[0, 1, 1, 2], [0, 0, 3]])
    yield "queries without keys", prefill_attention(draw, 2, 48, [0, 3], [[0, 0], [1, 2, 3]])
    yield "some queries missing", prefill_attention(draw, 2, 48, [70], [[1, 2, 5, 33, 34, 64, 65, 70]])
    yield "limits that do not increase", prefill_attention(draw, 2, 48, [33], [[33, 1, 17, 0, 32, 5]])
    for num_heads, num_kv_heads, head_size in _GROUPS:
        name, lengths = f"H={num_heads}, G={num_kv_heads}, D={head_size}", [1, 7, 67]
        make = partial(prefill_attention, draw, num_heads, head_size, lengths, num_kv_heads=num_kv_heads)
        yield name, make(strided=True)
        yield f"{name}, slopes", make(slopes=True)
        yield f"{name}, a window", make(window=20)
    yield "a window that nothing is outside of", prefill_attention(draw, 2, 48, [5, 37], window=200)
    missing = [[0, 1, 2, 5, 33, 34, 64, 65, 70], [0, 0]]
    some = prefill_attention(draw, 4, 64, [70, 3], missing, slopes=True, window=40, num_kv_heads=2)
    yield "slopes and a window, some queries missing", some
    far = prefill_attention(draw, 2, 48, [9, 4], window=4)
    far["position_ids"][::2] += 9
    yield "no key within the window of some queries", far


def _rotate(draw: Draw) -> Cases:
    for num_heads, head_size in _HEADS:
        for num_rows in _ROW_COUNTS:
            x = draw.normal(num_rows, num_heads, head_size)
            yield f"R={num_rows}, H={num_heads}, D={head_size}", rotate(draw, x)
        yield f"H={num_heads}, D={head_size}, norm", rotate(draw, draw.strided(7, num_heads, head_size), weight=True)
    for rotary_size in (2, 32, 66, 128):
        for weight in (False, True):
            x = draw.strided(_NUM_ROWS, 3, 128)
            name = f"{rotary_size} of 128 values{', norm' if weight else ''}, strided rows"
            yield name, rotate(draw, x, rotary_size, weight=weight)
    yield "an odd head", rotate(draw, draw.normal(5, 3, 11), 6)
    yield "large values, norm", rotate(draw, draw.normal(5, 3, 64) * 100, weight=True)


def _activate(draw: Draw) -> Cases:
    for activation in ACTIVATIONS:
        for gated in (False, True):
            name, parts = f"{activation}{', gated' if gated else ''}", 2 if gated else 1
            for num_rows in (0, 1, _NUM_ROWS):
                x = draw.normal(num_rows, parts * 192)
                yield f"R={num_rows}, F=192, {name}", {"x": x, "activation": activation, "gated": gated}
            for num_columns in (1, 97, 1500):
                x = draw.strided(_NUM_ROWS, parts * num_columns).mul_(5)
                yield f"F={num_columns}, {name}, strided rows", {"x": x, "activation": activation, "gated": gated}
        far = torch.linspace(-30, 30, 4 * 1001, device=draw.device).view(4, 1001).to(draw.dtype)
        yield f"from -30 to 30, {activation}", {"x": far, "activation": activation, "gated": False}


def _some(draw: Draw, num_listed: int = 5, num_rows: int = _NUM_ROWS) -> RowArguments:
    return RowArguments(draw, draw_rows(draw, num_listed, num_rows))


def _each_count(draw: Draw) -> Iterator[tuple[str, RowArguments]]:
    for num_listed in _LIST_LENGTHS:
        yield f"R={num_listed} of {_NUM_ROWS}", _some(draw, num_listed)


def _unusual_lists(draw: Draw) -> Iterator[tuple[str, RowArguments]]:
    shuffled = draw_rows(draw, 3, _NUM_ROWS, max_rows=7, shuffled=True)
    yield "rows in any order, fewer than their bound", RowArguments(draw, shuffled)
    rows = draw_rows(draw, 5, _NUM_ROWS)
    # One element further in memory: as the list of a layer among others.
    ids, num = (draw.guarded(torch.cat([part[:1], part]))[1:] for part in rows[:2])
    yield "a list amid others", RowArguments(draw, RowList(ids, num, rows.max_rows))


def _both_modes(cases: Cases) -> Cases:
    """Each case, and its arguments once more with fixed tiles and splits."""
    for name, arguments in cases:
        yield name, arguments
        yield f"{name}, deterministic", arguments | {"deterministic": True}


def _embed_rows(draw: Draw) -> Cases:
    for name, rows in _each_count(draw):
        yield f"{name}, C=192", rows.embed_rows(192)
    for num_columns in (1, 97, 2500):
        yield f"C={num_columns}", _some(draw).embed_rows(num_columns)
    yield "no offset", _some(draw).embed_rows(48, position_offset=0)
    for name, rows in _unusual_lists(draw):
        yield name, rows.embed_rows(48)


def _norm_rows(draw: Draw) -> Cases:
    for name, rows in _each_count(draw):
        yield f"{name}, C=192", rows.norm_rows(192)
    for num_columns in (1, 16, 97, 768):
        yield f"C={num_columns}", _some(draw).norm_rows(num_columns)
    yield "no weight, no bias", _some(draw).norm_rows(97, affine=False)
    for name, rows in _unusual_lists(draw):
        yield name, rows.norm_rows(48)
    far = _some(draw).norm_rows(192)
    far["x"] += 300
    yield "mean far from zero", far
    tiny = _some(draw).norm_rows(192)
    tiny["x"] *= 1e-3
    yield "tiny values", tiny
    for num_columns in (1, 97, 192):
        yield f"RMS, C={num_columns}", _some(draw).norm_rows(num_columns, rms=True)
    yield "RMS, no weight", _some(draw).norm_rows(97, affine=False, rms=True)


def _linear_rows(draw: Draw) -> Cases:
    for name, rows in _each_count(draw):
        yield f"{name}, N, K = 96, 192", rows.linear_rows((96, 192))
    for size in _SHAPES[1:]:
        yield f"N, K = {size[0]}, {size[1]}", _some(draw).linear_rows(size)
    yield "several tiles of rows", _some(draw, 37, 40).linear_rows((40, 64))
    yield "no norm, no bias, no ReLU", _some(draw).linear_rows((48, 96), norm=False, bias=False, activation="none")
    yield "norm without weight and bias", _some(draw).linear_rows((48, 96), affine=False)
    for name, rows in _unusual_lists(draw):
        yield name, rows.linear_rows((48, 96))
    far = _some(draw, 1).linear_rows((48, 192), activation="none")
    far["x"] += 300
    yield "mean far from zero", far
    for name, arguments in _activations(draw):
        # Products about 1: that is where activations bend, and a product of two of larger ones has large errors.
        arguments["x"] *= 0.1
        yield name, arguments


def _activations(draw: Draw) -> Cases:
    for activation in ACTIVATIONS[2:]:
        yield activation, _some(draw).linear_rows((33, 97), activation=activation)
    for activation in ACTIVATIONS:
        yield f"{activation}, gated", _some(draw).linear_rows((66, 97), norm=False, activation=activation, gated=True)
    for num_listed in _LIST_LENGTHS[1:]:
        name = f"R={num_listed} of {_NUM_ROWS}, gated, no bias"
        rows = _some(draw, num_listed)
        yield name, rows.linear_rows((96, 64), norm=False, bias=False, activation="silu", gated=True)
    yield "gated, one column", _some(draw, 1).linear_rows((2, 40), norm=False, activation="silu", gated=True)
    several = _some(draw, 37, 40)
    yield "gated, several tiles of rows", several.linear_rows((80, 64), norm=False, activation="silu", gated=True)
    yield "RMS", _some(draw).linear_rows((33, 97), activation="none", rms=True)


def _qkv_rows(draw: Draw) -> Cases:
    for name, rows in _each_count(draw):
        yield f"{name}, H, D = 2, 48", rows.qkv_rows(2, 48)
    yield "H, D = 3, 16", _some(draw).qkv_rows(3, 16)
    yield "H, D = 1, 80, no norm, no bias", _some(draw).qkv_rows(1, 80, norm=False, bias=False)
    yield "some rows not stored", _some(draw).qkv_rows(2, 48, num_stored=2)
    yield "no row stored", _some(draw).qkv_rows(2, 16, num_stored=0)
    yield "no row attends", _some(draw).qkv_rows(2, 48, num_run=0)
    yield "several tiles of rows", _some(draw, 37, 40).qkv_rows(2, 16)
    for name, rows in _unusual_lists(draw):
        yield name, rows.qkv_rows(2, 16)
    for heads in ((4, 16, 2), (6, 48, 2), (9, 7, 3), (8, 16, 1)):
        name = "H, D, G = {}, {}, {}".format(*heads)
        yield name, _some(draw).qkv_rows(*heads[:2], num_kv_heads=heads[2], hidden_size=80, rms=True)
    yield "G = 1, no row attends", _some(draw).qkv_rows(4, 16, num_run=0, num_kv_heads=1)
    yield "G = 1, some rows not stored", _some(draw).qkv_rows(4, 16, num_stored=2, num_kv_heads=1, bias=False)


def _rotate_rows(draw: Draw) -> Cases:
    for name, rows in _each_count(draw):
        yield f"{name}, H, D, G, E = 4, 16, 2, 16", rows.rotate_rows(4, 16, 2, 16)
    for heads in ((2, 64, 2, 64), (3, 80, 1, 20), (9, 12, 3, 6), (1, 2, 1, 2), (20, 128, 4, 32)):
        for norm in (False, True):
            name = "H, D, G, E = {}, {}, {}, {}".format(*heads) + (", norms" if norm else "")
            yield name, _some(draw).rotate_rows(*heads, norm=norm)
    yield "some rows not stored", _some(draw).rotate_rows(4, 16, 2, 16, num_stored=2)
    yield "no row stored", _some(draw).rotate_rows(4, 16, 2, 16, num_stored=0)
    for name, rows in _unusual_lists(draw):
        yield name, rows.rotate_rows(4, 16, 2, 8, norm=True)
    only_keys = _some(draw).rotate_rows(4, 16, 2, 16, norm=True)
    yield "no norm of queries", only_keys | {"q_weight": None}


def _place_rows(draw: Draw) -> Cases:
    for name, rows in _each_count(draw):
        yield name, rows.place_rows()
    yield "some rows not stored", _some(draw).place_rows(num_stored=2)
    yield "more rows than a block", _some(draw, 201, 203).place_rows()
    for name, rows in _unusual_lists(draw):
        yield name, rows.place_rows()


def _attend_rows(draw: Draw) -> Cases:
    def arguments(
        rows: RowArguments, num_heads: int, head_size: int, limits: list[int], sharpness: float = 1.0, **more: Any
    ) -> Arguments:
        return rows.attend_rows(num_heads, head_size, limits, max(limits) + 9, sharpness, **more)

    limits = [1, 2, 17, 63, 64, 65, 300]
    for num_heads, head_size in _HEADS:
        name = f"H={num_heads}, D={head_size}, ragged contexts"
        yield name, arguments(_some(draw, _NUM_ROWS), num_heads, head_size, limits)
    for num_listed in _LIST_LENGTHS[:-1]:
        yield f"R={num_listed} of {_NUM_ROWS}", arguments(_some(draw, num_listed), 2, 48, limits)
    for name, rows in _unusual_lists(draw):
        yield name, arguments(rows, 2, 48, limits)
    yield "sharp scores", arguments(_some(draw, _NUM_ROWS), 2, 64, limits, sharpness=20)
    yield "no context for some rows", arguments(_some(draw, _NUM_ROWS), 2, 48, [0, 5, 0, 0, 70, 1, 0])
    yield "one long context", arguments(_some(draw, 1, 1), 2, 16, [700])
    yield "many rows", arguments(_some(draw, 37, 40), 2, 16, [1 + row % 9 for row in range(40)])
    for num_heads, num_kv_heads, head_size in _GROUPED_ROWS:
        name = f"H={num_heads}, D={head_size}, G={num_kv_heads}, ragged contexts"
        yield name, arguments(_some(draw, _NUM_ROWS), num_heads, head_size, limits, num_kv_heads=num_kv_heads)
    for num_listed in _LIST_LENGTHS[1:-1]:
        yield f"R={num_listed} of {_NUM_ROWS}, G=2", arguments(_some(draw, num_listed), 4, 16, limits, num_kv_heads=2)
    limits = [1, 2, 17, 33, 64, 65, 90]
    yield "sharp scores, G=1", arguments(_some(draw, _NUM_ROWS), 4, 64, limits, sharpness=20, num_kv_heads=1)
    empty = [0, 5, 0, 0, 70, 1, 0]
    yield "no context for some rows, G=1", arguments(_some(draw, _NUM_ROWS), 3, 16, empty, num_kv_heads=1)
    for num_kv_heads in (4, 2):
        heads = f"H=4, G={num_kv_heads}"
        for words, num_listed, bias in (
            ("slopes", 3, {"slopes": True}),
            ("window", _NUM_ROWS, {"window": 40}),
            ("slopes and window", _NUM_ROWS, {"slopes": True, "window": 40}),
        ):
            rows = _some(draw, num_listed)
            yield f"{heads}, {words}", arguments(rows, 4, 16, limits, num_kv_heads=num_kv_heads, **bias)
        outside = arguments(_some(draw, _NUM_ROWS), 4, 16, limits, num_kv_heads=num_kv_heads, window=5)
        outside["position_ids"] += 1000
        yield f"{heads}, no token in the window", outside


def _linear_add_rows(draw: Draw) -> Cases:
    for name, rows in _each_count(draw):
        yield f"{name}, N, K = 96, 192", rows.linear_add_rows((96, 192))
    for size in _SHAPES[1:]:
        yield f"N, K = {size[0]}, {size[1]}", _some(draw).linear_add_rows(size)
    yield "several tiles of rows", _some(draw, 37, 40).linear_add_rows((40, 64))
    yield "no bias", _some(draw).linear_add_rows((48, 96), bias=False)
    for name, rows in _unusual_lists(draw):
        yield name, rows.linear_add_rows((48, 96))


def _gate_rows(draw: Draw) -> Cases:
    for name, rows in _each_count(draw):
        yield f"{name}, C=192", rows.gate_rows(192)
    for num_columns in (1, 97, 2500):
        yield f"C={num_columns}, no bias", _some(draw).gate_rows(num_columns, bias=False)
    for name, rows in _unusual_lists(draw):
        yield name, rows.gate_rows(48)
    ties = _some(draw, _NUM_ROWS).gate_rows(48, bias=False)
    ties["weight"][1] = ties["weight"][0]
    yield "ties", ties


def _plan_rows(draw: Draw) -> Cases:
    def arguments(
        kv_policy: int, num_rows: int, layers: tuple[int, int] = (0, 4), share: float = 0.5, absent: bool = True
    ) -> Arguments:
        num_layers, num_seqs, max_context_len, cursor = 4, num_rows + 3, 9, 1000
        first_layer, num_planned = layers
        active = (torch.rand(num_planned, num_rows, generator=draw.generator) < share).to(draw.device)
        cache_ids = draw.index(*draw.permutation(num_seqs)[:num_rows])
        if absent:
            cache_ids[draw.integers(0, num_rows, 2).long()] = -1
        # In the middle of a step some rows have run a layer before, others have not.
        row_slots = (draw.integers(-1, 2, num_rows) * 100).clamp(min=-1) if first_layer else None
        context_lens = draw.integers(0, max_context_len - 1, num_layers, num_seqs)
        free_slots = draw.index(*draw.permutation(cursor + num_planned * num_rows))
        places = (cursor, first_layer, kv_policy, cache_ids, row_slots)
        return plan_rows(draw, active, context_lens, free_slots, max_context_len, *places)

    for name, kv_policy in (("absent", ABSENT), ("evict", EVICT), ("propagate", PROPAGATE), ("share", SHARE)):
        yield f"{name}, all layers", arguments(kv_policy, _NUM_ROWS)
        yield f"{name}, first layer", arguments(kv_policy, _NUM_ROWS, (0, 1))
        yield f"{name}, a layer in between", arguments(kv_policy, _NUM_ROWS, (2, 1))
        yield f"{name}, no row runs", arguments(kv_policy, _NUM_ROWS, share=0)
        yield f"{name}, every row runs", arguments(kv_policy, _NUM_ROWS, share=1, absent=False)
        yield f"{name}, one row", arguments(kv_policy, 1, absent=False)
        yield f"{name}, more rows than threads in a warp", arguments(kv_policy, 45, (1, 3))
    yield "more rows than threads in a block", arguments(SHARE, 1100, (0, 2))


_makers: dict[str, Callable[[Draw], Cases]] = {
    "gather_layer_norm": _gather_layer_norm,
    "scatter_add": _scatter_add,
    "kv_store": _kv_store,
    "decode_attention": _decode_attention,
    "prefill_attention": _prefill_attention,
    "rotate": _rotate,
    "activate": _activate,
    "embed_rows": _embed_rows,
    "norm_rows": _norm_rows,
    "linear_rows": lambda draw: _both_modes(_linear_rows(draw)),
    "qkv_rows": lambda draw: _both_modes(_qkv_rows(draw)),
    "rotate_rows": _rotate_rows,
    "place_rows": _place_rows,
    "attend_rows": lambda draw: _both_modes(_attend_rows(draw)),
    "linear_add_rows": lambda draw: _both_modes(_linear_add_rows(draw)),
    "gate_rows": _gate_rows,
    "plan_rows": _plan_rows,
}
