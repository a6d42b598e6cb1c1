"""Who attends to which cached tokens: contexts cut into items, one for each program."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dynskip.kernels.configs import Config, get_entries
from dynskip.kernels.launches import cdiv, next_power_of_2

LEAST_DOT = 16
"""The least size of a matrix that tensor cores multiply, along each of its sides."""


class Splits(NamedTuple):
    """How many programs a launch has, and how their items are cut: see `attend_rows_kernel`.

    num_groups: programs that share an item, each with its share of the heads. block_h: query heads of a program.
    block_s: tokens that it takes at a time.
    """

    num_groups: int
    num_items: int
    target_items: int
    split_tokens: int
    block_h: int
    block_d: int
    block_s: int

    @property
    def num_partials(self) -> int:
        """Values that the programs may hand to each other: sums, and for each head two more."""
        return self.num_items * self.num_groups * self.block_h * (self.block_d + 2)


def plan_splits(
    config: Config,
    max_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    max_context_len: int,
    deterministic: bool,
) -> Splits:
    """The programs that attend for at most `max_rows` rows to at most `max_context_len` tokens each.

    A program has BLOCK_C values of a token: so many heads; or, where several queries share a head of keys and values,
    that head alone, and of as many tokens more.
    """
    block_d = next_power_of_2(head_size)
    block_s = config["BLOCK_S"]
    if num_heads == num_kv_heads:
        block_h = min(max(config["BLOCK_C"] // block_d, 1), next_power_of_2(num_heads))
        num_groups = cdiv(num_heads, block_h)
    else:
        block_d = max(block_d, LEAST_DOT)
        block_h = next_power_of_2(num_heads // num_kv_heads)
        num_groups = num_kv_heads
        block_s = max(block_s * max(config["BLOCK_C"] // block_d, 1), LEAST_DOT)
    target_items = max(config["TARGET_PROGRAMS"] // num_groups, 1)
    split_tokens = config["SPLIT_TOKENS"] if deterministic else 0
    num_items = max_rows * max(cdiv(max_context_len, split_tokens or block_s), 1)
    if not deterministic:
        num_items = min(num_items, target_items + max_rows)
    return Splits(num_groups, num_items, target_items, split_tokens, block_h, block_d, block_s)


def workspace_sizes(
    max_rows: int, num_heads: int, num_kv_heads: int, head_size: int, max_context_len: int, device: torch.device
) -> tuple[int, int]:
    """How many partials and counters `attend_rows` may need for at most `max_rows` rows, in any dtype and mode."""
    splits = [
        plan_splits(entry.config, max_rows, num_heads, num_kv_heads, head_size, max_context_len, deterministic)
        for dtype in (torch.float16, torch.float32)
        for deterministic in (False, True)
        for entry in get_entries("attend_rows", device, dtype, deterministic)
    ]
    return max(split.num_partials for split in splits), max_rows * max(split.num_groups for split in splits)


@triton.jit
def find_item_of_fixed_size(
    item,
    num_items,
    ids_ptr,
    seq_ids_ptr,
    key_limits_ptr,
    max_rows,
    SPLIT_TOKENS: tl.constexpr,
):
    """Which tokens an item is, where every row owns as many items and each is SPLIT_TOKENS long, whatever the others.

    Both ways to find an item give its row, as a place in the list and by id; the sequence of that row; how many tokens
    the row attends to, in how many items of how many tokens; and which of these items it is. An item that no row needs
    is one of 0 items.
    """
    items_per_row = num_items // max_rows
    index = item // items_per_row
    row = index
    is_listed = index < max_rows
    if ids_ptr is not None:
        row = tl.load(ids_ptr + index, mask=is_listed, other=-1)
        is_listed = row >= 0
    sequence = tl.load(seq_ids_ptr + row, mask=is_listed, other=0)
    limit = tl.load(key_limits_ptr + row, mask=is_listed, other=0)
    num_splits = tl.where(is_listed, tl.maximum(tl.cdiv(limit, SPLIT_TOKENS), 1), 0)
    return index, row, sequence, limit, num_splits, SPLIT_TOKENS, item % items_per_row


@triton.jit
def find_item(
    item,
    ids_ptr,
    seq_ids_ptr,
    key_limits_ptr,
    max_rows,
    TARGET_ITEMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Which tokens an item is, where rows own items one after the other, as many as they need.

    An item is as long as lets TARGET_ITEMS of them hold the tokens of all rows, in blocks of BLOCK_S. As each row may
    end in a shorter one, there are at most TARGET_ITEMS + max_rows.
    """
    indices = tl.arange(0, BLOCK_R)
    rows = tl.load(ids_ptr + indices, mask=indices < max_rows, other=-1)
    is_listed = rows >= 0
    limits = tl.load(key_limits_ptr + rows, mask=is_listed, other=0)
    sequences = tl.load(seq_ids_ptr + rows, mask=is_listed, other=0)
    tokens_per_item = tl.cdiv(tl.sum(limits, axis=0), TARGET_ITEMS)
    split_tokens = tl.maximum(tl.cdiv(tokens_per_item, BLOCK_S), 1) * BLOCK_S
    items = tl.where(is_listed, tl.maximum(tl.cdiv(limits, split_tokens), 1), 0)
    ends = tl.cumsum(items, axis=0)
    is_owner = (ends - items <= item) & (item < ends)
    index = tl.sum(tl.where(is_owner, indices, 0), axis=0)
    row = tl.sum(tl.where(is_owner, rows, 0), axis=0)
    sequence = tl.sum(tl.where(is_owner, sequences, 0), axis=0)
    limit = tl.sum(tl.where(is_owner, limits, 0), axis=0)
    num_splits = tl.sum(tl.where(is_owner, items, 0), axis=0)
    split = item - tl.sum(tl.where(is_owner, ends - items, 0), axis=0)
    return index, row, sequence, limit, num_splits, split_tokens, split
