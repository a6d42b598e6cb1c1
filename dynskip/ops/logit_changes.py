"""What changes the logits of a row before its token is chosen: bias, tokens that are withheld, penalties, min_p.

Arithmetic is that of vLLM, in float32 and in its order. A row's bits depend on that row alone. Only the places of a
row that change are read and written, but by min_p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynskip.sampling import SamplingParams

if TYPE_CHECKING:
    from numpy.typing import NDArray

NO_TOKENS: NDArray[np.int64] = np.empty(0, np.int64)


class LogitChange(NamedTuple):
    """How the logits of one row change. Token ids are different ones, each [K], int64.

    params: its logit_bias, penalties, temperature and min_p hold. withheld: tokens that must not come.
    seen: tokens of prompt and output. counts: [K], int64, how often the output has each.
    """

    params: SamplingParams
    withheld: NDArray[np.int64] = NO_TOKENS
    seen: NDArray[np.int64] = NO_TOKENS
    counts: NDArray[np.int64] = NO_TOKENS


def change_logits_(logits: Tensor, changes: Sequence[LogitChange]) -> None:
    """Change ``logits`` [R, V], float32, contiguous, in place; one of ``changes`` a row.

    Bias is added first; logits of tokens that are withheld become -inf; penalties follow, and min_p behind the
    temperature, which itself is not applied.
    """
    if logits.dtype != torch.float32 or not logits.is_contiguous() or logits.dim() != 2:
        raise ValueError(
            f"change_logits_: logits must be contiguous [R, V], float32, got {list(logits.shape)}, {logits.dtype}."
        )
    if len(changes) != len(logits):
        raise ValueError(f"change_logits_: changes must be one a row, {len(logits)}, got {len(changes)}.")
    flat = logits.view(-1)
    places = _places([change.params.bias_columns[0] for change in changes], logits)
    if places is not None:
        flat[places] += _joined([change.params.bias_columns[1] for change in changes], logits)
    places = _places([change.withheld for change in changes], logits)
    if places is not None:
        flat[places] = -math.inf
    places = _places([change.seen for change in changes], logits)
    if places is not None:
        flat[places] = _penalized(flat[places], changes)
    _cut_min_p_(logits, changes)


def _penalized(values: Tensor, changes: Sequence[LogitChange]) -> Tensor:
    """The logits of the tokens that ``changes`` have seen, [K], behind their penalties."""
    lengths = torch.tensor([len(change.seen) for change in changes])

    def column(name: str) -> Tensor:
        of_rows = torch.tensor([getattr(change.params, name) for change in changes], dtype=torch.float32)
        return of_rows.repeat_interleave(lengths).to(values.device)

    repetition, counts = column("repetition_penalty"), _joined([change.counts for change in changes], values)
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - column("frequency_penalty") * counts.float()
    return values - column("presence_penalty") * (counts > 0).float()


def _cut_min_p_(logits: Tensor, changes: Sequence[LogitChange]) -> None:
    """-inf for tokens less than min_p times as likely as the likeliest, by the temperature of their rows."""
    rows = [row for row, change in enumerate(changes) if change.params.filters_min_p]
    if not rows:
        return
    # p_i < min_p * p_max where x_i < x_max + temperature * log(min_p). Nothing is below NaN.
    params = [changes[row].params for row in rows]
    least = torch.tensor([each.temperature * math.log(each.min_p) for each in params], dtype=torch.float64)
    own = logits if len(rows) == len(logits) else logits[rows]
    own.masked_fill_(own < own.amax(-1, keepdim=True) + least.float().to(own.device)[:, None], -math.inf)
    if own is not logits:
        logits[rows] = own


def _places(tokens: Sequence[NDArray[np.int64]], logits: Tensor) -> Tensor | None:
    """Where in the flat ``logits`` the tokens of each row stand; None where no row has any."""
    if not any(map(len, tokens)):
        return None
    num_rows, num_tokens = logits.shape
    begins = np.repeat(np.arange(num_rows) * num_tokens, [len(each) for each in tokens])
    return torch.from_numpy(np.concatenate(tokens) + begins).to(logits.device)


def _joined(arrays: Sequence[NDArray[Any]], like: Tensor) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(like.device)
