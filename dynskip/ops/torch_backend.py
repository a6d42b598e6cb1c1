"""The five ops out of PyTorch's own fast operators, on any device. No checks: `dynskip.ops` has them.

The attention ops read lengths on the host, so on a GPU they synchronise; the `triton` backend does not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gather_layer_norm(
    x: Tensor, row_ids: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """See `reference.gather_layer_norm`. PyTorch's LayerNorm takes its statistics in float32 on every device."""
    rows = x if row_ids is None else x.index_select(0, row_ids)
    return F.layer_norm(rows, rows.shape[1:], weight, bias, eps)


def scatter_add(x: Tensor, row_ids: Tensor | None, y: Tensor) -> None:
    """See `reference.scatter_add`. PyTorch adds half precision in float32 and rounds once."""
    if row_ids is None:
        x.add_(y)
    else:
        x.index_put_((row_ids,), x.index_select(0, row_ids).add_(y))


def kv_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """See `reference.kv_store`."""
    stored = (slot_mapping >= 0).nonzero().flatten()
    slots = slot_mapping
    if stored.numel() != slot_mapping.numel():
        slots, k, v = slot_mapping[stored], k[stored], v[stored]
    k_cache.index_put_((slots,), k)
    v_cache.index_put_((slots,), v)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slot_table: Tensor, seq_ids: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """See `reference.decode_attention`. One call of PyTorch's attention a row, so that no row sees another's length."""
    # On a CPU PyTorch's attention of one query takes 25 times as long over strided bfloat16 as over strided float32.
    dtype = torch.float32 if q.device.type == "cpu" else q.dtype
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for row, (sequence, length) in enumerate(zip(seq_ids.tolist(), context_lens.tolist(), strict=True)):
        if length == 0:
            out[row] = 0
            continue
        slots = slot_table[sequence, :length]
        k = k_cache.index_select(0, slots).to(dtype).transpose(0, 1)
        v = v_cache.index_select(0, slots).to(dtype).transpose(0, 1)
        query = q[row].to(dtype)[:, None]
        out[row] = F.scaled_dot_product_attention(query[None], k[None], v[None], scale=scale)[0, :, 0]
    return out


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, key_limits: Tensor, scale: float
) -> Tensor:
    """See `reference.prefill_attention`. One call of PyTorch's attention a sequence: none sees another."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.dtype == torch.float16 and q.device.type == "cpu":
        # A CPU multiplies float16 at less than half the speed of float32.
        q, k, v = q.float(), k.float(), v.float()
    query_starts, key_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for sequence in range(len(query_starts) - 1):
        rows = slice(query_starts[sequence], query_starts[sequence + 1])
        keys = slice(key_starts[sequence], key_starts[sequence + 1])
        num_rows, num_keys = rows.stop - rows.start, keys.stop - keys.start
        if num_rows == 0:
            continue
        if num_keys == 0:
            out[rows] = 0
            continue
        queries, key_rows, value_rows = (tensor.transpose(0, 1)[None] for tensor in (q[rows], k[keys], v[keys]))
        limits = key_limits[rows]
        positions = torch.arange(num_keys, dtype=limits.dtype, device=limits.device)
        if num_rows == num_keys and torch.equal(limits, positions + 1):
            attended = F.scaled_dot_product_attention(queries, key_rows, value_rows, is_causal=True, scale=scale)
        else:
            mask = positions < limits[:, None]
            attended = F.scaled_dot_product_attention(queries, key_rows, value_rows, attn_mask=mask, scale=scale)
            attended = attended.masked_fill((limits == 0)[:, None], 0)
        out[rows] = attended[0].transpose(0, 1)
    return out
