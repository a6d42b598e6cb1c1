"""What a step of the engine costs on one device: a table of a layer's time by its rows, and what comes on top of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dynskip.costs.layer_costs import Curve, LayerCosts, MachineSpeed, ModelBytes
from dynskip.files import write_text
from dynskip.models.shapes import DEFAULT_SHAPE, SHAPES
from dynskip.paths import LayerPath

# What one H200 showed: the bandwidth of reading weights, and the arithmetic of its matrix units.
_H200 = MachineSpeed(bandwidth_gbps=4300.0, peak_gflops=790e3)
# A row costs its share once the time per row is within this factor of the least that any row count reaches.
_NEAR_BEST = 1.15
_FORMAT = 1


@dataclass(frozen=True)
class StepCosts:
    """The time of any step of one model on one device, in milliseconds.

    num_layers: L of the model. decode: a layer and the head by the rows of a decode step, and a key-value entry read.
    prefill: a layer and the head by the packed tokens of prompts, attention included.
    step_ms, step_row_ms: what a decode step of a stream takes besides, and what each of its rows does; prefill_step_ms:
        what a prefill takes besides. Requests that come and go, and caches that hold more of them than step at once.
    draft_ratios: by the number of sequences, how many times as long as predicted the guesses of drafts take, and steps
        that verify them, where steps without guesses take what is predicted; empty where that was not measured.
    device: where the figures are from. predicted: True where they are arithmetic and nothing was measured.
    conditions: what else a reader needs to judge the figures.
    """

    num_layers: int
    decode: LayerCosts
    prefill: LayerCosts
    step_ms: float = 0.0
    step_row_ms: float = 0.0
    prefill_step_ms: float = 0.0
    draft_ratios: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    device: str = "unknown"
    predicted: bool = False
    conditions: dict[str, Any] = field(default_factory=dict)
    _layer_table: list[float] = field(default_factory=list, init=False, repr=False, compare=False)

    @staticmethod
    def modelled(device: str, speed: MachineSpeed) -> StepCosts:
        """OPT-1.3B in bfloat16 by the roofline of a device of that speed: predicted, not measured."""
        model = ModelBytes.of(SHAPES[DEFAULT_SHAPE])
        costs = LayerCosts.modelled(model, speed)
        conditions = {"shape": DEFAULT_SHAPE, "bandwidth_gbps": speed.bandwidth_gbps, "peak_gflops": speed.peak_gflops}
        return StepCosts(model.num_layers, costs, costs, device=device, predicted=True, conditions=conditions)

    @staticmethod
    def h200() -> StepCosts:
        """OPT-1.3B on an H200 by its roofline, 4.3 TB/s and 790 TFLOP/s: predicted, not measured."""
        return StepCosts.modelled("H200", _H200)

    def decode_ms(self, cohort: Sequence[tuple[LayerPath, int]], num_kv_entries: int = 0) -> float:
        """A decode step of ``count`` rows along each path of ``cohort``, which read ``num_kv_entries`` entries."""
        num_rows = sum(count for _, count in cohort)
        if not num_rows:
            return 0.0
        layers = self._layers_ms(cohort, self.decode.layer, self._layer_table)
        model_ms = layers + num_kv_entries * self.decode.kv_ms_per_entry + self.decode.head.at(num_rows)
        return model_ms + self.step_ms + num_rows * self.step_row_ms

    def prefill_ms(self, prompts: Sequence[tuple[LayerPath, int]], num_heads: int) -> float:
        """A prefill of ``count`` packed tokens along each path of ``prompts``, of which ``num_heads`` see the head."""
        if not prompts:
            return 0.0
        layers = self._layers_ms(prompts, self.prefill.layer, None)
        return layers + self.prefill.head.at(num_heads) + self.prefill_step_ms

    def of_model(self) -> StepCosts:
        """The same without what streams take besides: layers, embedding, head and key-value reads."""
        return replace(self, step_ms=0.0, step_row_ms=0.0, prefill_step_ms=0.0)

    def path_ms(self, path: LayerPath, num_rows: int) -> float:
        """A decode step of ``num_rows`` rows along one path, without key-value reads."""
        return self.decode_ms(((path, num_rows),))

    def layer_ms(self, num_rows: int) -> float:
        """One layer of a decode step with ``num_rows`` rows, from a table that fills as it is asked."""
        table = self._layer_table
        while len(table) <= num_rows:
            table.append(self.decode.layer.at(len(table)))
        return table[num_rows]

    def efficient_tokens(self) -> int:
        """How many prompt tokens make a prefill about as cheap, per token, as any number does."""
        curve = self.prefill.layer
        counts = sorted({*curve.num_rows, *(2**power for power in range(13))})
        best = min(curve.at(count) / count for count in counts)
        return next(count for count in counts if curve.at(count) / count <= _NEAR_BEST * best)

    def write(self, path: Path) -> None:
        """Write it to ``path`` as JSON, in one piece: a reader never finds half a file."""
        values = asdict(self)
        del values["_layer_table"]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"format": _FORMAT, **values}, indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> StepCosts:
        """What `write` left at ``path``; raises ValueError where the file holds something else."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") != _FORMAT:
                raise ValueError("another format")
            for name in ("decode", "prefill"):
                layer, head = (Curve(**{k: tuple(v) for k, v in values[name][c].items()}) for c in ("layer", "head"))
                values[name] = LayerCosts(layer, head, values[name]["kv_ms_per_entry"])
            ratios = values.get("draft_ratios", {})
            values["draft_ratios"] = {int(num_seqs): tuple(ratios[num_seqs]) for num_seqs in ratios}
            costs = StepCosts(**values)
            costs._check_numbers()
            return costs
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"StepCosts.read: path must hold costs of format {_FORMAT}, got {path} ({error}). "
                "Write them with `dynskip calibrate`."
            ) from error

    def _check_numbers(self) -> None:
        """Raise ValueError or TypeError where a number is none that `write` could have left."""
        if type(self.num_layers) is not int or self.num_layers < 1:
            raise ValueError(f"num_layers is {self.num_layers!r}")
        times = [self.step_ms, self.step_row_ms, self.prefill_step_ms]
        for part in (self.decode, self.prefill):
            times += [part.kv_ms_per_entry, *part.layer.ms, *part.head.ms]
            if not all(type(count) is int for count in (*part.layer.num_rows, *part.head.num_rows)):
                raise ValueError("a row count is no integer")
        if not all(math.isfinite(ms) and ms >= 0 for ms in times):
            raise ValueError("a time is no number of milliseconds")
        for num_seqs, ratios in self.draft_ratios.items():
            if num_seqs < 1 or len(ratios) != 2 or not all(math.isfinite(ratio) and ratio > 0 for ratio in ratios):
                raise ValueError(f"the ratios of {num_seqs} sequences are {ratios!r}")

    def _layers_ms(self, cohort: Sequence[tuple[LayerPath, int]], curve: Curve, table: list[float] | None) -> float:
        rows = [0] * self.num_layers
        for path, count in cohort:
            for layer in path.layers:
                rows[layer] += count
        if table is None:
            known: dict[int, float] = {}
            for count in rows:
                if count not in known:
                    known[count] = curve.at(count)
            return sum(known[count] for count in rows)
        if max(rows) >= len(table):
            self.layer_ms(max(rows))
        return sum([table[count] for count in rows])
