"""Tiny random models of every architecture, in variants and random draws, and transformers' model cut to a path."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import torch
from models import NUM_LAYERS, VARIANTS, VOCAB_SIZE
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dynskip import LayerPath
from dynskip.models.hf_model import layer_list

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
_LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
_WINDOW = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}

# What the tiny models of a family have in common, and six variants of each beside OPT's.
COMMON: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "mistral": {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"intermediate_size": 48, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16},
    "gpt_neox": {"intermediate_size": 48},
    "bloom": {},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "opt": {},
    "llama": {
        "plain": {},
        "one-kv-head": {"num_key_value_heads": 1, "rope_parameters": _LINEAR},
        "wide-heads": {"head_dim": 24, "rope_parameters": _LLAMA3},
        "biases": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_new"},
        "tied": {"tie_word_embeddings": True, "rope_parameters": _YARN},
        "all-heads": {"num_key_value_heads": 4, "rope_parameters": _DYNAMIC},
    },
    "mistral": {
        "plain": {},
        "window": {"sliding_window": 3},
        "window-of-one": {"sliding_window": 1},
        "wide-heads": {"head_dim": 12, "num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True, "sliding_window": 5},
        "yarn": {"rope_parameters": _YARN, "hidden_act": "gelu"},
    },
    "qwen2": {
        "plain": {},
        "window": _WINDOW,
        "layer-types": {
            "use_sliding_window": True,
            "sliding_window": 2,
            "layer_types": ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2),
        },
        "tied": {"tie_word_embeddings": True},
        "yarn": {"rope_parameters": _YARN},
        "one-kv-head": {"num_key_value_heads": 1},
    },
    "qwen3": {
        "plain": {},
        "window": _WINDOW,
        "biases": {"attention_bias": True},
        "tied": {"tie_word_embeddings": True},
        "yarn": {"rope_parameters": _YARN},
        "one-kv-head": {"num_key_value_heads": 1, "head_dim": 8},
    },
    "gpt_neox": {
        "plain": {},
        "sequential": {"use_parallel_residual": False},
        "no-bias": {"attention_bias": False},
        "whole-heads": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0}},
        "tied": {"tie_word_embeddings": True, "hidden_act": "relu"},
        "linear": {"rope_parameters": {**_LINEAR, "partial_rotary_factor": 0.5}, "hidden_act": "gelu_new"},
    },
    "bloom": {
        "plain": {},
        "three-heads": {"n_head": 3, "hidden_size": 48},
        "six-heads": {"n_head": 6, "hidden_size": 48},
        "untied": {"tie_word_embeddings": False},
        "one-head": {"n_head": 1},
        "eps": {"layer_norm_epsilon": 0.1},
    },
    "gpt2": {
        "plain": {},
        "inner": {"n_inner": 40},
        "unscaled": {"scale_attn_weights": False},
        "by-depth": {"scale_attn_by_inverse_layer_idx": True},
        "untied": {"tie_word_embeddings": False},
        "relu": {"activation_function": "relu", "layer_norm_epsilon": 0.1},
    },
}
ALL_VARIANTS = [(family, name) for family, variants in FAMILIES.items() for name in variants]
NUM_DRAWS = 6


def family_config(family: str, **changes: Any) -> Any:
    """A config of 6 layers, hidden size 32 and four heads."""
    options: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        **COMMON.get(family, {}),
    }
    if family == "opt":
        options |= {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "num_attention_heads": 2}
    if family != "bloom":
        options["max_position_embeddings"] = 64
    return CONFIG_MAPPING[family](**{**options, **changes})


def random_weights_(model: Any, seed: int) -> Any:
    """Give every weight a random value that lets each layer, norm and bias count; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            kind = type(module).__name__
            for name, parameter in module.named_parameters(recurse=False):
                if "Norm" in kind:
                    parameter.normal_(1.0 if name == "weight" else 0.0, 0.2, generator=generator)
                elif parameter.dim() == 1:
                    parameter.normal_(0.0, 0.2, generator=generator)
                elif module is getattr(getattr(model, "transformer", None), "wpe", None):
                    parameter.normal_(generator=generator)
                else:
                    num_inputs = parameter.shape[0 if kind == "Conv1D" else -1]
                    parameter.normal_(0.0, num_inputs**-0.5, generator=generator)
    return model.eval()


def family_hf(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """transformers' model of ``family`` with random weights and every change of its config."""
    if family == "opt":
        from models import tiny_hf

        return tiny_hf(dtype=dtype, seed=seed, **changes)
    model = AutoModelForCausalLM.from_config(family_config(family, **changes), attn_implementation="eager")
    return random_weights_(model, seed).to(dtype)


def draws(family: str) -> Iterator[dict[str, Any]]:
    """Random changes of the family's config: every value that a variant has, in any combination."""
    generator = random.Random(f"draws of {family}")
    choices: dict[str, list[Any]] = {}
    for variant in (VARIANTS if family == "opt" else FAMILIES[family]).values():
        for name, value in variant.items():
            choices.setdefault(name, []).append(value)
    for _ in range(NUM_DRAWS):
        changes = {name: generator.choice(values) for name, values in choices.items() if generator.random() < 0.5}
        if family == "qwen2" and "layer_types" in changes:
            changes |= {"use_sliding_window": True, "sliding_window": 4}
        if family == "bloom" and changes.get("n_head") in (3, 6):
            changes["hidden_size"] = 48
        if family == "gpt_neox" and "rope_parameters" in changes:
            size = generator.choice([0.25, 0.5, 1.0])
            changes["rope_parameters"] = {**changes["rope_parameters"], "partial_rotary_factor": size}
        yield changes


def cut_family(hf_model: Any, path: LayerPath) -> Any:
    """A copy of transformers' model whose list of layers holds only those of ``path``, numbered anew."""
    model = copy.deepcopy(hf_model)
    owner, name = layer_list(model)
    layers = [getattr(owner, name)[layer] for layer in path.layers]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    setattr(owner, name, nn.ModuleList(layers))
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None) is not None:
        model.config.layer_types = [model.config.layer_types[layer] for layer in path.layers]
    return model
