"""What the training of a controller is made of, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dynskip.controllers.registry import controller_class
from dynskip.training.fine_tune.config import FineTuneConfig


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """A controller on a checkpoint: ``training`` says on what and for how long, its full-depth stage is meant.

    controller: a name that ``make_controller`` knows. alpha: the price of the mean fraction of layers executed.
    target_layers: where given, alpha is the price of the distance from so many layers. temperature, hard: of the
    Gumbel-Softmax. backbone: "frozen", or "joint" where the checkpoint is trained as well.
    """

    training: FineTuneConfig
    controller: str
    alpha: float
    target_layers: float | None = None
    temperature: float = 1.0
    hard: bool = True
    backbone: str = "frozen"

    def __post_init__(self) -> None:
        if self.backbone not in ("frozen", "joint"):
            raise ValueError(f"ControllerConfig: backbone must be 'frozen' or 'joint', got {self.backbone!r}.")
        if not self.alpha >= 0:
            raise ValueError(f"ControllerConfig: alpha must be at least 0, got {self.alpha}.")
        if not self.temperature > 0:
            raise ValueError(f"ControllerConfig: temperature must be positive, got {self.temperature}.")
        if self.target_layers is not None and not self.target_layers > 0:
            raise ValueError(f"ControllerConfig: target_layers must be positive, got {self.target_layers}.")
        controller_class(self.controller)

    def flat(self) -> dict[str, Any]:
        """All fields by name, those of ``training`` among them but for what concerns other stages."""
        fields = dataclasses.asdict(self)
        training = fields.pop("training")
        for name in ("paths", "menu", "num_path_steps"):
            del training[name]
        return {**training, **fields}
