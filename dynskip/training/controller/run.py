"""The training of a controller in a folder, which then is the controller. Started again, it goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from dynskip.controllers.learned import ModelSizes
from dynskip.controllers.registry import make_controller
from dynskip.controllers.storage import save_controller
from dynskip.models.registry import decoder_config
from dynskip.paths import LayerPath
from dynskip.training.controller.config import ControllerConfig
from dynskip.training.controller.gated_model import ControlledModel
from dynskip.training.controller.trainer import ControllerTrainer
from dynskip.training.fine_tune.checkpoint_run import CheckpointRun
from dynskip.training.stage import default_device, run_stage, write_curves


class ControllerRun(CheckpointRun):
    """One training: ``controller.json`` and its weights in the run's folder, ``model/`` if the backbone is joint."""

    def __init__(
        self,
        config: ControllerConfig,
        data: Path,
        directory: Path,
        device: torch.device | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(config.training, data, directory, device or default_device(), progress)
        self.config = config

    def train(self) -> Path:
        """The folder, which ``load_controller`` reads."""
        self.start(self.config.flat())
        run_stage(self.directory, self._make_trainer, self._export)
        return self.directory

    def _make_trainer(self) -> ControllerTrainer:
        backbone = self.load(self.training.model, with_loss=False)
        shape = decoder_config(backbone.config)
        sizes = ModelSizes(shape.num_layers, shape.hidden_size, shape.embedding_size)
        controller = make_controller(self.config.controller, sizes)
        controller.temperature = self.config.temperature
        model = ControlledModel(
            backbone,
            controller,
            alpha=self.config.alpha,
            target_layers=self.config.target_layers,
            hard=self.config.hard,
            joint=self.config.backbone == "joint",
        )
        every_layer = [LayerPath.full(sizes.num_layers)]
        seed = self.training.seed * 1000 + 2
        return ControllerTrainer(self, model, self.directory / "training", every_layer, is_full=True, seed=seed)

    def _export(self, trainer: ControllerTrainer) -> dict[str, Any]:
        trainer.load_weights(trainer.best_checkpoint)
        model, result = trainer.loss_model, trainer.result()
        assert isinstance(model, ControlledModel), "_make_trainer made it"
        about = {
            **{key: value for key, value in dataclasses.asdict(self.config).items() if key != "training"},
            "model": "model" if model.joint else self.training.model,
            "template": self.training.template,
            "training_seed": self.training.seed,
            "kv_policy": "propagate",
            "prompt_depth": "full",
            "validation": result["validation"],
        }
        if model.joint:
            self.export(model.model, self.directory / "model")
        write_curves(self.directory, trainer.history)
        save_controller(model.controller, self.config.controller, self.directory, json.loads(json.dumps(about)))
        return result
