"""The shapes at which every op is validated: small and awkward, with NaN wherever an op has no business to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from dynskip.ops.reference import ACTIVATIONS
from dynskip.validation.op_arguments import decode_attention, gather_layer_norm, kv_store, prefill_attention, rotate
from dynskip.validation.row_cases import ROW_CASE_MAKERS
from dynskip.validation.tensors import Arguments, Case, Draw


def make_cases(op: str, dtype: torch.dtype, device: torch.device | str) -> list[Case]:
    """The cases of `op` in `dtype` on `device`; the same at every call."""
    draw = Draw(dtype, torch.device(device))
    return [Case(op, name, arguments) for name, arguments in (_makers | ROW_CASE_MAKERS)[op](draw)]


_NUM_ROWS = 7
_ROW_COUNTS = (0, 1, _NUM_ROWS - 1, _NUM_ROWS)
# Heads and head sizes: OPT's 64, 80 and 128, opt-mini's 48 and the smallest, with odd and even numbers of heads.
_HEADS = ((3, 16), (2, 48), (2, 64), (3, 80), (1, 128))

# Query heads that share key-value heads, and key-value heads: Llama's, SmolLM's, one for all, and groups of five.
_GROUPS = ((8, 2, 64), (9, 3, 64), (4, 1, 128), (10, 2, 48), (6, 2, 20))


def _gather_layer_norm(draw: Draw) -> Iterator[tuple[str, Arguments]]:
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


def _scatter_add(draw: Draw) -> Iterator[tuple[str, Arguments]]:
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


def _kv_store(draw: Draw) -> Iterator[tuple[str, Arguments]]:
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


def _decode_attention(draw: Draw) -> Iterator[tuple[str, Arguments]]:
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


def _prefill_attention(draw: Draw) -> Iterator[tuple[str, Arguments]]:
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


def _rotate(draw: Draw) -> Iterator[tuple[str, Arguments]]:
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


def _activate(draw: Draw) -> Iterator[tuple[str, Arguments]]:
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


_makers: dict[str, Callable[[Draw], Iterator[tuple[str, Arguments]]]] = {
    "gather_layer_norm": _gather_layer_norm,
    "scatter_add": _scatter_add,
    "kv_store": _kv_store,
    "decode_attention": _decode_attention,
    "prefill_attention": _prefill_attention,
    "rotate": _rotate,
    "activate": _activate,
}
