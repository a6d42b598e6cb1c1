"""A fine-tune in a folder: full depth first, then from there one stage a path. Started again, it goes on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dynskip.models.hf_model import hf_layers
from dynskip.paths import LayerPath
from dynskip.training.fine_tune.checkpoint_run import CheckpointRun
from dynskip.training.fine_tune.config import FineTuneConfig
from dynskip.training.fine_tune.trainer import FineTuneTrainer
from dynskip.training.stage import run_stage, write_curves


@dataclass(frozen=True, slots=True)
class Stage:
    """One training of a run: its folder's name, the paths it draws from, and the stage whose model it starts with."""

    name: str
    paths: tuple[str, ...]
    source: str | None = "full"


def stages(config: FineTuneConfig) -> list[Stage]:
    """The stages of a run in their order. A stage ``full-continued`` is the full path trained as long as the others."""
    later = [Stage("full-continued" if path == "full" else path.replace(":", "-"), (path,)) for path in config.paths]
    menu = [Stage("menu", config.menu)] if config.menu else []
    return [Stage("full", ("full",), source=None), *later, *menu]


class FineTuneRun(CheckpointRun):
    """One fine-tune; in each stage's folder ``model/`` is its best model with the tokenizer."""

    def train(self) -> dict[str, Path]:
        """Per stage the folder of its model, all stages finished."""
        self.start(dataclasses.asdict(self.training))
        models: dict[str, Path] = {}
        for stage in stages(self.training):
            source = self.training.model if stage.source is None else str(models[stage.source])
            directory = self.directory / stage.name
            run_stage(directory, partial(self._make_trainer, stage, source), partial(self._export, stage))
            models[stage.name] = directory / "model"
        return models

    def _make_trainer(self, stage: Stage, source: str) -> FineTuneTrainer:
        model = self.load(source)
        paths = [LayerPath.parse(path, model.config.num_hidden_layers) for path in stage.paths]
        used = {layer for path in paths for layer in path.layers}
        for index, layer in enumerate(hf_layers(model)):
            layer.requires_grad_(index in used)
        is_full = stage.source is None
        # Every later stage sees the same batches, so that they differ in their layers alone.
        seed = self.training.seed * 1000 + (0 if is_full else 1)
        return FineTuneTrainer(self, model, self.directory / stage.name, paths, is_full=is_full, seed=seed)

    def _export(self, stage: Stage, trainer: FineTuneTrainer) -> dict[str, Any]:
        result = {
            "paths": list(stage.paths),
            "template": self.training.template,
            **trainer.result(),
            "validation_rows": self.training.num_validation_rows,
        }
        model = AutoModelForCausalLM.from_pretrained(trainer.best_checkpoint, dtype=torch.float32)
        self.export(model, trainer.directory / "model", result)
        write_curves(trainer.directory, trainer.history)
        return result
