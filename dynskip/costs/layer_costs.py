"""What a mix of paths costs: layers, their union, the speed-up that counting layers promises, and the one time allows.

Pure arithmetic: times come from a measurement or from a roofline, see `LayerCosts`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from dynskip.models.config import DecoderConfig
from dynskip.paths import LayerPath


@dataclass(frozen=True)
class PathMix:
    """How many token rows each layer has in one step.

    rows_per_layer: [L], the active rows of each layer.
    num_rows: N, the rows of the step; embedding and head see them all, or fewer: see ``num_head_rows``.
    num_head_rows: the rows whose logits are computed; in a decode step all, in a prefill step one per sequence.
    """

    rows_per_layer: tuple[int, ...]
    num_rows: int
    num_head_rows: int

    @staticmethod
    def of(paths: Sequence[LayerPath], rows_per_seq: int = 1) -> PathMix:
        """The mix of a step that brings ``rows_per_seq`` tokens of each sequence, sequence b along ``paths[b]``."""
        if not paths:
            raise ValueError("PathMix.of: paths must hold at least one path, got none.")
        if rows_per_seq < 1:
            raise ValueError(f"PathMix.of: rows_per_seq must be at least 1, got {rows_per_seq}.")
        num_layers = paths[0].num_layers
        counts = [0] * num_layers
        for path in paths:
            if path.num_layers != num_layers:
                raise ValueError(
                    f"PathMix.of: paths must be for one number of layers, got {num_layers} and {path.num_layers}."
                )
            for layer in path.layers:
                counts[layer] += rows_per_seq
        return PathMix(tuple(counts), len(paths) * rows_per_seq, len(paths))

    @property
    def num_layers(self) -> int:
        """L, the layers of the model."""
        return len(self.rows_per_layer)

    @property
    def mean_layers(self) -> float:
        """How many layers a row runs on average."""
        return sum(self.rows_per_layer) / self.num_rows

    @property
    def union(self) -> int:
        """How many layers at least one row runs: those whose weights a step has to read."""
        return sum(rows > 0 for rows in self.rows_per_layer)

    @property
    def ideal_speedup(self) -> float:
        """The speed-up if a step took time in proportion to the layers that its rows run: L / mean layers."""
        total = sum(self.rows_per_layer)
        return self.num_layers * self.num_rows / total if total else float("inf")

    def at_full_depth(self) -> PathMix:
        """The same rows, each through all layers."""
        return PathMix((self.num_rows,) * self.num_layers, self.num_rows, self.num_head_rows)


@dataclass(frozen=True)
class Curve:
    """Milliseconds as a function of the row count: points joined by straight lines.

    Below the first point the time is that of the first: a single row reads all weights as well. Beyond the last point
    the line through the last two goes on; with one point only, time grows in proportion to the rows.

    num_rows: increasing, from 1 on. ms: the time at each.
    """

    num_rows: tuple[int, ...]
    ms: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.num_rows or len(self.num_rows) != len(self.ms):
            raise ValueError(
                f"Curve: num_rows and ms must be equally long and not empty, got {len(self.num_rows)} and "
                f"{len(self.ms)}."
            )
        if self.num_rows[0] < 1 or any(a >= b for a, b in zip(self.num_rows, self.num_rows[1:], strict=False)):
            raise ValueError(f"Curve: num_rows must increase from at least 1, got {list(self.num_rows)}.")
        if min(self.ms) < 0:
            raise ValueError(f"Curve: ms must be at least 0, got {min(self.ms)}.")

    def at(self, num_rows: int) -> float:
        """The milliseconds of ``num_rows`` rows; none take none."""
        if num_rows < 0:
            raise ValueError(f"Curve.at: num_rows must be at least 0, got {num_rows}.")
        if num_rows == 0:
            return 0.0
        if num_rows <= self.num_rows[0]:
            return self.ms[0]
        if len(self.num_rows) == 1:
            return self.ms[0] * num_rows / self.num_rows[0]
        right = min(bisect_right(self.num_rows, num_rows), len(self.num_rows) - 1)
        (x0, x1), (y0, y1) = self.num_rows[right - 1 : right + 1], self.ms[right - 1 : right + 1]
        return max(0.0, y0 + (y1 - y0) * (num_rows - x0) / (x1 - x0))


@dataclass(frozen=True)
class LayerCosts:
    """What one layer, the head and the cache of a model cost on one machine.

    layer: the time of one layer by active rows. head: the time of embedding and head by rows.
    kv_ms_per_entry: the time to read one key-value entry, one token in one layer.
    """

    layer: Curve
    head: Curve
    kv_ms_per_entry: float = 0.0

    @staticmethod
    def modelled(shape: ModelBytes, machine: MachineSpeed) -> LayerCosts:
        """The roofline of a model: weights are read once, or the arithmetic takes longer (see `roofline_ms`)."""
        return LayerCosts(
            _roofline_curve(shape.layer_bytes, shape.layer_flops_per_row, machine),
            _roofline_curve(shape.head_bytes, shape.head_flops_per_row, machine),
            shape.kv_entry_bytes / machine.bandwidth_gbps / 1e6,
        )

    def step_ms(self, mix: PathMix, context_len: int = 0) -> float:
        """The milliseconds of a step of ``mix`` whose sequences hold ``context_len`` tokens each.

        Each active row reads ``context_len`` key-value entries in each of its layers.
        """
        layers = sum(self.layer.at(rows) for rows in mix.rows_per_layer)
        kv = sum(mix.rows_per_layer) * context_len * self.kv_ms_per_entry
        return layers + kv + self.head.at(mix.num_head_rows)

    def speedup(self, mix: PathMix, context_len: int = 0) -> float:
        """How much faster a step of ``mix`` is than the same rows at full depth."""
        return self.step_ms(mix.at_full_depth(), context_len) / self.step_ms(mix, context_len)


@dataclass(frozen=True)
class ModelBytes:
    """Bytes and floating-point operations of a decoder's weights and entries.

    layer_bytes, head_bytes: weights of one layer and of the head. kv_entry_bytes: a key and a value of one token.
    layer_flops_per_row, head_flops_per_row: of the matrix products, two per multiply-add.
    """

    num_layers: int
    layer_bytes: int
    layer_flops_per_row: int
    head_bytes: int
    head_flops_per_row: int
    kv_entry_bytes: int

    @staticmethod
    def of(config: DecoderConfig, item_bytes: int = 2) -> ModelBytes:
        """Those of a decoder whose values take ``item_bytes`` each."""
        head = math.prod(config.head_matrix)
        return ModelBytes(
            num_layers=config.num_layers,
            layer_bytes=config.layer_size * item_bytes,
            layer_flops_per_row=2 * config.layer_size,
            head_bytes=head * item_bytes,
            head_flops_per_row=2 * head,
            kv_entry_bytes=config.kv_entry_size * item_bytes,
        )


@dataclass(frozen=True)
class MachineSpeed:
    """What a machine was measured to do: bytes read per second and operations per second, both in 10^9."""

    bandwidth_gbps: float
    peak_gflops: float

    def __post_init__(self) -> None:
        for name in ("bandwidth_gbps", "peak_gflops"):
            if getattr(self, name) <= 0:
                raise ValueError(f"MachineSpeed: {name} must be positive, got {getattr(self, name)}.")

    @staticmethod
    def best(speeds: Sequence[MachineSpeed]) -> MachineSpeed:
        """The most of either that any of ``speeds`` shows."""
        if not speeds:
            raise ValueError("MachineSpeed.best: speeds must hold at least one, got none.")
        return MachineSpeed(max(speed.bandwidth_gbps for speed in speeds), max(speed.peak_gflops for speed in speeds))

    def ms(self, num_bytes: float, flops: float) -> float:
        """The milliseconds of work bound by memory or by arithmetic, whichever takes longer."""
        return max(num_bytes / self.bandwidth_gbps, flops / self.peak_gflops) / 1e6


def roofline_ms(mix: PathMix, shape: ModelBytes, machine: MachineSpeed, context_len: int = 0) -> float:
    """The least milliseconds of a step of ``mix``: the denominator of a claim about speed.

    Sum over the layers with an active row of max(weight bytes / bandwidth, FLOPs / peak), plus the key-value bytes that
    the active rows read, plus the head.
    """
    layers = sum(machine.ms(shape.layer_bytes, rows * shape.layer_flops_per_row) for rows in mix.rows_per_layer if rows)
    kv = machine.ms(sum(mix.rows_per_layer) * context_len * shape.kv_entry_bytes, 0)
    return layers + kv + machine.ms(shape.head_bytes, mix.num_head_rows * shape.head_flops_per_row)


def _roofline_curve(num_bytes: int, flops_per_row: int, machine: MachineSpeed) -> Curve:
    """The roofline as points: flat up to the row count at which arithmetic overtakes reading, then straight up."""
    # Rows are whole numbers: on either side of the knee the straight line between two of them is exact.
    knee = max(1, int(num_bytes / machine.bandwidth_gbps * machine.peak_gflops / flops_per_row))
    rows = (knee, knee + 1, knee + 2)
    return Curve(rows, tuple(machine.ms(num_bytes, r * flops_per_row) for r in rows))
