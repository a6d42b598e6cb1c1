"""What a model of transformers holds, and whether it computes what the plain class of its config does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from dynskip.models.config import Rotary
from dynskip.models.registry import decoder_config
from dynskip.models.source import Source, check_end_tokens, check_keys
from dynskip.models.weights import EMBEDDING, stored_names
from dynskip.ops.checks import dtype_name

_FUNCTION, _NAME = "from_hf", "the model"
# What a module computes with besides its tensors.
_SETTINGS = (
    "apply_residual_connection_post_layernorm",
    "attention_scaling",
    "beta",
    "do_layer_norm_before",
    "eps",
    "head_dim",
    "head_size",
    "inv_norm_factor",
    "layer_type",
    "max_norm",
    "num_heads",
    "num_key_value_groups",
    "offset",
    "rotary_ndims",
    "scaling",
    "sliding_window",
    "use_parallel_residual",
    "variance_epsilon",
)
# transformers leaves these on a model that was once asked for hidden states; they change nothing.
_HARMLESS_HOOKS = "transformers.utils.output_capturing"


def source_of(hf_model: nn.Module) -> tuple[Source, Tensor]:
    """The source of a model in memory, its own tensors with a config of its own, and the embedding among them.

    Raises TypeError for another class than the one with a language-modelling head; ValueError, naming the part, where
    the model does not compute what that class does.
    """
    config: Any = getattr(hf_model, "config", None)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None or not isinstance(hf_model, kind):
        merge = " Merge its adapter with merge_and_unload() first." if hasattr(hf_model, "merge_and_unload") else ""
        raise TypeError(
            f"{_FUNCTION}: the model must be a transformers model with a language-modelling head, such as "
            f"{'LlamaForCausalLM' if kind is None else kind.__name__}, got {type(hf_model).__name__}.{merge}"
        )
    values = config.to_dict()
    check_keys(_FUNCTION, _NAME, values)
    config = type(config).from_dict(values)
    rotary = decoder_config(config).rotary
    ends = getattr(hf_model.generation_config, "eos_token_id", None)
    check_end_tokens(f"{_FUNCTION}: eos_token_id in generation_config", ends)
    config.eos_token_id = ends or config.eos_token_id
    _check_modules(hf_model, config)
    tensors = {
        **dict(hf_model.named_parameters(remove_duplicate=False)),
        **dict(hf_model.named_buffers(remove_duplicate=False)),
    }
    _check_frequencies(config, rotary, tensors)
    source = Source.of(_FUNCTION, _NAME, config, tensors)
    embedding: Tensor = tensors[stored_names(source.architecture, EMBEDDING)[0]]
    dtype = embedding.dtype
    for key in sorted(source.tensors):
        tensor = source.tensors[key]
        assert isinstance(tensor, Tensor), "a model in memory has its tensors"
        if tensor.dtype != dtype:
            raise ValueError(
                f"{_FUNCTION}: {key} of {_NAME} must be {dtype_name(dtype)} like the embedding, "
                f"got {dtype_name(tensor.dtype)}. Use .to(torch.{dtype_name(dtype)})."
            )
    return source, embedding


def _check_frequencies(config: Any, rotary: Rotary | None, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the model rotates by the frequencies of its config, rounded where it was converted."""
    if rotary is None:
        return
    # What "dynamic" rotates by may be left from a sequence that was too long; it goes back to the original one.
    is_dynamic = config.rope_parameters.get("rope_type") == "dynamic"
    last = "original_inv_freq" if is_dynamic else "inv_freq"
    for name, held in tensors.items():
        if name.rpartition(".")[2] == last and held.device.type != "meta":
            wanted = torch.tensor(rotary.frequencies, device=held.device).to(held.dtype)
            if not torch.equal(held, wanted):
                raise ValueError(f"{_FUNCTION}: {name} of {_NAME} must hold the frequencies of its config, got others.")


def _check_modules(hf_model: nn.Module, config: Any) -> None:
    """Raise ValueError unless the modules are those that transformers makes of the config, as it makes them."""
    with torch.device("meta"):
        model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        plain = dict(model(config).named_modules())
    modules = dict(hf_model.named_modules())
    for name, module in modules.items():
        if name not in plain:
            raise ValueError(
                f"{_FUNCTION}: {_NAME} must have the modules of its config only, got {name}, {_kind(module)}, as well."
            )
        _check_module(f"{_FUNCTION}: {name or _NAME}", module, plain[name])
    for name, module in plain.items():
        if name not in modules:
            raise ValueError(
                f"{_FUNCTION}: {_NAME} must have the modules of its config, got no {name}, {_kind(module)}. "
                "Make its config fit, num_hidden_layers for instance."
            )


def _check_module(what: str, module: nn.Module, plain: nn.Module) -> None:
    """Raise ValueError, beginning with ``what``, unless ``module`` computes what ``plain`` does with its tensors."""
    if type(module) is not type(plain):
        raise ValueError(
            f"{what} must be a plain {_kind(plain)}, got {_kind(module)}. Merge adapters, dequantise weights, remove "
            "parametrizations."
        )
    of_accelerate = [vars(module)["_hf_hook"]] if "_hf_hook" in vars(module) else []
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values(), *of_accelerate):
        if getattr(hook, "__module__", None) != _HARMLESS_HOOKS:
            raise ValueError(f"{what} must have no forward hook, got {_origin(hook)}. Remove it.")
    forward: Any = vars(module).get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        raise ValueError(f"{what} must have the forward of its class, got {_origin(forward)}. Remove the wrapper.")
    for setting in _SETTINGS:
        value, wanted = getattr(module, setting, None), getattr(plain, setting, None)
        if value != wanted:
            raise ValueError(f"{what} must have {setting} {wanted} as its config says, got {value}.")


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _origin(function: Callable[..., Any]) -> str:
    """The name of a function, or of the class of what is called like one, with its module."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
