"""How many layers a per-token controller asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from dynskip.controllers.protocol import TokenContext, TokenController


class CountingController:
    """Passes on what ``controller`` decides, and counts it: rows that were asked about, and rows that run, per layer.

    Rows that nobody asks about, such as a prompt that runs at full depth, are not counted.
    """

    def __init__(self, controller: TokenController, num_layers: int) -> None:
        self.controller = controller
        self.num_layers = num_layers
        self.num_asked = [0] * num_layers
        self._num_run: list[list[Tensor]] = [[] for _ in range(num_layers)]

    def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
        """[N], bool: what the controller says."""
        active = self.controller.active(layer, hidden_states, context)
        self.num_asked[layer] += active.shape[0]
        # Summed where it is: fetching every count would make the host wait at every layer.
        self._num_run[layer].append(active.sum())
        return active

    @property
    def num_run(self) -> list[int]:
        """[L]: the rows that run each layer."""
        return [int(torch.stack(counts).sum()) if counts else 0 for counts in self._num_run]

    @property
    def mean_layers(self) -> float:
        """The mean number of layers of the rows that were asked about."""
        return sum(run / max(asked, 1) for run, asked in zip(self.num_run, self.num_asked, strict=True))
