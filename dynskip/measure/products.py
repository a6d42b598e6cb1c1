"""The matrix products of a step, and nothing else: what the step's time is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from dynskip.causal_lm import CausalLM
from dynskip.costs.layer_costs import PathMix
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
