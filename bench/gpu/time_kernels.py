"""Kernels alone: attention, gather and scatter against bandwidth, the four matrix kernels against cuBLAS as well."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.recorder import Question, Recorder, chosen_sections, numbers, run_part
from dynskip.kernels.row_list import RowList, RowNorm
from dynskip.measure.device import Device, time_in_turns
from dynskip.measure.timing import Samples
from dynskip.models.shapes import SHAPES
from dynskip.ops.backends import get_backend
from dynskip.ops.row_ops import RowOps, get_row_ops

SECTIONS = ("matrices", "attention", "movement")
MATRIX_OPS = ("qkv_rows", "linear_add_rows, out_proj", "linear_rows, fc1", "linear_add_rows, fc2")
_ALL_FOUR = "the four matrix kernels of all layers, one graph"
_EPS = 1e-5


@dataclass(frozen=True)
class Sizes:
    """What is measured. shape: hidden size, ffn size, layers, heads. movement_bytes: of the copies taken in turn."""

    shape: str = "opt-1.3b"
    matrix_rows: tuple[int, ...] = (1, 16, 64, 256)
    attention_rows: tuple[int, ...] = (64, 256)
    context_lens: tuple[int, ...] = (512, 1024, 2048)
    movement_rows: tuple[int, ...] = (4096, 16384, 65536)
    movement_bytes: int = 2**30
    num_rounds: int = 7
    num_repeats: int = 10

    def of(self, section: str) -> tuple[int, ...]:
        """The row counts of a section."""
        return {"matrices": self.matrix_rows, "attention": self.attention_rows, "movement": self.movement_rows}[section]


TINY = Sizes("tiny", (1, 3), (2,), (5,), (7,), 2**14, 2, 2)


def matrix_questions(sizes: Sizes, num_rows: int) -> list[Question]:
    """The four kernels together, and each alone."""
    return [
        Question(num_rows, f"{_ALL_FOUR}, share of what limits it", 0.8),
        Question(num_rows, f"{_ALL_FOUR}, share of bandwidth"),
        Question(num_rows, f"{_ALL_FOUR}, share of the speed of cuBLAS"),
        *(Question(num_rows, f"{op}, share of what limits it") for op in MATRIX_OPS),
    ]


def attention_questions(sizes: Sizes, num_rows: int, context_len: int) -> list[Question]:
    """Decode attention."""
    return [Question(num_rows, f"decode attention, context {context_len}, share of bandwidth", 0.85)]


def movement_questions(sizes: Sizes, num_rows: int) -> list[Question]:
    """Gather with LayerNorm, and scatter-add."""
    return [
        Question(num_rows, "gather + LayerNorm, share of bandwidth", 0.85),
        Question(num_rows, "scatter-add, share of bandwidth", 0.85),
    ]


class KernelBenchmark:
    """All questions about single kernels."""

    def __init__(self, recorder: Recorder, device: Device, sizes: Sizes, ops: str) -> None:
        self.recorder = recorder
        self.device = device
        self.sizes = sizes
        self.ops: RowOps = get_row_ops(ops)
        self.reference: RowOps = get_row_ops("reference")
        self.backend = get_backend("triton" if ops == "triton" else "torch")
        shape = SHAPES[sizes.shape]
        self.hidden_size, self.ffn_size = shape.hidden_size, shape.ffn_size
        self.num_layers, self.num_heads = shape.num_layers, shape.num_heads
        self.generator = torch.Generator(device.device).manual_seed(0)

    def run(self, sections: Sequence[str]) -> None:
        """Answer the questions of ``sections``."""
        sizes, attempt = self.sizes, self.recorder.attempt
        for section in sections:
            self.recorder.enter(section)
            for num_rows in sizes.of(section):
                if section == "matrices":
                    attempt(matrix_questions(sizes, num_rows), partial(self._matrices, num_rows))
                elif section == "movement":
                    attempt(movement_questions(sizes, num_rows), partial(self._movement, num_rows))
                else:
                    for context_len in sizes.context_lens:
                        asked = attention_questions(sizes, num_rows, context_len)
                        attempt(asked, partial(self._attention, num_rows, context_len))

    def _matrices(self, num_rows: int) -> None:
        layers = [_Layer(self, num_rows) for _ in range(self.num_layers)]
        wrong = layers[0].check(self.reference)
        any_wrong = " ".join(filter(None, wrong.values()))
        calls = {op: [layer.calls(self.ops)[op] for layer in layers] for op in MATRIX_OPS}
        library = {op: [layer.library_calls()[op] for layer in layers] for op in MATRIX_OPS}
        in_order = [calls[op][layer] for layer in range(self.num_layers) for op in MATRIX_OPS]
        in_order_library = [library[op][layer] for layer in range(self.num_layers) for op in MATRIX_OPS]
        tasks = {_ALL_FOUR: _graph(self.device, in_order), "cuBLAS": _graph(self.device, in_order_library)}
        for op in MATRIX_OPS:
            tasks[op] = _graph(self.device, calls[op])
            tasks[f"cuBLAS {op}"] = _graph(self.device, library[op])
        samples = self._time(tasks)
        num_bytes = {op: self.num_layers * count for op, count in layers[0].weight_bytes().items()}
        floor_ms = sum(num_bytes.values()) / self.recorder.speed.bandwidth_gbps / 1e6
        ours, cublas = samples[_ALL_FOUR], samples["cuBLAS"]
        what = f"{_ALL_FOUR}, share of what limits it"
        self._share_of_limit(num_rows, what, ours, cublas, floor_ms, any_wrong)
        self.recorder.share(num_rows, f"{_ALL_FOUR}, share of bandwidth", ours, floor_ms, any_wrong)
        self.recorder.speedup(num_rows, f"{_ALL_FOUR}, share of the speed of cuBLAS", ours, cublas, any_wrong)
        for op in MATRIX_OPS:
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
        head_size = self.hidden_size // self.num_heads
        num_slots = num_rows * context_len
        pool = (num_slots, self.num_heads, head_size)
        # As many pools as it takes that none is still in the cache when its turn comes again.
        row_bytes = self.hidden_size * self.recorder.dtype.itemsize
        pool_bytes = 2 * num_slots * row_bytes
        num_pools = max(1, self.sizes.movement_bytes // 4 // pool_bytes)
        slots = torch.randperm(num_slots, generator=self.generator, device=self.device.device).int()
        rows = self._all_rows(num_rows)
        arguments: dict[str, Any] = {
            "q": self.normal(num_rows, self.hidden_size),
            "rows": rows,
            "slot_table": slots.view(num_rows, context_len),
            "seq_ids": rows.ids,
            "key_limits": torch.full_like(rows.ids, context_len),
            "scale": head_size**-0.5,
            "out": self.normal(num_rows, self.hidden_size),
        }
        workspace = self.ops.workspace(
            max_rows=num_rows,
            num_heads=self.num_heads,
            head_size=head_size,
            sizes=[(self.hidden_size, self.ffn_size)],
            max_context_len=context_len,
            device=self.device.device,
        )
        pools = [(self.normal(*pool), self.normal(*pool)) for _ in range(num_pools)]
        calls = [
            lambda keys=keys, values=values: self.ops.attend_rows(
                **arguments, k_cache=keys, v_cache=values, workspace=workspace
            )
            for keys, values in pools
        ]
        calls[0]()
        sampled = RowList(rows.ids, torch.full_like(rows.num, min(8, num_rows)), min(8, num_rows))
        wrong = self._compare(
            "decode attention",
            [arguments["out"][: min(8, num_rows)]],
            lambda tensors: self.reference.attend_rows(
                tensors(arguments["q"]),
                sampled,
                tensors(pools[0][0]),
                tensors(pools[0][1]),
                *(arguments[name] for name in ("slot_table", "seq_ids", "key_limits", "scale")),
                tensors(arguments["out"]),
            ),
            lambda tensors: [tensors(arguments["out"])[: min(8, num_rows)]],
        )
        samples = self._time({"attention": _graph(self.device, calls)})["attention"]
        num_bytes = num_pools * (pool_bytes + 2 * num_rows * row_bytes)
        what = f"decode attention, context {context_len}, share of bandwidth"
        self.recorder.share(num_rows, what, samples, num_bytes / self.recorder.speed.bandwidth_gbps / 1e6, wrong)

    def _movement(self, num_rows: int) -> None:
        row_bytes = self.hidden_size * self.recorder.dtype.itemsize
        num_copies = max(1, self.sizes.movement_bytes // (2 * num_rows * row_bytes))
        streams = [self.normal(2 * num_rows, self.hidden_size) for _ in range(num_copies)]
        deltas = [self.normal(num_rows, self.hidden_size) for _ in range(num_copies)]
        chosen = torch.randperm(2 * num_rows, generator=self.generator, device=self.device.device)[:num_rows]
        row_ids = chosen.sort().values.int()
        weight, bias = self.normal(self.hidden_size), self.normal(self.hidden_size)
        before = streams[0].double()
        expected = F.layer_norm(before[row_ids.long()], (self.hidden_size,), weight.double(), bias.double(), _EPS)
        eager = F.layer_norm(streams[0][row_ids.long()], (self.hidden_size,), weight, bias, _EPS)
        normed = self.backend.gather_layer_norm(streams[0], row_ids, weight, bias, _EPS)
        gather_wrong = _why_outside_budget("gather + LayerNorm", normed, eager, expected)
        gathers = [
            lambda stream=stream: self.backend.gather_layer_norm(stream, row_ids, weight, bias, _EPS)
            for stream in streams
        ]
        scatters = [
            lambda stream=stream, delta=delta: self.backend.scatter_add(stream, row_ids, delta)
            for stream, delta in zip(streams, deltas, strict=True)
        ]
        self.backend.scatter_add(streams[0], row_ids, deltas[0])
        expected = before.index_add(0, row_ids.long(), deltas[0].double())
        is_exact = torch.equal(streams[0], expected.to(streams[0].dtype))
        scatter_wrong = "" if is_exact else "scatter-add: every sum must be the exact one rounded once, got another."
        samples = self._time({"gather": _graph(self.device, gathers), "scatter": _graph(self.device, scatters)})
        bandwidth = self.recorder.speed.bandwidth_gbps * 1e6
        gather_ms = num_copies * num_rows * 2 * row_bytes / bandwidth
        scatter_ms = num_copies * num_rows * 3 * row_bytes / bandwidth
        what = "gather + LayerNorm, share of bandwidth"
        self.recorder.share(num_rows, what, samples["gather"], gather_ms, gather_wrong)
        self.recorder.share(num_rows, "scatter-add, share of bandwidth", samples["scatter"], scatter_ms, scatter_wrong)

    def _time(self, tasks: dict[str, Callable[[], object]]) -> dict[str, Samples]:
        return time_in_turns(self.device, tasks, self.sizes.num_rounds, self.sizes.num_repeats)

    def _compare(
        self,
        what: str,
        actual: list[Tensor],
        run: Callable[[Callable[[Tensor], Tensor]], None],
        results: Callable[[Callable[[Tensor], Tensor]], list[Tensor]],
    ) -> str:
        """What is wrong with ``actual`` beside the reference in float64; the eager one is in the working dtype.

        run: runs the reference on the tensors that its argument gives for those of the kernel; results: what it wrote.
        """
        found = []
        for dtype in (torch.float64, actual[0].dtype):
            copies: dict[int, Tensor] = {}

            def tensors(tensor: Tensor, dtype: torch.dtype = dtype, copies: dict[int, Tensor] = copies) -> Tensor:
                return copies.setdefault(id(tensor), tensor.to(dtype, copy=True))

            run(tensors)
            found.append(results(tensors))
        complaints = (_why_outside_budget(what, *three) for three in zip(actual, *reversed(found), strict=True))
        return " ".join(filter(None, complaints))

    def _all_rows(self, num_rows: int) -> RowList:
        ids = torch.arange(num_rows, dtype=torch.int32, device=self.device.device)
        return RowList(ids, torch.full((1,), num_rows, dtype=torch.int32, device=self.device.device), num_rows)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Random numbers."""
        tensor = torch.empty(shape, dtype=self.recorder.dtype, device=self.device.device)
        return tensor.normal_(0, scale, generator=self.generator)


class _Layer:
    """The weights of one layer, and buffers of its rows."""

    def __init__(self, benchmark: KernelBenchmark, num_rows: int) -> None:
        size, ffn_size, heads = benchmark.hidden_size, benchmark.ffn_size, benchmark.num_heads
        normal = benchmark.normal
        self.rows = benchmark._all_rows(num_rows)
        self.norm = RowNorm(normal(size), normal(size), _EPS)
        self.x, self.normed, self.query, self.attended = (normal(num_rows, size) for _ in range(4))
        self.inner = normal(num_rows, ffn_size)
        self.qkv, self.out = normal(3 * size, size, scale=0.02), normal(size, size, scale=0.02)
        self.fc1, self.fc2 = normal(ffn_size, size, scale=0.02), normal(size, ffn_size, scale=0.02)
        self.qkv_bias, self.out_bias = normal(3 * size), normal(size)
        self.fc1_bias, self.fc2_bias = normal(ffn_size), normal(size)
        self.k_cache, self.v_cache = (normal(num_rows, heads, size // heads) for _ in range(2))
        self.ffn_normed = normal(num_rows, max(size, ffn_size))[:, :size].contiguous()
        self.residual = normal(num_rows, size)
        self.workspace = benchmark.ops.workspace(
            max_rows=num_rows,
            num_heads=heads,
            head_size=size // heads,
            sizes=[tuple(self.out.shape), tuple(self.fc2.shape)],
            max_context_len=1,
            device=self.x.device,
        )
        self._compare = benchmark._compare
        self._ops = benchmark.ops

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the matrix that each op reads."""
        matrices = (self.qkv, self.out, self.fc1, self.fc2)
        return {op: weight.numel() * weight.element_size() for op, weight in zip(MATRIX_OPS, matrices, strict=True)}

    def calls(self, ops: RowOps, tensors: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, Any]:
        """Each op as a call without arguments, on the tensors that ``tensors`` gives for this layer's."""
        rows, t, slots = self.rows, tensors, self.rows.ids
        weight, bias, eps = self.norm
        assert weight is not None and bias is not None
        norm = RowNorm(t(weight), t(bias), eps)
        return {
            "qkv_rows": lambda: ops.qkv_rows(
                t(self.x), rows, rows.num, norm, t(self.qkv), t(self.qkv_bias), t(self.query), t(self.k_cache),
                t(self.v_cache), slots, t(self.normed),
            ),
            "linear_add_rows, out_proj": lambda: ops.linear_add_rows(
                t(self.attended), rows, t(self.out), t(self.out_bias), t(self.residual), self.workspace
            ),
            "linear_rows, fc1": lambda: ops.linear_rows(
                t(self.x), rows, norm, t(self.fc1), t(self.fc1_bias), True, t(self.inner), t(self.ffn_normed)
            ),
            "linear_add_rows, fc2": lambda: ops.linear_add_rows(
                t(self.inner), rows, t(self.fc2), t(self.fc2_bias), t(self.residual), self.workspace
            ),
        }  # fmt: skip

    def library_calls(self) -> dict[str, Any]:
        """The same products by the library on contiguous rows, without gather, LayerNorm and residual."""
        return {
            "qkv_rows": lambda: F.linear(self.x, self.qkv, self.qkv_bias),
            "linear_add_rows, out_proj": lambda: F.linear(self.attended, self.out, self.out_bias),
            "linear_rows, fc1": lambda: F.linear(self.x, self.fc1, self.fc1_bias),
            "linear_add_rows, fc2": lambda: F.linear(self.inner, self.fc2, self.fc2_bias),
        }

    def check(self, reference: RowOps) -> dict[str, str]:
        """What is wrong with the results of each op; "" where nothing is."""
        results = {
            "qkv_rows": (self.query, self.k_cache, self.v_cache),
            "linear_add_rows, out_proj": (self.residual,),
            "linear_rows, fc1": (self.inner,),
            "linear_add_rows, fc2": (self.residual,),
        }
        return {op: self._check(op, reference, results[op]) for op in MATRIX_OPS}

    def _check(self, op: str, reference: RowOps, results: tuple[Tensor, ...]) -> str:
        before = {id(tensor): tensor.clone() for tensor in results}

        def run(tensors: Callable[[Tensor], Tensor]) -> None:
            self.calls(reference, lambda tensor: tensors(before.get(id(tensor), tensor)))[op]()

        self.calls(self._ops)[op]()
        return self._compare(
            op, list(results), run, lambda tensors: [tensors(before[id(tensor)]) for tensor in results]
        )


def _graph(device: Device, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    def launch() -> None:
        # All results are kept to the end, so that no two calls write to the same memory, which a cache would hold.
        results = [call() for call in calls]
        del results

    return device.captured(launch)


def _why_outside_budget(what: str, actual: Tensor, eager: Tensor, exact: Tensor) -> str:
    """What is wrong where the error is more than twice that of plain PyTorch, and more than one rounding."""
    error, allowed = ((tensor.double() - exact).abs().max().item() for tensor in (actual, eager))
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    if not error <= max(2 * allowed, rounding):
        return f"{what}: the result must be within {max(2 * allowed, rounding):.3g} of float64, got {error:.3g}."
    return ""


def questions(args: argparse.Namespace) -> list[Question]:
    """Every question that the part answers."""
    sizes = _sizes(args)
    asked = {
        "matrices": [question for rows in sizes.matrix_rows for question in matrix_questions(sizes, rows)],
        "attention": [
            question
            for rows in sizes.attention_rows
            for context_len in sizes.context_lens
            for question in attention_questions(sizes, rows, context_len)
        ],
        "movement": [question for rows in sizes.movement_rows for question in movement_questions(sizes, rows)],
    }
    return [question for section in _sections(args) for question in asked[section]]


def measure(args: argparse.Namespace, device: Device) -> int:
    """Answer them."""
    sizes = _sizes(args)
    described = {
        "shape": sizes.shape,
        "row_ops": args.ops,
        "notes": ["Each kernel over memory that no cache holds, many launches in one graph."],
    }
    recorder = Recorder("kernels", device, args, described)
    try:
        KernelBenchmark(recorder, device, sizes, args.ops).run(_sections(args))
    finally:
        status = recorder.close()
    return status


def _sections(args: argparse.Namespace) -> tuple[str, ...]:
    return chosen_sections(args.sections, SECTIONS, SECTIONS)


def _sizes(args: argparse.Namespace) -> Sizes:
    sizes = TINY if args.tiny else Sizes()
    if args.rows is None:
        return sizes
    return replace(sizes, matrix_rows=args.rows, attention_rows=args.rows, movement_rows=args.rows)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", choices=("triton", "reference"), default="triton", help="row ops (default: triton)")
    parser.add_argument("--sections", metavar="A,B", help=f"of {','.join(SECTIONS)} (default: all)")
    parser.add_argument("--rows", type=numbers, metavar="A,B", help="(default: those that each section has)")


def main(argv: Sequence[str] | None = None) -> int:
    """The part ``kernels`` of `make gpu`."""
    return run_part("kernels", __doc__ or "", questions, measure, argv, _add_arguments)


if __name__ == "__main__":
    sys.exit(main())
