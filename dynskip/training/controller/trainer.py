"""The Trainer of a controller: that of a fine-tune, with a loss that has a price for layers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from dynskip.data.batches import Batch
from dynskip.paths import LayerPath
from dynskip.training.fine_tune.trainer import FineTuneTrainer

_WEIGHTS = "trained.safetensors"


class ControllerTrainer(FineTuneTrainer):
    """Trains a ``ControlledModel``; its log has the layers of each step, its checkpoints only what is trained."""

    _layers: Tensor | None = None

    def along(self, path: LayerPath) -> AbstractContextManager[None]:
        """Nothing: the controller chooses the layers."""
        return nullcontext()

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch; its layers are added up for the log of the step."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        layers = outputs["num_layers"]
        self._layers = layers if self._layers is None else self._layers + layers
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a step's line says how many layers its response tokens ran."""
        if "loss" in logs and self._layers is not None:
            logs = {**logs, "num_layers": float(self.accelerator.reduce(self._layers.clone(), "sum"))}
            self._layers = None
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Of the validation rows under argmax decisions, per response token: ``eval_loss``, ``eval_cross_entropy``,
        and ``eval_num_layers``."""
        self.loss_model.train(False)
        names = ("loss", "cross_entropy", "num_layers")
        return self.report(dict(zip((f"eval_{name}" for name in names), self.validation_means(names), strict=True)))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        directory = Path(output_dir or self.directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_model(self.loss_model, str(directory / _WEIGHTS))  # it knows of tied weights

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_weights(Path(resume_from_checkpoint))

    def load_weights(self, checkpoint: Path) -> None:
        """Give the model the weights of a checkpoint."""
        load_model(self.loss_model, checkpoint / _WEIGHTS, device=str(self.args.device))
