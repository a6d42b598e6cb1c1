"""The ops, checked and dispatched: same signatures as `dynskip.reference`, run by the backend in use.

Each op is registered with torch.library in the namespace `dynskip`, with a fake, so that torch.compile and torch.export
take it. The ops are for inference: with grad enabled they refuse inputs that require grad.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from dynskip.ops import reference
from dynskip.ops.backends import BACKEND_NAMES, Backend, resolve_backend
from dynskip.ops.checks import (
    check_caches,
    check_groups,
    check_index,
    check_no_grad,
    check_packed,
    check_positions,
    check_rows,
    check_tensor,
)
from dynskip.ops.reference import ACTIVATIONS

_backend_name: ContextVar[str] = ContextVar("dynskip_backend", default="auto")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every op called inside the block on the backend `name`, or on the best one of each device for "auto".

    Raises: ValueError for an unknown name. A backend that cannot run on an op's device raises there.
    """
    if name not in ("auto", *BACKEND_NAMES):
        names = ", ".join(("auto", *BACKEND_NAMES))
        raise ValueError(f"use_backend: name must be one of {names}, got {name!r}. Choose one of these.")
    token = _backend_name.set(name)
    try:
        yield
    finally:
        _backend_name.reset(token)


def current_backend(device: torch.device | str = "cpu") -> Backend:
    """The backend that an op called here runs on, for tensors on `device`."""
    return resolve_backend(_backend_name.get(), device)


def gather_layer_norm(
    x: Tensor, row_ids: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool = False
) -> Tensor:
    """Returns the LayerNorm of the chosen rows of `x`, with `rms` their RMSNorm, packed: `[R, C]`, dtype of `x`.

    x: `[N, C]`, float32, bfloat16 or float16, row stride free. row_ids: `[R], int32`, values in 0..N-1, or None for all
    rows. weight, bias: `[C]`, dtype of `x`, or None. eps: added to the (biased) variance. rms: leaves the mean where
    it is. Statistics are float32; the result is contiguous. Cost: reads R * C values once, writes R * C.
    """
    function = "gather_layer_norm"
    check_rows(function, "x", x, ("N", "C"))
    if x.shape[1] == 0:
        raise ValueError(
            f"gather_layer_norm: x must have at least one column, got shape {list(x.shape)}. Drop the empty rows."
        )
    if row_ids is not None:
        check_index(function, "row_ids", row_ids, ("R",), x)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_tensor(function, name, parameter, (x.shape[1],), like=x)
            check_packed(function, name, parameter, num_dims=1)
    if eps < 0:
        raise ValueError(f"gather_layer_norm: eps must be at least 0, got {eps}. LayerNorm in OPT uses 1e-5.")
    check_no_grad(function, x=x, weight=weight, bias=bias)
    return torch.ops.dynskip.gather_layer_norm(x, row_ids, weight, bias, eps, rms)


def scatter_add(x: Tensor, row_ids: Tensor | None, y: Tensor) -> None:
    """Adds row r of `y` to row `row_ids[r]` of `x`, in place.

    x: `[N, C]`, float32, bfloat16 or float16, row stride free, mutated. row_ids: `[R], int32`, distinct values in
    0..N-1, or None for all rows. y: `[R, C]`, dtype of `x`, row stride free. The sum is float32, rounded once. Cost:
    reads 2 * R * C, writes R * C.
    """
    function = "scatter_add"
    check_rows(function, "x", x, ("N", "C"))
    num_rows = x.shape[0]
    if row_ids is not None:
        check_index(function, "row_ids", row_ids, ("R",), x)
        num_rows = row_ids.shape[0]
    check_rows(function, "y", y, (num_rows, x.shape[1]), like=x)
    check_no_grad(function, x=x, y=y)
    torch.ops.dynskip.scatter_add(x, row_ids, y)


def kv_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes row r of `k` and `v` to slot `slot_mapping[r]` of the caches, in place; a slot of -1 stores nothing.

    k, v: `[R, H, D]`, float32, bfloat16 or float16, row stride free. k_cache, v_cache: `[num_slots, H, D]`, contiguous,
    mutated. slot_mapping: `[R], int32`, -1 or distinct values in 0..num_slots-1. Cost: reads and writes 2 * R * H * D
    values.
    """
    function = "kv_store"
    check_rows(function, "k", k, ("R", "H", "D"))
    check_rows(function, "v", v, tuple(k.shape), like=k)
    check_caches(function, k_cache, v_cache, ("num_slots", k.shape[1], k.shape[2]), k)
    check_index(function, "slot_mapping", slot_mapping, (k.shape[0],), k)
    check_no_grad(function, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    torch.ops.dynskip.kv_store(k, v, k_cache, v_cache, slot_mapping)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_table: Tensor,
    seq_ids: Tensor,
    context_lens: Tensor,
    scale: float,
    slopes: Tensor | None = None,
    window: int = 0,
    position_ids: Tensor | None = None,
    slot_positions: Tensor | None = None,
) -> Tensor:
    """Returns the attention of one query a row over its sequence's cached tokens: `[R, H, D]`, dtype of `q`.

    q: `[R, H, D]`, float32, bfloat16 or float16, row stride free. k_cache, v_cache: `[num_slots, G, D]`, contiguous:
    G key-value heads, a divisor of H; query head h reads head h // (H / G). slot_table: `[B, S_max], int32`,
    contiguous. seq_ids, context_lens: `[R], int32`. Row r attends to the slots in the first `context_lens[r]` entries
    of `slot_table[seq_ids[r]]`; without any, its result is zero. Scores are q . k * scale.

    slopes: `[H], float32`, or None: the score of a key that stands n positions before the query is lessened by n *
    slope. window: in tokens, 0 for none: keys that stand as many positions before the query, or more, are left out.
    Both need positions, which count from 0 in a sequence: position_ids: `[R], int64`, of the queries; slot_positions:
    `[num_slots], int32`, of the token in each slot.

    The result of a row does not depend, to the bit, on the other rows. Cost: reads 2 * G * D values for each attended
    token.
    """
    function = "decode_attention"
    check_rows(function, "q", q, ("R", "H", "D"))
    check_tensor(function, "k_cache", k_cache, ("num_slots", "G", q.shape[2]), like=q)
    check_groups(function, "k_cache", k_cache, q)
    check_caches(function, k_cache, v_cache, tuple(k_cache.shape), q)
    check_index(function, "slot_table", slot_table, ("B", "S_max"), q)
    check_packed(function, "slot_table", slot_table, num_dims=2)
    for name, index in (("seq_ids", seq_ids), ("context_lens", context_lens)):
        check_index(function, name, index, (q.shape[0],), q)
    check_positions(function, q, slopes, window, position_ids, "slot_positions", slot_positions, k_cache)
    check_no_grad(function, q=q, k_cache=k_cache, v_cache=v_cache, slopes=slopes)
    return torch.ops.dynskip.decode_attention(
        q, k_cache, v_cache, slot_table, seq_ids, context_lens, scale, slopes, window, position_ids, slot_positions
    )


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    key_limits: Tensor,
    scale: float,
    slopes: Tensor | None = None,
    window: int = 0,
    position_ids: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> Tensor:
    """Returns the attention of packed queries over their sequence's packed keys: `[R, H, D]`, dtype of `q`.

    q: `[R, H, D]`. k, v: `[S, G, D]`, dtype of `q`: float32, bfloat16 or float16, row strides free, heads as in
    `decode_attention`. cu_seqlens_q, cu_seqlens_k: `[B + 1], int32`, from 0 to R and from 0 to S: where the queries and
    keys of each sequence begin. key_limits: `[R], int32`: row r attends to the first `key_limits[r]` keys of its
    sequence; without any, its result is zero. Limits 1..T are the causal mask. slopes, window: as in
    `decode_attention`, with position_ids: `[R], int64`, of the queries, and key_positions: `[S]`, int32 or int64, of
    the keys. The result of a sequence does not depend, to the bit, on the other sequences. Cost: 4 * H * D FLOPs a
    query and key.
    """
    function = "prefill_attention"
    check_rows(function, "q", q, ("R", "H", "D"))
    check_rows(function, "k", k, ("S", "G", q.shape[2]), like=q)
    check_groups(function, "k", k, q)
    check_rows(function, "v", v, tuple(k.shape), like=q)
    check_index(function, "cu_seqlens_q", cu_seqlens_q, ("B + 1",), q)
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError(
            "prefill_attention: cu_seqlens_q must have B + 1 entries, got none. For an empty batch pass [0]."
        )
    check_index(function, "cu_seqlens_k", cu_seqlens_k, (cu_seqlens_q.shape[0],), q)
    check_index(function, "key_limits", key_limits, (q.shape[0],), q)
    check_positions(function, q, slopes, window, position_ids, "key_positions", key_positions, k)
    check_no_grad(function, q=q, k=k, v=v, slopes=slopes)
    return torch.ops.dynskip.prefill_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, key_limits, scale, slopes, window, position_ids, key_positions
    )


def rotate(x: Tensor, position_ids: Tensor, cos_sin: Tensor, weight: Tensor | None = None, eps: float = 0.0) -> None:
    """Turns each head of `x` to the position of its row (arXiv 2104.09864), in place.

    x: `[R, H, D]`, float32, bfloat16 or float16, row stride free, mutated. position_ids: `[R], int64`, values in
    0..P-1. cos_sin: `[P, E], float32`, contiguous, E even and at most D: E/2 cosines, then E/2 sines, of each position.
    Value i of a head makes a pair with value i + E/2; values from E on stay as they are. weight: `[D]`, dtype of `x`,
    or None: each head is replaced by its RMSNorm first, with `eps`. All in float32, rounded once. Cost: reads and
    writes R * H * E values, with a weight R * H * D.
    """
    function = "rotate"
    check_rows(function, "x", x, ("R", "H", "D"))
    check_index(function, "position_ids", position_ids, (x.shape[0],), x, torch.int64)
    check_index(function, "cos_sin", cos_sin, ("P", "E"), x, torch.float32)
    check_packed(function, "cos_sin", cos_sin, num_dims=2)
    if cos_sin.shape[1] % 2 or not 2 <= cos_sin.shape[1] <= x.shape[2]:
        raise ValueError(
            f"rotate: cos_sin must have an even number of columns from 2 to {x.shape[2]}, got {cos_sin.shape[1]}. "
            "Pass a cosine and a sine for each pair of values that is turned."
        )
    if weight is not None:
        check_tensor(function, "weight", weight, (x.shape[2],), like=x)
        check_packed(function, "weight", weight, num_dims=1)
    if eps < 0:
        raise ValueError(f"rotate: eps must be at least 0, got {eps}. RMSNorms use 1e-6 or 1e-5.")
    check_no_grad(function, x=x, cos_sin=cos_sin, weight=weight)
    torch.ops.dynskip.rotate(x, position_ids, cos_sin, weight, eps)


def activate(x: Tensor, activation: str, gated: bool = False) -> Tensor:
    """Returns `x` through `activation`; with `gated`, its first half so, times its second: `[R, F]`, dtype of `x`.

    x: `[R, F]`, with `gated` `[R, 2 * F]`, float32, bfloat16 or float16, row stride free. activation: "none", "relu",
    "gelu", "gelu_tanh" (arXiv 1606.08415, by tanh) or "silu". The result is contiguous and its memory its own. Cost:
    reads the values once, writes R * F.
    """
    function = "activate"
    check_rows(function, "x", x, ("R", "2 * F" if gated else "F"))
    if activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"activate: activation must be one of {names}, got {activation!r}. Choose one of these.")
    if gated and x.shape[1] % 2:
        raise ValueError(
            f"activate: x must have an even number of columns with a gate, got {x.shape[1]}. Pass the values that go "
            "through the activation and their factors side by side."
        )
    check_no_grad(function, x=x)
    return torch.ops.dynskip.activate(x, activation, gated)


def _register(op: str, mutated: tuple[str, ...], fake: Callable[..., Tensor | None]) -> None:
    """Registers the op with the signature of its specification; the backend in use runs it."""

    def run(*arguments: Any) -> Tensor | None:
        return getattr(current_backend(arguments[0].device), op)(*arguments)

    schema = torch.library.infer_schema(getattr(reference, op), mutates_args=mutated)
    torch.library.custom_op(f"dynskip::{op}", run, mutates_args=mutated, schema=schema).register_fake(fake)


def _fake_rows(x: Tensor, row_ids: Tensor | None, *others: Any) -> Tensor:
    return x.new_empty((x.shape[0] if row_ids is None else row_ids.shape[0], x.shape[1]))


def _fake_activate(x: Tensor, activation: str, gated: bool = False) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // 2 if gated else x.shape[1]))


def _fake_attention(q: Tensor, *others: Any) -> Tensor:
    return q.new_empty(q.shape)


def _fake_nothing(*arguments: Any) -> None:
    return None


_register("gather_layer_norm", (), _fake_rows)
_register("scatter_add", ("x",), _fake_nothing)
_register("kv_store", ("k_cache", "v_cache"), _fake_nothing)
_register("decode_attention", (), _fake_attention)
_register("prefill_attention", (), _fake_attention)
_register("rotate", ("x",), _fake_nothing)
_register("activate", (), _fake_activate)
