"""What a sweep compares, on the disk: checkpoints with tokenizers that fit, and the controllers that steer them."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynskip.assets import ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_adapter, find_model, opt_mini_directory
from dynskip.controllers.registry import controller_class
from dynskip.controllers.storage import read_config
from dynskip.files import file_hash
from dynskip.models.registry import decoder_config
from dynskip.models.source_files import GGUF, read_end_tokens
from dynskip.models.source_files import read_config as read_model_config
from dynskip.models.tokenizer import check_vocabulary

_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on the disk. hash: of config, weights, tokenizer and end tokens. num_layers: L of this checkpoint.

    directory: of the model, or its one file, which holds all of that. adapter: the folder of what is merged into it.
    """

    directory: Path
    hash: str
    num_layers: int
    adapter: Path | None = None

    @property
    def name(self) -> str:
        """What it is called: as its folder or file, or as the adapter where it has one."""
        return (self.adapter or self.directory).name

    @staticmethod
    def of(source: str | Path | None) -> Checkpoint:
        """The checkpoint in a directory, a GGUF file, of a hub id, or of a model known by name; None for opt-mini.

        The folder of an adapter stands for the model that its config names, with the adapter merged into it. Raises
        ValueError or OSError where it is no checkpoint of one of the architectures.
        """
        named = find_adapter(source)
        adapter = _adapter_folder(source) if named is None else named
        if adapter is not None:
            base = Checkpoint.of(find_model(str(source)) if named is not None else _base_of(adapter))
            if base.adapter is not None:
                raise ValueError(
                    f"Checkpoint.of: {adapter} must be an adapter of a whole model, got one of {base.name}, which is "
                    "one itself. Save the merged weights, and name them."
                )
            parts = (base.hash, *(file_hash(adapter / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)))
            digest = hashlib.sha256(" ".join(parts).encode())
            return Checkpoint(base.directory, digest.hexdigest()[:16], base.num_layers, adapter)
        directory = _directory(source)
        if directory.is_file():
            num_layers = decoder_config(read_model_config(directory, "Checkpoint.of")).num_layers
            return Checkpoint(directory, file_hash(directory)[:16], num_layers)
        weights = sorted(path for pattern in _WEIGHTS for path in directory.glob(pattern))
        missing = [] if (directory / "config.json").is_file() else ["config.json"]
        missing += [] if weights else ["weights"]
        if missing:
            raise FileNotFoundError(
                f"Checkpoint.of: {directory} must hold config.json and weights, got no {' and no '.join(missing)}. "
                "Name an exported checkpoint."
            )
        if any(path.suffix == ".safetensors" for path in weights):
            weights = [path for path in weights if path.suffix == ".safetensors"]
        files = [directory / "config.json", *weights]
        files += sorted({path for pattern in _TOKENIZER for path in directory.glob(pattern)})
        digest = hashlib.sha256()
        for path in files:
            digest.update(f"{path.name} {file_hash(path)}\n".encode())
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        ends = read_end_tokens(str(directory), "Checkpoint.of")
        if ends and ends != config.get("eos_token_id"):
            # They decide where outputs end; where both files say the same, the first has been counted.
            digest.update(f"ends {ends}\n".encode())
        num_layers = decoder_config(read_model_config(directory, "Checkpoint.of")).num_layers
        return Checkpoint(directory, digest.hexdigest()[:16], num_layers)


def check_tokenizer(tokenizer: Any, config: Any, name: str | Path) -> None:
    """Raise ValueError where ``tokenizer`` makes or expects tokens that the model of ``config`` does not have."""
    if tokenizer is None:
        raise ValueError(f"eval: {name} must come with a tokenizer, got none. Export the model with its tokenizer.")
    check_vocabulary(tokenizer, config.vocab_size, name, "eval")
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if tokenizer.eos_token_id not in ends:
        raise ValueError(
            f"eval: tokenizer of {name} must end texts with the model's token {config.eos_token_id}, "
            f"got {tokenizer.eos_token_id}. Checkpoint and tokenizer do not belong together."
        )


def _adapter_folder(source: str | Path | None) -> Path | None:
    folder = None if source is None else Path(os.path.expanduser(source))
    is_adapter = folder is not None and (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").exists()
    return folder if is_adapter else None


def _base_of(adapter: Path) -> str:
    base = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"Checkpoint.of: {adapter / ADAPTER_CONFIG} must name its model as base_model_name_or_path, got {base!r}."
        )
    return base


def _directory(source: str | Path | None) -> Path:
    path = opt_mini_directory() if source is None else Path(find_model(source))
    if path.is_dir() or (path.is_file() and path.suffix == GGUF):
        return path
    if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1:
        raise FileNotFoundError(f"Checkpoint.of: {str(source)!r} must be a directory, got no such directory.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", *_WEIGHTS]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"Checkpoint.of: {source!r} must be a directory, or a hub id within reach, got neither: {reason}"
        ) from error


_FILES = ("controller.json", "controller.safetensors")


@dataclass(frozen=True, slots=True)
class ControllerFolder:
    """What ``dynskip train`` made of a controller.

    hash: of controller and weights. name: as on the command line, ``mlp:32``. checkpoint: the weights that it steers.
    alpha: the price of layers in its loss, or of the distance from target_layers where those were given.
    training_seed: of the training; None where the folder does not say.
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
    training_seed: int | None = None

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
            about.get("training_seed"),
        )

    @property
    def label(self) -> str:
        """What tables call it: its recipe, and the seed of its training where that is known."""
        return self.recipe if self.training_seed is None else f"{self.recipe}, seed {self.training_seed}"

    @property
    def recipe(self) -> str:
        """What its trainings have in common: its name, what it aimed at, and the weights where they are not its own."""
        aim = f"alpha {self.alpha:g}" if self.target_layers is None else f"target {self.target_layers:g}"
        weights = "joint" if self.backbone == "joint" else f"frozen {self.checkpoint.name}"
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
