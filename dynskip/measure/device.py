"""The device that a benchmark runs on: how time is measured there, how launches are captured, what it can do at most.

A CPU stands in for a GPU so that every line of a benchmark can be run without one; its times mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch

from dynskip import host
from dynskip.costs.layer_costs import MachineSpeed
from dynskip.kernels.configs import device_slug
from dynskip.measure import machine
from dynskip.measure.timing import Samples, interleave

_COPY_BYTES = 4 * 2**30  # far more than any cache holds
_GEMM_SIZE = 8192
NUM_SPEED_SAMPLES = 20


class Gpu:
    """A CUDA device, timed by its own events."""

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError(
                "Gpu: device must be a CUDA device that this machine has, got none. Run it on a machine with a GPU, or "
                "with --device cpu, whose times mean nothing."
            )
        self.device = device
        self.name = torch.cuda.get_device_name(device)

    def time(self, task: Callable[[], object], num_repeats: int) -> float:
        """The milliseconds of one of ``num_repeats`` calls of ``task`` in a row, without waits between them."""
        begin, end = _event(), _event()
        torch.cuda.synchronize(self.device)
        begin.record()
        for _ in range(num_repeats):
            task()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / num_repeats

    def captured(self, launch: Callable[[], object]) -> Callable[[], object]:
        """A call that runs again what ``launch`` launches, on the same memory; ``launch`` itself has run then.

        The call keeps ``launch``: memory that nothing else holds would go back to the device, and a graph not know it.
        """
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            launch()  # compiles and loads kernels, which must not happen inside a capture
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        return partial(_replay, graph, launch)

    def graphs(self) -> Any:
        """What `GraphedDecode` captures its graphs with."""
        from dynskip.execution.graphs import CudaGraphs

        return CudaGraphs(self.device)

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """A context in which a wait of the host for the device is an error."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def synchronize(self) -> None:
        """Wait until the device has nothing left to do."""
        torch.cuda.synchronize(self.device)


class RepeatedLaunches:
    """What a CPU has of graphs: the captured calls themselves, made again."""

    num_bytes = 0

    def capture(self, *launches: Callable[[], None]) -> list[Callable[[], None]]:
        """``launches``."""
        return [*launches]

    def replay(self, graphs: Sequence[Callable[[], None]]) -> None:
        """Call ``graphs`` one after the other."""
        for launch in graphs:
            launch()


class Cpu:
    """The CPU in place of a GPU, to try a benchmark out."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.name = f"{host.cpu_model()}, instead of a GPU"

    def time(self, task: Callable[[], object], num_repeats: int) -> float:
        """See `Gpu.time`."""
        start = time.perf_counter()
        for _ in range(num_repeats):
            task()
        return (time.perf_counter() - start) * 1e3 / num_repeats

    def captured(self, launch: Callable[[], object]) -> Callable[[], object]:
        """See `Gpu.captured`."""
        launch()
        return launch

    def graphs(self) -> RepeatedLaunches:
        """See `Gpu.graphs`."""
        return RepeatedLaunches()

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """See `Gpu.no_waiting`; a CPU always waits for itself."""
        yield

    def synchronize(self) -> None:
        """See `Gpu.synchronize`."""


# Where a benchmark runs.
Device: TypeAlias = Gpu | Cpu


def get_device(name: str) -> Device:
    """The device called ``name``, "cuda" or "cpu". Raises RuntimeError where this machine has no GPU."""
    if name == "cuda":
        return Gpu(torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0))
    if name == "cpu":
        return Cpu()
    raise ValueError(f"get_device: name must be 'cuda' or 'cpu', got {name!r}.")


def measure_device_speed(
    device: Device, dtype: torch.dtype = torch.bfloat16, num_samples: int = NUM_SPEED_SAMPLES
) -> MachineSpeed:
    """The bandwidth of copying device memory and the rate of a large matrix product, the best of ``num_samples``.

    A copy of n bytes moves 2 n. Products take long enough for the power limit to show; the best is before it does.
    """
    copy_ms = _copy_ms(device, num_samples)
    product_ms = _product_ms(device, dtype, num_samples)
    return MachineSpeed(2 * _COPY_BYTES / copy_ms / 1e6, 2 * _GEMM_SIZE**3 / product_ms / 1e6)


def time_in_turns(
    device: Device, tasks: Mapping[str, Callable[[], object]], num_rounds: int, num_repeats: int
) -> dict[str, Samples]:
    """The samples of each task, one a round: the mean of ``num_repeats`` calls in a row. One warm-up round first."""
    return interleave({name: partial(device.time, task, num_repeats) for name, task in tasks.items()}, num_rounds)


def describe_device(device: Device, commit: str | None) -> dict[str, Any]:
    """What stands in every line of a result on ``device``: card, machine, versions, commit, date.

    commit: the commit of the sources where they are no checkout; None to ask git.
    """
    import importlib.metadata

    described = machine.describe()
    versions = described["versions"] | {"triton": importlib.metadata.version("triton"), "cuda": torch.version.cuda}
    versions.pop("ctranslate2", None)
    is_gpu = device.device.type == "cuda"
    total = torch.cuda.get_device_properties(device.device).total_memory if is_gpu else 0
    return {
        "machine": device_slug(device.name),
        "gpu": device.name,
        "gpu_memory_gib": round(total / 2**30, 1),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(device.device)) if is_gpu else "none",
        "cpu": described["cpu"],
        "num_cores": described["num_cores"],
        "versions": versions,
        "commit": commit or described["commit"],
        "date": described["date"],
    }


def _replay(graph: torch.cuda.CUDAGraph, _launch: Callable[[], object]) -> None:
    graph.replay()


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _copy_ms(device: Device, num_samples: int) -> float:
    source = torch.zeros(_COPY_BYTES // 4, dtype=torch.int32, device=device.device)
    target = torch.empty_like(source)
    return min(device.time(lambda: target.copy_(source), 3) for _ in range(num_samples))


def _product_ms(device: Device, dtype: torch.dtype, num_samples: int) -> float:
    shape = (_GEMM_SIZE, _GEMM_SIZE)
    one, other, product = (torch.randn(shape, dtype=dtype, device=device.device) for _ in range(3))
    return min(device.time(lambda: torch.mm(one, other, out=product), 5) for _ in range(num_samples))
