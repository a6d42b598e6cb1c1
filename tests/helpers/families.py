"""Tiny random models of every architecture, in variants, and transformers' model cut to a path."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from models import NUM_LAYERS, VOCAB_SIZE, tiny_hf, tiny_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dynskip import CausalLM, LayerPath
from dynskip.models.config import DecoderConfig, Rotary
from dynskip.models.hf_model import layer_list, only_layers
from dynskip.models.registry import decoder_config

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
_WINDOW = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}

# What the tiny models of a family have in common, and six variants of each beside OPT's.
COMMON: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "mistral": {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"intermediate_size": 48, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16},
    "gpt_neox": {"intermediate_size": 48},
    "bloom": {},
    "phi": {"intermediate_size": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "opt": {},
    "llama": {
        "plain": {},
        "one-kv-head": {"num_key_value_heads": 1, "rope_parameters": LINEAR},
        "wide-heads": {"head_dim": 24, "rope_parameters": LLAMA3},
        "biases": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_new"},
        "tied": {"tie_word_embeddings": True, "rope_parameters": YARN},
        "all-heads": {"num_key_value_heads": 4, "rope_parameters": DYNAMIC},
    },
    "mistral": {
        "plain": {},
        "window": {"sliding_window": 3},
        "window-of-one": {"sliding_window": 1},
        "wide-heads": {"head_dim": 12, "num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True, "sliding_window": 5},
        "yarn": {"rope_parameters": YARN, "hidden_act": "gelu"},
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
        "yarn": {"rope_parameters": YARN},
        "one-kv-head": {"num_key_value_heads": 1},
    },
    "qwen3": {
        "plain": {},
        "window": _WINDOW,
        "biases": {"attention_bias": True},
        "tied": {"tie_word_embeddings": True},
        "yarn": {"rope_parameters": YARN},
        "one-kv-head": {"num_key_value_heads": 1, "head_dim": 8},
    },
    "gpt_neox": {
        "plain": {},
        "sequential": {"use_parallel_residual": False},
        "no-bias": {"attention_bias": False},
        "whole-heads": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0}},
        "tied": {"tie_word_embeddings": True, "hidden_act": "relu"},
        "linear": {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}, "hidden_act": "gelu_new"},
    },
    "bloom": {
        "plain": {},
        "three-heads": {"n_head": 3, "hidden_size": 48},
        "six-heads": {"n_head": 6, "hidden_size": 48},
        "untied": {"tie_word_embeddings": False},
        "one-head": {"n_head": 1},
        "eps": {"layer_norm_epsilon": 0.1},
    },
    "phi": {
        "plain": {},
        "two-kv-heads": {"num_key_value_heads": 2},
        "whole-heads": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0}},
        "relu": {"hidden_act": "relu"},
        "eps": {"layer_norm_eps": 0.1},
        "linear": {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}},
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
# Heads of 64, windows of less than a block of any attention kernel, and products of many terms; see `large_changes`.
LARGE: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1, "intermediate_size": 1024},
    "mistral": {"num_key_value_heads": 1, "intermediate_size": 1024, "sliding_window": 40},
    "qwen2": {"intermediate_size": 1024, **_WINDOW, "sliding_window": 40, "max_window_layers": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 64, **_WINDOW, "sliding_window": 100, "max_window_layers": 0},
    "gpt_neox": {"intermediate_size": 1024},
    "bloom": {"n_head": 3, "hidden_size": 192},
    "phi": {"num_key_value_heads": 1, "intermediate_size": 1024},
    "gpt2": {"n_inner": 1024, "scale_attn_by_inverse_layer_idx": True},
}
ALL_VARIANTS = [(family, name) for family, variants in FAMILIES.items() for name in variants]


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
    # Of its own: configs add to their rope_parameters.
    return CONFIG_MAPPING[family](**copy.deepcopy({**options, **changes}))


def family_shape(family: str, **changes: Any) -> DecoderConfig:
    """The decoder of `family_config`, as shapes are: its frequencies are not rounded to float32."""
    shape = decoder_config(family_config(family, **changes))
    return replace(shape, rotary=Rotary.plain(shape.rotary_size, 1e4)) if shape.rotary else shape


def large_changes(family: str) -> dict[str, Any]:
    """Changes of a family's config for prompts of many blocks: two layers, two heads of 64 or three."""
    positions = "seq_length" if family == "bloom" else "max_position_embeddings"
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, positions: 512}
    return sizes | LARGE[family]


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
        return tiny_hf(dtype=dtype, seed=seed, **changes)
    model = AutoModelForCausalLM.from_config(family_config(family, **changes), attn_implementation="eager")
    return convert_(random_weights_(model, seed), dtype)


def native_model(family: str, variant: str, dtype: torch.dtype = torch.float32, **options: Any) -> CausalLM:
    """Our model of a variant on the native backend; options as in CausalLM.from_hf."""
    if family == "opt":
        return tiny_model(variant, dtype=dtype, backend="native", **options)
    hf = family_hf(family, dtype=dtype, **FAMILIES[family][variant])
    return CausalLM.from_hf(hf, backend="native", **options)


def convert_(hf_model: Any, dtype: torch.dtype) -> Any:
    """``hf_model`` in another dtype, but for the frequencies of its positions, which stay what a loaded model has.

    GPT-2's scores in float32 of any dtype are not those of float64.
    """
    for module in hf_model.modules():
        if dtype == torch.float64 and hasattr(module, "reorder_and_upcast_attn"):
            module.reorder_and_upcast_attn = False
    frequencies = {name: buffer for name, buffer in hf_model.named_buffers() if name.endswith("inv_freq")}
    hf_model.to(dtype)
    for name, buffer in frequencies.items():
        owner, _, last = name.rpartition(".")
        setattr(hf_model.get_submodule(owner), last, buffer)
    return hf_model


@contextlib.contextmanager
def cut_family(hf_model: Any, path: LayerPath) -> Iterator[Any]:
    """Within it, transformers' model has only the layers of ``path``, numbered anew."""
    with only_layers(hf_model, path):
        yield hf_model


class _LastEntries:
    """Stands for transformers' cache: a token that does not compute key and value in a layer keeps its last ones."""

    def __init__(self) -> None:
        self.has_run: Tensor | None = None
        self.runs: Tensor | None = None
        self.last: tuple[Tensor, Tensor] | None = None

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each [1, G, T, D], that the layer attends to."""
        assert self.runs is not None
        if self.has_run is None or self.last is None:
            self.has_run = torch.zeros_like(self.runs)
        else:
            keeps = (self.has_run & ~self.runs)[:, None]
            key, value = torch.where(keeps, self.last[0], key), torch.where(keeps, self.last[1], value)
        self.has_run = self.has_run | self.runs
        self.last = key, value
        return key, value


class _PerToken(nn.Module):
    """One of transformers' layers for some tokens of a sequence: the others pass on.

    runs: [T], bool. window: positions that a token sees back, itself included; 0 for all. entries: None unless shared.
    """

    def __init__(
        self, layer: nn.Module, runs: Tensor, kv_policy: str, window: int, entries: _LastEntries | None
    ) -> None:
        super().__init__()
        self.layer, self.runs, self.window = layer, runs, window
        self.evicts, self.entries = kv_policy == "evict", entries
        self.parameters_of_layer = inspect.signature(layer.forward)

    def forward(self, *given: Any, **options: Any) -> Any:
        """What the layer returns, with its input where a token skips it."""
        arguments = dict(self.parameters_of_layer.bind(*given, **options).arguments)
        arguments |= arguments.pop("kwargs", {})
        states = arguments.pop("hidden_states")
        positions = torch.arange(states.shape[1])
        distances = positions[:, None] - positions
        seen = (distances >= 0) & (distances < (self.window or len(positions)))
        if self.evicts:  # a token that skips the layer sees itself, and what comes of it is dropped
            seen = seen & (self.runs | (distances == 0))
        hidden = torch.finfo(states.dtype).min
        arguments["attention_mask"] = torch.zeros(seen.shape, dtype=states.dtype).masked_fill(~seen, hidden)[None, None]
        cache = "layer_past" if "layer_past" in self.parameters_of_layer.parameters else "past_key_values"
        arguments[cache] = self.entries
        if self.entries is not None:
            self.entries.runs = self.runs
        output = self.layer(states, **arguments)
        kept = self.runs[:, None]
        if isinstance(output, tuple):
            return torch.where(kept, output[0], states), *output[1:]
        return torch.where(kept, output, states)


@torch.no_grad()
def per_token_logits(hf_model: Any, token_ids: list[int], active: Tensor, kv_policy: str) -> Tensor:
    """[T, V]: of transformers' layers, each run for the tokens that ``active`` [T, L] says.

    A token keeps its position, whatever other tokens leave. kv_policy: what a token leaves in a layer that it skips:
    the key and value of what it passes on ("propagate"), nothing ("evict"), or those of the last layer that it ran
    ("share"); before any of them, those of what it passes on.
    """
    config = hf_model.config
    window = (getattr(config, "sliding_window", None) or 0) if config.model_type != "llama" else 0
    layer_types = getattr(config, "layer_types", None) if config.model_type in ("qwen2", "qwen3") else None
    owner, name = layer_list(hf_model)
    layers = getattr(owner, name)
    entries = _LastEntries() if kv_policy == "share" else None
    per_token = [
        _PerToken(
            layer,
            active[:, index],
            kv_policy,
            0 if layer_types is not None and layer_types[index] == "full_attention" else window,
            entries,
        )
        for index, layer in enumerate(layers)
    ]
    setattr(owner, name, nn.ModuleList(per_token))
    try:
        return hf_model(torch.tensor([token_ids]), use_cache=False).logits[0]
    finally:
        setattr(owner, name, layers)
