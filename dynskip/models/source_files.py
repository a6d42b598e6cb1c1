"""What a model folder or a hub id holds, read as data: nothing of it is run."""

from __future__ import annotations

import functools
import json
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils.hub import cached_file

from dynskip.assets import ADAPTER_CONFIG, ADAPTER_WEIGHTS, NAMES, find_adapter, find_model
from dynskip.models.adapter import merge, read_adapter
from dynskip.models.gguf import read_gguf
from dynskip.models.registry import ARCHITECTURES, decoder_config
from dynskip.models.source import Source, check_end_tokens, check_keys, one_line
from dynskip.models.weights import Deferred

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
GGUF = ".gguf"
_ADAPTER = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.bin")


def read_source(source: str | Path, function: str = "from_pretrained", adapter: str | Path | None = None) -> Source:
    """The model in a directory, in a GGUF file or at a hub id, its tensors mapped from the files and not yet read.

    adapter: the folder of a LoRA adapter that is merged into them; None for none but that of a model by name.
    Raises FileNotFoundError, NotADirectoryError, TypeError or ValueError, beginning with ``function``.
    """
    own = find_adapter(source)
    if own is not None and adapter is not None:
        raise ValueError(f"{function}: adapter must be left out with {source}, which has one, got {str(adapter)!r}.")
    chosen = own or adapter
    found = _read_whole(source, function)
    return found if chosen is None else merge(found, read_adapter(chosen, function))


def _read_whole(source: str | Path, function: str) -> Source:
    """The model of `read_source` before an adapter is merged into it."""
    name = _check_name(source, function)
    if name.endswith(GGUF):
        held = read_gguf(name, function)
        tensors = {
            key: Deferred(held.tensors.shape(key), functools.partial(held.tensors.__getitem__, key))
            for key in held.tensors
        }
        return Source.of(function, name, make_config(held.config, name, function), tensors)
    config = _read_config(name, function)
    for file in _ADAPTER:
        if _find(name, file) is not None:
            _refuse_adapter(name, file, function)
    config.eos_token_id = read_end_tokens(name, function) or config.eos_token_id
    return Source.of(function, name, config, _read_tensors(name, function))


def read_config(source: str | Path, function: str) -> Any:
    """The config of what `read_source` reads, without its tensors; raises what that does."""
    name = _check_name(source, function)
    if name.endswith(GGUF):
        return make_config(read_gguf(name, function).config, name, function)
    return _read_config(name, function)


def read_end_tokens(name: str, function: str) -> int | list[int] | None:
    """What generation_config.json says of ``eos_token_id``; None or an empty list where it names no end."""
    file = _find(name, "generation_config.json")
    if file is None:
        return None
    try:
        ends = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{function}: {file} must be a JSON object, got: {one_line(error)}") from error
    check_end_tokens(f"{function}: eos_token_id in {file}", ends)
    return ends


def _check_name(source: str | Path, function: str) -> str:
    if not isinstance(source, str | Path):
        raise TypeError(f"{function}: the model must be a directory or a hub id, got {type(source).__name__}.")
    path, name = Path(find_model(source)), str(find_model(source))
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or isinstance(source, Path)
    if path.is_dir() and name:
        if not (path / "config.json").is_file():
            if (path / _ADAPTER[0]).is_file():
                _refuse_adapter(name, _ADAPTER[0], function)
            raise FileNotFoundError(
                f"{function}: {name} must hold a config.json, got none. Save the model with save_pretrained."
            )
    elif path.is_file() and path.suffix != GGUF:
        raise NotADirectoryError(
            f"{function}: {name} must be a directory or a GGUF file, got another file. Name the folder around it."
        )
    elif not path.is_file() and path.suffix == GGUF:
        raise FileNotFoundError(f"{function}: {name!r} must be a GGUF file, got no such file.")
    elif not path.is_file() and (looks_local or not name):
        raise FileNotFoundError(f"{function}: {name!r} must be a directory, got no such directory.")
    return name


def _refuse_adapter(name: str, file: str, function: str) -> NoReturn:
    raise ValueError(
        f"{function}: {name} must hold one whole model, got an adapter ({file}). Name its base as the model, and a "
        "folder with nothing but the adapter as adapter."
    )


def _read_config(name: str, function: str) -> Any:
    try:
        values, _ = PreTrainedConfig.get_config_dict(name)
    except Exception as error:  # transformers and the hub raise types of their own: all say why in their text
        if Path(name).is_dir():
            raise ValueError(f"{function}: {name} must hold a config, got: {one_line(error)}") from error
        raise FileNotFoundError(
            f"{function}: {name} must be a directory, or a hub id within reach, got neither: {one_line(error)} "
            f"Name the folder of a model that was downloaded, or one of {', '.join(NAMES)}."
        ) from error
    check_keys(function, name, values)
    return make_config(values, name, function)


def make_config(values: dict[str, Any], name: str, function: str) -> Any:
    """The config of transformers of these ``values``. Raises ValueError where no decoder can be built of it."""
    model_type = values.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"{function}: {name} must hold a model of type {', '.join(ARCHITECTURES)}, got model_type {model_type!r}. "
            "Other architectures are not supported."
        )
    try:
        config = CONFIG_MAPPING[model_type].from_dict(values)
    except Exception as error:  # the validators of transformers raise types of their own
        raise ValueError(f"{function}: {name} must hold a config of {model_type}, got: {one_line(error)}") from error
    decoder_config(config)
    config.name_or_path = name
    return config


def _find(name: str, file: str) -> Path | None:
    """The file of that name in a directory or at a hub id; None where there is none."""
    found = cached_file(
        name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else Path(found)


def _read_tensors(name: str, function: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(name, function):
        try:
            held = _read_file(file)
        except MemoryError:
            raise
        except Exception as error:  # safetensors raises its own type on damaged files; keep the cause
            raise ValueError(
                f"{function}: {name} must hold readable weights, got in {file.name}: {one_line(error)}"
            ) from error
        for key, tensor in held.items():
            if key in tensors:
                raise ValueError(f"{function}: {name} must hold {key} once, got another in {file.name}.")
            tensors[key] = tensor
    return tensors


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    # A file of before 2020 is no archive, and cannot be mapped.
    held = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    if not isinstance(held, dict) or not all(isinstance(key, str) for key in held):
        raise ValueError(f"a {type(held).__name__} where tensors by name should be")
    return dict(held)


def _weight_files(name: str, function: str) -> list[Path]:
    """The files that hold the weights: the one, or all shards of an index."""
    for file in _WEIGHTS:
        whole = _find(name, file)
        if whole is not None:
            return [whole]
        index = _find(name, f"{file}.index.json")
        if index is not None:
            return [_find_shard(name, shard, index, function) for shard in _shards(index, function)]
    raise ValueError(
        f"{function}: {name} must hold readable weights, got none of {' and '.join(_WEIGHTS)}, whole or in shards."
    )


def _shards(index: Path, function: str) -> list[str]:
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{function}: {index} must hold a weight_map, got: {one_line(error)}") from error
    for file in files:
        # As either system reads it: a name that is harmless here is no reason to trust the index.
        outside = not isinstance(file, str) or any(
            path.is_absolute() or path.drive or ".." in path.parts
            for path in (PurePosixPath(file), PureWindowsPath(file))
        )
        if outside:
            raise ValueError(f"{function}: {index} must name files inside its folder, got {file!r}.")
    return sorted(files)


def _find_shard(name: str, shard: str, index: Path, function: str) -> Path:
    found = _find(name, shard)
    if found is None:
        raise ValueError(f"{function}: {name} must hold every shard of {index.name}, got no {shard}.")
    return found
