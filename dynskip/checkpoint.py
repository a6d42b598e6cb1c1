"""Loading, converting and saving models. transformers reads the checkpoints; this module checks and packs them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AutoConfig, OPTConfig
from transformers import OPTForCausalLM as HFOPTForCausalLM

from dynskip.linear import Linear
from dynskip.opt import check_config

if TYPE_CHECKING:
    from dynskip.model import OPTForCausalLM


def load(
    source: str | Path, dtype: torch.dtype, device: torch.device, backend: str, deterministic: bool, pack: bool
) -> OPTForCausalLM:
    """The model of a local directory or hub id; see OPTForCausalLM.from_pretrained."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"from_pretrained: dtype must be float32, bfloat16 or float16, got {dtype}.")
    name = _check_source(source)
    check_config(AutoConfig.from_pretrained(name))
    try:
        hf_model, info = HFOPTForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except Exception as error:
        # safetensors raises its own exception type on damaged files; name the file's home, keep the cause.
        raise ValueError(f"from_pretrained: {name} must hold readable weights, got: {error}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            keys = sorted(str(key) for key in info[kind])
            raise ValueError(
                f"from_pretrained: {name} must hold every weight of its config, got {len(keys)} {kind}, such as "
                f"{keys[0]}."
            )
    return _convert(hf_model, device, backend, deterministic, pack, consume=True)


def convert(hf_model: HFOPTForCausalLM, backend: str, deterministic: bool, pack: bool) -> OPTForCausalLM:
    """The model with copies of a transformers model's weights; see OPTForCausalLM.from_hf."""
    if not isinstance(hf_model, HFOPTForCausalLM):
        raise TypeError(f"from_hf: the model must be a transformers OPTForCausalLM, got {type(hf_model).__name__}.")
    return _convert(hf_model, hf_model.device, backend, deterministic, pack, consume=False)


def save(model: OPTForCausalLM, directory: Path) -> None:
    """Write config and safetensors, sharded above 5 GB; see OPTForCausalLM.save_pretrained."""
    from huggingface_hub import save_torch_state_dict

    directory.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach() for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    config = type(model.config).from_dict(model.config.to_dict())
    config.dtype = model.dtype
    config.architectures = ["OPTForCausalLM"]
    config.save_pretrained(directory)
    save_torch_state_dict(state, str(directory))


def _check_source(source: str | Path) -> str:
    path = Path(source)
    name = os.fspath(source)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or isinstance(source, Path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"from_pretrained: {name} must hold a config.json, got none. Save the model with save_pretrained."
            )
    elif looks_local:
        raise FileNotFoundError(f"from_pretrained: {name} must be a directory, got no such directory.")
    return name


def _convert(
    hf_model: HFOPTForCausalLM, device: torch.device, backend: str, deterministic: bool, pack: bool, consume: bool
) -> OPTForCausalLM:
    """Move (``consume``) or copy the weights matrix by matrix, so that at most one matrix is held twice."""
    from dynskip.model import OPTForCausalLM

    config = OPTConfig.from_dict(hf_model.config.to_dict())
    with torch.device("meta"):
        model = OPTForCausalLM(config, backend, deterministic)
    source_modules = dict(hf_model.named_modules())
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if module is model.lm_head and config.tie_word_embeddings:
                continue
            source: Tensor = getattr(source_modules[module_name], name).detach()
            if source.shape != parameter.shape:
                raise ValueError(
                    f"from_hf: {module_name}.{name} must have shape {list(parameter.shape)}, got {list(source.shape)}."
                )
            if not torch.isfinite(source).all():
                raise ValueError(
                    f"from_hf: {module_name}.{name} must hold finite numbers only, got NaN or infinity. "
                    "The checkpoint is damaged."
                )
            # A loaded weight may be a view of the mapped file, which stays resident as long as any view lives.
            to_be_packed = pack and isinstance(module, Linear) and name == "weight"
            copy = source.to(device, copy=not (consume and to_be_packed))
            setattr(module, name, nn.Parameter(copy, requires_grad=False))
            tied = module_name.endswith("embed_tokens") and config.tie_word_embeddings
            if consume and not tied:
                setattr(source_modules[module_name], name, None)
        if pack and isinstance(module, Linear) and module is not model.lm_head:
            module.pack_()
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.decoder.embed_tokens.weight
    if pack:
        model.lm_head.pack_()
    return model.eval()
