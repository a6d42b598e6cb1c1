"""What changes the logits of a row before its token is chosen: bias, tokens that are withheld, penalties.

Arithmetic is that of vLLM, in float32 and in its order. A row's bits depend on that row alone. Only the places of a
row that change are read and written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynskip.ops import native
from dynskip.ops.checks import FLOAT_DTYPES
from dynskip.sampling import SamplingParams

if TYPE_CHECKING:
    from numpy.typing import NDArray

NO_TOKENS: NDArray[np.int64] = np.empty(0, np.int64)


class LogitChange(NamedTuple):
    """How the logits of one row change. Token ids are different ones, each [K], int64.

    params: its logit_bias and penalties hold. withheld: tokens that must not come.
    seen: tokens of prompt and output. counts: [K], int64, how often the output has each.
    """

    params: SamplingParams
    withheld: NDArray[np.int64] = NO_TOKENS
    seen: NDArray[np.int64] = NO_TOKENS
    counts: NDArray[np.int64] = NO_TOKENS


def float_rows(logits: Tensor, rows: Sequence[int], decoder: int = 0) -> Tensor:
    """[R, V], float32: a copy of some rows of ``logits`` [N, V]. decoder: as in `native.choose_tokens`.

    On a CPU not by PyTorch's parallel loops, behind which OpenMP's threads spin into the next step.
    """
    if _is_native(logits):
        copied: Tensor = native.float_rows(logits, torch.tensor(rows, dtype=torch.int64), decoder)
        return copied
    return logits[rows].to(torch.float32, copy=True)


def _is_native(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and logits.dtype in FLOAT_DTYPES and native.unavailable_reason() is None


def change_logits_(logits: Tensor, changes: Sequence[LogitChange]) -> None:
    """Change ``logits`` [R, V], float32, contiguous, in place; one of ``changes`` a row.

    Bias is added first; logits of tokens that are withheld become -inf; penalties follow.
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


def _penalized(values: Tensor, changes: Sequence[LogitChange]) -> Tensor:
    """The logits of the tokens that ``changes`` have seen, [K], behind their penalties."""
    lengths = [len(change.seen) for change in changes]

    def column(name: str) -> Tensor:
        of_rows = np.array([getattr(change.params, name) for change in changes], np.float32)
        # Not by PyTorch's repeat_interleave, a parallel loop however short it is.
        return torch.from_numpy(np.repeat(of_rows, lengths)).to(values.device)

    repetition, counts = column("repetition_penalty"), _joined([change.counts for change in changes], values)
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - column("frequency_penalty") * counts.float()
    return values - column("presence_penalty") * (counts > 0).float()


def _places(tokens: Sequence[NDArray[np.int64]], logits: Tensor) -> Tensor | None:
    """Where in the flat ``logits`` the tokens of each row stand; None where no row has any."""
    if not any(map(len, tokens)):
        return None
    num_rows, num_tokens = logits.shape
    begins = np.repeat(np.arange(num_rows) * num_tokens, [len(each) for each in tokens])
    return torch.from_numpy(np.concatenate(tokens) + begins).to(logits.device)


def _joined(arrays: Sequence[NDArray[Any]], like: Tensor) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(like.device)
