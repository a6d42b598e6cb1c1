"""A decode step that runs again and again from one state: its results must be the same bits each time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from bench.gpu.fused_steps import FusedSteps
from dynskip.measure.device import Device

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class RepeatedStep:
    """The next step of ``steps``, put back before each run; the device counts the runs that differ from the first.

    num_different: [1], int64, on the device. What is compared: logits, hidden states, and the new keys and values.
    """

    def __init__(self, device: Device, steps: FusedSteps) -> None:
        self.device = device
        self.steps = steps
        buffers, cache = steps.fused.buffers, steps.cache
        changed = (buffers.token_ids, buffers.position_ids, cache.context_lens, cache.slot_cursor)
        self._state = [(tensor, tensor.clone()) for tensor in changed]
        self._run()
        device.synchronize()
        # Where new keys go is the plan's business, and so the same each time.
        self._slots = buffers.slots[:, : steps.workload.batch].flatten().long()
        self._first = [result.clone() for result in self._results()]
        self.num_different = torch.zeros(1, dtype=torch.int64, device=device.device)

    @property
    def logits(self) -> Tensor:
        """[B, V]: those of the first run."""
        return self._first[0].view(self.steps.fused.buffers.logits.dtype)

    def captured(self, constants: AbstractContextManager[None] | None = None) -> Callable[[], object]:
        """A graph of one run with its comparison, with the kernels' constants that ``constants`` puts in place."""
        with constants or nullcontext():
            return self.device.captured(self._run_and_compare)

    def uncompared(self) -> Callable[[], object]:
        """A graph of one run, to time it."""
        return self.device.captured(self._run)

    def count_different(self, run: Callable[[], object], num_runs: int) -> int:
        """How many of ``num_runs`` calls of ``run``, a graph, gave other bits than the first run; waits for them."""
        self.num_different.zero_()
        for _ in range(num_runs):
            run()
        return int(self.num_different)

    def _run(self) -> None:
        for tensor, before in self._state:
            tensor.copy_(before)
        fused, shape = self.steps.fused, self.steps.shape
        fused.run(shape)
        fused.head(shape.max_rows)

    def _run_and_compare(self) -> None:
        self._run()
        differs = [(result != first).any() for result, first in zip(self._results(), self._first, strict=True)]
        self.num_different.add_(torch.stack(differs).any())

    def _results(self) -> list[Tensor]:
        """Bits, so that a zero with another sign is another result, and NaN the same."""
        batch, cache, buffers = self.steps.workload.batch, self.steps.cache, self.steps.fused.buffers
        found = [buffers.logits[:batch], buffers.hidden_states[:batch]]
        found += [pool[self._slots] for pool in (cache.k_cache, cache.v_cache)]
        return [tensor.view(_BITS[tensor.element_size()]) for tensor in found]
