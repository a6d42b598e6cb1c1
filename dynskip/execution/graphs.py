"""CUDA graphs of decode steps: a graph per layer and row bucket, chained from C++, and whole steps that come again."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dynskip.controllers import HiddenStateGate
from dynskip.execution.fused import FusedDecode
from dynskip.execution.step_shape import StepWork
from dynskip.ops import native

MAX_STEP_GRAPHS = 32
# A step is captured whole when it comes for this time: a mix of paths that stays comes again, one that does not would
# cost a capture (milliseconds) to save the gaps between its layers' graphs (about a microsecond each).
WHOLE_STEP_AFTER = 4


# Of so many steps for each graph it is known how often they came.
_SEEN_PER_GRAPH = 4


@dataclass
class _Seen:
    """How often a step has to come until it is captured: from now on, and from when its graph was last dropped."""

    num_left: int
    num_needed: int


class Graphs(Protocol):
    """Makes and launches graphs."""

    def capture(self, launch: Callable[[], None]) -> Any:
        """A graph of what ``launch`` launches; nothing runs."""
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

    def capture(self, launch: Callable[[], None]) -> Any:
        """See `Graphs.capture`."""
        graph = torch.cuda.CUDAGraph()
        free_before = self._free_bytes()
        # Not torch.cuda.graph, which waits for the device and gives torch's unused memory back to it: that takes longer
        # than the capture, and hides what the graph takes.
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
        self.num_bytes += max(free_before - self._free_bytes(), 0)
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

    def __init__(self, decoder: FusedDecode, graphs: Graphs, max_step_graphs: int = MAX_STEP_GRAPHS) -> None:
        if max_step_graphs < 1:
            raise ValueError(f"GraphedDecode: max_step_graphs must be at least 1, got {max_step_graphs}.")
        self.decoder = decoder
        self.graphs = graphs
        self.max_step_graphs = max_step_graphs
        self._parts: dict[Hashable, Any] = {}
        self._steps: OrderedDict[tuple[StepWork, bool], Any] = OrderedDict()
        self._seen: OrderedDict[tuple[StepWork, bool], _Seen] = OrderedDict()
        self._chain: tuple[tuple[StepWork, bool], list[Any]] | None = None

    def run(self, work: StepWork, head: bool = True) -> None:
        """Run a step of ``work``: layers, and with ``head`` the logits. Tokens and rows were set before."""
        key = (work, head)
        graph = self._steps.get(key)
        if graph is not None:
            self._steps.move_to_end(key)
            self.graphs.replay([graph])
        elif work.controller is not None:
            self._run_controlled(work, head)
        elif self._comes_often(key):
            self.graphs.replay([self._capture_step(work, head)])
        else:
            self.run_chain(work, head)

    def run_chain(self, work: StepWork, head: bool = True) -> None:
        """Run a step of ``work``, whose mask is known, from the graphs of its layers, as for one that never came."""
        key = (work, head)
        if self._chain is None or self._chain[0] != key:
            self._chain = (key, self._parts_of(work, head))
        self.graphs.replay(self._chain[1])

    def run_whole(self, work: StepWork, head: bool = True) -> None:
        """Run a step of ``work`` from one graph, captured now where it is not there yet."""
        if (work, head) not in self._steps:
            self._capture_step(work, head)
        self.run(work, head)

    @property
    def memory(self) -> GraphMemory:
        """What the graphs and buffers take."""
        num_graphs = len(self._parts) + len(self._steps)
        return GraphMemory(num_graphs, self.graphs.num_bytes, self.decoder.num_bytes)

    def _run_controlled(self, work: StepWork, head: bool) -> None:
        if isinstance(work.controller, HiddenStateGate):
            self.graphs.replay([self._capture_step(work, head)])
            return
        self.decoder.run(work)
        if head:
            self.decoder.head(work.max_rows)

    def _comes_often(self, key: tuple[StepWork, bool]) -> bool:
        """Whether the step, this time included, came often enough to be captured; only the last are remembered."""
        seen = self._remember(key)
        seen.num_left -= 1
        return seen.num_left <= 0

    def _remember(self, key: tuple[StepWork, bool]) -> _Seen:
        seen = self._seen.setdefault(key, _Seen(WHOLE_STEP_AFTER, WHOLE_STEP_AFTER))
        self._seen.move_to_end(key)
        while len(self._seen) > _SEEN_PER_GRAPH * self.max_step_graphs:
            self._seen.popitem(last=False)
        return seen

    def _capture_step(self, work: StepWork, head: bool) -> Any:
        decoder = self.decoder
        decoder.warm_up(work)

        def launch() -> None:
            decoder.run(work)
            if head:
                decoder.head(work.max_rows)

        graph = self.graphs.capture(launch)
        self._steps[(work, head)] = graph
        while len(self._steps) > self.max_step_graphs:
            dropped, _ = self._steps.popitem(last=False)
            seen = self._remember(dropped)
            seen.num_needed *= 2
            seen.num_left = seen.num_needed
        return graph

    def _parts_of(self, work: StepWork, head: bool) -> list[Any]:
        decoder, warm = self.decoder, False
        parts: list[tuple[Hashable, Callable[[], None]]] = [
            (("begin", work.max_rows, work.kv_policy), lambda: decoder.begin(work))
        ]
        # A layer's launches depend on its own bounds only: what the mask means is in the plan.
        parts += [(layer, functools.partial(decoder.layer, work, layer)) for layer in work.layers]
        if head:
            parts.append((("head", work.max_rows), lambda: decoder.head(work.max_rows)))
        for key, launch in parts:
            if key not in self._parts:
                if not warm:
                    decoder.warm_up(work)
                    warm = True
                self._parts[key] = self.graphs.capture(launch)
        return [self._parts[key] for key, _ in parts]
