"""What a layer costs by its row count, measured: the table that the cost model reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dynskip.causal_lm import CausalLM
from dynskip.costs.layer_costs import Curve, LayerCosts, ModelBytes, PathMix
from dynskip.measure.products import Products
from dynskip.measure.timing import Task, interleave


def measure_layer_costs(
    model: CausalLM,
    row_counts: Sequence[int],
    bandwidth_gbps: float,
    num_rounds: int = 3,
    on_call: Callable[[str], None] | None = None,
) -> LayerCosts:
    """The time of the matrix products of a layer and of the head at each of ``row_counts``, in milliseconds.

    All layers run one after the other, as in a step: their weights come from memory, not from a cache. Reading the
    key-value cache is taken to run at ``bandwidth_gbps``.
    """
    num_layers = model.num_layers
    tasks: dict[str, Task] = {}
    for rows in row_counts:
        tasks[f"layers {rows}"] = Products(model, PathMix((rows,) * num_layers, rows, 0)).run
        tasks[f"head {rows}"] = Products(model, PathMix((0,) * num_layers, rows, rows)).run
    samples = interleave(tasks, num_rounds, on_call=on_call)
    layer = tuple(samples[f"layers {rows}"].ms / num_layers for rows in row_counts)
    head = tuple(samples[f"head {rows}"].ms for rows in row_counts)
    kv_ms = ModelBytes.of(model.decoder_config, model.dtype.itemsize).kv_entry_bytes / bandwidth_gbps / 1e6
    return LayerCosts(Curve(tuple(row_counts), layer), Curve(tuple(row_counts), head), kv_ms)


def row_counts_up_to(num_rows: int) -> tuple[int, ...]:
    """1, 2, 4, 8 and the quarters of ``num_rows``: dense where a layer stops being bound by memory."""
    counts = {1, 2, 4, 8, num_rows}
    counts |= {max(1, num_rows * quarter // 4) for quarter in (1, 2, 3)}
    return tuple(sorted(count for count in counts if count <= num_rows))
