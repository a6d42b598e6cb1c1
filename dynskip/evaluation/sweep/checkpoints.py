"""Checkpoints of a sweep: where they are, which weights they hold, and whether their tokenizer fits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynskip.assets import find_model, opt_mini_directory
from dynskip.data.provenance import file_hash
from dynskip.models.source_files import read_end_tokens

_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on the disk. hash: of config, weights, tokenizer and end tokens. num_layers: L of this checkpoint."""

    directory: Path
    hash: str
    num_layers: int

    @staticmethod
    def of(source: str | Path | None) -> Checkpoint:
        """The checkpoint in a directory, of a hub id, or the model shipped with the package for "opt-mini" or None.

        Raises ValueError or OSError where it is no OPT checkpoint with a tokenizer.
        """
        directory = _directory(source)
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
        num_layers = config.get("num_hidden_layers")
        if config.get("model_type") != "opt" or not isinstance(num_layers, int):
            raise ValueError(
                f"Checkpoint.of: {directory} must hold an OPT model, got model_type {config.get('model_type')!r}."
            )
        return Checkpoint(directory, digest.hexdigest()[:16], num_layers)


def check_tokenizer(tokenizer: Any, config: Any, name: str | Path) -> None:
    """Raise ValueError where ``tokenizer`` makes or expects tokens that the model of ``config`` does not have."""
    if tokenizer is None:
        raise ValueError(f"eval: {name} must come with a tokenizer, got none. Export the model with its tokenizer.")
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ValueError(
            f"eval: tokenizer of {name} must know token ids below the model's {config.vocab_size}, got {largest}. "
            "Checkpoint and tokenizer do not belong together."
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if tokenizer.eos_token_id not in ends:
        raise ValueError(
            f"eval: tokenizer of {name} must end texts with the model's token {config.eos_token_id}, "
            f"got {tokenizer.eos_token_id}. Checkpoint and tokenizer do not belong together."
        )


def _directory(source: str | Path | None) -> Path:
    path = opt_mini_directory() if source is None else Path(find_model(source))
    if path.is_dir():
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
