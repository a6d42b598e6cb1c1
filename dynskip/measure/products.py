"""The matrix products of a step, and nothing else: what its time is held against, and what they cost by rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dynskip.causal_lm import CausalLM
from dynskip.costs.layer_costs import Curve, LayerCosts, ModelBytes, PathMix
from dynskip.measure.timing import Task, interleave
from dynskip.models.linear import Linear


class Products:
    """The products that a step of ``mix`` needs, run by the model's own (packed) matrices on random rows.

    Each layer multiplies as many rows as the mix gives it, the head as many as it gives the head.
    onednn: leave all products to oneDNN, also those that the model's backend would multiply by its own code.
    """

    def __init__(self, model: CausalLM, mix: PathMix, onednn: bool = False) -> None:
        self.mix = mix
        self.onednn = onednn
        self._work: list[tuple[Linear, str, Tensor]] = []
        rows: dict[tuple[int, int], Tensor] = {}

        def add(linear: Linear, num_rows: int, activation: str = "none") -> None:
            size = (num_rows, linear.in_features)
            if size not in rows:
                rows[size] = torch.randn(size).to(model.dtype)
            self._work.append((linear, activation, rows[size]))

        for layer, num_rows in zip(model.decoder.layers, mix.rows_per_layer, strict=True):
            if num_rows:
                for linear in matrices(layer):
                    config = model.decoder_config
                    is_inner = linear is layer.fc1 and not config.gated
                    activation = config.activation if is_inner else "none"
                    add(linear, num_rows, activation)
        for projection, num_rows in (
            (model.decoder.project_in, mix.num_rows),
            (model.decoder.project_out, mix.num_head_rows),
        ):
            if projection is not None and num_rows:
                add(projection, num_rows)
        if mix.num_head_rows:
            add(model.lm_head, mix.num_head_rows)

    @torch.no_grad()
    def run(self) -> None:
        """Do all the products once."""
        for linear, activation, rows in self._work:
            native_rows = linear.native_rows
            linear.native_rows = 0 if self.onednn else native_rows
            try:
                linear(rows, activation=activation)
            finally:
                linear.native_rows = native_rows

    @property
    def flops(self) -> int:
        """Floating-point operations of one run, two per multiply-add."""
        return sum(2 * rows.shape[0] * linear.in_features * linear.out_features for linear, _, rows in self._work)


class Embedding:
    """The embedding of a step's tokens: the part of it that is neither product nor overhead."""

    def __init__(self, model: CausalLM, num_rows: int) -> None:
        self._decoder = model.decoder
        self._token_ids = torch.randint(0, model.decoder_config.vocab_size, (num_rows,))
        self._position_ids = torch.arange(num_rows) % model.decoder_config.max_positions

    @torch.no_grad()
    def run(self) -> None:
        """Look up every row once."""
        self._decoder.embed(self._token_ids, self._position_ids)


def matrices(layer: torch.nn.Module) -> list[Linear]:
    """The matrices that a row of ``layer`` is multiplied by, in order."""
    return [module for module in layer.modules() if isinstance(module, Linear)]


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
