"""Loading, converting and saving models: a source's tensors, one after the other, into a model and back to files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers import OPTForCausalLM as HFOPTForCausalLM

from dynskip.models.linear import Linear
from dynskip.models.source import EMBEDDING, HEAD, Source
from dynskip.models.source_files import one_line, read_source
from dynskip.models.source_model import source_of
from dynskip.ops.backends import resolve_backend
from dynskip.ops.checks import find_dtype

if TYPE_CHECKING:
    from dynskip.causal_lm import OPTForCausalLM


def load(
    source: str | Path,
    dtype: torch.dtype | str,
    device: torch.device | str,
    backend: str,
    deterministic: bool,
    pack: bool,
) -> OPTForCausalLM:
    """The model of a local directory or hub id; see OPTForCausalLM.from_pretrained."""
    found_dtype, found_device = find_dtype("from_pretrained", dtype), _find_device(device)
    return _convert(read_source(source), found_dtype, found_device, backend, deterministic, pack, from_files=True)


def convert(hf_model: HFOPTForCausalLM, backend: str, deterministic: bool, pack: bool) -> OPTForCausalLM:
    """The model with copies of a transformers model's weights; see OPTForCausalLM.from_hf."""
    source = source_of(hf_model)
    like = source.tensors[EMBEDDING]
    return _convert(source, like.dtype, like.device, backend, deterministic, pack, from_files=False)


def save(model: OPTForCausalLM, directory: Path) -> None:
    """Write configs and safetensors, sharded above 5 GB; see OPTForCausalLM.save_pretrained."""
    from huggingface_hub import save_torch_state_dict

    directory.mkdir(parents=True, exist_ok=True)
    state = {key: _own_storage(value) for key, value in model.state_dict().items()}
    config = type(model.config).from_dict(model.config.to_dict())
    if config.tie_word_embeddings:
        del state[HEAD]
    config.dtype = model.dtype
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
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    deterministic: bool,
    pack: bool,
    from_files: bool,
) -> OPTForCausalLM:
    """Move (``from_files``) or copy the weights matrix by matrix, so that at most one matrix is held twice."""
    from dynskip.causal_lm import OPTForCausalLM

    with torch.device("meta"):
        model = OPTForCausalLM(source.config, backend, deterministic)
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
    return model.eval()
