"""CUDA graphs of decode steps: a graph per layer and row bucket, chained from C++, and whole steps that come again."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dynskip import native
from dynskip.controllers import HiddenStateGate
from dynskip.decode_work import StepWork
from dynskip.fused_decode import FusedDecode

MAX_STEP_GRAPHS = 32
# A step is captured whole when it comes for this time: a mix of paths that stays comes again, one that does not would
# cost a capture (milliseconds) to save the gaps between its layers' graphs (about a microsecond each).
WHOLE_STEP_AFTER = 4


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
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            launch()
        self.num_bytes += max(free_before - self._free_bytes(), 0)
        return graph

    def replay(self, graphs: Sequence[Any]) -> None:
        """See `Graphs.replay`."""
        native.replay([graph.raw_cuda_graph_exec() for graph in graphs], self.device)

    def _free_bytes(self) -> int:
        torch.cuda.synchronize(self.device)
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


class GraphedDecode:
    """Runs the steps of a `FusedDecode` from graphs.

    Paths known to the host: a step is the graphs of its layers, each for the bucket of its rows, launched in a chain;
    a step that comes again and again is captured whole, and the least recently used of these are dropped. A layer
    without rows is not launched. Masks that the device alone knows, and hidden-state gates: one graph of the whole
    step, whose kernels read their rows and return at once where there are none.
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
        self._seen: OrderedDict[tuple[StepWork, bool], int] = OrderedDict()
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
        elif self._count(key) >= WHOLE_STEP_AFTER:
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

    def _count(self, key: tuple[StepWork, bool]) -> int:
        """How often the step came, this time included; only the last steps are remembered."""
        self._seen[key] = self._seen.pop(key, 0) + 1
        while len(self._seen) > 4 * self.max_step_graphs:
            self._seen.popitem(last=False)
        return self._seen[key]

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
            self._steps.popitem(last=False)
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
