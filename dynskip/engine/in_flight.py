"""`TokensInFlight`: the tokens of a decode step on their way to the host, while the next step already runs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynskip.engine.request import OutputSequence, Span
from dynskip.ops.transfer import to_device


class TokensInFlight:
    """The tokens of one decode step, which the device knows and the host has not read.

    They stand between a step and the next one: the host reads them once the next decode step is under way, and before
    it takes any token in another way. So a sequence has at most one token that the host does not know, the last one
    that the scheduler has booked for it, and the next step finds it here.

    What a sequence ends by shows one step late; by then the step may have run one row of it for nothing. The entry of
    that row fits, because a sequence that has its last token by count leaves the scheduler when that is chosen, not
    when it is read.

    sequences: whose tokens they are. tokens: [R], int64, one each, `NOT_FINITE` for none.
    """

    def __init__(self, sequences: Sequence[OutputSequence], tokens: Tensor) -> None:
        self.sequences = sequences
        self._rows = {sequence: row for row, sequence in enumerate(sequences)}
        # Where logits are not finite the host will see so; the device runs token 0 meanwhile.
        self._token_ids = tokens.clamp(min=0)
        self._host, self._copied = tokens, None
        if tokens.device.type == "cuda":
            self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self._copied.record(torch.cuda.current_stream(tokens.device))

    def inputs(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Token and position of spans of one token each, both [N], int64, on the device; nothing is waited for."""
        known: list[int] = []
        rows: list[int] = []
        for sequence, first, _ in spans:
            tokens = sequence.tokens(first, 1)
            known.append(tokens[0] if tokens else -1)
            rows.append(0 if tokens else self._rows[sequence])
        table = torch.tensor([known, rows, [span.first for span in spans]])
        token_ids, row_ids, position_ids = to_device(table, self._token_ids.device)
        return torch.where(token_ids < 0, self._token_ids[row_ids], token_ids), position_ids

    def read(self) -> list[int]:
        """The token of each sequence, `NOT_FINITE` for none: waits for the step that has chosen them."""
        if self._copied is not None:
            self._copied.synchronize()
        tokens: list[int] = self._host.tolist()
        return tokens
