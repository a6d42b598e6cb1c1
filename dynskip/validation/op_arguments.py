"""The arguments of the ops, made in one place for what validates, tunes, compiles and times them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynskip.kernels.row_list import RowList, RowNorm, row_bucket
from dynskip.models.config import DecoderConfig
from dynskip.ops.row_ops import RowOps
from dynskip.ops.row_reference import EVICT, listed
from dynskip.validation.tensors import POISON, Arguments, Draw

# The matrices of a decoder, and the op that multiplies by each.
MATRIX_OPS = {
    "fc1": "linear_rows",
    "fc2": "linear_add_rows",
    "qkv": "qkv_rows",
    "out_proj": "linear_add_rows",
    "head": "linear_rows",
}
OTHER_OPS = ("attend_rows", "norm_rows", "embed_rows", "gate_rows", "rotate_rows", "place_rows")


Matrix = tuple[int, int]


class NormKind(NamedTuple):
    """affine: with a weight, and with a bias unless it is an RMSNorm."""

    affine: bool = True
    rms: bool = False


Norm = NormKind | None
LAYER_NORM = NormKind()


def parts_of(config: DecoderConfig) -> tuple[str, ...]:
    """Which matrices and other ops a step of the decoder launches, those of a gate included."""
    absent: tuple[str, ...] = () if config.rotary_size else ("rotate_rows",)
    absent += () if config.attends_by_position else ("place_rows",)
    return tuple(part for part in (*MATRIX_OPS, *OTHER_OPS) if part not in absent)


def draw_rows(
    draw: Draw, num_listed: int, num_rows: int, max_rows: int | None = None, shuffled: bool = False, offset: int = 0
) -> RowList:
    """Some of `num_rows` rows, increasing unless `shuffled`; behind `max_rows` in `ids` stand others.

    offset: elements further in memory, as the list of a layer among others.
    """
    permutation = draw.permutation(num_rows)
    rows = permutation[:num_listed] if shuffled else sorted(permutation[:num_listed])
    max_rows = min(row_bucket(max(num_listed, 1)), num_rows) if max_rows is None else max_rows
    ends = [-1] * (max_rows - num_listed)
    lists = draw.index(*rows, *ends, *permutation[max_rows:]), draw.index(num_listed)
    ids, num = (draw.guarded(torch.cat([part[:offset], part]))[offset:] for part in lists)
    return RowList(ids, num, max_rows)


def make_workspace(row_ops: RowOps, arguments: Arguments) -> Any:
    """A workspace large enough for the op, with the constants that are in place; None where the op needs none."""
    if "workspace" not in arguments:
        return None
    is_attention = "k_cache" in arguments
    num_kv_heads, head_size = arguments["k_cache"].shape[1:] if is_attention else (1, 16)
    return row_ops.workspace(
        max_rows=arguments["rows"].ids.shape[0],
        num_heads=arguments["q"].shape[1] // head_size if is_attention else 1,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        sizes=[(16, 16)] if is_attention else [tuple(arguments["weight"].shape)],
        max_context_len=arguments["slot_table"].shape[1] if is_attention else 1,
        device=arguments["rows"].ids.device,
    )


def bind(
    row_ops: RowOps, op: str, arguments: Arguments, workspace: Any = None, deterministic: bool = False
) -> Callable[[], object]:
    """The call of an op with `arguments`, but for the workspace and the mode, where it has them."""
    changed = {"workspace": workspace, "deterministic": deterministic}
    return partial(getattr(row_ops, op), *(changed.get(name, argument) for name, argument in arguments.items()))


class RowArguments:
    """Makes the arguments of row ops for the rows of one list, by name, in the order in which an op takes them.

    What the list does not name holds NaN where an op might read it, numbers where an op might write it, and the other
    way round what it does name: so that a row too many is seen, and an element too few.
    """

    def __init__(self, draw: Draw, rows: RowList) -> None:
        self.draw = draw
        self.rows = rows
        self.ids = listed(rows)
        self.num_rows = rows.ids.shape[0]

    def of_decoder(self, part: str, config: DecoderConfig, num_keys: int, max_context_len: int) -> Arguments:
        """Those with which a decoder launches `part`: one of its matrices, or an op without a matrix by its own name.

        num_keys: that a row attends to, of the `max_context_len` that a table has room for.
        """
        size, heads, groups = config.hidden_size, (config.num_heads, config.head_size), config.num_kv_heads
        norm, matrices = NormKind(config.norm_affine, config.norm == "rms"), config.layer_matrices
        num_positions = config.max_positions + config.position_offset if config.has_position_table else None
        limits = [num_keys] * self.num_rows
        seen: dict[str, Any] = {"slopes": config.alibi, "window": config.window}
        make: dict[str, Callable[[], Arguments]] = {
            "head": lambda: self.linear_rows(config.head_matrix, norm, config.head_bias, "none"),
            "fc1": lambda: self.linear_rows(matrices["fc1"], norm, config.mlp_bias, config.activation, config.gated),
            "fc2": lambda: self.linear_add_rows(matrices["fc2"], config.mlp_bias),
            "out_proj": lambda: self.linear_add_rows(matrices["out_proj"], config.out_bias),
            "qkv": lambda: self.qkv_rows(*heads, None, 1, norm, config.qkv_bias, groups, size),
            "rotate_rows": lambda: self.rotate_rows(
                *heads, groups, config.rotary_size, config.qk_norm, config.max_positions
            ),
            "place_rows": self.place_rows,
            "attend_rows": lambda: self.attend_rows(*heads, limits, max_context_len, num_kv_heads=groups, **seen),
            "embed_rows": lambda: self.embed_rows(size, config.vocab_size, num_positions, config.position_offset),
            "norm_rows": lambda: self.norm_rows(size, norm),
            "gate_rows": lambda: self.gate_rows(size),
        }
        return make[part]()

    def embed_rows(
        self, num_columns: int, num_tokens: int = 11, num_positions: int | None = 13, position_offset: int = 2
    ) -> Arguments:
        """num_positions: of the table; None: there is none."""
        draw = self.draw
        largest = (num_positions or 13) - position_offset
        table = None if num_positions is None else draw.guarded(draw.normal(num_positions, num_columns))
        return {
            "token_ids": draw.guarded(draw.integers(0, num_tokens, self.num_rows).long()),
            "position_ids": draw.guarded(draw.integers(0, largest, self.num_rows).long()),
            "rows": self.rows,
            "token_table": draw.guarded(draw.normal(num_tokens, num_columns)),
            "position_table": table,
            "position_offset": position_offset,
            "out": self._output(num_columns),
        }

    def norm_rows(self, num_columns: int, norm: NormKind = LAYER_NORM) -> Arguments:
        made = self._norm(num_columns, norm)
        return {"x": self._input(num_columns), "rows": self.rows, "norm": made, "out": self._output(num_columns)}

    def linear_rows(
        self, matrix: Matrix, norm: Norm = LAYER_NORM, bias: bool = True, activation: str = "relu", gated: bool = False
    ) -> Arguments:
        num_outputs, num_inputs = matrix
        return {
            "x": self._input(num_inputs),
            "rows": self.rows,
            "norm": self._norm(num_inputs, norm),
            "weight": self.draw.guarded(self.draw.matrix(num_outputs, num_inputs)),
            "bias": self.draw.normal(num_outputs) if bias else None,
            "activation": activation,
            "gated": gated,
            "out": self._output(num_outputs // 2 if gated else num_outputs),
            "normed": self.draw.nan(self.num_rows, num_inputs),
            "deterministic": False,
        }

    def qkv_rows(
        self,
        num_heads: int,
        head_size: int,
        num_stored: int | None = None,
        num_run: int = 1,
        norm: Norm = LAYER_NORM,
        bias: bool = True,
        num_kv_heads: int | None = None,
        hidden_size: int | None = None,
    ) -> Arguments:
        """num_stored: the first rows of the list, which alone have a slot; None: all have one.

        num_kv_heads: None for num_heads. hidden_size: None for that of all query heads.
        """
        draw, size = self.draw, num_heads * head_size
        num_kv_heads = num_kv_heads or num_heads
        num_inputs = hidden_size or size
        num_outputs = size + 2 * num_kv_heads * head_size
        slots, num_slots = self._slots(num_stored)
        k_cache, v_cache = (draw.guarded(draw.normal(num_slots, num_kv_heads, head_size), 7.0) for _ in range(2))
        targets = slots[self.ids].long()
        for cache in (k_cache, v_cache):
            cache[targets[targets >= 0]] = float("nan")
        return {
            "x": self._input(num_inputs),
            "rows": self.rows,
            "num_run": draw.guarded(draw.index(num_run)),
            "norm": self._norm(num_inputs, norm),
            "weight": draw.guarded(draw.matrix(num_outputs, num_inputs)),
            "bias": draw.normal(num_outputs) if bias else None,
            "q": self._output(size),
            "k_cache": k_cache,
            "v_cache": v_cache,
            "slots": draw.guarded(slots),
            "normed": draw.nan(self.num_rows, num_inputs),
            "deterministic": False,
        }

    def rotate_rows(
        self,
        num_heads: int,
        head_size: int,
        num_kv_heads: int,
        rotary_size: int,
        norm: bool = False,
        max_positions: int = 50,
        num_stored: int | None = None,
    ) -> Arguments:
        """Rows outside of the list, and slots of none of its rows, hold numbers: turned, they would be others."""
        draw = self.draw
        slots, num_slots = self._slots(num_stored)
        table = rotary_table(draw, max_positions, rotary_size)
        return {
            "q": draw.guarded(draw.normal(self.num_rows, num_heads * head_size), 7.0),
            "rows": self.rows,
            "k_cache": draw.guarded(draw.normal(num_slots, num_kv_heads, head_size), 7.0),
            "slots": draw.guarded(slots),
            "position_ids": draw.guarded(draw.integers(0, max_positions, self.num_rows).long()),
            "cos_sin": draw.guarded(table),
            "q_weight": draw.normal(head_size) if norm else None,
            "k_weight": draw.normal(head_size) if norm else None,
            "eps": 1e-6 if norm else 0.0,
        }

    def place_rows(self, num_stored: int | None = None) -> Arguments:
        draw = self.draw
        slots, num_slots = self._slots(num_stored)
        return {
            "rows": self.rows,
            "slots": draw.guarded(slots),
            "position_ids": draw.guarded(draw.integers(0, 2**30, self.num_rows).long()),
            "slot_positions": draw.guarded(draw.integers(0, 2**30, num_slots)),
        }

    def attend_rows(
        self,
        num_heads: int,
        head_size: int,
        limits: list[int],
        max_context_len: int | None = None,
        sharpness: float = 1.0,
        num_kv_heads: int | None = None,
        slopes: bool = False,
        window: int = 0,
    ) -> Arguments:
        """limits: how many keys each row attends to, listed or not. max_context_len: of the table; None: a few more.

        num_kv_heads: None for num_heads. slopes, window: rows and slots have positions, which rise in a table by one or
        more from entry to entry.
        """
        draw, size, num_seqs = self.draw, num_heads * head_size, self.num_rows + 2
        num_kv_heads = num_kv_heads or num_heads
        max_context_len = max_context_len or max(limits) + 9
        assert len(limits) == self.num_rows
        seq_ids = draw.permutation(num_seqs)[: self.num_rows]
        used = {row: limits[row] for row in self.ids.tolist()}
        num_slots = sum(used.values()) + 5
        k_cache, v_cache = (draw.nan(num_slots, num_kv_heads, head_size) for _ in range(2))
        position_ids = torch.full((self.num_rows,), POISON, dtype=torch.int64, device=draw.device)
        # A slot of no row would stand in every window.
        slot_positions = torch.full((num_slots,), 2**30, dtype=torch.int32, device=draw.device)
        has_positions = slopes or window > 0
        free = draw.index(*draw.permutation(num_slots - 1))
        # A table's entries behind the limit, and all of the tables of other sequences, name no slot: taken as an index
        # from the end, they lead to NaN.
        slot_table = torch.full((num_seqs, max_context_len), -1, dtype=torch.int32, device=draw.device)
        for row, limit in used.items():
            slots, free = free[:limit], free[limit:]
            slot_table[seq_ids[row], :limit] = slots
            for cache in (k_cache, v_cache):
                cache[slots.long()] = draw.normal(limit, num_kv_heads, head_size)
            if has_positions:
                positions = draw.integers(1, 4, limit).cumsum(0)
                slot_positions[slots.long()] = positions.int()
                position_ids[row] = positions[-1] if limit else 0
        return {
            "q": self._input(size),
            "rows": self.rows,
            "k_cache": draw.guarded(k_cache),
            "v_cache": draw.guarded(v_cache),
            "slot_table": draw.guarded(slot_table),
            "seq_ids": draw.guarded(draw.index(*seq_ids)),
            "key_limits": draw.guarded(draw.index(*limits)),
            "scale": sharpness * head_size**-0.5,
            "out": self._output(size),
            "workspace": None,
            "deterministic": False,
            "slopes": draw.guarded(draw_slopes(draw, num_heads)) if slopes else None,
            "window": window,
            "position_ids": draw.guarded(position_ids) if has_positions else None,
            "slot_positions": draw.guarded(slot_positions) if has_positions else None,
        }

    def linear_add_rows(self, matrix: Matrix, bias: bool = True) -> Arguments:
        num_outputs, num_inputs = matrix
        return {
            "x": self._input(num_inputs),
            "rows": self.rows,
            "weight": self.draw.guarded(self.draw.matrix(num_outputs, num_inputs)),
            "bias": self.draw.normal(num_outputs) if bias else None,
            "residual": self.draw.guarded(self.draw.normal(self.num_rows, num_outputs), filler=7.0),
            "workspace": None,
            "deterministic": False,
        }

    def gate_rows(self, num_columns: int, bias: bool = True) -> Arguments:
        """Small integers: their products and sums are exact, whatever the order, and ties are ties."""
        draw = self.draw
        weight = draw.integers(-3, 4, 2, num_columns).float()
        x = draw.nan(self.num_rows, num_columns)
        x[self.ids] = draw.integers(-3, 4, len(self.ids), num_columns).to(draw.dtype)
        if len(self.ids) > 1:
            x[self.ids[1]] = 0  # a tie without bias
        # What an op leaves unwritten is false in every second row and true in the others.
        active = torch.arange(self.num_rows, device=draw.device) % 2 == 0
        return {
            "x": draw.guarded(x),
            "rows": self.rows,
            "weight": weight,
            "bias": draw.integers(-3, 4, 2).float() if bias else None,
            "active": draw.guarded(active, filler=1),
        }

    def _slots(self, num_stored: int | None) -> tuple[Tensor, int]:
        """A slot for each row, and how many there are; -1 for listed rows from `num_stored` on, None: for none.

        Rows outside of the list have slots, too: nothing may be stored there.
        """
        num_slots = 2 * self.num_rows + 3
        slots = self.draw.index(*self.draw.permutation(num_slots)[: self.num_rows])
        if num_stored is not None:
            slots[self.ids[num_stored:]] = -1
        return slots, num_slots

    def _input(self, num_columns: int) -> Tensor:
        """`[M, num_columns]`, numbers in the listed rows, NaN elsewhere."""
        x = self.draw.nan(self.num_rows, num_columns)
        x[self.ids] = self.draw.normal(len(self.ids), num_columns)
        return self.draw.guarded(x)

    def _output(self, num_columns: int) -> Tensor:
        """`[M, num_columns]`, NaN in the listed rows, numbers elsewhere."""
        out = self.draw.normal(self.num_rows, num_columns)
        out[self.ids] = float("nan")
        return self.draw.guarded(out, filler=7.0)

    def _norm(self, num_columns: int, norm: Norm) -> RowNorm | None:
        if norm is None:
            return None
        weight = self.draw.normal(num_columns) if norm.affine else None
        bias = self.draw.normal(num_columns) if norm.affine and not norm.rms else None
        return RowNorm(weight, bias, 1e-5, norm.rms)


def plan_rows(
    draw: Draw,
    active: Tensor,
    context_lens: Tensor,
    free_slots: Tensor,
    max_context_len: int,
    slot_cursor: int = 0,
    first_layer: int = 0,
    kv_policy: int = EVICT,
    cache_ids: Tensor | None = None,
    row_slots: Tensor | None = None,
) -> Arguments:
    """The arguments of `plan_rows`, which names their shapes. cache_ids: None for each row's own number."""
    num_rows, (num_layers, num_seqs) = active.shape[1], context_lens.shape

    def unwritten(*shape: int) -> Tensor:
        return draw.guarded(torch.full(shape, POISON, dtype=torch.int32, device=draw.device))

    return {
        "active": active,
        "first_layer": first_layer,
        "kv_policy": kv_policy,
        "cache_ids": draw.index(*range(num_rows)) if cache_ids is None else cache_ids,
        "context_lens": draw.guarded(context_lens),
        "slot_tables": unwritten(num_layers, num_seqs, max_context_len),
        "free_slots": draw.guarded(free_slots),
        "slot_cursor": draw.guarded(draw.index(slot_cursor)),
        "row_slots": unwritten(num_rows) if row_slots is None else draw.guarded(row_slots),
        "run_ids": unwritten(num_layers, num_rows),
        "num_run": unwritten(num_layers),
        "kv_ids": unwritten(num_layers, num_rows),
        "num_kv": unwritten(num_layers),
        "slots": unwritten(num_layers, num_rows),
        "key_limits": unwritten(num_layers, num_rows),
    }


def gather_layer_norm(
    draw: Draw, x: Tensor, row_ids: Tensor | None, affine: bool = True, rms: bool = False
) -> Arguments:
    weight, bias = (draw.normal(x.shape[1]) if affine else None for _ in range(2))
    return {"x": x, "row_ids": row_ids, "weight": weight, "bias": bias, "eps": 1e-5, "rms": rms}


def kv_store(
    draw: Draw, num_heads: int, head_size: int, slots: list[int], projection: bool = True, num_slots: int = 14
) -> Arguments:
    """projection: k and v are slices of the rows of one projection, as in a model."""
    qkv = draw.normal(len(slots), 3, num_heads, head_size)
    k, v = (qkv[:, 1], qkv[:, 2]) if projection else (qkv[:, 1].contiguous(), qkv[:, 2].contiguous())
    k_cache, v_cache = (draw.nan(num_slots, num_heads, head_size) for _ in range(2))
    return {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": draw.index(*slots)}


def rotary_table(draw: Draw, num_positions: int, rotary_size: int) -> Tensor:
    """`[P, E], float32`: cosines and sines of random angles."""
    angles = draw.normal(num_positions, rotary_size // 2).float() * 3
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rotate(
    draw: Draw,
    x: Tensor,
    rotary_size: int | None = None,
    num_positions: int = 50,
    weight: bool = False,
) -> Arguments:
    """rotary_size: None for whole heads."""
    head_size = x.shape[2]
    return {
        "x": x,
        "position_ids": draw.guarded(draw.integers(0, num_positions, len(x)).long()),
        "cos_sin": draw.guarded(rotary_table(draw, num_positions, head_size if rotary_size is None else rotary_size)),
        "weight": draw.normal(head_size) if weight else None,
        "eps": 1e-6,
    }


def draw_slopes(draw: Draw, num_heads: int) -> Tensor:
    """`[H], float32`: slopes as ALiBi has them, for any number of heads."""
    return torch.tensor([2.0 ** (-8 * (head + 1) / num_heads) for head in range(num_heads)], device=draw.device)


def decode_attention(
    draw: Draw,
    num_heads: int,
    head_size: int,
    lengths: list[int],
    seq_ids: list[int],
    sharpness: float = 1,
    num_kv_heads: int | None = None,
    slopes: bool = False,
    window: int = 0,
) -> Arguments:
    """lengths: of the sequences, all of which each of their rows attends to, but for those outside of the window.

    With slopes or a window every third position has no entry, as in a layer that some tokens skip.
    """
    num_slots, num_kv_heads = sum(lengths) + 5, num_heads if num_kv_heads is None else num_kv_heads
    k_cache, v_cache = (draw.nan(num_slots, num_kv_heads, head_size) for _ in range(2))
    slots = draw.index(*draw.permutation(num_slots)[: sum(lengths)])
    for cache in (k_cache, v_cache):
        cache[slots.long()] = draw.normal(len(slots), num_kv_heads, head_size)
    # Rows end in unused entries, as the engine's do.
    table = torch.full((len(lengths), max(lengths) + 9), -1, dtype=torch.int32, device=draw.device)
    for sequence, used in enumerate(torch.split(slots, lengths)):
        table[sequence, : len(used)] = used
    context_lens = [lengths[sequence] for sequence in seq_ids]
    positions: dict[str, Tensor | None] = {"position_ids": None, "slot_positions": None}
    if slopes or window:
        slot_positions = torch.full((num_slots,), POISON, dtype=torch.int32, device=draw.device)
        for used in torch.split(slots, lengths):
            slot_positions[used.long()] = _places(draw, len(used))
        position_ids = [_position(length - 1) for length in context_lens]
        positions = {"position_ids": draw.index(*position_ids).long(), "slot_positions": draw.guarded(slot_positions)}
        if window:
            for sequence, used in enumerate(torch.split(slots, lengths)):
                outside = _position(lengths[sequence] - 1) - slot_positions[used.long()] >= window
                for cache in (k_cache, v_cache):
                    cache[used[outside].long()] = float("nan")
    return {
        "q": draw.strided(len(seq_ids), num_heads, head_size),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slot_table": table,
        "seq_ids": draw.index(*seq_ids),
        "context_lens": draw.index(*context_lens),
        "scale": sharpness * head_size**-0.5,
        "slopes": draw_slopes(draw, num_heads) if slopes else None,
        "window": window,
        **positions,
    }


def prefill_attention(
    draw: Draw,
    num_heads: int,
    head_size: int,
    num_keys: list[int],
    limits: list[list[int]] | None = None,
    strided: bool = False,
    sharpness: float = 1,
    num_kv_heads: int | None = None,
    slopes: bool = False,
    window: int = 0,
) -> Arguments:
    """num_keys: of each sequence. limits: of each of its queries; None: as many queries as keys, causal.

    With slopes or a window every third position has no key; a query stands where its last key does.
    """
    limits = [list(range(1, length + 1)) for length in num_keys] if limits is None else limits
    starts_q, starts_k = [0], [0]
    for length, of_sequence in zip(num_keys, limits, strict=True):
        starts_q.append(starts_q[-1] + len(of_sequence))
        starts_k.append(starts_k[-1] + length)
    tensor, num_kv_heads = draw.strided if strided else draw.normal, num_heads if num_kv_heads is None else num_kv_heads
    positions: dict[str, Tensor | None] = {"position_ids": None, "key_positions": None}
    if slopes or window:
        last_keys = [max(limit - 1, 0) for of_sequence in limits for limit in of_sequence]
        places = [_places(draw, length) for length in num_keys] or [draw.index()]
        positions = {
            "position_ids": draw.index(*map(_position, last_keys)).long(),
            "key_positions": draw.guarded(torch.cat(places)),
        }
    return {
        "q": tensor(starts_q[-1], num_heads, head_size),
        "k": tensor(starts_k[-1], num_kv_heads, head_size),
        "v": tensor(starts_k[-1], num_kv_heads, head_size),
        "cu_seqlens_q": draw.index(*starts_q),
        "cu_seqlens_k": draw.index(*starts_k),
        "key_limits": draw.index(*(limit for of_sequence in limits for limit in of_sequence)),
        "scale": sharpness * head_size**-0.5,
        "slopes": draw_slopes(draw, num_heads) if slopes else None,
        "window": window,
        **positions,
    }


def _position(rank: int) -> int:
    """Where the entry of that rank in a sequence stands: every third position has none."""
    return rank + rank // 2


def _places(draw: Draw, num_entries: int) -> Tensor:
    return draw.index(*map(_position, range(num_entries)))
