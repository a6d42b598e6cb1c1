"""Embeddings of lists of rows: on a GPU, or else under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynskip.kernels.embed_rows import embed_rows
from dynskip.kernels.launches import LAUNCHES
from dynskip.kernels.row_list import RowList
from dynskip.ops import row_reference
from dynskip.ops.backends import available_backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WHY_NOT = available_backends(DEVICE)["triton"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=f"triton backend: {WHY_NOT}")]
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="Triton's interpreter cuts float32 off to bfloat16")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)]
NUM_ROWS, NUM_TOKENS, NUM_POSITIONS = 7, 11, 20


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids", [[], [4], [5, 0, 3], list(range(NUM_ROWS))], ids=str)
@pytest.mark.parametrize("num_columns", [1, 97, 1500])
@pytest.mark.parametrize("positions", [True, False], ids=["positions", "tokens"])
def test_listed_rows_get_the_reference_bits(
    positions: bool, num_columns: int, ids: list[int], dtype: torch.dtype
) -> None:
    """One sum, rounded once: equal to the bit. Rows that are not listed have no token, and keep what they hold."""
    generator = torch.Generator().manual_seed(num_columns)
    tables: list[Tensor | None] = [
        torch.randn(size, num_columns, generator=generator).to(DEVICE, dtype) for size in (NUM_TOKENS, NUM_POSITIONS)
    ]
    tables[1] = tables[1] if positions else None
    token_ids, position_ids = (torch.full((NUM_ROWS,), 2**40, device=DEVICE) for _ in range(2))
    token_ids[ids] = torch.randint(0, NUM_TOKENS, (len(ids),), generator=generator).to(DEVICE)
    position_ids[ids] = torch.randint(0, NUM_POSITIONS - 2, (len(ids),), generator=generator).to(DEVICE)
    rows = RowList(index(*ids, *[-1] * (NUM_ROWS - len(ids))), index(len(ids)), NUM_ROWS)
    out, expected = (torch.full((NUM_ROWS, num_columns), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2))
    LAUNCHES.clear()
    embed_rows(token_ids, position_ids, rows, *tables, 2, out)
    row_reference.embed_rows(token_ids, position_ids, rows, *tables, 2, expected)
    assert torch.equal(out[ids], expected[ids])
    assert torch.equal(out.isnan(), expected.isnan())
    assert LAUNCHES == {"embed_rows": 1}


def test_the_last_rows_of_large_tables_are_found() -> None:
    """Their offsets exceed 32 bits. The memory is reserved, not touched, but for these rows."""
    stride = 2**30 + 8
    table = torch.empty(2 * stride + 16, dtype=torch.float16, device=DEVICE).as_strided((3, 16), (stride, 1))
    table[2] = torch.arange(16)
    positions = torch.ones(4, 16, dtype=torch.float16, device=DEVICE)
    out = torch.full((1, 16), float("nan"), dtype=torch.float16, device=DEVICE)
    token_ids, position_ids = (torch.tensor([value], device=DEVICE) for value in (2, 1))
    embed_rows(token_ids, position_ids, RowList(index(0), index(1), 1), table, positions, 2, out)
    assert torch.equal(out[0].cpu(), torch.arange(1, 17).half())
