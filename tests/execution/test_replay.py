"""Chains of captured CUDA graphs launched by the extension, and what is said where it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from dynskip.execution.graphs import CudaGraphs
from dynskip.ops import native, row_reference

needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and native.has_cuda()), reason="needs a GPU and the extension's CUDA part"
)


@pytest.mark.skipif(native.has_cuda(), reason="the extension has its CUDA part")
def test_without_its_cuda_part_the_extension_says_how_to_get_it() -> None:
    message = (
        r"^native.replay: the C\+\+ extension must have its CUDA part, got none\. The C\+\+ extension .*\. "
        r"Build it where nvcc and a torch with CUDA are: DYNSKIP_BUILD_CUDA=1 pip install .* -e \.$"
    )
    with pytest.raises(RuntimeError, match=message):
        native.replay([1, 2], torch.device("cuda", 0))


def captured(launch: object) -> torch.cuda.CUDAGraph:
    """A graph of what ``launch`` launches."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()  # type: ignore[operator]
    return graph


@pytest.mark.gpu
@needs_gpu
def test_graphs_run_in_order_on_the_current_stream_without_a_wait() -> None:
    x = torch.ones(8, device="cuda")
    twice, more = captured(lambda: x.mul_(2)), captured(lambda: x.add_(1))
    torch.cuda.synchronize()
    execs = [graph.raw_cuda_graph_exec() for graph in (twice, more, twice, twice, more)]
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            x.fill_(3)
            native.replay(execs, x.device)
            native.replay([], x.device)
            result = x.clone()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert result.tolist() == [29.0] * 8


@pytest.mark.gpu
@needs_gpu
def test_a_graph_that_cannot_be_launched_is_named() -> None:
    x = torch.zeros(8, device="cuda")
    more = captured(lambda: x.add_(1))
    with pytest.raises(RuntimeError, match=r"replay: graph_execs\[1\] of 3 must launch on device 0, got CUDA error"):
        native.replay([more.raw_cuda_graph_exec(), 0, more.raw_cuda_graph_exec()], x.device)
    torch.cuda.synchronize()
    # The error was told once, and is not told again to whoever asks next.
    assert x.tolist() == [1.0] * 8


@pytest.mark.gpu
@needs_gpu
def test_planning_is_captured_and_follows_masks_that_change() -> None:
    num_layers, num_rows = 6, 40
    i32 = {"dtype": torch.int32, "device": "cuda"}
    active = torch.zeros(num_layers, num_rows, dtype=torch.bool, device="cuda")
    cache_ids = torch.arange(num_rows, **i32)
    cache = (torch.zeros(num_layers, num_rows, **i32), torch.zeros(num_layers, num_rows, 9, **i32))
    single, by_row, by_layer = torch.zeros(1, **i32), torch.zeros(num_rows, **i32), torch.zeros(2, num_layers, **i32)
    run_ids, kv_ids, slots, key_limits = torch.zeros(4, num_layers, num_rows, **i32)
    free_slots = torch.randperm(4 * num_layers * num_rows).int().cuda()
    state = (*cache, free_slots, single, by_row, run_ids, by_layer[0], kv_ids, by_layer[1], slots, key_limits)
    expected = [tensor.cpu() for tensor in state]

    def plan() -> None:
        native.plan_rows(active, 0, row_reference.SHARE, cache_ids, *state)

    graph = captured(plan)
    for seed in range(4):
        mask = torch.rand(num_layers, num_rows, generator=torch.Generator().manual_seed(seed)) < 0.4
        row_reference.plan_rows(mask, 0, row_reference.SHARE, cache_ids.cpu(), *expected)
        active.copy_(mask)
        native.replay([graph.raw_cuda_graph_exec()], active.device)
        num_run, num_kv = expected[6].tolist(), expected[8].tolist()
        for index, (result, wanted) in enumerate(zip(state, expected, strict=True)):
            counts = {5: num_run, 7: num_kv}.get(index)
            for layer, num in enumerate(counts or ()):
                assert torch.equal(result[layer, :num].cpu(), wanted[layer, :num])
            assert counts is not None or torch.equal(result.cpu(), wanted)


class FakeGpu:
    """Stands for what `CudaGraphs` asks of torch.cuda: it notes what it is asked, and waits for nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.free_bytes = 1000
        self.num_asked = 0
        fakes = {
            "graph_pool_handle": lambda: (0, 1),
            "Stream": lambda device: "side",
            "stream": self.stream,
            "CUDAGraph": lambda: self,
            "mem_get_info": self.mem_get_info,
            "synchronize": lambda device=None: self.events.append("wait"),
            "empty_cache": lambda: self.events.append("empty"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        self.events.append(f"on {stream}")
        yield
        self.events.append(f"off {stream}")

    def mem_get_info(self, device: object) -> tuple[int, int]:
        self.num_asked += 1
        return self.free_bytes, 2000

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert pool == (0, 1) and capture_error_mode == "thread_local"
        self.events.append("begin")

    def capture_end(self) -> None:
        self.events.append("end")
        self.free_bytes -= 30


def test_a_capture_waits_for_nothing_and_counts_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    graphs = CudaGraphs(torch.device("cuda", 0))
    for count in (1, 2):
        launches = [lambda: gpu.events.append("launch")] * count
        assert graphs.capture(*launches) == [gpu] * count
        assert graphs.num_bytes == (30, 90)[count - 1] and gpu.num_asked == 2 * count, "asked once for all of them"
    assert gpu.events == ["on side", "begin", "launch", "end", "off side"] * 3


def test_a_capture_that_fails_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)

    def launch() -> None:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        CudaGraphs(torch.device("cuda", 0)).capture(launch)
    assert gpu.events[:3] == ["on side", "begin", "end"]
