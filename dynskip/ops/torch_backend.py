"""The ops out of PyTorch's own fast operators, on any device. No checks: `dynskip.ops` has them.

The attention ops read lengths on the host, so on a GPU they synchronise; the `triton` backend does not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynskip.ops.reference import ACTIVATION_FUNCTIONS

# Of a mask by head, in float32: 64 MiB.
_MASK_ELEMENTS = 2**24
# On a CPU the order of a sum depends on where a row begins between two multiples of so many bytes.
_ROW_BYTES = 16


def aligned_rows(rows: Tensor) -> Tensor:
    """``rows`` [..., N], on a CPU with zeros behind each, so that the bits of a sum do not depend on its place."""
    num_zeros = -rows.shape[-1] % (_ROW_BYTES // rows.element_size()) if rows.device.type == "cpu" else 0
    return F.pad(rows, (0, num_zeros)) if num_zeros else rows


def gather_layer_norm(
    x: Tensor, row_ids: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool = False
) -> Tensor:
    """See `reference.gather_layer_norm`. PyTorch's norms take their statistics in float32 on every device."""
    rows = x if row_ids is None else x.index_select(0, row_ids)
    if not rms:
        return F.layer_norm(rows, rows.shape[1:], weight, bias, eps)
    if bias is None:
        return F.rms_norm(rows, rows.shape[1:], weight, eps)
    normed = F.rms_norm(rows.float(), rows.shape[1:], None if weight is None else weight.float(), eps)
    return (normed + bias.float()).to(x.dtype)


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


def rotate(x: Tensor, position_ids: Tensor, cos_sin: Tensor, weight: Tensor | None = None, eps: float = 0.0) -> None:
    """See `reference.rotate`. In float32, rounded once."""
    heads = x.float()
    if weight is not None:
        heads = F.rms_norm(heads, x.shape[2:], weight.float(), eps)
    cos, sin = cos_sin.index_select(0, position_ids)[:, None].chunk(2, dim=-1)
    half = cos_sin.shape[1] // 2
    one, other = heads[..., :half], heads[..., half : 2 * half]
    turned = one * cos - other * sin, other * cos + one * sin  # in float32 `heads` may be `x`
    x[..., :half], x[..., half : 2 * half] = turned
    if weight is not None:
        x[..., 2 * half :] = heads[..., 2 * half :]


def activate(x: Tensor, activation: str, gated: bool = False) -> Tensor:
    """See `reference.activate`. With a gate the activation is rounded before the product. Differentiable."""
    values, factors = x.chunk(2, dim=-1) if gated else (x, None)
    values = _apply(activation, values)
    return values if factors is None else values * factors


def _apply(activation: str, x: Tensor) -> Tensor:
    function = ACTIVATION_FUNCTIONS[activation]
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    if activation in ("none", "relu") or x.device.type != "cpu" or needs_grad:
        return function(x)
    # On a CPU PyTorch has other functions for elements that fill no vector, and which these are depends on all of a
    # tensor: row by row, the bits of a row depend on that row alone.
    out = torch.empty(x.shape, dtype=x.dtype)
    for row, values in enumerate(x):
        out[row] = function(values)
    return out


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
    """See `reference.decode_attention`. One call of PyTorch's attention a row, so that no row sees another's length."""
    # On a CPU PyTorch's attention of one query takes 25 times as long over strided bfloat16 as over strided float32;
    # a slope times a distance needs float32 anywhere.
    dtype = torch.float32 if q.device.type == "cpu" or slopes is not None else q.dtype
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for row, (sequence, length) in enumerate(zip(seq_ids.tolist(), context_lens.tolist(), strict=True)):
        slots, mask = slot_table[sequence, :length], None
        if slopes is not None or window:
            assert position_ids is not None and slot_positions is not None, "slopes and windows are ones of positions"
            distances = position_ids[row] - slot_positions.index_select(0, slots)
            if window:
                inside = distances < window
                slots, distances = slots[inside], distances[inside]
            mask = None if slopes is None else (-slopes[:, None] * distances)[None, :, None]
        if slots.numel() == 0:
            out[row] = 0
            continue
        k, v = (cache.index_select(0, slots).to(dtype) for cache in (k_cache, v_cache))
        out[row] = _attend(q[row, None].to(dtype), k, v, scale, mask)[0]
    return out


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
    """See `reference.prefill_attention`. Calls PyTorch's attention for each sequence: none sees another."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if slopes is not None or (q.dtype == torch.float16 and q.device.type == "cpu"):
        # A slope times a distance needs float32; a CPU multiplies float16 at less than half the speed of float32.
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
        limits, tensors = key_limits[rows], (q[rows], k[keys], v[keys])
        if slopes is None and not window:
            out[rows] = _attend_sequence(*tensors, limits, scale)
            continue
        assert position_ids is not None and key_positions is not None, "slopes and windows are ones of positions"
        place, key_place = position_ids[rows], key_positions[keys]
        if slopes is None and int(place.max()) - int(key_place.min()) < window:
            out[rows] = _attend_sequence(*tensors, limits, scale)
        else:
            out[rows] = _attend_by_position(*tensors, limits, scale, slopes, window, place, key_place)
    return out


def _attend_sequence(q: Tensor, k: Tensor, v: Tensor, limits: Tensor, scale: float) -> Tensor:
    """[T, H, D]: the attention of the queries of one sequence, at least one, over its keys, at least one."""
    positions = torch.arange(len(k), dtype=limits.dtype, device=limits.device)
    if len(q) == len(k) and torch.equal(limits, positions + 1):
        return _attend(q, k, v, scale, is_causal=True)
    attended = _attend(q, k, v, scale, positions < limits[:, None])
    return attended.masked_fill((limits == 0)[:, None, None], 0)


def _attend_by_position(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    limits: Tensor,
    scale: float,
    slopes: Tensor | None,
    window: int,
    position_ids: Tensor,
    key_positions: Tensor,
) -> Tensor:
    """As `_attend_sequence`, with slopes or a window. position_ids: `[T]`. key_positions: `[S]`."""
    numbers = torch.arange(len(k), dtype=limits.dtype, device=limits.device)
    # A slope makes the mask as large as all scores: some rows at a time.
    num_masks = 1 if slopes is None else q.shape[1]
    num_block_rows = max(1, _MASK_ELEMENTS // (num_masks * len(k)))
    blocks = []
    for rows in (slice(first, first + num_block_rows) for first in range(0, len(q), num_block_rows)):
        distances = position_ids[rows, None] - key_positions
        mask = numbers < limits[rows, None]
        if window:
            mask = mask & (distances < window)
        lessening = mask if slopes is None else (-slopes[:, None, None] * distances).masked_fill(~mask, float("-inf"))
        blocks.append(_attend(q[rows], k, v, scale, lessening[None]).masked_fill(~mask.any(dim=1)[:, None, None], 0))
    return torch.cat(blocks)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """`[T, H, D]`: PyTorch's attention of queries `[T, H, D]` over keys and values `[S, G, D]`.

    mask: which keys a query attends to, or what is added to scores, in a shape that PyTorch takes.
    """
    queries, keys, values = (aligned_rows(tensor).transpose(0, 1)[None] for tensor in (q, k, v))
    attended = F.scaled_dot_product_attention(
        queries, keys, values, mask, is_causal=is_causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )
    return attended[0].transpose(0, 1)[..., : v.shape[-1]]
