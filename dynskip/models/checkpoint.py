"""Loading, converting and saving models: a source's tensors, one after the other, into a model and back to files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, OPTConfig
from transformers import OPTForCausalLM as HFOPTForCausalLM

from dynskip.models.linear import Linear
from dynskip.models.source import EMBEDDING, HEAD, Source
from dynskip.models.source_files import one_line, read_source
from dynskip.models.source_model import source_of
from dynskip.ops.backends import resolve_backend
from dynskip.ops.checks import find_dtype

_Model = TypeVar("_Model", bound=nn.Module)


def load(
    make_model: Callable[[OPTConfig], _Model],
    source: str | Path,
    dtype: torch.dtype | str,
    device: torch.device | str,
    backend: str,
    pack: bool,
) -> _Model:
    """The model of a local directory or hub id; see CausalLM.from_pretrained. make_model: makes an empty one."""
    found_dtype, found_device = find_dtype("from_pretrained", dtype), _find_device(device)
    return _convert(make_model, read_source(source), found_dtype, found_device, backend, pack, from_files=True)


def convert(make_model: Callable[[OPTConfig], _Model], hf_model: HFOPTForCausalLM, backend: str, pack: bool) -> _Model:
    """The model with copies of a transformers model's weights; see CausalLM.from_hf."""
    source = source_of(hf_model)
    like = source.tensors[EMBEDDING]
    return _convert(make_model, source, like.dtype, like.device, backend, pack, from_files=False)


def save(weights: Mapping[str, Tensor], config: OPTConfig, dtype: torch.dtype, directory: Path) -> None:
    """Write configs and safetensors, sharded above 5 GB; see CausalLM.save_pretrained."""
    from huggingface_hub import save_torch_state_dict

    directory.mkdir(parents=True, exist_ok=True)
    state = {key: _own_storage(value) for key, value in weights.items()}
    config = type(config).from_dict(config.to_dict())
    if config.tie_word_embeddings:
        del state[HEAD]
    config.dtype = dtype
    config.architectures = ["OPTForCausalLM"]
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
    return tensor.detach() if whole else tensor.detach().clone()


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
    make_model: Callable[[OPTConfig], _Model],
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
    for module_name, module in model.named_modules():
        for name in [name for name, _ in module.named_parameters(recurse=False)]:
            key = f"{module_name}.{name}"
            if key == HEAD and source.config.tie_word_embeddings:
                continue
            # A loaded weight may be a view of the mapped file, which stays resident as long as any view lives.
            to_be_packed = pack and isinstance(module, Linear) and name == "weight"
            tensor = source.tensors.pop(key).detach()
            held = tensor.to(device, dtype, copy=not (from_files and to_be_packed))
            if not torch.isfinite(held).all():
                raise ValueError(
                    f"{source.function}: {key} must hold finite numbers only, got NaN or infinity. "
                    "The checkpoint is damaged, or its numbers do not fit the dtype."
                )
            del tensor
            setattr(module, name, nn.Parameter(held, requires_grad=False))
        if pack and isinstance(module, Linear) and module is not model.lm_head:
            module.pack_(use_native)
    assert not source.tensors, "every tensor of a source is a parameter of the model"
    if source.config.tie_word_embeddings:
        model.tie_head_()
    if pack:
        model.lm_head.pack_(use_native)
    loaded: _Model = model.eval()
    return loaded
