"""The shapes at which the row ops are validated: see `validation_cases`.

What a list does not name holds NaN where an op might read it, numbers where an op might write it, and the other way
round what it does name: so that a row too many is seen, and an element too few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dynskip.kernels.row_list import RowList, RowNorm
from dynskip.ops.row_reference import ABSENT, EVICT, PROPAGATE, SHARE
from dynskip.validation.tensors import Arguments, Draw

_NUM_ROWS = 7
_ROW_COUNTS = (0, 1, 5, _NUM_ROWS)
_HEADS = ((3, 16), (2, 48), (2, 64), (3, 80), (1, 128))
_POISON = -77


def _row_list(
    draw: Draw, num_listed: int, num_rows: int = _NUM_ROWS, max_rows: int | None = None, shuffled: bool = False
) -> RowList:
    """Some of `num_rows` rows, increasing unless `shuffled`; behind `max_rows` in `ids` stand others."""
    permutation = draw.permutation(num_rows)
    listed = permutation[:num_listed] if shuffled else sorted(permutation[:num_listed])
    bucket = 1
    while bucket < num_listed:
        bucket *= 2
    max_rows = min(bucket, num_rows) if max_rows is None else max_rows
    ends = [-1] * (max_rows - num_listed)
    ids = draw.guarded(draw.index(*listed, *ends, *permutation[max_rows:]), _POISON)
    return RowList(ids, draw.guarded(draw.index(num_listed), _POISON), max_rows)


def _misaligned(draw: Draw, rows: RowList) -> RowList:
    """The same list, one element further in memory: as that of a layer among others."""
    ids, num = (draw.guarded(torch.cat([part[:1], part]), _POISON)[1:] for part in rows[:2])
    return RowList(ids, num, rows.max_rows)


def _listed(rows: RowList) -> Tensor:
    return rows.ids[: int(rows.num)].long()


def _input(draw: Draw, rows: RowList, num_columns: int) -> Tensor:
    """`[M, num_columns]`, numbers in the listed rows, NaN elsewhere."""
    ids = _listed(rows)
    x = draw.nan(rows.ids.shape[0], num_columns)
    x[ids] = draw.normal(len(ids), num_columns)
    return draw.guarded(x)


def _output(draw: Draw, rows: RowList, num_columns: int) -> Tensor:
    """`[M, num_columns]`, NaN in the listed rows, numbers elsewhere."""
    out = draw.normal(rows.ids.shape[0], num_columns)
    out[_listed(rows)] = float("nan")
    return draw.guarded(out, filler=7.0)


def _norm(draw: Draw, num_columns: int, affine: bool = True) -> RowNorm:
    return RowNorm(draw.normal(num_columns), draw.normal(num_columns), 1e-5) if affine else RowNorm(None, None, 1e-5)


def _embed_rows(draw: Draw) -> Iterator[tuple[str, Arguments]]:
    def arguments(rows: RowList, num_columns: int, position_offset: int = 2) -> Arguments:
        num_rows, num_tokens, num_positions = rows.ids.shape[0], 11, 13
        token_ids = torch.tensor([draw.permutation(num_tokens)[0] for _ in range(num_rows)], device=draw.device)
        position_ids = torch.tensor(
            [draw.permutation(num_positions - position_offset)[0] for _ in range(num_rows)], device=draw.device
        )
        return {
            "token_ids": token_ids,
            "position_ids": position_ids,
            "rows": rows,
            "token_table": draw.guarded(draw.normal(num_tokens, num_columns)),
            "position_table": draw.guarded(draw.normal(num_positions, num_columns)),
            "position_offset": position_offset,
            "out": _output(draw, rows, num_columns),
        }

    for num_listed in _ROW_COUNTS:
        yield f"R={num_listed} of {_NUM_ROWS}, C=192", arguments(_row_list(draw, num_listed), 192)
    for num_columns in (1, 97, 2500):
        yield f"C={num_columns}", arguments(_row_list(draw, 5), num_columns)
    yield "no offset", arguments(_row_list(draw, 5), 48, position_offset=0)
    yield "rows in any order, fewer than their bound", arguments(_row_list(draw, 3, max_rows=7, shuffled=True), 48)
    yield "a list amid others", arguments(_misaligned(draw, _row_list(draw, 5)), 48)


def _norm_rows(draw: Draw) -> Iterator[tuple[str, Arguments]]:
    def arguments(rows: RowList, num_columns: int, affine: bool = True) -> Arguments:
        norm = _norm(draw, num_columns, affine)
        return {
            "x": _input(draw, rows, num_columns),
            "rows": rows,
            "norm": norm,
            "out": _output(draw, rows, num_columns),
        }

    for num_listed in _ROW_COUNTS:
        yield f"R={num_listed} of {_NUM_ROWS}, C=192", arguments(_row_list(draw, num_listed), 192)
    for num_columns in (1, 16, 97, 768):
        yield f"C={num_columns}", arguments(_row_list(draw, 5), num_columns)
    yield "no weight, no bias", arguments(_row_list(draw, 5), 97, affine=False)
    yield "rows in any order, fewer than their bound", arguments(_row_list(draw, 3, max_rows=7, shuffled=True), 48)
    yield "a list amid others", arguments(_misaligned(draw, _row_list(draw, 5)), 48)
    far = arguments(_row_list(draw, 5), 192)
    far["x"] += 300
    yield "mean far from zero", far
    tiny = arguments(_row_list(draw, 5), 192)
    tiny["x"] *= 1e-3
    yield "tiny values", tiny


# Of matrices, [N, K]: OPT's own are multiples of 64; tiles of the kernels are 16 to 128 wide.
_SHAPES = ((96, 192), (33, 97), (130, 130), (16, 600))


def _both_modes(cases: Iterator[tuple[str, Arguments]]) -> Iterator[tuple[str, Arguments]]:
    """Each case, and its arguments once more with fixed tiles and splits."""
    for name, arguments in cases:
        yield name, arguments | {"deterministic": False}
        yield f"{name}, deterministic", arguments | {"deterministic": True}


def _linear_rows(draw: Draw) -> Iterator[tuple[str, Arguments]]:
    def arguments(
        rows: RowList,
        size: tuple[int, int],
        norm: bool = True,
        bias: bool = True,
        relu: bool = True,
        affine: bool = True,
    ) -> Arguments:
        num_outputs, num_inputs = size
        return {
            "x": _input(draw, rows, num_inputs),
            "rows": rows,
            "norm": _norm(draw, num_inputs, affine) if norm else None,
            "weight": draw.guarded(draw.normal(num_outputs, num_inputs)),
            "bias": draw.normal(num_outputs) if bias else None,
            "relu": relu,
            "out": _output(draw, rows, num_outputs),
            "normed": draw.nan(rows.ids.shape[0], num_inputs),
        }

    for num_listed in _ROW_COUNTS:
        yield f"R={num_listed} of {_NUM_ROWS}, N, K = 96, 192", arguments(_row_list(draw, num_listed), (96, 192))
    for size in _SHAPES[1:]:
        yield f"N, K = {size[0]}, {size[1]}", arguments(_row_list(draw, 5), size)
    yield "several tiles of rows", arguments(_row_list(draw, 37, 40), (40, 64))
    yield "no norm, no bias, no ReLU", arguments(_row_list(draw, 5), (48, 96), norm=False, bias=False, relu=False)
    yield "norm without weight and bias", arguments(_row_list(draw, 5), (48, 96), affine=False)
    yield (
        "rows in any order, fewer than their bound",
        arguments(_row_list(draw, 3, max_rows=7, shuffled=True), (48, 96)),
    )
    yield "a list amid others", arguments(_misaligned(draw, _row_list(draw, 5)), (48, 96))
    far = arguments(_row_list(draw, 1), (48, 192), relu=False)
    far["x"] += 300
    yield "mean far from zero", far


def _qkv_rows(draw: Draw) -> Iterator[tuple[str, Arguments]]:
    def arguments(
        rows: RowList,
        num_heads: int,
        head_size: int,
        num_stored: int | None = None,
        num_run: int = 1,
        norm: bool = True,
    ) -> Arguments:
        num_rows, size, num_slots = rows.ids.shape[0], num_heads * head_size, 2 * rows.ids.shape[0] + 3
        # Rows outside of the list have slots, too: nothing may be stored there.
        slots = draw.index(*draw.permutation(num_slots)[:num_rows])
        if num_stored is not None:
            slots[_listed(rows)[num_stored:]] = -1
        k_cache, v_cache = (draw.guarded(draw.normal(num_slots, num_heads, head_size), 7.0) for _ in range(2))
        targets = slots[_listed(rows)].long()
        for cache in (k_cache, v_cache):
            cache[targets[targets >= 0]] = float("nan")
        return {
            "x": _input(draw, rows, size),
            "rows": rows,
            "num_run": draw.index(num_run),
            "norm": _norm(draw, size) if norm else None,
            "weight": draw.guarded(draw.normal(3 * size, size)),
            "bias": draw.normal(3 * size) if norm else None,
            "q": _output(draw, rows, size),
            "k_cache": k_cache,
            "v_cache": v_cache,
            "slots": draw.guarded(slots, _POISON),
            "normed": draw.nan(num_rows, size),
        }

    for num_listed in _ROW_COUNTS:
        yield f"R={num_listed} of {_NUM_ROWS}, H, D = 2, 48", arguments(_row_list(draw, num_listed), 2, 48)
    yield "H, D = 3, 16", arguments(_row_list(draw, 5), 3, 16)
    yield "H, D = 1, 80, no norm, no bias", arguments(_row_list(draw, 5), 1, 80, norm=False)
    yield "some rows not stored", arguments(_row_list(draw, 5), 2, 48, num_stored=2)
    yield "no row stored", arguments(_row_list(draw, 5), 2, 16, num_stored=0)
    yield "no row attends", arguments(_row_list(draw, 5), 2, 48, num_run=0)
    yield "several tiles of rows", arguments(_row_list(draw, 37, 40), 2, 16)
    yield "rows in any order, fewer than their bound", arguments(_row_list(draw, 3, max_rows=7, shuffled=True), 2, 16)
    yield "a list amid others", arguments(_misaligned(draw, _row_list(draw, 5)), 2, 16)


def _attend_rows(draw: Draw) -> Iterator[tuple[str, Arguments]]:
    def arguments(
        rows: RowList, num_heads: int, head_size: int, limits: list[int], sharpness: float = 1.0
    ) -> Arguments:
        num_rows, size = rows.ids.shape[0], num_heads * head_size
        assert len(limits) == num_rows
        num_seqs, ids = num_rows + 2, _listed(rows)
        seq_ids = draw.index(*draw.permutation(num_seqs)[:num_rows])
        used = [limits[row] for row in ids.tolist()]
        num_slots = sum(used) + 5
        k_cache, v_cache = (draw.nan(num_slots, num_heads, head_size) for _ in range(2))
        free = draw.permutation(num_slots - 1)
        # A table's entries behind the limit, and all of the tables of other sequences, name no slot: taken as an index
        # from the end, they lead to NaN.
        slot_table = draw.index(*[-1] * (num_seqs * (max(limits) + 9))).view(num_seqs, -1)
        for row, limit in zip(ids.tolist(), used, strict=True):
            slots, free = draw.index(*free[:limit]), free[limit:]
            slot_table[seq_ids[row], :limit] = slots
            for cache in (k_cache, v_cache):
                cache[slots.long()] = draw.normal(limit, num_heads, head_size)
        return {
            "q": _input(draw, rows, size),
            "rows": rows,
            "k_cache": draw.guarded(k_cache),
            "v_cache": draw.guarded(v_cache),
            "slot_table": slot_table,
            "seq_ids": draw.guarded(seq_ids, _POISON),
            "key_limits": draw.guarded(draw.index(*limits), _POISON),
            "scale": sharpness * head_size**-0.5,
            "out": _output(draw, rows, size),
            "workspace": None,
        }

    limits = [1, 2, 17, 63, 64, 65, 300]
    for num_heads, head_size in _HEADS:
        name = f"H={num_heads}, D={head_size}, ragged contexts"
        yield name, arguments(_row_list(draw, _NUM_ROWS), num_heads, head_size, limits)
    for num_listed in _ROW_COUNTS[:-1]:
        yield f"R={num_listed} of {_NUM_ROWS}", arguments(_row_list(draw, num_listed), 2, 48, limits)
    yield (
        "rows in any order, fewer than their bound",
        arguments(_row_list(draw, 3, max_rows=7, shuffled=True), 2, 48, limits),
    )
    yield "a list amid others", arguments(_misaligned(draw, _row_list(draw, 5)), 2, 48, limits)
    yield "sharp scores", arguments(_row_list(draw, _NUM_ROWS), 2, 64, limits, sharpness=20)
    yield "no context for some rows", arguments(_row_list(draw, _NUM_ROWS), 2, 48, [0, 5, 0, 0, 70, 1, 0])
    yield "one long context", arguments(_row_list(draw, 1, 1), 2, 16, [700])
    yield "many rows", arguments(_row_list(draw, 37, 40), 2, 16, [1 + row % 9 for row in range(40)])


def _linear_add_rows(draw: Draw) -> Iterator[tuple[str, Arguments]]:
    def arguments(rows: RowList, size: tuple[int, int], bias: bool = True) -> Arguments:
        num_outputs, num_inputs = size
        return {
            "x": _input(draw, rows, num_inputs),
            "rows": rows,
            "weight": draw.guarded(draw.normal(num_outputs, num_inputs)),
            "bias": draw.normal(num_outputs) if bias else None,
            "residual": draw.guarded(draw.normal(rows.ids.shape[0], num_outputs), filler=7.0),
            "workspace": None,
        }

    for num_listed in _ROW_COUNTS:
        yield f"R={num_listed} of {_NUM_ROWS}, N, K = 96, 192", arguments(_row_list(draw, num_listed), (96, 192))
    for size in _SHAPES[1:]:
        yield f"N, K = {size[0]}, {size[1]}", arguments(_row_list(draw, 5), size)
    yield "several tiles of rows", arguments(_row_list(draw, 37, 40), (40, 64))
    yield "no bias", arguments(_row_list(draw, 5), (48, 96), bias=False)
    yield (
        "rows in any order, fewer than their bound",
        arguments(_row_list(draw, 3, max_rows=7, shuffled=True), (48, 96)),
    )
    yield "a list amid others", arguments(_misaligned(draw, _row_list(draw, 5)), (48, 96))


def _gate_rows(draw: Draw) -> Iterator[tuple[str, Arguments]]:
    def arguments(rows: RowList, num_columns: int, bias: bool = True) -> Arguments:
        """Small integers: their products and sums are exact, whatever the order, and ties are ties."""
        num_rows, ids = rows.ids.shape[0], _listed(rows)

        def integers(*shape: int) -> Tensor:
            return torch.randint(-3, 4, shape, generator=draw.generator).to(draw.device, torch.float32)

        weight = integers(2, num_columns)
        x = draw.nan(num_rows, num_columns)
        x[ids] = integers(len(ids), num_columns).to(draw.dtype)
        if len(ids) > 1:
            x[ids[1]] = 0  # a tie without bias
        # What an op leaves unwritten is false in every second row and true in the others.
        active = torch.arange(num_rows, device=draw.device) % 2 == 0
        return {
            "x": draw.guarded(x),
            "rows": rows,
            "weight": weight,
            "bias": integers(2) if bias else None,
            "active": draw.guarded(active, filler=1),
        }

    for num_listed in _ROW_COUNTS:
        yield f"R={num_listed} of {_NUM_ROWS}, C=192", arguments(_row_list(draw, num_listed), 192)
    for num_columns in (1, 97, 2500):
        yield f"C={num_columns}, no bias", arguments(_row_list(draw, 5), num_columns, bias=False)
    yield "rows in any order, fewer than their bound", arguments(_row_list(draw, 3, max_rows=7, shuffled=True), 48)
    yield "a list amid others", arguments(_misaligned(draw, _row_list(draw, 5)), 48)
    ties = arguments(_row_list(draw, _NUM_ROWS), 48, bias=False)
    ties["weight"][1] = ties["weight"][0]
    yield "ties", ties


def _plan_rows(draw: Draw) -> Iterator[tuple[str, Arguments]]:
    def arguments(
        kv_policy: int, num_rows: int, layers: tuple[int, int] = (0, 4), share: float = 0.5, absent: bool = True
    ) -> Arguments:
        num_layers, num_seqs, max_context_len, cursor = 4, num_rows + 3, 9, 1000
        first_layer, num_planned = layers

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=draw.generator, dtype=torch.int32).to(draw.device)

        def unwritten(*shape: int) -> Tensor:
            return draw.guarded(torch.full(shape, _POISON, dtype=torch.int32, device=draw.device), _POISON)

        active = (torch.rand(num_planned, num_rows, generator=draw.generator) < share).to(draw.device)
        cache_ids = draw.index(*draw.permutation(num_seqs)[:num_rows])
        if absent:
            cache_ids[integers(0, num_rows, 2).long()] = -1
        # In the middle of a step some rows have run a layer before, others have not.
        row_slots = integers(-1, 2, num_rows) * 100 if first_layer else unwritten(num_rows)
        row_slots[row_slots < 0] = -1 if first_layer else _POISON
        return {
            "active": active,
            "first_layer": first_layer,
            "kv_policy": kv_policy,
            "cache_ids": cache_ids,
            "context_lens": draw.guarded(integers(0, max_context_len - 1, num_layers, num_seqs), _POISON),
            "slot_tables": unwritten(num_layers, num_seqs, max_context_len),
            "free_slots": draw.guarded(draw.index(*draw.permutation(cursor + num_planned * num_rows)), _POISON),
            "slot_cursor": draw.guarded(draw.index(cursor), _POISON),
            "row_slots": draw.guarded(row_slots, _POISON),
            "run_ids": unwritten(num_layers, num_rows),
            "num_run": unwritten(num_layers),
            "kv_ids": unwritten(num_layers, num_rows),
            "num_kv": unwritten(num_layers),
            "slots": unwritten(num_layers, num_rows),
            "key_limits": unwritten(num_layers, num_rows),
        }

    for name, kv_policy in (("absent", ABSENT), ("evict", EVICT), ("propagate", PROPAGATE), ("share", SHARE)):
        yield f"{name}, all layers", arguments(kv_policy, _NUM_ROWS)
        yield f"{name}, first layer", arguments(kv_policy, _NUM_ROWS, (0, 1))
        yield f"{name}, a layer in between", arguments(kv_policy, _NUM_ROWS, (2, 1))
        yield f"{name}, no row runs", arguments(kv_policy, _NUM_ROWS, share=0)
        yield f"{name}, every row runs", arguments(kv_policy, _NUM_ROWS, share=1, absent=False)
        yield f"{name}, one row", arguments(kv_policy, 1, absent=False)
        yield f"{name}, more rows than threads in a warp", arguments(kv_policy, 45, (1, 3))
    yield "more rows than threads in a block", arguments(SHARE, 1100, (0, 2))


ROW_CASE_MAKERS: dict[str, Callable[[Draw], Iterator[tuple[str, Arguments]]]] = {
    "embed_rows": _embed_rows,
    "norm_rows": _norm_rows,
    "linear_rows": lambda draw: _both_modes(_linear_rows(draw)),
    "qkv_rows": lambda draw: _both_modes(_qkv_rows(draw)),
    "attend_rows": lambda draw: _both_modes(_attend_rows(draw)),
    "linear_add_rows": lambda draw: _both_modes(_linear_add_rows(draw)),
    "gate_rows": _gate_rows,
    "plan_rows": _plan_rows,
}
