"""Decode steps run fused, on a GPU from graphs: one per layer and row bucket, chained, and whole repeated steps."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dynskip.controllers import HiddenStateGate
from dynskip.execution.fused import FusedDecode
from dynskip.execution.kv_cache import KVCache
from dynskip.execution.step import RowCounts, Step
from dynskip.execution.step_shape import LayerBounds, StepShape
from dynskip.kernels.row_list import ROW_BUCKETS, row_bucket
from dynskip.ops import native
from dynskip.routing.plan import KVPolicy, Plan

MAX_STEP_GRAPHS = 32
# A step is captured whole when it comes for this time. On an H200 a capture took 11 to 17 ms, and saves the
# gaps between the graphs of 24 or 30 layers, 0.1 to 0.3 ms a step: a mix that comes so often has cost as much without.
WHOLE_STEP_AFTER = 64

# Of so many steps for each graph it is known how often they came.
_SEEN_PER_GRAPH = 4


@dataclass
class _Seen:
    """How often a step has to come until it is captured: from now on, and from when its graph was last dropped."""

    num_left: int
    num_needed: int


class Graphs(Protocol):
    """Makes and launches graphs."""

    def capture(self, *launches: Callable[[], None]) -> list[Any]:
        """A graph of what each of ``launches`` launches; nothing runs."""
        ...

    def replay(self, graphs: Sequence[Any]) -> None:
        """Launch ``graphs``, one after the other, without waiting for them."""
        ...

    @property
    def num_bytes(self) -> int:
        """Device memory that all graphs made so far took."""
        ...


class CudaGraphs:
    """CUDA graphs that share one memory pool. They are launched by the C++ extension, about 1.6 us each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.num_bytes = 0

    def capture(self, *launches: Callable[[], None]) -> list[Any]:
        """See `Graphs.capture`."""
        free_before = self._free_bytes()
        graphs = [self._capture(launch) for launch in launches]
        self.num_bytes += max(free_before - self._free_bytes(), 0)
        return graphs

    def _capture(self, launch: Callable[[], None]) -> Any:
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph, which waits for the device and gives torch's unused memory back to it: that takes longer
        # than the capture, and hides what the graph takes.
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
        return graph

    def replay(self, graphs: Sequence[Any]) -> None:
        """See `Graphs.replay`."""
        native.replay([graph.raw_cuda_graph_exec() for graph in graphs], self.device)

    def _free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[0])


@dataclass(frozen=True)
class GraphMemory:
    """What graphs and their static buffers take on the device."""

    num_graphs: int
    graph_bytes: int
    buffer_bytes: int

    def __str__(self) -> str:
        graphs, buffers = self.graph_bytes / 2**20, self.buffer_bytes / 2**20
        return f"{self.num_graphs} graphs {graphs:.1f} MiB, static buffers {buffers:.1f} MiB"


def sum_memory(parts: Sequence[GraphMemory]) -> GraphMemory:
    """What all of ``parts`` take."""
    return GraphMemory(
        sum(part.num_graphs for part in parts),
        sum(part.graph_bytes for part in parts),
        sum(part.buffer_bytes for part in parts),
    )


class GraphedDecode:
    """Runs the steps of a `FusedDecode` from graphs.

    Paths known to the host: a step is the graphs of its layers, each for the bucket of its rows, launched in a chain;
    a step that comes again and again is captured whole, and the least recently used of these are dropped. One that was
    dropped has to come again twice as often as before, so that more mixes than graphs do not drive each other out with
    every step. A layer without rows is not launched. Masks that the device alone knows, and hidden-state gates: one
    graph of the whole step, whose kernels read their rows and return at once where there are none.
    Other controllers run their own code, which may wait for the device: their steps are launched without graphs.
    """

    def __init__(self, fused: FusedDecode, graphs: Graphs, max_step_graphs: int = MAX_STEP_GRAPHS) -> None:
        if max_step_graphs < 1:
            raise ValueError(f"GraphedDecode: max_step_graphs must be at least 1, got {max_step_graphs}.")
        self.fused = fused
        self.graphs = graphs
        self.max_step_graphs = max_step_graphs
        self._parts: dict[Hashable, Any] = {}
        self._steps: OrderedDict[tuple[StepShape, bool], Any] = OrderedDict()
        self._seen: OrderedDict[tuple[StepShape, bool], _Seen] = OrderedDict()
        self._chain: tuple[tuple[StepShape, bool], list[Any]] | None = None
        self._warm: set[Hashable] = set()

    def run(self, shape: StepShape, head: bool = True) -> None:
        """Run a step of ``shape``: layers, and with ``head`` the logits. Tokens and rows were set before."""
        key = (shape, head)
        graph = self._steps.get(key)
        if graph is not None:
            self._steps.move_to_end(key)
            self.graphs.replay([graph])
        elif shape.controller is not None:
            self._run_controlled(shape, head)
        elif self._comes_often(key):
            self.graphs.replay([self._capture_step(shape, head)])
        else:
            self.run_chain(shape, head)

    def run_chain(self, shape: StepShape, head: bool = True) -> None:
        """Run a step of ``shape``, whose mask is known, from the graphs of its layers, as for one that never came."""
        key = (shape, head)
        if self._chain is None or self._chain[0] != key:
            self._chain = (key, self._parts_of(shape, head))
        self.graphs.replay(self._chain[1])

    def run_whole(self, shape: StepShape, head: bool = True) -> None:
        """Run a step of ``shape`` from one graph, captured now where it is not there yet."""
        if (shape, head) not in self._steps:
            self._capture_step(shape, head)
        self.run(shape, head)

    @property
    def memory(self) -> GraphMemory:
        """What the graphs and buffers take."""
        num_graphs = len(self._parts) + len(self._steps)
        return GraphMemory(num_graphs, self.graphs.num_bytes, self.fused.num_bytes)

    def _run_controlled(self, shape: StepShape, head: bool) -> None:
        if isinstance(shape.controller, HiddenStateGate):
            self.graphs.replay([self._capture_step(shape, head)])
        else:
            self.fused.run(shape, head=head)

    def _comes_often(self, key: tuple[StepShape, bool]) -> bool:
        """Whether the step, this time included, came often enough to be captured; only the last are remembered."""
        seen = self._remember(key)
        seen.num_left -= 1
        return seen.num_left <= 0

    def _remember(self, key: tuple[StepShape, bool]) -> _Seen:
        seen = self._seen.setdefault(key, _Seen(WHOLE_STEP_AFTER, WHOLE_STEP_AFTER))
        self._seen.move_to_end(key)
        while len(self._seen) > _SEEN_PER_GRAPH * self.max_step_graphs:
            self._seen.popitem(last=False)
        return seen

    def _warm_up(self, shape: StepShape) -> None:
        """Compile and load what ``shape`` launches and no capture before it did.

        Layers of the same bounds and windows have the same kernels, so one stands for all of them.
        """
        controller = shape.controller
        always = controller.always if isinstance(controller, HiddenStateGate) else ()
        alike: dict[Hashable, LayerBounds] = {}
        for bounds in shape.layers:
            window, decides = self.fused.layers[bounds.layer].window, bounds.layer not in always
            alike.setdefault((bounds.max_run, bounds.max_kv, window, decides), bounds)
        whole = shape.max_rows, shape.kv_policy, shape.controller_id
        new = {(whole, kind): bounds for kind, bounds in alike.items() if (whole, kind) not in self._warm}
        if new or whole not in self._warm:
            self.fused.warm_up(replace(shape, layers=tuple(new.values())))
            self._warm |= {whole, *new}

    def _capture_step(self, shape: StepShape, head: bool) -> Any:
        self._warm_up(shape)
        (graph,) = self.graphs.capture(functools.partial(self.fused.run, shape, head=head))
        self._steps[(shape, head)] = graph
        while len(self._steps) > self.max_step_graphs:
            dropped, _ = self._steps.popitem(last=False)
            seen = self._remember(dropped)
            seen.num_needed *= 2
            seen.num_left = seen.num_needed
        return graph

    def _parts_of(self, shape: StepShape, head: bool) -> list[Any]:
        fused = self.fused
        parts: list[tuple[Hashable, Callable[[], None]]] = [
            (("begin", shape.max_rows, shape.kv_policy), lambda: fused.plan_and_embed(shape))
        ]
        # A layer's launches depend on its own bounds only: what the mask means is in the plan.
        parts += [(layer, functools.partial(fused.layer, shape, layer)) for layer in shape.layers]
        if head:
            parts.append((("head", shape.max_rows), lambda: fused.head(shape.max_rows)))
        new = {key: launch for key, launch in parts if key not in self._parts}
        if new:
            self._warm_up(shape)
            self._parts |= dict(zip(new, self.graphs.capture(*new.values()), strict=True))
        return [self._parts[key] for key, _ in parts]


class DecodeSteps:
    """Runs the decode steps of one cache by a `FusedDecode`, on a GPU from CUDA graphs."""

    def __init__(self, fused: FusedDecode, row_counts: RowCounts) -> None:
        self.fused = fused
        self.row_counts = row_counts
        device = fused.k_cache.device
        self.graphs = GraphedDecode(fused, CudaGraphs(device)) if device.type == "cuda" else None
        self._plan: Plan | None = None
        self._shape: StepShape | None = None
        self._cache_ids: Tensor | None = None
        self._counts: tuple[int, ...] = ()

    def run(
        self, step: Step, cache: KVCache, head: bool, on_layer: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """Run ``step``: [N, C], the last layer's output, or with ``head`` [N, V], the logits.

        cache: the one whose tensors `fused` has. What comes back is overwritten by the next step.
        """
        fused, buffers, plan = self.fused, self.fused.buffers, step.plan
        num_rows = plan.rows.num_rows
        if self._cache_ids is not step.cache_ids or self._counts != plan.rows.num_new_tokens:
            fused.set_rows(step.cache_ids_of_rows)
            self._cache_ids, self._counts = step.cache_ids, plan.rows.num_new_tokens
        fused.set_tokens(step.token_ids, step.position_ids)
        if self._plan is not plan or self._shape is None:
            self._plan, self._shape = plan, StepShape.of(plan)
            if plan.active is not None:
                fused.set_active(plan.active)
            if isinstance(self._shape.controller, HiddenStateGate):
                fused.prepare_gate(self._shape.controller)
        shape = self._shape
        if plan.active is None:
            cache.reserve(plan.num_layers * num_rows)
        else:
            cache.reserve(sum(num_kv for _, num_kv in plan.num_rows_by_layer), exact=True)
        if self.graphs is not None and on_layer is None:
            self.graphs.run(shape, head)
        else:
            record = None if on_layer is None else lambda layer, states: on_layer(layer, states[:num_rows])
            fused.run(shape, record, head)
        self._count(plan)
        return (buffers.logits if head else buffers.hidden_states)[:num_rows]

    def warm_up(self, max_rows: int) -> None:
        """Compile and load the kernels of steps of at most ``max_rows`` rows, for every bucket; nothing changes."""
        largest = min(row_bucket(max_rows), self.fused.max_rows)
        for bucket in ROW_BUCKETS:
            if bucket <= largest:
                # One layer stands for all: they have the same kernels.
                self.fused.warm_up(StepShape(bucket, KVPolicy.EVICT, (LayerBounds(0, bucket, bucket),)))

    @property
    def memory(self) -> GraphMemory:
        """What graphs and static buffers take."""
        return GraphMemory(0, 0, self.fused.num_bytes) if self.graphs is None else self.graphs.memory

    def _count(self, plan: Plan) -> None:
        counts = self.row_counts
        if plan.active is None:
            if counts.on_device is None:
                counts.on_device = torch.zeros_like(self.fused.buffers.counts, dtype=torch.int64)
            counts.on_device.add_(self.fused.buffers.counts)
            return
        for layer, (num_run, num_kv) in enumerate(plan.num_rows_by_layer):
            counts.add(layer, num_run, num_kv)
