"""Loading, converting and saving models. transformers reads the checkpoints; this module checks and packs them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, OPTConfig
from transformers import OPTForCausalLM as HFOPTForCausalLM

from dynskip.assets import find_model
from dynskip.backends import resolve_backend
from dynskip.linear import Linear
from dynskip.opt import check_config

if TYPE_CHECKING:
    from dynskip.model import OPTForCausalLM


def load(
    source: str | Path, dtype: torch.dtype, device: torch.device | str, backend: str, deterministic: bool, pack: bool
) -> OPTForCausalLM:
    """The model of a local directory or hub id; see OPTForCausalLM.from_pretrained."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"from_pretrained: dtype must be float32, bfloat16 or float16, got {dtype}.")
    found = _find_device(device)
    name = _check_source(find_model(source))
    check_config(_read_config(name))
    hf_model = _read_weights(name, dtype)
    return _convert(hf_model, found, backend, deterministic, pack, consume=True)


def convert(hf_model: HFOPTForCausalLM, backend: str, deterministic: bool, pack: bool) -> OPTForCausalLM:
    """The model with copies of a transformers model's weights; see OPTForCausalLM.from_hf."""
    if not isinstance(hf_model, HFOPTForCausalLM):
        raise TypeError(f"from_hf: the model must be a transformers OPTForCausalLM, got {type(hf_model).__name__}.")
    return _convert(hf_model, hf_model.device, backend, deterministic, pack, consume=False)


def save(model: OPTForCausalLM, directory: Path) -> None:
    """Write config and safetensors, sharded above 5 GB; see OPTForCausalLM.save_pretrained."""
    from huggingface_hub import save_torch_state_dict

    directory.mkdir(parents=True, exist_ok=True)
    state = {key: _own_storage(value) for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    config = type(model.config).from_dict(model.config.to_dict())
    config.dtype = model.dtype
    config.architectures = ["OPTForCausalLM"]
    config.save_pretrained(directory)
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
            f"from_pretrained: device must be one that this machine has, got {device!r}: {_one_line(error)}"
        ) from error
    return found


def _check_source(source: str | Path) -> str:
    if not isinstance(source, str | Path):
        raise TypeError(f"from_pretrained: the model must be a directory or a hub id, got {type(source).__name__}.")
    path, name = Path(source), str(source)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or isinstance(source, Path)
    if path.is_dir() and name:
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"from_pretrained: {name} must hold a config.json, got none. Save the model with save_pretrained."
            )
    elif path.is_file():
        raise NotADirectoryError(f"from_pretrained: {name} must be a directory, got a file. Name the folder around it.")
    elif looks_local or not name:
        raise FileNotFoundError(f"from_pretrained: {name!r} must be a directory, got no such directory.")
    return name


def _read_config(name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # transformers and its validators raise types of their own: all say why in their text
        if Path(name).is_dir():
            raise ValueError(f"from_pretrained: {name} must hold an OPT config, got: {_one_line(error)}") from error
        raise FileNotFoundError(
            f"from_pretrained: {name} must be a directory, or a hub id within reach, got neither: {_one_line(error)}"
        ) from error


def _read_weights(name: str, dtype: torch.dtype) -> HFOPTForCausalLM:
    """transformers' model with exactly the weights of the checkpoint: none invented, none of its layers left out."""
    try:
        # Asked to go on over wrong shapes, transformers names them, which its own error does not.
        loaded: Any = HFOPTForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except MemoryError:
        raise
    except Exception as error:  # safetensors raises its own type on damaged files; name the file's home, keep the cause
        raise ValueError(f"from_pretrained: {name} must hold readable weights, got: {_one_line(error)}") from error
    hf_model, info = loaded
    for key, actual, expected in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"from_pretrained: {key} of {name} must have the shape {list(expected)} of its config, got {list(actual)}."
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"from_pretrained: {name} must hold every weight of its config, got {len(missing)} missing, such as "
            f"{missing[0]}."
        )
    # Left out, a layer would change the model without a word; other keys are buffers of old versions.
    unused = sorted(key for key in info["unexpected_keys"] if ".layers." in key)
    if unused:
        raise ValueError(
            f"from_pretrained: {name} must hold the layers of its config only, got {len(unused)} weights more, such as "
            f"{unused[0]}."
        )
    return hf_model


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def _convert(
    hf_model: HFOPTForCausalLM, device: torch.device, backend: str, deterministic: bool, pack: bool, consume: bool
) -> OPTForCausalLM:
    """Move (``consume``) or copy the weights matrix by matrix, so that at most one matrix is held twice."""
    from dynskip.model import OPTForCausalLM

    config = OPTConfig.from_dict(hf_model.config.to_dict())
    with torch.device("meta"):
        model = OPTForCausalLM(config, backend, deterministic)
    function = "from_pretrained" if consume else "from_hf"
    use_native = resolve_backend(backend, device).name == "native"
    source_modules = dict(hf_model.named_modules())
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if module is model.lm_head and config.tie_word_embeddings:
                continue
            source: Tensor = getattr(source_modules[module_name], name).detach()
            if source.shape != parameter.shape:
                raise ValueError(
                    f"{function}: {module_name}.{name} must be {list(parameter.shape)}, got {list(source.shape)}."
                )
            if not torch.isfinite(source).all():
                raise ValueError(
                    f"{function}: {module_name}.{name} must hold finite numbers only, got NaN or infinity. "
                    "The checkpoint is damaged, or its numbers do not fit the dtype."
                )
            # A loaded weight may be a view of the mapped file, which stays resident as long as any view lives.
            to_be_packed = pack and isinstance(module, Linear) and name == "weight"
            copy = source.to(device, copy=not (consume and to_be_packed))
            setattr(module, name, nn.Parameter(copy, requires_grad=False))
            tied = module_name.endswith("embed_tokens") and config.tie_word_embeddings
            if consume and not tied:
                setattr(source_modules[module_name], name, None)
        if pack and isinstance(module, Linear) and module is not model.lm_head:
            module.pack_(use_native)
    if config.tie_word_embeddings:
        model.tie_head_()
    if pack:
        model.lm_head.pack_(use_native)
    return model.eval()
