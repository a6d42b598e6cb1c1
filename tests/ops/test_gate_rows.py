"""Gates over lists of rows: on a GPU, or else under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynskip.kernels.gate_rows import gate_rows
from dynskip.kernels.launches import LAUNCHES
from dynskip.kernels.row_list import RowList
from dynskip.ops import row_reference
from dynskip.ops.backends import available_backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WHY_NOT = available_backends(DEVICE)["triton"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=f"triton backend: {WHY_NOT}")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NUM_ROWS = 7


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def rows_of(ids: list[int], max_rows: int = NUM_ROWS) -> RowList:
    return RowList(index(*ids, *[-1] * (NUM_ROWS - len(ids))), index(len(ids)), max_rows)


def make_rows(num_columns: int, ids: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x with NaN in rows that are not listed, and a gate's weight and bias."""
    generator = torch.Generator().manual_seed(num_columns)
    x = torch.full((NUM_ROWS, num_columns), float("nan"), dtype=dtype)
    x[ids] = torch.randn(len(ids), num_columns, generator=generator).to(dtype)
    weight, bias = torch.randn(2, num_columns, generator=generator), torch.randn(2, generator=generator)
    return x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids", [[], [4], [5, 0, 3], list(range(NUM_ROWS))], ids=str)
@pytest.mark.parametrize("num_columns", [1, 97, 192, 3000])
def test_decisions_are_those_of_the_exact_logits(num_columns: int, ids: list[int], dtype: torch.dtype) -> None:
    """Those of float64, wherever float32 sums cannot mistake which logit is larger; other rows keep theirs."""
    x, weight, bias = make_rows(num_columns, ids, dtype)
    for chosen_bias in (bias, None):
        logits = x[ids].double() @ weight.double().T + (0 if chosen_bias is None else chosen_bias.double())
        margin = torch.finfo(torch.float32).eps * num_columns * x[ids].double().abs() @ weight.double().abs().T.amax(1)
        assert ((logits[:, 1] - logits[:, 0]).abs() > margin).all()
        for before in (False, True):
            active = torch.full((NUM_ROWS,), before, device=DEVICE)
            expected = active.clone()
            expected[ids] = logits[:, 1] >= logits[:, 0]
            gate_rows(x, rows_of(ids), weight, chosen_bias, active)
            assert torch.equal(active, expected)


def test_equal_logits_run_and_nan_skips() -> None:
    x, weight, _ = make_rows(192, [0, 1, 2], torch.float32)
    x[1] = float("nan")
    weight[1] = weight[0]
    active = torch.tensor([False, True, False], device=DEVICE).repeat(3)[:NUM_ROWS]
    expected = active.clone()
    gate_rows(x, rows_of([0, 1, 2]), weight, None, active)
    row_reference.gate_rows(x, rows_of([0, 1, 2]), weight, None, expected)
    assert active[:3].tolist() == expected[:3].tolist() == [True, False, True]


def test_a_decision_does_not_depend_on_the_other_rows() -> None:
    """Weights that all but cancel: the sum's last bits decide, and they are the same in any list."""
    x, weight, _ = make_rows(3000, list(range(NUM_ROWS)), torch.float32)
    weight[1] = weight[0][torch.randperm(3000, generator=torch.Generator().manual_seed(1))]
    x[:] = 1.0
    together = torch.zeros(NUM_ROWS, dtype=torch.bool, device=DEVICE)
    gate_rows(x, rows_of([3, 1, 6]), weight, None, together)
    for row in (3, 1, 6):
        alone = torch.zeros_like(together)
        gate_rows(x, rows_of([row], max_rows=1), weight, None, alone)
        assert alone[row] == together[row]


def test_rows_may_lie_apart_and_launches_are_counted() -> None:
    x, weight, bias = make_rows(97, [0, 2], torch.float32)
    wide = torch.full((NUM_ROWS, 3 * 97), float("nan"), device=DEVICE)
    wide[:, 97:194] = x
    LAUNCHES.clear()
    results = [torch.zeros(NUM_ROWS, dtype=torch.bool, device=DEVICE) for _ in range(2)]
    for source, active in zip((x, wide[:, 97:194]), results, strict=True):
        gate_rows(source, rows_of([2, 0]), weight, bias, active)
    assert torch.equal(*results)
    assert LAUNCHES == {"gate_rows": 2}
