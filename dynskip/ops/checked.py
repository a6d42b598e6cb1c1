"""The five ops, checked and dispatched: same signatures as `dynskip.reference`, run by the backend in use.

Each op is registered with torch.library in the namespace `dynskip`, with a fake, so that torch.compile and torch.export
take it. The ops are for inference: with grad enabled they refuse inputs that require grad.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from dynskip.ops.backends import BACKEND_NAMES, Backend, resolve_backend
from dynskip.ops.checks import check_float, check_index, check_no_grad, check_packed, check_tensor

OP_NAMES = ("gather_layer_norm", "scatter_add", "kv_store", "decode_attention", "prefill_attention")

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
    x: Tensor, row_ids: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Returns the LayerNorm of the chosen rows of `x`, packed: `[R, C]`, dtype of `x`, contiguous.

    x: `[N, C]`, float32, bfloat16 or float16, row stride free. row_ids: `[R], int32`, values in 0..N-1, or None for all
    rows. weight, bias: `[C]`, dtype of `x`, or None. eps: added to the (biased) variance. Statistics are float32. Cost:
    reads R * C values once, writes R * C.
    """
    function = "gather_layer_norm"
    check_tensor(function, "x", x, ("N", "C"))
    check_float(function, "x", x)
    check_packed(function, "x", x, num_dims=1)
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
    return torch.ops.dynskip.gather_layer_norm(x, row_ids, weight, bias, eps)


def scatter_add(x: Tensor, row_ids: Tensor | None, y: Tensor) -> None:
    """Adds row r of `y` to row `row_ids[r]` of `x`, in place.

    x: `[N, C]`, float32, bfloat16 or float16, row stride free, mutated. row_ids: `[R], int32`, distinct values in
    0..N-1, or None for all rows. y: `[R, C]`, dtype of `x`, row stride free. The sum is float32, rounded once. Cost:
    reads 2 * R * C, writes R * C.
    """
    function = "scatter_add"
    check_tensor(function, "x", x, ("N", "C"))
    check_float(function, "x", x)
    check_packed(function, "x", x, num_dims=1)
    num_rows = x.shape[0]
    if row_ids is not None:
        check_index(function, "row_ids", row_ids, ("R",), x)
        num_rows = row_ids.shape[0]
    check_tensor(function, "y", y, (num_rows, x.shape[1]), like=x)
    check_packed(function, "y", y, num_dims=1)
    check_no_grad(function, x=x, y=y)
    torch.ops.dynskip.scatter_add(x, row_ids, y)


def kv_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes row r of `k` and `v` to slot `slot_mapping[r]` of the caches, in place; a slot of -1 stores nothing.

    k, v: `[R, H, D]`, float32, bfloat16 or float16, row stride free. k_cache, v_cache: `[num_slots, H, D]`, contiguous,
    mutated. slot_mapping: `[R], int32`, -1 or distinct values in 0..num_slots-1. Cost: reads and writes 2 * R * H * D
    values.
    """
    function = "kv_store"
    check_tensor(function, "k", k, ("R", "H", "D"))
    check_float(function, "k", k)
    check_tensor(function, "v", v, tuple(k.shape), like=k)
    for name, rows in (("k", k), ("v", v)):
        check_packed(function, name, rows, num_dims=2)
    _check_caches(function, k_cache, v_cache, k)
    check_index(function, "slot_mapping", slot_mapping, (k.shape[0],), k)
    check_no_grad(function, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    torch.ops.dynskip.kv_store(k, v, k_cache, v_cache, slot_mapping)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slot_table: Tensor, seq_ids: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """Returns the attention of one query a row over its sequence's cached tokens: `[R, H, D]`, dtype of `q`.

    q: `[R, H, D]`, float32, bfloat16 or float16, row stride free. k_cache, v_cache: `[num_slots, H, D]`, contiguous.
    slot_table: `[B, S_max], int32`, contiguous. seq_ids, context_lens: `[R], int32`. Row r attends to the slots in
    the first `context_lens[r]` entries of `slot_table[seq_ids[r]]`; without any, its result is zero. Scores are q . k *
    scale. The result of a row does not depend, to the bit, on the other rows. Cost: reads 2 * H * D values for each
    attended token.
    """
    function = "decode_attention"
    check_tensor(function, "q", q, ("R", "H", "D"))
    check_float(function, "q", q)
    check_packed(function, "q", q, num_dims=2)
    _check_caches(function, k_cache, v_cache, q)
    check_index(function, "slot_table", slot_table, ("B", "S_max"), q)
    check_packed(function, "slot_table", slot_table, num_dims=2)
    for name, index in (("seq_ids", seq_ids), ("context_lens", context_lens)):
        check_index(function, name, index, (q.shape[0],), q)
    check_no_grad(function, q=q, k_cache=k_cache, v_cache=v_cache)
    return torch.ops.dynskip.decode_attention(q, k_cache, v_cache, slot_table, seq_ids, context_lens, scale)


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, key_limits: Tensor, scale: float
) -> Tensor:
    """Returns the attention of packed queries over their sequence's packed keys: `[R, H, D]`, dtype of `q`.

    q: `[R, H, D]`. k, v: `[S, H, D]`, dtype of `q`: float32, bfloat16 or float16, row strides free. cu_seqlens_q,
    cu_seqlens_k: `[B + 1], int32`, from 0 to R and from 0 to S: where the queries and keys of each sequence begin.
    key_limits: `[R], int32`: row r attends to the first `key_limits[r]` keys of its sequence; without any, its result
    is zero. Limits 1..T are the causal mask. The result of a sequence does not depend, to the bit, on the other
    sequences. Cost: 4 * H * D FLOPs a query and key.
    """
    function = "prefill_attention"
    check_tensor(function, "q", q, ("R", "H", "D"))
    check_float(function, "q", q)
    check_tensor(function, "k", k, ("S", q.shape[1], q.shape[2]), like=q)
    check_tensor(function, "v", v, tuple(k.shape), like=q)
    for name, rows in (("q", q), ("k", k), ("v", v)):
        check_packed(function, name, rows, num_dims=2)
    check_index(function, "cu_seqlens_q", cu_seqlens_q, ("B + 1",), q)
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError(
            "prefill_attention: cu_seqlens_q must have B + 1 entries, got none. For an empty batch pass [0]."
        )
    check_index(function, "cu_seqlens_k", cu_seqlens_k, (cu_seqlens_q.shape[0],), q)
    check_index(function, "key_limits", key_limits, (q.shape[0],), q)
    check_no_grad(function, q=q, k=k, v=v)
    return torch.ops.dynskip.prefill_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, key_limits, scale)


def _check_caches(function: str, k_cache: Tensor, v_cache: Tensor, rows: Tensor) -> None:
    check_tensor(function, "k_cache", k_cache, ("num_slots", rows.shape[1], rows.shape[2]), like=rows)
    check_tensor(function, "v_cache", v_cache, tuple(k_cache.shape), like=rows)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_packed(function, name, cache, num_dims=3)


@torch.library.custom_op("dynskip::gather_layer_norm", mutates_args=())
def _gather_layer_norm(
    x: Tensor, row_ids: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return current_backend(x.device).gather_layer_norm(x, row_ids, weight, bias, eps)


@_gather_layer_norm.register_fake
def _(x: Tensor, row_ids: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty((x.shape[0] if row_ids is None else row_ids.shape[0], x.shape[1]))


@torch.library.custom_op("dynskip::scatter_add", mutates_args=("x",))
def _scatter_add(x: Tensor, row_ids: Tensor | None, y: Tensor) -> None:
    current_backend(x.device).scatter_add(x, row_ids, y)


@_scatter_add.register_fake
def _(x: Tensor, row_ids: Tensor | None, y: Tensor) -> None:
    return None


@torch.library.custom_op("dynskip::kv_store", mutates_args=("k_cache", "v_cache"))
def _kv_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    current_backend(k.device).kv_store(k, v, k_cache, v_cache, slot_mapping)


@_kv_store.register_fake
def _(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    return None


@torch.library.custom_op("dynskip::decode_attention", mutates_args=())
def _decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slot_table: Tensor, seq_ids: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    return current_backend(q.device).decode_attention(q, k_cache, v_cache, slot_table, seq_ids, context_lens, scale)


@_decode_attention.register_fake
def _(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slot_table: Tensor, seq_ids: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("dynskip::prefill_attention", mutates_args=())
def _prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, key_limits: Tensor, scale: float
) -> Tensor:
    return current_backend(q.device).prefill_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, key_limits, scale)


@_prefill_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, key_limits: Tensor, scale: float
) -> Tensor:
    return q.new_empty(q.shape)
