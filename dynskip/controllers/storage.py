"""Learned controllers in a folder: ``controller.json`` and ``controller.safetensors``."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dynskip.controllers.learned import LearnedController, ModelSizes
from dynskip.controllers.registry import make_controller

_CONFIG, _WEIGHTS = "controller.json", "controller.safetensors"


def save_controller(
    controller: LearnedController, name: str, directory: Path, about: Mapping[str, Any] | None = None
) -> None:
    """Write the controller called ``name``; ``about`` is kept beside it for whoever reads the folder."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in controller.state_dict().items()}
    save_file(tensors, directory / _WEIGHTS)
    config = {
        "controller": name,
        "sizes": dataclasses.asdict(controller.sizes),
        "always": sorted(controller.always),
        "temperature": controller.temperature,
        **({} if about is None else {"about": dict(about)}),
    }
    (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def read_config(directory: Path) -> dict[str, Any]:
    """What ``save_controller`` wrote beside the weights."""
    file = directory / _CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"load_controller: {directory} must hold {_CONFIG}, got none. Check the path.")
    try:
        config = json.loads(file.read_text())
        missing = {"controller", "sizes", "always", "temperature"} - set(config)
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"load_controller: {file} must hold a JSON object, got: {error}.") from error
    if missing:
        raise ValueError(f"load_controller: {file} must name {', '.join(sorted(missing))}, got none.")
    return dict(config)


def load_controller(
    directory: str | Path, device: torch.device | str = "cpu", sample: bool = False, seed: int = 0
) -> LearnedController:
    """The controller of a folder, ready to run. Loading one that names a class of its own imports that class.

    sample, seed: whether it samples its decisions, and from which seed; otherwise it takes the likelier ones.
    """
    directory = Path(os.path.expanduser(directory))
    config = read_config(directory)
    controller = make_controller(config["controller"], ModelSizes(**config["sizes"]))
    tensors = load_file(directory / _WEIGHTS)
    try:
        controller.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"load_controller: {directory} must hold the weights of its controller, got: {reason}"
        ) from error
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"load_controller: {key} must hold finite numbers only, got NaN or infinity.")
    controller.always = frozenset(config["always"])
    controller.temperature, controller.sample, controller.seed = config["temperature"], sample, seed
    return controller.to(device).eval().requires_grad_(False)
