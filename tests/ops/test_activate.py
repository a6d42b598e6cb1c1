"""Activations of packed rows: on a GPU, or else under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from dynskip.kernels.activate import activate
from dynskip.kernels.launches import LAUNCHES
from dynskip.ops import reference
from dynskip.ops.backends import available_backends
from dynskip.validation.errors import allowed_error, eager_activation, poisoned_allocations

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WHY_NOT = available_backends(DEVICE)["triton"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=f"triton backend: {WHY_NOT}")]
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="Triton's interpreter cuts float32 off to bfloat16")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize(("num_rows", "num_columns"), [(0, 16), (1, 1), (5, 97), (3, 1500)])
def test_errors_stay_within_the_budget(
    num_rows: int, num_columns: int, activation: str, gated: bool, dtype: torch.dtype
) -> None:
    """Values far from zero among them, in rows that lie apart. No row depends on the others."""
    generator = torch.Generator().manual_seed(num_columns)
    width = 2 * num_columns if gated else num_columns
    wide = torch.randn(num_rows, width + 5, generator=generator).to(DEVICE, dtype)
    wide[:, ::7] *= 30
    x = wide[:, :width]
    LAUNCHES.clear()
    with poisoned_allocations():
        found = activate(x, activation, gated)
    assert found.shape == (num_rows, num_columns) and found.dtype == dtype and found.is_contiguous()
    if not num_rows:
        assert not LAUNCHES
        return
    exact = reference.activate(x.double(), activation, gated)
    eager, magnified = eager_activation(x, activation, gated, 0.0)
    assert (found.double() - exact).abs().max().item() <= allowed_error(exact, eager, magnified)
    assert torch.equal(activate(x[-1:], activation, gated), found[-1:])


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_values_far_from_zero_are_those_of_the_specification(activation: str) -> None:
    x = torch.tensor([[-1e4, -90.0, -0.0, 0.0, 90.0, 1e4, float("nan")]], device=DEVICE)
    found, expected = activate(x, activation), reference.activate(x, activation)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
