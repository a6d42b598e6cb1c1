"""Loading, converting and saving models: a source's tensors, one after the other, into a model and back to files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dynskip.models.config import DecoderConfig
from dynskip.models.linear import Linear
from dynskip.models.registry import get_architecture
from dynskip.models.source import Source, one_line
from dynskip.models.source_files import read_source
from dynskip.models.source_model import source_of
from dynskip.models.weights import HEAD, StoredWeights, stored_names, to_stored
from dynskip.ops.backends import resolve_backend
from dynskip.ops.checks import find_dtype

_Model = TypeVar("_Model", bound=nn.Module)


def load(
    make_model: Callable[[Any], _Model],
    source: str | Path,
    dtype: torch.dtype | str,
    device: torch.device | str,
    backend: str,
    pack: bool,
    adapter: str | Path | None,
) -> _Model:
    """The model of a local directory or hub id; see CausalLM.from_pretrained. make_model: makes an empty one."""
    found_dtype, found_device = find_dtype("from_pretrained", dtype), _find_device(device)
    found = read_source(source, adapter=adapter)
    if found.adapter is not None:
        found.config.adapter = str(found.adapter)
    return _convert(make_model, found, found_dtype, found_device, backend, pack, from_files=True)


def convert(make_model: Callable[[Any], _Model], hf_model: nn.Module, backend: str, pack: bool) -> _Model:
    """The model with copies of a transformers model's weights; see CausalLM.from_hf."""
    source, like = source_of(hf_model)
    return _convert(make_model, source, like.dtype, like.device, backend, pack, from_files=False)


def save(
    weights: Mapping[str, Tensor], config: Any, decoder_config: DecoderConfig, dtype: torch.dtype, directory: Path
) -> None:
    """Write configs and safetensors, sharded above 5 GB; see CausalLM.save_pretrained."""
    from huggingface_hub import save_torch_state_dict

    directory.mkdir(parents=True, exist_ok=True)
    architecture = get_architecture(config.model_type)
    if decoder_config.is_head_tied:
        weights = {key: tensor for key, tensor in weights.items() if key != HEAD}
    state = {name: _own_storage(held) for name, held in to_stored(architecture, decoder_config, weights)}
    # What was merged is part of the weights now: a folder of this machine says nothing to who loads them.
    config = type(config).from_dict({key: value for key, value in config.to_dict().items() if key != "adapter"})
    config.dtype = dtype
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(directory)
    # The ends that the config names: an older file in the folder would overrule them.
    ends = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    ends.save_pretrained(directory)
    save_torch_state_dict(state, str(directory))


def _own_storage(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy where it is a part of something larger, which safetensors does not write."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor.detach().contiguous() if whole else tensor.detach().clone(memory_format=torch.contiguous_format)


def _find_device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"from_pretrained: device must be one that this machine has, got {device!r}: {one_line(error)}"
        ) from error
    return found


def _convert(
    make_model: Callable[[Any], _Model],
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    pack: bool,
    from_files: bool,
) -> _Model:
    """Move (``from_files``) or copy the weights matrix by matrix, so that at most one matrix is held twice."""
    with torch.device("meta"):
        model: Any = make_model(source.config)  # with a head called lm_head, which may be tied
    use_native = resolve_backend(backend, device).name == "native"
    is_tied = source.decoder_config.is_head_tied
    keys = [key for key, _ in model.named_parameters() if not (is_tied and key == HEAD)]
    stored = StoredWeights(source.architecture, source.decoder_config, source.tensors, keys)
    for module_name, module in model.named_modules():
        for name in [name for name, _ in module.named_parameters(recurse=False)]:
            key = f"{module_name}.{name}"
            if key == HEAD and is_tied:
                continue
            # A loaded weight may be a view of the mapped file, which stays resident as long as any view lives.
            to_be_packed = pack and isinstance(module, Linear) and name == "weight"
            tensor = stored.take(key)
            held = tensor.to(device, dtype, copy=not (from_files and to_be_packed)).contiguous()
            if not torch.isfinite(held).all():
                name_there = stored_names(source.architecture, key)[0]
                raise ValueError(
                    f"{source.function}: {name_there} must hold finite numbers only, got NaN or infinity. "
                    "The checkpoint is damaged, or its numbers do not fit the dtype."
                )
            del tensor
            setattr(module, name, nn.Parameter(held, requires_grad=False))
        if pack and isinstance(module, Linear) and module is not model.lm_head:
            module.pack_(use_native)
    assert not source.tensors, "every tensor of a source is a parameter of the model"
    if is_tied:
        model.tie_head_()
    if pack:
        model.lm_head.pack_(use_native)
    loaded: _Model = model.eval()
    return loaded
