"""The training of a controller in a folder, which then is the controller. Started again, it goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers import OPTForCausalLM

from dynskip.controllers.learned import ModelSizes
from dynskip.controllers.registry import make_controller
from dynskip.controllers.storage import save_controller
from dynskip.data.provenance import provenance
from dynskip.files import write_json
from dynskip.models.tokenizer import check_vocabulary
from dynskip.paths import LayerPath
from dynskip.training.controller.config import ControllerConfig
from dynskip.training.controller.gated_model import ControlledModel
from dynskip.training.controller.trainer import ControllerTrainer
from dynskip.training.curves import write_curves
from dynskip.training.fine_tune.run import (
    check_length,
    export_model,
    is_first_process,
    load_for_training,
    load_rows,
    load_tokenizer,
    record_start,
)
from dynskip.training.schedule import PathMenu


class ControllerRun:
    """One training in ``directory``: ``controller.json`` and its weights, and ``model/`` if the backbone is joint."""

    def __init__(
        self,
        config: ControllerConfig,
        data: Path,
        directory: Path,
        device: torch.device | None = None,
        progress: bool = True,
    ) -> None:
        self.config = config
        self.directory = directory
        self._data = data
        self._progress = progress
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else device

    def train(self) -> Path:
        """The folder, which ``load_controller`` reads."""
        training = self.config.training
        torch.manual_seed(training.seed)
        tokenizer = load_tokenizer(training.model)
        check_length(training.max_tokens, training.model)
        examples, validation, counts = load_rows(training, self._data, tokenizer)
        record_start(self.directory, provenance(self.config.flat(), [self._data]), counts, self._device)
        if (self.directory / "done.json").exists():
            return self.directory
        backbone = load_for_training(training.model, self._device, OPTForCausalLM)
        shape = backbone.config
        check_vocabulary(tokenizer, shape.vocab_size, training.model, "train")
        sizes = ModelSizes(shape.num_hidden_layers, shape.hidden_size, shape.word_embed_proj_dim or shape.hidden_size)
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
        every_layer = PathMenu((LayerPath.full(sizes.num_layers),), (1.0,), (1.0,))
        trainer = ControllerTrainer(
            model,
            self.directory / "training",
            training,
            every_layer,
            examples,
            validation,
            pad_id=tokenizer.pad_token_id,
            num_steps=training.steps(len(examples), full=True),
            seed=training.seed * 1000 + 2,
            use_cpu=self._device.type == "cpu",
            progress=self._progress,
        )
        best = trainer.run()
        trainer.load_weights(best)
        if is_first_process(self._device):
            self._export(model, best, tokenizer, trainer.history)
        trainer.accelerator.wait_for_everyone()
        return self.directory

    def _export(self, model: ControlledModel, best: Path, tokenizer: Any, history: list[dict[str, Any]]) -> None:
        step = int(best.name.split("-")[1])
        evaluated = next(entry for entry in history if "eval_loss" in entry and entry["step"] == step)
        about = {
            **{key: value for key, value in dataclasses.asdict(self.config).items() if key != "training"},
            "model": self.config.training.model,
            "template": self.config.training.template,
            "kv_policy": "propagate",
            "prompt_depth": "full",
            "validation": evaluated,
        }
        if model.joint:
            export_model(model.model, tokenizer, self.config.training.template, self.directory / "model")
            about["model"] = "model"
        write_curves(self.directory, history)
        save_controller(model.controller, self.config.controller, self.directory, json.loads(json.dumps(about)))
        num_steps = max(entry["step"] for entry in history)
        write_json(self.directory / "done.json", {"step": step, "num_steps": num_steps, "validation": evaluated})
