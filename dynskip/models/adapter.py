"""A LoRA adapter in peft's format, read as data, and merged into each matrix of a model where the matrix is read."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dynskip.arguments import as_float, shown
from dynskip.assets import ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_adapter
from dynskip.models.source import Source, check_tensor, one_line
from dynskip.models.weights import HEAD, Deferred, stored_names

# What a config says of the factors themselves, of how they were trained, or of where they came from.
# fmt: off
_KNOWN_KEYS = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_rslora",
))
# fmt: on
# Other ways to begin, such as "pissa", take the first factors off the base: the adapter is one of another base.
_KNOWN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_MERGE = "Merge it into its base with merge_and_unload() of peft, and save that."
# Rows of a matrix whose change is held at a time, in float64.
_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter. Made by `read_adapter`.

    what: its folder and what asks for it; errors begin with it. config: of adapter_config.json, checked to be of LoRA.
    factors: A and B by transformers' name of the module that they change; shapes are checked with the model.
    """

    folder: Path
    what: str
    config: dict[str, Any]
    factors: dict[str, dict[str, Tensor]]

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """The rank of the factors of ``module``, and what their product is multiplied by."""
        rank, alpha = self._setting(module, "r", _PATTERNS[0]), self._setting(module, "lora_alpha", _PATTERNS[1])
        if type(rank) is not int or rank < 1:
            raise ValueError(f"{self.what} must have ranks of at least 1, got r {shown(rank)} of {module}.")
        factor = as_float(alpha)
        if factor is None or not math.isfinite(factor):
            raise ValueError(f"{self.what} must have a number for lora_alpha, got {shown(alpha)} of {module}.")
        return rank, factor / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def lacks(self, module: str) -> bool:
        """Whether the config says that ``module`` is adapted, and the file does not hold its factors."""
        targets = self.config.get("target_modules")
        if module in self.factors or self.config.get("layers_to_transform") or self.config.get("exclude_modules"):
            return False
        if isinstance(targets, str):
            return self._fits(targets, module)
        return any(f".{module}".endswith(f".{target}") for target in targets or ())

    def _setting(self, module: str, key: str, patterns: str) -> object:
        """What the first of the ``patterns`` that fits ``module`` says; else what holds for all, or peft's default."""
        for pattern, value in (self.config.get(patterns) or {}).items():
            if self._fits(rf"(.*\.)?({pattern})", module):
                return value
        return self.config.get(key, 8)

    def _fits(self, pattern: str, module: str) -> bool:
        try:
            return re.fullmatch(pattern, module) is not None
        except re.error as error:
            raise ValueError(f"{self.what} must have patterns of names, got {shown(pattern)}: {error}.") from error


def read_adapter(adapter: str | Path, function: str) -> Adapter:
    """The adapter in a folder, or that of a model by name; its tensors are mapped from the file.

    Raises TypeError, FileNotFoundError, or ValueError for one that is damaged or no plain LoRA, from ``function``.
    """
    if not isinstance(adapter, str | Path):
        raise TypeError(f"{function}: adapter must be a folder, got {type(adapter).__name__}.")
    folder = find_adapter(adapter) or Path(os.path.expanduser(adapter))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{function}: adapter must be a folder, got {str(adapter)!r}, which is none. Download what lies on a hub."
        )
    what = f"{function}: {folder}"
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{what} must hold {file}, got none. Save it with save_pretrained of peft.")
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} must hold JSON in {ADAPTER_CONFIG}, got: {one_line(error)}") from error
    _check_config(config, what)
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except Exception as error:  # safetensors raises its own type on damaged files; keep the cause
        raise ValueError(
            f"{what} must hold readable {ADAPTER_WEIGHTS}, got: {one_line(error)}. Copy it again."
        ) from error
    return Adapter(folder, what, config, _factors(tensors, what))


def merge(source: Source, adapter: Adapter) -> Source:
    """``source`` with W + scale * B A in place of each adapted W, worked out when W is read.

    Raises ValueError where a module is no matrix of the model, has other sizes, or is without its factors.
    """
    architecture, tensors = source.architecture, dict(source.tensors)
    [head] = stored_names(architecture, HEAD)
    tables = {f"{architecture.prefix}{architecture.base.get(of)}.weight" for of in ("embed_tokens", "embed_positions")}
    matrices = {name for name, held in tensors.items() if len(held.shape) == 2 and name not in tables}
    base = adapter.config.get("base_model_name_or_path")
    hint = f" It was made for {shown(base)}." if base else ""
    for module, factors in sorted(adapter.factors.items()):
        name = head if module == "lm_head" else f"{module}.weight"
        if name not in matrices:
            tied = " The head is the embedding." if name == head else ""
            raise ValueError(f"{adapter.what} must adapt matrices of {source.name}, got {module}.{tied}{hint}")
        held, (rank, scale) = tensors[name], adapter.rank_and_scale(module)
        is_turned = architecture.transposed and name != head
        num_outputs, num_inputs = reversed(held.shape) if is_turned else held.shape
        for factor, shape in (("A", [rank, num_inputs]), ("B", [num_outputs, rank])):
            got = list(factors[factor].shape)
            if got != shape:
                raise ValueError(
                    f"{adapter.what} must hold lora_{factor} of {module} in the shape {shape}, by its rank {rank} and "
                    f"{source.name}, got {got}.{hint}"
                )
        left, right = (factors["A"].t(), factors["B"].t()) if is_turned else (factors["B"], factors["A"])
        tensors[name] = Deferred(held.shape, functools.partial(_merged, held, left, right, scale))
    lacking = sorted(name for name in matrices if adapter.lacks(name.removesuffix(".weight")))
    if lacking:
        raise ValueError(f"{adapter.what} must hold factors of all its target_modules, got none of {lacking[0]}.{hint}")
    return replace(source, tensors=tensors, adapter=adapter.folder)


def _merged(held: Tensor | Deferred, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """A new tensor, float32: ``held`` + scale * ``left`` ``right``, rounded once.

    The product is one of float64. Its last bits differ between machines, which changes a model's weights in bfloat16
    with a chance of 1e-5: so the digest of merged weights is the same everywhere, as that of others, and does not have
    to remember a base and an adapter while weights are packed, moved, copied or saved.
    """
    weight = held.read().float() if isinstance(held, Deferred) else held.detach().to(torch.float32, copy=True)
    wide = right.double()
    for first in range(0, len(weight), _BLOCK_ROWS):
        rows = slice(first, first + _BLOCK_ROWS)
        weight[rows] += (left[rows].double() @ wide).mul_(scale)
    return weight


def _check_config(config: Any, what: str) -> None:
    """Raise ValueError unless ``config`` is of LoRA and of nothing that changes results besides the two factors."""
    if not isinstance(config, dict):
        raise ValueError(f"{what} must hold a JSON object in {ADAPTER_CONFIG}, got a {type(config).__name__}.")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{what} must be of peft_type LORA, got {shown(config.get('peft_type'))}. {_MERGE}")
    changes = {key: value for key, value in sorted(config.items()) if key not in _KNOWN_KEYS and value != "none"}
    if config.get("init_lora_weights") not in _KNOWN_STARTS:
        changes["init_lora_weights"] = config["init_lora_weights"]
    changes |= {key: config[key] for key in _PATTERNS if not isinstance(config.get(key) or {}, dict)}
    for key, value in changes.items():
        if value:
            raise ValueError(f"{what} must be of plain LoRA, got {key} {shown(value)}. {_MERGE}")


def _factors(tensors: dict[str, Tensor], what: str) -> dict[str, dict[str, Tensor]]:
    """A and B by module. Raises ValueError for any other tensor, a factor without the other, and one not finite."""
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        found = _FACTOR.fullmatch(key)
        if found is None:
            raise ValueError(f"{what} must hold lora_A and lora_B of matrices only, got {key}. {_MERGE}")
        check_tensor(f"{what}: {key}", tensor)
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{what}: {key} must hold finite numbers only, got NaN or infinity. It is damaged.")
        factors.setdefault(found[1], {})[found[2]] = tensor
    for module, both in factors.items():
        if len(both) < 2:
            raise ValueError(f"{what} must hold both factors of {module}, got lora_{next(iter(both))} only.")
    if not factors:
        raise ValueError(f"{what} must hold factors of at least one matrix, got none.")
    return factors
