"""What changes logits before the choice: against transformers' processors, dense formulas, exact probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from dynskip import SamplingParams
from dynskip.ops import native
from dynskip.ops.choice import choose_tokens
from dynskip.ops.logit_changes import LogitChange, change_logits_, float_rows
from dynskip.sampling import NOT_FINITE, Choice

NUM_TOKENS = 97


def random_logits(num_rows: int, seed: int = 0, num_tokens: int = NUM_TOKENS) -> Tensor:
    return 3 * torch.randn(num_rows, num_tokens, generator=torch.Generator().manual_seed(seed))


def random_ids(count: int, seed: int) -> list[int]:
    """Token ids, many of them several times."""
    return torch.randint(NUM_TOKENS // 2, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def change_of(prompt_ids: list[int], output_ids: list[int], withheld: list[int] | None = None, **params: Any) -> Any:
    seen = sorted({*prompt_ids, *output_ids})
    counts = [output_ids.count(token) for token in seen]
    arrays = (np.array(each, np.int64) for each in (withheld or [], seen, counts))
    return LogitChange(SamplingParams(**params), *arrays)


def changed(logits: Tensor, changes: list[LogitChange]) -> Tensor:
    own = logits.clone()
    change_logits_(own, changes)
    return own


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 1e30])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = random_logits(6)
    texts = [(random_ids(5, row), random_ids(3 * row, 10 + row)) for row in range(6)]
    found = changed(logits, [change_of(*text, repetition_penalty=penalty) for text in texts])
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for row, (prompt_ids, output_ids) in enumerate(texts):
        ids = torch.tensor([prompt_ids + output_ids])
        assert torch.equal(found[row : row + 1], processor(ids, logits[row : row + 1]))


def test_presence_and_frequency_penalties_are_subtracted() -> None:
    logits = random_logits(5)
    texts = [(random_ids(5, row), random_ids(8 * row, 20 + row)) for row in range(5)]
    penalties = [(0.0, 0.0), (0.4, 0.0), (0.0, -1.7), (2.0, 0.3), (-2.0, 2.0)]
    changes = [
        change_of(*text, presence_penalty=presence, frequency_penalty=frequency)
        for text, (presence, frequency) in zip(texts, penalties, strict=True)
    ]
    found = changed(logits, changes)
    for row, ((_, output_ids), (presence, frequency)) in enumerate(zip(texts, penalties, strict=True)):
        counts = torch.bincount(torch.tensor(output_ids, dtype=torch.int64), minlength=NUM_TOKENS)
        expected = logits[row] - frequency * counts - presence * (counts > 0)
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-5)
        assert torch.equal(found[row][counts == 0], logits[row][counts == 0]), "the prompt's tokens do not count"


def test_the_bias_is_that_of_transformers() -> None:
    logits = random_logits(3)
    bias = {5: 2.5, 96: -math.inf, 0: -1.25}
    found = changed(logits, [change_of([], []), change_of([], [], logit_bias=bias), change_of([], [])])
    expected = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    assert torch.equal(found[1:2], expected(torch.tensor([[1, 2]]), logits[1:2]))
    assert torch.equal(found[[0, 2]], logits[[0, 2]])


def test_withheld_tokens_are_those_of_transformers() -> None:
    logits = random_logits(2)
    found = changed(logits, [change_of([], [], [3, 95]), change_of([], [])])
    processor = MinNewTokensLengthLogitsProcessor(2, 5, [3, 95], device="cpu")
    assert torch.equal(found[:1], processor(torch.tensor([[1, 2, 4]]), logits[:1]))
    assert torch.equal(found[1], logits[1])


def test_the_order_is_bias_withheld_penalties() -> None:
    logits = torch.tensor([[1.0, -1.0, 2.0, 0.5]])
    params = {
        "logit_bias": {0: 1.0, 1: 3.0, 2: 5.0},
        "repetition_penalty": 2.0,
        "frequency_penalty": 0.25,
        "presence_penalty": 0.5,
    }
    # Token 0: (1 + 1) / 2 - 2 * 0.25 - 0.5, token 1: (-1 + 3) / 2, token 2: withheld whatever its bias.
    found = changed(logits, [change_of([1], [0, 0], [2], **params)])
    assert found.tolist() == [[0.0, 1.0, -math.inf, 0.5]]


def test_minus_infinity_stays_and_huge_penalties_make_no_nan() -> None:
    logits = random_logits(1)
    logits[0, :40] = -math.inf
    for params in (
        {"repetition_penalty": 3e38, "presence_penalty": 2.0},
        {"repetition_penalty": 2e-38, "frequency_penalty": -2.0},
        {"logit_bias": dict.fromkeys(range(NUM_TOKENS), 3e38), "repetition_penalty": 3e38},
        {"logit_bias": dict.fromkeys(range(NUM_TOKENS), -3e38)},
    ):
        found = changed(logits, [change_of(list(range(NUM_TOKENS)), [1, 50], **params)])
        assert not bool(found.isnan().any()) and bool((found[0, :40] == -math.inf).all())


def test_a_row_of_minus_infinity_has_no_token() -> None:
    found = changed(random_logits(1), [change_of([], [], list(range(NUM_TOKENS)))])
    assert choose_tokens(found, [Choice(SamplingParams(temperature=1.0, min_p=0.9), 0, 0, 0)]) == [NOT_FINITE]


PARAMS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7, "presence_penalty": 0.3},
    {"frequency_penalty": 1.0, "logit_bias": {3: 1.0, 4: -math.inf}},
    {"presence_penalty": -1.0, "temperature": 2.0},
    {"logit_bias": {0: 0.5, 96: 0.25}},
]


@given(st.lists(st.integers(0, 59), min_size=1, max_size=12, unique=True))
def test_a_row_depends_on_itself_alone(rows: list[int]) -> None:
    logits = random_logits(60)
    changes = [
        change_of(random_ids(row % 7, row), random_ids(row, 99 + row), [row] if row % 5 == 0 else [], **PARAMS[row % 6])
        for row in range(60)
    ]
    together = changed(logits, changes)
    assert torch.equal(changed(logits[rows], [changes[row] for row in rows]), together[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_of_rows_are_those_of_pytorch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = random_logits(6, num_tokens=131).to(dtype)
    for logits in (wide, wide[:, 3:100], wide[:0]):
        for rows in ([], [5, 0, 5], [2]) if len(logits) else ([],):
            copied = float_rows(logits, rows)
            assert torch.equal(copied, logits[rows].float()) and copied.dtype == torch.float32
            copied.zero_()
    assert wide.any()
    if native.unavailable_reason() is None:
        with pytest.raises(RuntimeError, match=r"float_rows: rows must lie in 0\.\.5, got 6"):
            float_rows(wide, [0, 6])
    monkeypatch.setattr(native, "unavailable_reason", lambda: "not here")
    assert torch.equal(float_rows(wide, [5, 0]), wide[[5, 0]].float())


def test_nothing_is_changed_where_nothing_is_asked_for() -> None:
    logits = random_logits(3)
    assert torch.equal(changed(logits, [LogitChange(SamplingParams())] * 3), logits)
    change_logits_(logits[:0], [])


@pytest.mark.parametrize(
    ("logits", "count", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.bfloat16), 2, r"logits must be contiguous \[R, V\], float32, got \[2, 5\]"),
        (torch.zeros(5, 2).T, 2, r"logits must be contiguous \[R, V\], float32, got \[2, 5\]"),
        (torch.zeros(5), 5, r"logits must be contiguous \[R, V\], float32, got \[5\]"),
        (torch.zeros(2, 5), 1, "changes must be one a row, 2, got 1"),
    ],
)
def test_what_it_cannot_change_is_refused(logits: Tensor, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"change_logits_: {message}"):
        change_logits_(logits, [LogitChange(SamplingParams())] * count)
