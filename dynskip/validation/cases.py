"""The shapes at which every op is validated: small and awkward, with NaN wherever an op has no business to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dynskip.ops.reference import ACTIVATIONS
from dynskip.ops.row_reference import ABSENT, EVICT, PROPAGATE, SHARE
from dynskip.validation import op_arguments
from dynskip.validation.op_arguments import NormKind, RowArguments, draw_rows
from dynskip.validation.tensors import Arguments, Case, Draw

Cases = Iterator[tuple[str, Arguments]]


def make_cases(op: str, dtype: torch.dtype, device: torch.device | str) -> list[Case]:
    """The cases of `op` in `dtype` on `device`; the same at every call."""
    draw = Draw(dtype, torch.device(device))
    cases = _row_cases(op, draw) if op in _ROW_CASES else _MAKERS[op](draw)
    return [Case(op, name, arguments) for name, arguments in cases]


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


def _amid_nan(draw: Draw, num_chosen: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Rows of which `num_chosen` hold numbers, and their ids."""
    row_ids, x = draw.row_ids(num_chosen, _NUM_ROWS), draw.nan(_NUM_ROWS, num_columns)
    x[row_ids.long()] = draw.normal(num_chosen, num_columns)
    return x, row_ids


def _gather_layer_norm(draw: Draw) -> Cases:
    make, rows = partial(op_arguments.gather_layer_norm, draw), partial(draw.normal, _NUM_ROWS)
    for num_columns in (1, 16, 97, 192, 768):
        yield f"all rows, C={num_columns}", make(rows(num_columns), None)
        for num_chosen in _ROW_COUNTS:
            name = f"R={num_chosen} of {_NUM_ROWS}, C={num_columns}, NaN in other rows"
            yield name, make(*_amid_nan(draw, num_chosen, num_columns))
    yield "strided rows", make(draw.strided(_NUM_ROWS, 97), draw.row_ids(5, _NUM_ROWS))
    yield "strided rows, all", make(draw.strided(_NUM_ROWS, 192), None)
    yield "rows in any order", make(rows(192), draw.index(*draw.permutation(_NUM_ROWS)))
    yield "no weight, no bias", make(rows(97), draw.row_ids(5, _NUM_ROWS), affine=False)
    yield "no bias", make(rows(97), None) | {"bias": None}
    yield "constant rows", make(rows(1).expand(-1, 192).contiguous(), None)
    yield "mean far from zero", make(rows(192) + 300, None)
    yield "tiny values", make(rows(192) * 1e-3, None)
    for num_chosen in _ROW_COUNTS:
        x, row_ids = _amid_nan(draw, num_chosen, 192)
        yield f"R={num_chosen} of {_NUM_ROWS}, RMS", make(x + 1, row_ids, rms=True) | {"bias": None}
    for num_columns in (1, 16, 97, 768):
        x = draw.strided(_NUM_ROWS, num_columns)
        yield f"RMS with a bias, strided rows, C={num_columns}", make(x, None, rms=True)
    yield "RMS alone", make(rows(97) * 1e-3, None, affine=False, rms=True)


def _scatter_add(draw: Draw) -> Cases:
    for num_columns in (1, 16, 97, 192, 1500):
        x, y = draw.normal(_NUM_ROWS, num_columns), draw.normal(_NUM_ROWS, num_columns)
        yield f"all rows, C={num_columns}", {"x": x, "row_ids": None, "y": y}
        for num_chosen in _ROW_COUNTS:
            x, row_ids = _amid_nan(draw, num_chosen, num_columns)
            name = f"R={num_chosen} of {_NUM_ROWS}, C={num_columns}, NaN in other rows"
            yield name, {"x": x, "row_ids": row_ids, "y": draw.normal(num_chosen, num_columns)}
    yield "strided x", {"x": draw.strided(7, 97), "row_ids": draw.row_ids(5, 7), "y": draw.normal(5, 97)}
    yield "strided y", {"x": draw.normal(7, 97), "row_ids": draw.row_ids(5, 7), "y": draw.strided(5, 97)}
    yield "strided, all rows", {"x": draw.strided(7, 192), "row_ids": None, "y": draw.strided(7, 192)}
    yield "any order", {"x": draw.normal(7, 192), "row_ids": draw.index(*draw.permutation(7)), "y": draw.normal(7, 192)}


def _kv_store(draw: Draw) -> Cases:
    make = partial(op_arguments.kv_store, draw)
    for num_heads, head_size in _HEADS:
        for num_rows in _ROW_COUNTS:
            name = f"R={num_rows}, H={num_heads}, D={head_size}, slots in any order"
            yield name, make(num_heads, head_size, draw.permutation(2 * _NUM_ROWS)[:num_rows])
    some = [slot if slot % 3 else -1 for slot in draw.permutation(2 * _NUM_ROWS)[:_NUM_ROWS]]
    yield "some rows not stored", make(3, 48, some)
    yield "no row stored", make(3, 48, [-1] * 5)
    yield "contiguous rows", make(4, 16, draw.permutation(2 * _NUM_ROWS)[:_NUM_ROWS], projection=False)
    yield "more values than a block", make(20, 80, draw.permutation(2 * _NUM_ROWS)[:3])


def _decode_attention(draw: Draw) -> Cases:
    decode, lengths = partial(op_arguments.decode_attention, draw), [1, 2, 17, 63, 64, 65, 131]
    every = list(range(len(lengths)))
    for num_heads, head_size in _HEADS:
        yield f"H={num_heads}, D={head_size}, ragged contexts", decode(num_heads, head_size, lengths, every)
    for num_rows in (0, 1, len(lengths) - 1):
        seq_ids = sorted(draw.permutation(len(lengths))[:num_rows])
        yield f"R={num_rows} of {len(lengths)}", decode(2, 48, lengths, seq_ids)
    yield "rows in any order", decode(2, 48, lengths, draw.permutation(len(lengths)))
    yield "sharp scores", decode(2, 64, lengths, every, sharpness=20)
    empty = decode(2, 48, [5, 3, 70], [0, 1, 2])
    yield "no context for one row", empty | {"context_lens": draw.index(5, 0, 70)}
    shared = decode(2, 48, [33, 33], [0, 1])
    shared["slot_table"][1, :20] = shared["slot_table"][0, 5:25]
    yield "slots shared by two sequences", shared
    shorter = decode(2, 48, [9, 40], [1, 1, 0])
    yield "two rows of one sequence, part of its context", shorter | {"context_lens": draw.index(40, 39, 3)}

    for num_heads, num_kv_heads, head_size in _GROUPS:
        name = f"H={num_heads}, G={num_kv_heads}, D={head_size}"
        make = partial(decode, num_heads, head_size, lengths, every, num_kv_heads=num_kv_heads)
        yield name, make()
        yield f"{name}, slopes", make(slopes=True)
        yield f"{name}, a window", make(window=50)
    both = decode(4, 64, [*lengths, 300], [0, 7, 3], slopes=True, window=140, num_kv_heads=2)
    yield "slopes and a window, rows in any order", both
    far = decode(2, 48, lengths, every, window=3)
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
    prefill = partial(op_arguments.prefill_attention, draw)
    for num_heads, head_size in _HEADS:
        name = f"H={num_heads}, D={head_size}, causal, ragged"
        yield name, prefill(num_heads, head_size, [1, 7, 33, 67], strided=head_size == 64)
    yield "one sequence of one token", prefill(2, 48, [1])
    yield "no sequence", prefill(2, 48, [])
    yield "sequences without tokens", prefill(2, 48, [0, 5, 0, 0, 3, 0])
    yield "tile edges", prefill(2, 16, [31, 32, 33, 63, 64, 65])
    yield "strided rows", prefill(2, 48, [5, 37], strided=True)
    yield "sharp scores", prefill(2, 64, [5, 37], sharpness=20)
    yield "fewer queries than keys", prefill(2, 48, [40, 9], [[38, 39, 40], [9]])
    yield "more queries than keys", prefill(2, 48, [2, 3], [[0, 1, 1, 2], [0, 0, 3]])
    yield "queries without keys", prefill(2, 48, [0, 3], [[0, 0], [1, 2, 3]])
    yield "some queries missing", prefill(2, 48, [70], [[1, 2, 5, 33, 34, 64, 65, 70]])
    yield "limits that do not increase", prefill(2, 48, [33], [[33, 1, 17, 0, 32, 5]])
    for num_heads, num_kv_heads, head_size in _GROUPS:
        name, lengths = f"H={num_heads}, G={num_kv_heads}, D={head_size}", [1, 7, 67]
        make = partial(prefill, num_heads, head_size, lengths, num_kv_heads=num_kv_heads)
        yield name, make(strided=True)
        yield f"{name}, slopes", make(slopes=True)
        yield f"{name}, a window", make(window=20)
    yield "a window that nothing is outside of", prefill(2, 48, [5, 37], window=200)
    missing = [[0, 1, 2, 5, 33, 34, 64, 65, 70], [0, 0]]
    some = prefill(4, 64, [70, 3], missing, slopes=True, window=40, num_kv_heads=2)
    yield "slopes and a window, some queries missing", some
    far = prefill(2, 48, [9, 4], window=4)
    far["position_ids"][::2] += 9
    yield "no key within the window of some queries", far


def _rotate(draw: Draw) -> Cases:
    make = partial(op_arguments.rotate, draw)
    for num_heads, head_size in _HEADS:
        for num_rows in _ROW_COUNTS:
            x = draw.normal(num_rows, num_heads, head_size)
            yield f"R={num_rows}, H={num_heads}, D={head_size}", make(x)
        yield f"H={num_heads}, D={head_size}, norm", make(draw.strided(7, num_heads, head_size), weight=True)
    for rotary_size in (2, 32, 66, 128):
        for weight in (False, True):
            x = draw.strided(_NUM_ROWS, 3, 128)
            name = f"{rotary_size} of 128 values{', norm' if weight else ''}, strided rows"
            yield name, make(x, rotary_size, weight=weight)
    yield "an odd head", make(draw.normal(5, 3, 11), 6)
    yield "large values, norm", make(draw.normal(5, 3, 64) * 100, weight=True)


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


# The name of a case of a row op, and what makes the op's arguments.
RowCase = tuple[str, Callable[[str, Draw], Arguments]]
# How a list of rows is drawn that is not as most are.
_UNUSUAL_LISTS: dict[str, tuple[Any, ...]] = {
    "rows in any order, fewer than their bound": (3, _NUM_ROWS, _NUM_ROWS, True),
    "a list amid others": (5, _NUM_ROWS, None, False, 1),
}


def _case(
    name: str,
    *arguments: Any,
    rows: tuple[Any, ...] = (5, _NUM_ROWS),
    change: Callable[[Arguments], object] = lambda made: None,
    **options: Any,
) -> RowCase:
    """The case that `RowArguments` makes of `arguments` and `options`.

    rows: what `draw_rows` makes the list of. change: of the arguments, in place.
    """

    def make(op: str, draw: Draw) -> Arguments:
        made: Arguments = getattr(RowArguments(draw, draw_rows(draw, *rows)), op)(*arguments, **options)
        change(made)
        return made

    return name, make


def _each_count(end: str, *arguments: Any, lengths: tuple[int, ...] = _LIST_LENGTHS, **options: Any) -> list[RowCase]:
    """A case for each length of a list; `end` ends its name."""
    return [_case(f"R={num} of {_NUM_ROWS}{end}", *arguments, rows=(num, _NUM_ROWS), **options) for num in lengths]


def _unusual_lists(*arguments: Any, **options: Any) -> list[RowCase]:
    return [_case(name, *arguments, rows=rows, **options) for name, rows in _UNUSUAL_LISTS.items()]


def _attend_cases() -> Iterator[RowCase]:
    limits, whole = [1, 2, 17, 63, 64, 65, 300], (_NUM_ROWS, _NUM_ROWS)
    for heads in _HEADS:
        yield _case("H={}, D={}, ragged contexts".format(*heads), *heads, limits, rows=whole)
    yield from _each_count("", 2, 48, limits, lengths=_LIST_LENGTHS[:-1])
    yield from _unusual_lists(2, 48, limits)
    yield _case("sharp scores", 2, 64, limits, sharpness=20, rows=whole)
    empty = [0, 5, 0, 0, 70, 1, 0]
    yield _case("no context for some rows", 2, 48, empty, rows=whole)
    yield _case("one long context", 2, 16, [700], rows=(1, 1))
    yield _case("many rows", 2, 16, [1 + row % 9 for row in range(40)], rows=(37, 40))
    for num_heads, num_kv_heads, head_size in _GROUPED_ROWS:
        name = f"H={num_heads}, D={head_size}, G={num_kv_heads}, ragged contexts"
        yield _case(name, num_heads, head_size, limits, num_kv_heads=num_kv_heads, rows=whole)
    yield from _each_count(", G=2", 4, 16, limits, num_kv_heads=2, lengths=_LIST_LENGTHS[1:-1])
    limits = [1, 2, 17, 33, 64, 65, 90]
    yield _case("sharp scores, G=1", 4, 64, limits, sharpness=20, num_kv_heads=1, rows=whole)
    yield _case("no context for some rows, G=1", 3, 16, empty, num_kv_heads=1, rows=whole)
    for num_kv_heads in (4, 2):
        make = partial(_case, num_kv_heads=num_kv_heads, rows=whole)
        name = f"H=4, G={num_kv_heads}"
        yield make(f"{name}, slopes", 4, 16, limits, slopes=True, rows=(3, _NUM_ROWS))
        yield make(f"{name}, window", 4, 16, limits, window=40)
        yield make(f"{name}, slopes and window", 4, 16, limits, slopes=True, window=40)
        name += ", no token in the window"
        yield make(name, 4, 16, limits, window=5, change=lambda made: made["position_ids"].add_(1000))


def _activation_cases() -> Iterator[RowCase]:
    # Products about 1: that is where activations bend, and a product of two of larger ones has large errors.
    make = partial(_case, change=lambda made: made["x"].mul_(0.1))
    gated = partial(make, norm=None, activation="silu", gated=True)
    for activation in ACTIVATIONS[2:]:
        yield make(activation, (33, 97), activation=activation)
    for activation in ACTIVATIONS:
        yield gated(f"{activation}, gated", (66, 97), activation=activation)
    for num_listed in _LIST_LENGTHS[1:]:
        name = f"R={num_listed} of {_NUM_ROWS}, gated, no bias"
        yield gated(name, (96, 64), bias=False, rows=(num_listed, _NUM_ROWS))
    yield gated("gated, one column", (2, 40), rows=(1, _NUM_ROWS))
    yield gated("gated, several tiles of rows", (80, 64), rows=(37, 40))
    yield make("RMS", (33, 97), activation="none", norm=NormKind(rms=True))


_ROW_CASES: dict[str, list[RowCase]] = {
    "embed_rows": [
        *_each_count(", C=192", 192),
        *(_case(f"C={num_columns}", num_columns) for num_columns in (1, 97, 2500)),
        _case("no offset", 48, position_offset=0),
        *_unusual_lists(48),
    ],
    "norm_rows": [
        *_each_count(", C=192", 192),
        *(_case(f"C={num_columns}", num_columns) for num_columns in (1, 16, 97, 768)),
        _case("no weight, no bias", 97, NormKind(affine=False)),
        *_unusual_lists(48),
        _case("mean far from zero", 192, change=lambda made: made["x"].add_(300)),
        _case("tiny values", 192, change=lambda made: made["x"].mul_(1e-3)),
        *(_case(f"RMS, C={num_columns}", num_columns, NormKind(rms=True)) for num_columns in (1, 97, 192)),
        _case("RMS, no weight", 97, NormKind(affine=False, rms=True)),
    ],
    "linear_rows": [
        *_each_count(", N, K = 96, 192", (96, 192)),
        *(_case("N, K = {}, {}".format(*matrix), matrix) for matrix in _SHAPES[1:]),
        _case("several tiles of rows", (40, 64), rows=(37, 40)),
        _case("no norm, no bias, no ReLU", (48, 96), norm=None, bias=False, activation="none"),
        _case("norm without weight and bias", (48, 96), norm=NormKind(affine=False)),
        *_unusual_lists((48, 96)),
        _case(
            "mean far from zero",
            (48, 192),
            activation="none",
            rows=(1, _NUM_ROWS),
            change=lambda made: made["x"].add_(300),
        ),
        *_activation_cases(),
    ],
    "qkv_rows": [
        *_each_count(", H, D = 2, 48", 2, 48),
        _case("H, D = 3, 16", 3, 16),
        _case("H, D = 1, 80, no norm, no bias", 1, 80, norm=None, bias=False),
        _case("some rows not stored", 2, 48, num_stored=2),
        _case("no row stored", 2, 16, num_stored=0),
        _case("no row attends", 2, 48, num_run=0),
        _case("several tiles of rows", 2, 16, rows=(37, 40)),
        *_unusual_lists(2, 16),
        *(
            _case(f"H, D, G = {h}, {d}, {g}", h, d, num_kv_heads=g, hidden_size=80, norm=NormKind(rms=True))
            for h, d, g in ((4, 16, 2), (6, 48, 2), (9, 7, 3), (8, 16, 1))
        ),
        _case("G = 1, no row attends", 4, 16, num_run=0, num_kv_heads=1),
        _case("G = 1, some rows not stored", 4, 16, num_stored=2, num_kv_heads=1, bias=False),
    ],
    "rotate_rows": [
        *_each_count(", H, D, G, E = 4, 16, 2, 16", 4, 16, 2, 16),
        *(
            _case("H, D, G, E = {}, {}, {}, {}{}".format(*heads, ", norms" if norm else ""), *heads, norm=norm)
            for heads in ((2, 64, 2, 64), (3, 80, 1, 20), (9, 12, 3, 6), (1, 2, 1, 2), (20, 128, 4, 32))
            for norm in (False, True)
        ),
        _case("some rows not stored", 4, 16, 2, 16, num_stored=2),
        _case("no row stored", 4, 16, 2, 16, num_stored=0),
        *_unusual_lists(4, 16, 2, 8, norm=True),
        _case("no norm of queries", 4, 16, 2, 16, norm=True, change=lambda made: made.update(q_weight=None)),
    ],
    "place_rows": [
        *_each_count(""),
        _case("some rows not stored", num_stored=2),
        _case("more rows than a block", rows=(201, 203)),
        *_unusual_lists(),
    ],
    "attend_rows": [*_attend_cases()],
    "linear_add_rows": [
        *_each_count(", N, K = 96, 192", (96, 192)),
        *(_case("N, K = {}, {}".format(*matrix), matrix) for matrix in _SHAPES[1:]),
        _case("several tiles of rows", (40, 64), rows=(37, 40)),
        _case("no bias", (48, 96), bias=False),
        *_unusual_lists((48, 96)),
    ],
    "gate_rows": [
        *_each_count(", C=192", 192),
        *(_case(f"C={num_columns}, no bias", num_columns, bias=False) for num_columns in (1, 97, 2500)),
        *_unusual_lists(48),
        _case(
            "ties",
            48,
            bias=False,
            rows=(_NUM_ROWS, _NUM_ROWS),
            change=lambda made: made["weight"][1].copy_(made["weight"][0]),
        ),
    ],
}
# Those of which each case comes once more with fixed tiles and splits.
_WITH_MODES = ("linear_rows", "qkv_rows", "attend_rows", "linear_add_rows")


def _row_cases(op: str, draw: Draw) -> Cases:
    for name, make in _ROW_CASES[op]:
        arguments = make(op, draw)
        yield name, arguments
        if op in _WITH_MODES:
            yield f"{name}, deterministic", arguments | {"deterministic": True}


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
        return op_arguments.plan_rows(draw, active, context_lens, free_slots, max_context_len, *places)

    for name, kv_policy in (("absent", ABSENT), ("evict", EVICT), ("propagate", PROPAGATE), ("share", SHARE)):
        yield f"{name}, all layers", arguments(kv_policy, _NUM_ROWS)
        yield f"{name}, first layer", arguments(kv_policy, _NUM_ROWS, (0, 1))
        yield f"{name}, a layer in between", arguments(kv_policy, _NUM_ROWS, (2, 1))
        yield f"{name}, no row runs", arguments(kv_policy, _NUM_ROWS, share=0)
        yield f"{name}, every row runs", arguments(kv_policy, _NUM_ROWS, share=1, absent=False)
        yield f"{name}, one row", arguments(kv_policy, 1, absent=False)
        yield f"{name}, more rows than threads in a warp", arguments(kv_policy, 45, (1, 3))
    yield "more rows than threads in a block", arguments(SHARE, 1100, (0, 2))


_MAKERS: dict[str, Callable[[Draw], Cases]] = {
    "gather_layer_norm": _gather_layer_norm,
    "scatter_add": _scatter_add,
    "kv_store": _kv_store,
    "decode_attention": _decode_attention,
    "prefill_attention": _prefill_attention,
    "rotate": _rotate,
    "activate": _activate,
    "plan_rows": _plan_rows,
}
