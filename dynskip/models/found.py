"""Where found paths are kept: by a digest of the weights, beside the model, in the user's cache, or in the package."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynskip.assets import FOUND_PATHS_FOLDER
from dynskip.files import cache_folder
from dynskip.found import FOUND_PATHS, FoundPaths
from dynskip.models.linear import Linear
from dynskip.models.weights import HEAD


def weights_digest(model: nn.Module, is_head_tied: bool) -> str:
    """The SHA-256 of all weights in bfloat16, packed or dense, with their names and shapes.

    The same for a checkpoint in float32 and in bfloat16, on any device. Cost: reads and rounds all weights once.
    """
    digest = hashlib.sha256()
    for name, weight in _weights(model):
        if is_head_tied and name == HEAD:
            continue
        rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        digest.update(rounded.view(torch.int16).numpy().data)
    return digest.hexdigest()


def weights_version(model: nn.Module) -> tuple[Any, ...]:
    """What changes whenever torch or dynskip is told to change a weight of ``model``."""
    held = tuple((each.data_ptr(), 0 if each.is_inference() else each._version) for each in model.parameters())
    return Linear.num_changes, held


def find_found_paths(digest: str, source: str) -> FoundPaths | None:
    """What searches have found for the weights of ``digest``, loaded from ``source``; None where none has run.

    source: see `CausalLM.weights_folder`. A file beside the model comes first, then the user's cache, then what is
    shipped. Raises ValueError for a damaged file, and for one beside the model that is of other weights.
    """
    beside = _beside(source)
    if beside is not None and beside.is_file():
        found = FoundPaths.read(beside)
        if found.weights != digest:
            raise ValueError(
                f"found_paths: {beside} must be of the weights beside it, got one of others, or of the adapter with "
                "another base. Remove it, and search again."
            )
        return found
    try:
        cached = _cached(digest)
    except ValueError:
        cached = None  # a user without a home, for whom nothing was ever kept
    if cached is not None and cached.is_file():
        return FoundPaths.read(cached)
    beside_shipped = sorted(FOUND_PATHS_FOLDER.parent.glob(f"*/{FOUND_PATHS}"))
    shipped = (FoundPaths.read(path) for path in (*sorted(FOUND_PATHS_FOLDER.glob("*.json")), *beside_shipped))
    return next((found for found in shipped if found.weights == digest), None)


def place_to_keep(digest: str, source: str) -> Path:
    """Where a search of a model loaded from ``source`` leaves what it finds: beside it, or in the user's cache."""
    return _beside(source) or _cached(digest)


def _beside(source: str) -> Path | None:
    """The file in the model's folder; None where it has none of its own, or one of the package."""
    folder = Path(source)
    is_own = bool(source) and folder.is_dir() and not folder.resolve().is_relative_to(FOUND_PATHS_FOLDER.parent)
    return folder / FOUND_PATHS if is_own else None


def _cached(digest: str) -> Path:
    return cache_folder() / "found-paths" / f"{digest}.json"


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All weights by name, one dense copy at a time."""
    for prefix, module in model.named_modules():
        if isinstance(module, Linear):
            yield f"{prefix}.weight", module.dense_weight()
        for name, weight in module.named_parameters(recurse=False):
            if not (isinstance(module, Linear) and name == "weight"):
                yield f"{prefix}.{name}", weight
