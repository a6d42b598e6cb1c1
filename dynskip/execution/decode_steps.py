"""From the steps that generation makes to fused decode steps: what changed since the last one goes to the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dynskip.controllers import HiddenStateGate
from dynskip.execution.fused import FusedDecode
from dynskip.execution.graphs import CudaGraphs, GraphedDecode, GraphMemory
from dynskip.execution.kv_cache import KVCache
from dynskip.execution.step import RowCounts, Step
from dynskip.execution.step_shape import LayerWork, StepWork
from dynskip.kernels.row_list import ROW_BUCKETS, row_bucket
from dynskip.routing.plan import KVPolicy, Plan


class DecodeSteps:
    """Runs the decode steps of one cache by a `FusedDecode`, on a GPU from CUDA graphs."""

    def __init__(self, decoder: FusedDecode, row_counts: RowCounts) -> None:
        self.decoder = decoder
        self.row_counts = row_counts
        device = decoder.k_cache.device
        self.graphs = GraphedDecode(decoder, CudaGraphs(device)) if device.type == "cuda" else None
        self._plan: Plan | None = None
        self._work: StepWork | None = None
        self._cache_ids: Tensor | None = None

    def run(
        self, step: Step, cache: KVCache, head: bool, on_layer: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """Run ``step``: [N, C], the last layer's output, or with ``head`` [N, V], the logits.

        cache: the one whose tensors the decoder has. What comes back is overwritten by the next step.
        """
        decoder, buffers, plan = self.decoder, self.decoder.buffers, step.plan
        num_rows = plan.rows.num_rows
        if self._cache_ids is not step.cache_ids:
            decoder.set_rows(step.cache_ids)
            self._cache_ids = step.cache_ids
        decoder.set_tokens(step.token_ids, step.position_ids)
        if self._plan is not plan or self._work is None:
            self._plan, self._work = plan, StepWork.of(plan)
            if plan.active is not None:
                decoder.set_active(plan.active)
            if isinstance(self._work.controller, HiddenStateGate):
                decoder.prepare_gate(self._work.controller)
        work = self._work
        if plan.active is None:
            cache.reserve(plan.num_layers * num_rows)
        else:
            cache.reserve(sum(num_kv for _, num_kv in plan.num_rows_by_layer), exact=True)
        if self.graphs is not None and on_layer is None:
            self.graphs.run(work, head)
        else:
            record = None if on_layer is None else lambda layer, states: on_layer(layer, states[:num_rows])
            decoder.run(work, record)
            if head:
                decoder.head(work.max_rows)
        self._count(plan)
        return (buffers.logits if head else buffers.hidden_states)[:num_rows]

    def warm_up(self, max_rows: int) -> None:
        """Compile and load the kernels of steps of at most ``max_rows`` rows, for every bucket; nothing changes."""
        largest = min(row_bucket(max_rows), self.decoder.max_rows)
        for bucket in ROW_BUCKETS:
            if bucket <= largest:
                # One layer stands for all: they have the same kernels.
                self.decoder.warm_up(StepWork(bucket, KVPolicy.EVICT, (LayerWork(0, bucket, bucket),)))

    @property
    def memory(self) -> GraphMemory:
        """What graphs and static buffers take."""
        return GraphMemory(0, 0, self.decoder.num_bytes) if self.graphs is None else self.graphs.memory

    def _count(self, plan: Plan) -> None:
        counts = self.row_counts
        if plan.active is None:
            if counts.on_device is None:
                counts.on_device = torch.zeros_like(self.decoder.buffers.counts, dtype=torch.int64)
            counts.on_device.add_(self.decoder.buffers.counts)
            return
        for layer, (num_run, num_kv) in enumerate(plan.num_rows_by_layer):
            counts.add(layer, num_run, num_kv)
