"""Muon for the matrices of the layers and AdamW for everything else, behind one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    return ".layers." in name and parameter.ndim == 2


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimizer of two parts: ``torch.optim.Muon`` on the layers' matrices, ``torch.optim.AdamW`` on the rest.

    A parameter without gradient (a layer that the path of the step skips) is left as it is, momentum included.
    The groups are those of the parts, so a learning-rate scheduler reaches both.
    """

    def __init__(self, model: nn.Module, muon_lr: float, adamw_lr: float, weight_decay: float) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        matrices = [parameter for name, parameter in named if _is_layer_matrix(name, parameter)]
        others = [parameter for name, parameter in named if not _is_layer_matrix(name, parameter)]
        self._parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=weight_decay),
            torch.optim.AdamW(others, lr=adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
        )
        super().__init__([{"params": matrices, "lr": muon_lr}, {"params": others, "lr": adamw_lr}], {})
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        if closure is not None:
            raise ValueError("MuonWithAdamW.step: closure must be None, got a function. Neither part evaluates one.")
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both parts."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the states of both parts."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()
