"""Kernels alone: attention, gather and scatter against bandwidth, the four matrix kernels against cuBLAS as well."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F

from bench.gpu import recorder
from bench.gpu.recorder import Benchmark, Group, Question, Recorder
from dynskip.measure.device import Device, time_in_turns
from dynskip.measure.timing import Samples
from dynskip.models.shapes import get_shape
from dynskip.ops.backends import get_backend
from dynskip.ops.row_ops import RowOps, get_row_ops
from dynskip.validation.errors import Result
from dynskip.validation.op_arguments import RowArguments, bind, draw_rows, gather_layer_norm, make_workspace
from dynskip.validation.tensors import Arguments, Case, PlainDraw
from dynskip.validation.validate import validate_case, validate_row_case

# By their names in the results: the matrices of a layer, in the order of a step.
MATRICES = {
    "qkv_rows": "qkv",
    "linear_add_rows, out_proj": "out_proj",
    "linear_rows, fc1": "fc1",
    "linear_add_rows, fc2": "fc2",
}
_ALL_FOUR = "the four matrix kernels of all layers, one graph"


@dataclass(frozen=True)
class Sizes(recorder.Sizes):
    """What is measured: row counts by section, tokens, rounds. movement_bytes: of the copies taken in turn."""

    matrices_rows: tuple[int, ...] = (1, 16, 64, 256)
    attention_rows: tuple[int, ...] = (64, 256)
    context_lens: tuple[int, ...] = (512, 1024, 2048)
    movement_rows: tuple[int, ...] = (4096, 16384, 65536)
    movement_bytes: int = 2**30
    num_rounds: int = 7
    num_repeats: int = 10

    @property
    def note(self) -> str:
        """How they are timed."""
        return "Each kernel over memory that no cache holds, many launches in one graph."


TINY = Sizes("tiny", 128, (1, 3), (2,), (5,), (7,), 2**14, 2, 2)


def matrix_questions(num_rows: int) -> list[Question]:
    """The four kernels together, and each alone."""
    return [
        Question(num_rows, f"{_ALL_FOUR}, share of what limits it", 0.8),
        Question(num_rows, f"{_ALL_FOUR}, share of bandwidth"),
        Question(num_rows, f"{_ALL_FOUR}, share of the speed of cuBLAS"),
        *(Question(num_rows, f"{op}, share of what limits it") for op in MATRICES),
    ]


def gather_name(shape: str) -> str:
    """Of gather with the norm that a model of ``shape`` has."""
    return "gather + RMSNorm" if get_shape(shape).norm == "rms" else "gather + LayerNorm"


def movement_questions(num_rows: int, shape: str) -> list[Question]:
    """Gather with norm, and scatter-add."""
    return [
        Question(num_rows, f"{gather_name(shape)}, share of bandwidth", 0.85),
        Question(num_rows, "scatter-add, share of bandwidth", 0.85),
    ]


class KernelBenchmark(Benchmark):
    """All questions about single kernels."""

    name = "kernels"
    sections = default_sections = ("matrices", "attention", "movement")
    counts, counted = "--rows", tuple(f"{section}_rows" for section in sections)

    def __init__(self, recorder: Recorder, device: Device, sizes: Sizes, timed: str) -> None:
        super().__init__(recorder, device, sizes, timed)
        self.ops: RowOps = get_row_ops(timed)
        self.backend = get_backend("triton" if timed == "triton" else "torch")
        self.config = get_shape(sizes.shape)
        self.hidden_size, self.num_layers = self.config.hidden_size, self.config.num_layers
        self.draw = PlainDraw(recorder.dtype, device.device)

    @classmethod
    def asked(cls, sizes: Sizes, section: str) -> Iterator[Group]:
        """The questions of a section, in the order in which they are answered."""
        for num_rows in getattr(sizes, f"{section}_rows"):
            if section == "matrices":
                yield matrix_questions(num_rows), cls._matrices, (num_rows,)
            elif section == "movement":
                yield movement_questions(num_rows, sizes.shape), cls._movement, (num_rows,)
            else:
                for context_len in sizes.context_lens:
                    what = f"decode attention, context {context_len}, share of bandwidth"
                    yield [Question(num_rows, what, 0.85)], cls._attention, (num_rows, context_len)

    def _matrices(self, num_rows: int) -> None:
        first = self._layer(num_rows)
        wrong = {op: self._why_row_op_wrong(op, arguments) for op, arguments in first.items()}
        any_wrong = " ".join(filter(None, wrong.values()))
        workspaces = {op: make_workspace(self.ops, arguments) for op, arguments in first.items()}
        num_bytes = {op: self.num_layers * arguments["weight"].nbytes for op, arguments in first.items()}
        layers = [first, *(copy.deepcopy(first) for _ in range(1, self.num_layers))]
        calls = {op: [bind(self.ops, _op(op), layer[op], workspaces[op]) for layer in layers] for op in MATRICES}
        # The same products by the library on contiguous rows, without gather, norm, gate and residual.
        library = {
            op: [partial(F.linear, *(layer[op][name] for name in ("x", "weight", "bias"))) for layer in layers]
            for op in MATRICES
        }
        in_order = [calls[op][layer] for layer in range(self.num_layers) for op in MATRICES]
        in_order_library = [library[op][layer] for layer in range(self.num_layers) for op in MATRICES]
        tasks = {_ALL_FOUR: _graph(self.device, in_order), "cuBLAS": _graph(self.device, in_order_library)}
        for op in MATRICES:
            tasks[op] = _graph(self.device, calls[op])
            tasks[f"cuBLAS {op}"] = _graph(self.device, library[op])
        samples = self._time(tasks)
        floor_ms = sum(num_bytes.values()) / self.recorder.speed.bandwidth_gbps / 1e6
        ours, cublas = samples[_ALL_FOUR], samples["cuBLAS"]
        what = f"{_ALL_FOUR}, share of what limits it"
        self._share_of_limit(num_rows, what, ours, cublas, floor_ms, any_wrong)
        self.recorder.share(num_rows, f"{_ALL_FOUR}, share of bandwidth", ours, floor_ms, any_wrong)
        self.recorder.speedup(num_rows, f"{_ALL_FOUR}, share of the speed of cuBLAS", ours, cublas, any_wrong)
        for op in MATRICES:
            floor_ms = num_bytes[op] / self.recorder.speed.bandwidth_gbps / 1e6
            what = f"{op}, share of what limits it"
            self._share_of_limit(num_rows, what, samples[op], samples[f"cuBLAS {op}"], floor_ms, wrong[op])

    def _share_of_limit(
        self, num_rows: int, what: str, ours: Samples, cublas: Samples, floor_ms: float, wrong: str
    ) -> None:
        """Against bandwidth, or against cuBLAS where cuBLAS itself is slower than bandwidth allows."""
        if floor_ms >= cublas.ms:
            self.recorder.share(num_rows, what, ours, floor_ms, wrong)
        else:
            self.recorder.speedup(num_rows, what, ours, cublas, wrong)

    def _attention(self, num_rows: int, context_len: int) -> None:
        arguments = self._arguments("attend_rows", num_rows, context_len)
        # As many pools as it takes that none is still in the cache when its turn comes again.
        itemsize, config = self.recorder.dtype.itemsize, self.config
        pool_bytes = num_rows * context_len * config.kv_entry_size * itemsize
        num_pools = max(1, self.sizes.movement_bytes // 4 // pool_bytes)
        wrong = self._why_row_op_wrong("attend_rows", arguments)
        caches = ("k_cache", "v_cache")
        copies = (arguments | {name: arguments[name].clone() for name in caches} for _ in range(1, num_pools))
        workspace = make_workspace(self.ops, arguments)
        calls = [bind(self.ops, "attend_rows", pool, workspace) for pool in (arguments, *copies)]
        samples = self._time({"attention": _graph(self.device, calls)})["attention"]
        row_bytes = config.num_heads * config.head_size * itemsize
        num_bytes = num_pools * (pool_bytes + 2 * num_rows * row_bytes)
        what = f"decode attention, context {context_len}, share of bandwidth"
        self.recorder.share(num_rows, what, samples, num_bytes / self.recorder.speed.bandwidth_gbps / 1e6, wrong)

    def _movement(self, num_rows: int) -> None:
        row_bytes = self.hidden_size * self.recorder.dtype.itemsize
        num_copies = max(1, self.sizes.movement_bytes // (2 * num_rows * row_bytes))
        streams = [self.draw.normal(2 * num_rows, self.hidden_size) for _ in range(num_copies)]
        deltas = [self.draw.normal(num_rows, self.hidden_size) for _ in range(num_copies)]
        row_ids = self.draw.row_ids(num_rows, 2 * num_rows)
        is_rms = self.config.norm == "rms"
        norm = gather_layer_norm(self.draw, streams[0], row_ids, rms=is_rms) | ({"bias": None} if is_rms else {})
        gather = gather_name(self.sizes.shape)
        sums = [{"x": x, "row_ids": row_ids, "y": y} for x, y in zip(streams, deltas, strict=True)]
        gather_wrong, scatter_wrong = (
            self._why_wrong(what, validate_case(self.backend.name, self.recorder.dtype, Case(op, what, arguments)))
            for op, what, arguments in (
                ("gather_layer_norm", gather, norm),
                ("scatter_add", "scatter-add", sums[0]),
            )
        )
        gathers = [partial(self.backend.gather_layer_norm, *(norm | {"x": x}).values()) for x in streams]
        scatters = [partial(self.backend.scatter_add, *own.values()) for own in sums]
        samples = self._time({"gather": _graph(self.device, gathers), "scatter": _graph(self.device, scatters)})
        bandwidth = self.recorder.speed.bandwidth_gbps * 1e6
        gather_ms = num_copies * num_rows * 2 * row_bytes / bandwidth
        scatter_ms = num_copies * num_rows * 3 * row_bytes / bandwidth
        self.recorder.share(num_rows, f"{gather}, share of bandwidth", samples["gather"], gather_ms, gather_wrong)
        self.recorder.share(num_rows, "scatter-add, share of bandwidth", samples["scatter"], scatter_ms, scatter_wrong)

    def _time(self, tasks: dict[str, Callable[[], object]]) -> dict[str, Samples]:
        return time_in_turns(self.device, tasks, self.sizes.num_rounds, self.sizes.num_repeats)

    def _layer(self, num_rows: int) -> dict[str, Arguments]:
        """The arguments of each of `MATRICES`, which hand rows to each other as in a layer."""
        layer = {op: self._arguments(part, num_rows) for op, part in MATRICES.items()}
        qkv, out_proj, fc1, fc2 = layer.values()
        fc1["x"], fc1["out"], fc2["residual"] = qkv["x"], fc2["x"], out_proj["residual"]
        return layer

    def _arguments(self, part: str, num_rows: int, context_len: int = 1) -> Arguments:
        """Those of a part of the decoder in which every row is listed."""
        rows = draw_rows(self.draw, num_rows, num_rows, num_rows)
        return RowArguments(self.draw, rows).of_decoder(part, self.config, context_len, context_len)

    def _why_row_op_wrong(self, op: str, arguments: Arguments) -> str:
        return self._why_wrong(op, validate_row_case(self.ops, self.recorder.dtype, Case(_op(op), op, arguments)))

    @staticmethod
    def _why_wrong(op: str, result: Result) -> str:
        """What is wrong with the results of an op; "" where nothing is."""
        return "" if result.failure is None else f"{op}: {result.failure}."


def _op(name: str) -> str:
    return name.partition(",")[0]


def _graph(device: Device, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    def launch() -> None:
        # All results are kept to the end, so that no two calls write to the same memory, which a cache would hold.
        results = [call() for call in calls]
        del results

    return device.captured(launch)


def main(argv: Sequence[str] | None = None) -> int:
    """The part ``kernels`` of `make gpu`."""
    return KernelBenchmark.run(Sizes(), TINY, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
