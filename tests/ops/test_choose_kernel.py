"""The Triton kernel that chooses tokens, against the specification: on a GPU, or else under Triton's interpreter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dynskip.kernels.choose_tokens import choose_tokens
from dynskip.kernels.launches import LAUNCHES
from dynskip.ops import choice_reference
from dynskip.ops.backends import available_backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WHY_NOT = available_backends(DEVICE)["triton"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=f"triton backend: {WHY_NOT}")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A tile of the kernel holds 1,024 tokens.
SIZES = [1, 2, 63, 65, 200, 2048, 2049, 5000]


def columns(logits: Tensor, seed: int) -> list[Tensor]:
    """Choices of all kinds: rows without top_k, top_p or min_p, and one that takes the most likely token."""
    num_rows, num_tokens = logits.shape
    generator = torch.Generator().manual_seed(seed)
    temperature = 0.1 + 1.5 * torch.rand(num_rows, generator=generator, dtype=torch.float64)
    top_p = 0.05 + 0.95 * torch.rand(num_rows, generator=generator, dtype=torch.float64)
    top_k = torch.randint(1, min(num_tokens + 3, 60), (num_rows,), generator=generator)
    seeds = torch.randint(-(2**62), 2**62, (num_rows,), generator=generator)
    outputs, positions = (torch.randint(0, 2**20, (num_rows,), generator=generator) for _ in range(2))
    min_p = 0.2 * torch.rand(num_rows, generator=generator, dtype=torch.float64)
    top_k[::3], top_p[::2], temperature[3], min_p[:2] = 0, 1, 0, 0
    return [column.to(DEVICE) for column in (temperature, top_k, top_p, min_p, seeds, outputs, positions)]


@pytest.mark.parametrize("spread", [0.3, 6.0], ids=["flat", "steep"])
@pytest.mark.parametrize(("num_tokens", "dtype"), [*zip(SIZES, itertools.cycle(DTYPES), strict=False)], ids=str)
def test_tokens_are_those_of_the_specification(num_tokens: int, dtype: torch.dtype, spread: float) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    logits = (spread * torch.randn(8, num_tokens + 3, generator=generator)).to(DEVICE, dtype)[:, :num_tokens]
    logits[4, : num_tokens // 2] = -math.inf
    logits[6:] = logits[6:, :1].clone()  # ties: the lower token comes first
    choices = columns(logits, num_tokens)
    LAUNCHES.clear()
    tokens = choose_tokens(logits, *choices)
    assert LAUNCHES == {"choose_tokens": 1}
    assert tokens.tolist() == choice_reference.choose_tokens(logits, *choices).tolist()
    for row in (1, 5):
        assert choose_tokens(logits[row : row + 1], *(column[row : row + 1] for column in choices)) == tokens[row]


def test_equal_logits_are_cut_in_the_order_of_tokens() -> None:
    logits = torch.full((16, 4500), -20.0, device=DEVICE)
    logits[:, ::100] = 1.0
    choices = columns(logits, 4)
    choices[0].fill_(1)
    choices[1].fill_(23)
    choices[2].fill_(1)
    choices[3].fill_(1)  # cuts at the same logit, behind all of its tokens
    tokens = choose_tokens(logits, *choices).tolist()
    assert tokens == choice_reference.choose_tokens(logits, *choices).tolist()
    assert 2048 < max(tokens) < 2300


def test_what_is_not_finite_is_told() -> None:
    logits = torch.zeros(8, 70, device=DEVICE)
    logits[0, 69], logits[1, 0], logits[2, 5], logits[3] = math.nan, math.inf, -math.inf, -math.inf
    logits[4, 3:], logits[5] = -math.inf, -0.0
    logits[6, ::2] = -0.0  # both zeros are one logit
    choices = columns(logits, 1)
    choices[1][5:7] = 9
    tokens = choose_tokens(logits, *choices).tolist()
    assert tokens == choice_reference.choose_tokens(logits, *choices).tolist()
    assert tokens[:2] == [-1, -1] and tokens[3] == -1 and 0 <= tokens[4] < 3 and max(tokens[5:7]) < 9


def test_temperatures_at_both_ends() -> None:
    """Where all other scores vanish the draw is among the likeliest; where all weigh the same, among all."""
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]], device=DEVICE).repeat(6, 1)
    choices = columns(logits, 2)
    choices[0][:] = torch.tensor([1e-300, 1e-300, 1e-300, 1e300, 1e300, 1e300], dtype=torch.float64)
    choices[1].zero_()
    choices[2].fill_(1)
    choices[3].zero_()
    tokens = choose_tokens(logits, *choices).tolist()
    assert tokens == choice_reference.choose_tokens(logits, *choices).tolist()
    assert set(tokens[:3]) <= {1, 3}


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter takes seconds for a row of this size")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_a_large_vocabulary(dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(64, 128_256, generator=torch.Generator().manual_seed(0))).to(DEVICE, dtype)
    choices = columns(logits, 3)
    assert choose_tokens(logits, *choices).tolist() == choice_reference.choose_tokens(logits, *choices).tolist()
