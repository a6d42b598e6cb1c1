"""`ControllerFolder`: a learned controller on the disk, the weights that it steers, and how it was trained."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynskip.controllers.registry import controller_class
from dynskip.controllers.storage import read_config
from dynskip.data.provenance import file_hash
from dynskip.evaluation.sweep.checkpoints import Checkpoint

_FILES = ("controller.json", "controller.safetensors")


@dataclass(frozen=True, slots=True)
class ControllerFolder:
    """What ``dynskip train`` made of a controller.

    hash: of controller and weights. name: as on the command line, ``mlp:32``. checkpoint: the weights that it steers.
    alpha: the price of layers in its loss, or of the distance from target_layers where those were given.
    backbone: "frozen" or "joint". kv_policy, prompt_depth: as it was trained; None and "path" for one that decides
    once per sequence.
    """

    directory: Path
    hash: str
    name: str
    checkpoint: Checkpoint
    alpha: float
    target_layers: float | None
    backbone: str
    kv_policy: str | None
    prompt_depth: str

    @staticmethod
    def of(directory: str | Path) -> ControllerFolder:
        """The controller in ``directory``; raises OSError or ValueError where there is none, or not its model."""
        directory = Path(os.path.expanduser(directory))
        config = read_config(directory)
        about: dict[str, Any] = config.get("about") or {}
        missing = {"alpha", "backbone", "model"} - set(about)
        if missing:
            raise ValueError(
                f"ControllerFolder.of: {directory / _FILES[0]} must say {' and '.join(sorted(missing))} of its "
                "training, got nothing. Save it with dynskip train, or name them in about."
            )
        # A joint controller brings its own weights; a relative name stands for a folder beside its files.
        own = directory / str(about["model"]) if about["backbone"] == "joint" else None
        checkpoint = Checkpoint.of(own or about["model"])
        digest = hashlib.sha256(checkpoint.hash.encode())
        for name in _FILES:
            digest.update(file_hash(directory / name).encode())
        per_token = hasattr(controller_class(config["controller"])[0], "active")
        return ControllerFolder(
            directory,
            digest.hexdigest()[:16],
            config["controller"],
            checkpoint,
            float(about["alpha"]),
            about.get("target_layers"),
            about["backbone"],
            str(about.get("kv_policy", "propagate")) if per_token else None,
            str(about.get("prompt_depth", "full")) if per_token else "path",
        )

    @property
    def label(self) -> str:
        """What tables call it: its name, what it aimed at, and the weights where they are not its own."""
        aim = f"alpha {self.alpha:g}" if self.target_layers is None else f"target {self.target_layers:g}"
        weights = "joint" if self.backbone == "joint" else f"frozen {self.checkpoint.directory.name}"
        return f"{self.name}, {aim}, {weights}"

    @property
    def kind(self) -> str:
        """The name without its argument."""
        return self.name.partition(":")[0]

    @property
    def width(self) -> int | None:
        """The argument behind the name where it is a number: the width of an MLP."""
        argument = self.name.partition(":")[2]
        return int(argument) if argument.isdecimal() else None
