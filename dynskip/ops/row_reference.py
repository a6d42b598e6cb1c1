"""The parts of a decode step over lists of rows, in plain PyTorch: the specification of the fused kernels.

A decode step keeps its state in buffers of M rows, one row a sequence, in place: `x[row]` is the residual stream of the
sequence in `row`, `q[row]` its query, and so on. A layer works on the rows of a list and leaves all others alone. As in
`reference`, sums, statistics and softmax run in float32, or in float64 for float64 inputs. A product's operands have
the dtype of the buffers, so a LayerNorm's result is rounded before it is multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynskip.kernels.row_list import RowList, RowNorm
from dynskip.ops.reference import accumulation_dtype, activate, decode_attention, gather_layer_norm, rotated
from dynskip.routing.plan import KVPolicy

# What a token leaves in a layer that it skips, as `plan_rows` is told it.
ABSENT, EVICT, PROPAGATE, SHARE = range(4)
KV_POLICY_CODES = {
    KVPolicy.ABSENT: ABSENT,
    KVPolicy.EVICT: EVICT,
    KVPolicy.PROPAGATE: PROPAGATE,
    KVPolicy.SHARE: SHARE,
}


def embed_rows(
    token_ids: Tensor,
    position_ids: Tensor,
    rows: RowList,
    token_table: Tensor,
    position_table: Tensor | None,
    position_offset: int,
    out: Tensor,
) -> None:
    """Writes to `out[row]` the sum of two embeddings: of `token_ids[row]` and `position_ids[row] + position_offset`.

    token_ids, position_ids: `[M], int64`. token_table: `[V, C]`. position_table: `[P, C]`, or None: the token's
    embedding alone is written. out: `[M, C]`, mutated. The sum is float32, rounded once.
    """
    ids = listed(rows)
    tokens = token_table[token_ids[ids]].to(accumulation_dtype(out.dtype))
    if position_table is not None:
        tokens = tokens + position_table[position_ids[ids] + position_offset].to(tokens.dtype)
    out[ids] = tokens.to(out.dtype)


def norm_rows(x: Tensor, rows: RowList, norm: RowNorm, out: Tensor) -> None:
    """Writes the norm of `x[row]` to `out[row]`. x: `[M, C]`. out: `[M, C]`, mutated; it may be `x`."""
    ids = listed(rows)
    out[ids] = gather_layer_norm(x, ids.int(), *norm)


def linear_rows(
    x: Tensor,
    rows: RowList,
    norm: RowNorm | None,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    gated: bool,
    out: Tensor,
    normed: Tensor,
    deterministic: bool = False,
) -> None:
    """Writes to `out[row]` the product of the (normalised) `x[row]` with `weight`, plus `bias`, through `activation`.

    x: `[M, K]`. norm: before the product, or None. weight: `[N, K]`, contiguous. bias: `[N]` or None. activation: one
    of `reference.ACTIVATIONS`. gated: weight `[2 * N, K]` and bias `[2 * N]`: the first N go through the activation
    and are multiplied by the others. out: `[M, N]`, mutated. normed: `[M, K]`, scratch, for normalised rows; undefined
    afterwards. deterministic: the bits of a row depend on that row alone. Cost: reads `weight` once, 2 FLOPs a value of
    it and row.
    """
    ids = listed(rows)
    out[ids] = activate(_product(x[ids], norm, weight, bias), activation, gated).to(out.dtype)


def qkv_rows(
    x: Tensor,
    rows: RowList,
    num_run: Tensor,
    norm: RowNorm | None,
    weight: Tensor,
    bias: Tensor | None,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    normed: Tensor,
    deterministic: bool = False,
) -> None:
    """Writes the queries of the listed rows to `q[row]`, and their keys and values to slot `slots[row]` of the caches.

    x: `[M, C]`. num_run: `[1], int32`: how many of the rows attend; if none, no query is computed and `q` keeps its
    values. weight: `[(H + 2 * G) * D, C]`, contiguous, and bias, of as many or None: of H query heads, G key heads and
    G value heads. q: `[M, H * D]`, mutated. k_cache, v_cache: `[num_slots, G, D]`, contiguous, mutated. slots: `[M],
    int32`; a row of the list whose slot is -1 stores nothing. normed, deterministic: as in `linear_rows`.
    """
    ids = listed(rows)
    product = _product(x[ids], norm, weight, bias).to(q.dtype)
    key_size = k_cache.shape[1] * k_cache.shape[2]
    query, key, value = torch.split(product, [q.shape[1], key_size, key_size], dim=1)
    if int(num_run):
        q[ids] = query
    stored = slots[ids] >= 0
    targets = slots[ids][stored].long()
    k_cache[targets] = key[stored].view(-1, *k_cache.shape[1:])
    v_cache[targets] = value[stored].view(-1, *v_cache.shape[1:])


def rotate_rows(
    q: Tensor,
    rows: RowList,
    k_cache: Tensor,
    slots: Tensor,
    position_ids: Tensor,
    cos_sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Turns `q[row]`, and the key in slot `slots[row]`, to the position of the row, as `reference.rotated` does.

    q: `[M, H * D]`, mutated. k_cache: `[num_slots, G, D]`, contiguous, mutated in the slots of the listed rows; a slot
    of -1 is none. position_ids: `[M], int64`. cos_sin: `[P, E], float32`. q_weight, k_weight: `[D]`, of the RMSNorm of
    each head, with `eps`, or None.
    """
    ids = listed(rows)
    heads = _heads(q, k_cache)[ids]
    q[ids] = rotated(heads, position_ids[ids], cos_sin, q_weight, eps).flatten(1)
    ids = ids[slots[ids] >= 0]
    targets = slots[ids].long()
    k_cache[targets] = rotated(k_cache[targets], position_ids[ids], cos_sin, k_weight, eps)


def place_rows(rows: RowList, slots: Tensor, position_ids: Tensor, slot_positions: Tensor) -> None:
    """Writes `position_ids[row]` to `slot_positions[slots[row]]` for the listed rows; a slot of -1 is none.

    slots: `[M], int32`. position_ids: `[M], int64`. slot_positions: `[num_slots], int32`, mutated.
    """
    ids = listed(rows)
    ids = ids[slots[ids] >= 0]
    slot_positions[slots[ids].long()] = position_ids[ids].int()


def attend_rows(
    q: Tensor,
    rows: RowList,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_table: Tensor,
    seq_ids: Tensor,
    key_limits: Tensor,
    scale: float,
    out: Tensor,
    workspace: object = None,
    deterministic: bool = False,
    slopes: Tensor | None = None,
    window: int = 0,
    position_ids: Tensor | None = None,
    slot_positions: Tensor | None = None,
) -> None:
    """Writes to `out[row]` the attention of `q[row]` over the cached tokens of its sequence.

    q, out: `[M, H * D]`; `out` is mutated. slot_table: `[B, S_max], int32`. seq_ids, key_limits: `[M], int32`: the row
    attends to the slots in the first `key_limits[row]` entries of `slot_table[seq_ids[row]]`; without any, its result
    is zero. workspace: what the programs of the kernel share; the reference needs none. slopes, window, slot_positions:
    as in `reference.decode_attention`, with position_ids `[M], int64`.
    """
    ids = listed(rows)
    attention = decode_attention(
        _heads(q, k_cache)[ids],
        k_cache,
        v_cache,
        slot_table,
        seq_ids[ids],
        key_limits[ids],
        scale,
        slopes,
        window,
        None if position_ids is None else position_ids[ids],
        slot_positions,
    )
    out[ids] = attention.flatten(1)


def linear_add_rows(
    x: Tensor,
    rows: RowList,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    workspace: object = None,
    deterministic: bool = False,
) -> None:
    """Adds to `residual[row]` the product of `x[row]` with `weight`, plus `bias`, in place.

    x: `[M, K]`. weight: `[N, K]`, contiguous. bias: `[N]` or None. residual: `[M, N]`, mutated. Product, bias and
    residual are added in float32, rounded once.
    """
    ids = listed(rows)
    product = _product(x[ids], None, weight, bias)
    residual[ids] = (residual[ids].to(product.dtype) + product).to(residual.dtype)


def gate_rows(x: Tensor, rows: RowList, weight: Tensor, bias: Tensor | None, active: Tensor) -> None:
    """Writes to `active[row]` whether the row's "run" logit is at least its "skip" logit (arXiv 2410.20022, 3.2).

    x: `[M, C]`. weight: `[2, C], float32`, and bias: `[2], float32`, or None: index 0 is skip, 1 is run. active: `[M],
    bool`, mutated. Logits are float32.
    """
    ids = listed(rows)
    logits = (x[ids].to(weight.dtype)[:, None, :] * weight).sum(-1)
    if bias is not None:
        logits = logits + bias
    active[ids] = logits[:, 1] >= logits[:, 0]


def plan_rows(
    active: Tensor,
    first_layer: int,
    kv_policy: int,
    cache_ids: Tensor,
    context_lens: Tensor,
    slot_tables: Tensor,
    free_slots: Tensor,
    slot_cursor: Tensor,
    row_slots: Tensor,
    run_ids: Tensor,
    num_run: Tensor,
    kv_ids: Tensor,
    num_kv: Tensor,
    slots: Tensor,
    key_limits: Tensor,
) -> None:
    """Works out, for consecutive layers, which rows run, which compute a key and a value, and where these go.

    active: `[n, M], bool`: which rows run layers first_layer, first_layer + 1, ... kv_policy: ABSENT, EVICT, PROPAGATE
    or SHARE. cache_ids: `[M], int32`: the cache sequence of each row, or -1: the row takes no part, whatever `active`
    says. Rows of one sequence stand side by side, in the order of its tokens.

    The cache, mutated: context_lens `[L, B], int32`, slot_tables `[L, B, S_max], int32`: each row that gets an entry in
    a layer appends one slot to its table there. slot_cursor `[1], int32`: new keys take the slots that stand in
    free_slots `[num_slots], int32`, itself unchanged, from this place on, in the order of layers and, in a layer, of
    rows. row_slots `[M], int32`: the slot of the last layer that the row ran in this step, -1 before; reset where
    first_layer is 0.

    The plan, mutated: run_ids, kv_ids `[L, M], int32`: the rows, increasing, and -1 behind them. num_run, num_kv `[L],
    int32`. slots `[L, M], int32`: where the row's new key and value go, -1 for none. key_limits `[L, M],
    int32`: the entries of its table that the row attends to, its own included. Only the n layers are written.

    With ABSENT and EVICT a row that runs computes a key. With PROPAGATE every row does. With SHARE rows that run do,
    and rows that have run no earlier layer of the step; every other row appends the slot of the last layer that it ran.
    """
    takes_part = (cache_ids >= 0).tolist()
    if first_layer == 0:
        row_slots.fill_(-1)
    for index, mask in enumerate(active.tolist()):
        layer = first_layer + index
        run, kv = [], []
        slots[layer] = -1
        for row, runs in enumerate(mask):
            if not takes_part[row]:
                key_limits[layer, row] = 0
                continue
            has_slot = bool(row_slots[row] >= 0)
            computes_kv = runs or kv_policy == PROPAGATE or (kv_policy == SHARE and not has_slot)
            if runs:
                run.append(row)
            if computes_kv:
                kv.append(row)
                slots[layer, row] = free_slots[slot_cursor[0]]
                slot_cursor += 1
            seq = int(cache_ids[row])
            if computes_kv or kv_policy == SHARE:
                slot_tables[layer, seq, context_lens[layer, seq].long()] = (
                    slots[layer, row] if computes_kv else row_slots[row]
                )
                context_lens[layer, seq] += 1
            key_limits[layer, row] = context_lens[layer, seq]
            if runs:
                row_slots[row] = slots[layer, row]
        for ids, rows in ((run_ids, run), (kv_ids, kv)):
            padded = rows + [-1] * (len(mask) - len(rows))
            ids[layer] = torch.tensor(padded, dtype=torch.int32, device=ids.device)
        num_run[layer], num_kv[layer] = len(run), len(kv)


def listed(rows: RowList) -> Tensor:
    """`[R], int64`: the rows of the list."""
    return rows.ids[: int(rows.num)].long()


def _heads(q: Tensor, k_cache: Tensor) -> Tensor:
    head_size = k_cache.shape[2]
    return q.view(q.shape[0], q.shape[1] // head_size, head_size)


def _product(x: Tensor, norm: RowNorm | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    if norm is not None:
        x = gather_layer_norm(x, None, *norm)
    accumulation = accumulation_dtype(x.dtype)
    product = x.to(accumulation) @ weight.to(accumulation).T
    return product if bias is None else product + bias.to(accumulation)
