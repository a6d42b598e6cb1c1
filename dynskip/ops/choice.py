"""The choice of next tokens for the rows of a batch, each by parameters of its own.

On a CPU the C++ extension chooses, on a GPU a Triton kernel. Where these are absent the specification runs, which is
the torch backend of this op; `resolve_backend` has warned by then.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import attrgetter
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from dynskip.ops import choice_reference, native
from dynskip.ops.backends import available_backends
from dynskip.ops.checks import FLOAT_DTYPES
from dynskip.ops.transfer import to_device
from dynskip.sampling import Choice, SamplingParams

_FILTERS = attrgetter("temperature", "top_k", "top_p", "min_p")


def choose_tokens(
    logits: Tensor, choices: Sequence[Choice], likely: Tensor | None = None, decoder: int = 0
) -> list[int]:
    """The next token of each row of `logits` `[R, V]`, `NOT_FINITE` for none; waits for the device once.

    likely: `most_likely` of `logits`, where it is known. decoder: as in `native.choose_tokens`.

    A row's token depends on that row and its choice alone. See `choice_reference.choose_tokens`.
    """
    tokens: list[int] = launch_choice(logits, choices, likely, decoder).tolist()
    return tokens


def launch_choice(logits: Tensor, choices: Sequence[Choice], likely: Tensor | None = None, decoder: int = 0) -> Tensor:
    """`[R], int64`: what `choose_tokens` returns, on the device of `logits`, which is not waited for."""
    if all(choice.params.greedy for choice in choices):
        return most_likely(logits) if likely is None else likely
    columns = choice_columns(choices, logits.shape[1], logits.device)
    by = {"decoder": decoder} if decoder else {}
    tokens: Tensor = _launchers(logits).choose_tokens(logits, *columns, **by)
    return tokens


def warm_up(logits: Tensor) -> None:
    """Compile and load what draws from rows like those of ``logits`` [R, V], and from changed, float32 ones."""
    choices = [Choice(SamplingParams(temperature=1.0), 0, 0, 0)]
    for rows in (logits[:1], logits[:1].float()):
        launch_choice(rows, choices)


def most_likely(logits: Tensor) -> Tensor:
    """See `choice_reference.most_likely`."""
    launchers = native if _is_native(logits) else choice_reference
    tokens: Tensor = launchers.most_likely(logits)
    return tokens


def choice_columns(choices: Sequence[Choice], num_tokens: int, device: torch.device) -> tuple[Tensor, ...]:
    """temperature, top_k, top_p, min_p, seed, output and position of `choices`, `[R]` each, for `choose_tokens`.

    All but positions are kept from step to step, so they must not be written to.
    """
    params, seeds, outputs, positions = zip(*choices, strict=True) if choices else ((),) * 4
    # Their copies are not waited for: what a stream made is for that stream.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    kept = _kept_columns(tuple(map(_FILTERS, params)), seeds, outputs, num_tokens, device, stream)
    # By numpy, which reads lists of numbers several times as fast as torch.tensor does.
    return *kept, to_device(torch.from_numpy(np.array(positions, np.int64)), device)


@functools.lru_cache(maxsize=16)
def _kept_columns(
    filters: tuple[tuple[float, int | None, float, float], ...],
    seeds: tuple[int, ...],
    outputs: tuple[int, ...],
    num_tokens: int,
    device: torch.device,
    _stream: int,
) -> tuple[Tensor, ...]:
    """All columns but positions; the key is what they hold, so a row that is another in any of it has new ones."""
    temperatures, top_ks, top_ps, min_ps = zip(*filters, strict=True) if filters else ((),) * 4
    floats = np.array([temperatures, top_ps, min_ps], np.float64)
    temperature, top_p, min_p = to_device(torch.from_numpy(floats), device)
    integers = [[min(top_k or 0, num_tokens) for top_k in top_ks], seeds, outputs]
    top_k, seed, output = to_device(torch.from_numpy(np.array(integers, np.int64)), device)
    return temperature, top_k, top_p, min_p, seed, output


def _launchers(logits: Tensor) -> ModuleType:
    """What draws tokens from ``logits``."""
    if _is_native(logits):
        return native
    if logits.device.type == "cuda" and logits.dtype in FLOAT_DTYPES and _has_triton():
        from dynskip.kernels import choose_tokens

        return choose_tokens
    return choice_reference


def _is_native(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and logits.dtype in FLOAT_DTYPES and native.unavailable_reason() is None


@functools.cache
def _has_triton() -> bool:
    return available_backends("cuda")["triton"] is None
