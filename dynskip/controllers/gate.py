"""The hidden-state gate: a linear map per layer that reads the layer's input and says run or skip."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dynskip.controllers.protocol import TokenContext


class HiddenStateGate:
    """Runs a layer for the rows whose "run" logit is at least their "skip" logit (arXiv 2410.20022, section 3.2).

    weight: [L, 2, C], float; bias: [L, 2] or None. Index 0 of the logits is skip, index 1 is run.
    always: layers that run whatever the gate says; by default the first and the last, as in the paper.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, always: Iterable[int] | None = None) -> None:
        if weight.dim() != 3 or weight.shape[1] != 2:
            raise ValueError(f"HiddenStateGate: weight must be [L, 2, C], got {list(weight.shape)}.")
        if bias is not None and bias.shape != weight.shape[:2]:
            raise ValueError(f"HiddenStateGate: bias must be {list(weight.shape[:2])}, got {list(bias.shape)}.")
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise ValueError(f"HiddenStateGate: {name} must hold finite numbers only, got NaN or infinity.")
        num_layers = weight.shape[0]
        self.always = frozenset((0, num_layers - 1) if always is None else always)
        for layer in self.always:
            if not 0 <= layer < num_layers:
                raise ValueError(f"HiddenStateGate: always must name layers in 0..{num_layers - 1}, got {layer}.")
        self.weight = weight
        self.bias = bias

    @property
    def num_layers(self) -> int:
        """How many layers the gate decides for."""
        return self.weight.shape[0]

    def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
        """[N], bool: True where the row runs ``layer``; ``hidden_states`` [N, C] is the layer's input."""
        if hidden_states.shape[1] != self.weight.shape[2]:
            raise ValueError(
                f"HiddenStateGate: weight must be [L, 2, {hidden_states.shape[1]}] for this model, "
                f"got {list(self.weight.shape)}."
            )
        if layer in self.always:
            return torch.ones(hidden_states.shape[0], dtype=torch.bool, device=hidden_states.device)
        # One product per row and class, summed in a fixed order: a row's decision never depends on its neighbours.
        rows = hidden_states.detach().to(torch.float32)
        weight = self.weight[layer].to(rows)
        logits = (rows[:, None, :] * weight).sum(-1)
        if self.bias is not None:
            logits = logits + self.bias[layer].to(rows)
        return logits[:, 1] >= logits[:, 0]
