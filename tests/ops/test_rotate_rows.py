"""Heads turned in place, and positions beside slots: on a GPU, or else under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynskip.kernels.launches import LAUNCHES
from dynskip.kernels.place_rows import place_rows
from dynskip.kernels.rotate_rows import rotate, rotate_rows
from dynskip.kernels.row_list import RowList
from dynskip.ops import reference, row_reference
from dynskip.ops.backends import available_backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WHY_NOT = available_backends(DEVICE)["triton"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=f"triton backend: {WHY_NOT}")]
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="Triton's interpreter cuts float32 off to bfloat16")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)]
NUM_ROWS, NUM_POSITIONS, NUM_SLOTS = 7, 40, 17
# Query heads, key heads, their size, how much of it turns: with little to turn, with nothing left, in several programs.
HEADS = [(4, 2, 16, 16), (3, 3, 12, 4), (20, 4, 128, 32), (1, 1, 2, 2)]


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Draw:
    """Repeatable tensors of one dtype, and what rows of a list turn by."""

    def __init__(self, dtype: torch.dtype, rotary_size: int) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(5)
        angles = torch.randn(NUM_POSITIONS, rotary_size // 2, generator=self.generator) * 3
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).to(DEVICE)
        self.position_ids = torch.randint(0, NUM_POSITIONS, (NUM_ROWS,), generator=self.generator).to(DEVICE)
        self.slots = index(*torch.randperm(NUM_SLOTS, generator=self.generator)[:NUM_ROWS].tolist())

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(DEVICE, self.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("ids", [[], [4], [5, 0, 3], list(range(NUM_ROWS))], ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size", "rotary_size"), HEADS)
def test_listed_rows_and_their_keys_are_turned(
    num_heads: int, num_kv_heads: int, head_size: int, rotary_size: int, ids: list[int], norm: bool, dtype: torch.dtype
) -> None:
    """By the bits of packed rows, each alone; other rows, other slots and what lies beside a row keep theirs."""
    draw = Draw(dtype, rotary_size)
    # Rows begin at multiples of 16 bytes, as they do in a step: elsewhere a GPU adds up a head in another order.
    pad = 16 - num_heads * head_size % 16
    wide = draw.normal(NUM_ROWS, num_heads * head_size + pad)
    q, k_cache = wide[:, :-pad], draw.normal(NUM_SLOTS, num_kv_heads, head_size)
    weights = [draw.normal(head_size) if norm else None for _ in range(2)]
    draw.slots[ids[1:2]] = -1
    rows = RowList(index(*ids, *[-1] * (NUM_ROWS - len(ids))), index(len(ids)), NUM_ROWS)
    expected_wide, expected_cache = wide.clone(), k_cache.clone()
    for row in ids:
        of_row = draw.position_ids[row : row + 1], draw.cos_sin
        rotate(expected_wide[row, :-pad].view(1, num_heads, head_size), *of_row, weights[0], 1e-6)
        slot = int(draw.slots[row])
        if slot >= 0:
            rotate(expected_cache[slot : slot + 1], *of_row, weights[1], 1e-6)
    LAUNCHES.clear()
    rotate_rows(q, rows, k_cache, draw.slots, draw.position_ids, draw.cos_sin, *weights, 1e-6)
    assert torch.equal(wide, expected_wide) and torch.equal(k_cache, expected_cache)
    assert LAUNCHES == {"rotate_rows": 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size", "rotary_size"), HEADS)
def test_packed_rows_are_turned_within_the_budget(
    num_heads: int, num_kv_heads: int, head_size: int, rotary_size: int, norm: bool, dtype: torch.dtype
) -> None:
    """Rows as a projection leaves them, amid others: twice the error of eager PyTorch, or the rounding of a result."""
    draw = Draw(dtype, rotary_size)
    projection = draw.normal(NUM_ROWS, num_heads + 2 * num_kv_heads, head_size)
    for part in (slice(0, num_heads), slice(num_heads, num_heads + num_kv_heads)):
        before = projection.clone()
        x = projection[:, part]
        weight = draw.normal(head_size) if norm else None
        exact = reference.rotated(
            x.double(), draw.position_ids, draw.cos_sin.double(), None if weight is None else weight.double(), 1e-6
        )
        heads = x if weight is None else torch.nn.functional.rms_norm(x, (head_size,), weight, 1e-6)
        cos, sin = draw.cos_sin[draw.position_ids].to(dtype)[:, None].chunk(2, dim=-1)
        one, other, rest = heads.split([rotary_size // 2, rotary_size // 2, head_size - rotary_size], dim=-1)
        eager = torch.cat([one * cos - other * sin, other * cos + one * sin, rest], dim=-1)
        rotate(x, draw.position_ids, draw.cos_sin, weight, 1e-6)
        floor = (torch.finfo(dtype).eps / 2 + 6 * torch.finfo(torch.float32).eps) * exact.abs().max().item()
        allowed = max(2 * (eager.double() - exact).abs().max().item(), floor)
        assert (x.double() - exact).abs().max().item() <= allowed
        before[:, part] = x
        assert torch.equal(before, projection)


def test_no_rows_launch_nothing() -> None:
    draw = Draw(torch.float32, 4)
    LAUNCHES.clear()
    rotate(draw.normal(0, 2, 8), draw.position_ids[:0], draw.cos_sin)
    assert not LAUNCHES


@pytest.mark.parametrize("ids", [[], [4], [5, 0, 3], list(range(NUM_ROWS))], ids=str)
def test_positions_stand_beside_the_slots_of_listed_rows(ids: list[int]) -> None:
    draw = Draw(torch.float32, 2)
    draw.slots[ids[1:2]] = -1
    rows = RowList(index(*ids, *[-1] * (NUM_ROWS - len(ids))), index(len(ids)), NUM_ROWS)
    found, expected = (torch.full((NUM_SLOTS,), -77, dtype=torch.int32, device=DEVICE) for _ in range(2))
    place_rows(rows, draw.slots, draw.position_ids, found)
    row_reference.place_rows(rows, draw.slots, draw.position_ids, expected)
    assert torch.equal(found, expected)
