"""The config of a GGUF file's model, in transformers' names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dynskip.arguments import shown
from dynskip.models.gguf_file import GGUFHeader

ARCHITECTURES = ("llama", "qwen2", "qwen3")
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# A file that says something else computes what none of the architectures do.
_PLAIN: dict[str, int | float | bool] = {
    "attention.causal": True,
    "attention.scale": 0.0,
    "attention.sliding_window": 0,
    "attention.clamp_kqv": 0.0,
    "attention.logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "expert_count": 0,
    "rope.scaling.alpha": 0.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}
# The end of a sequence, of a turn, of a message that a tool answers.
_ENDS = ("eos", "eot", "eom")
# What rope_freqs is made with; the file holds the factors that come of it, and none of these.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_POSITIONS = 1.0, 4.0, 8192


def read_config(header: GGUFHeader, rope_factors: Sequence[float] | None) -> dict[str, Any]:
    """What makes a config of transformers: its class by ``model_type``, and its values.

    rope_factors: of the tensor rope_freqs, by which the frequencies of the rotation are divided; None where there is
    none. Raises ValueError, beginning with what the header does, for a model that is not one of ``ARCHITECTURES``, and
    for one whose values contradict each other.
    """
    architecture = header.require("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise header.error(
            f"hold a model of architecture {', '.join(ARCHITECTURES)}, got {shown(architecture)}. Other architectures "
            "are not supported."
        )
    num_parts = header.get("split.count", int, 1)
    if num_parts > 1:
        raise header.error(
            f"hold a whole model, got one of {num_parts} parts. Merge them with llama-gguf-split --merge."
        )
    for key, plain in _PLAIN.items():
        found = header.get(f"{architecture}.{key}", type(plain), plain)
        if found != plain:
            raise header.error(f"hold {architecture}.{key} {plain} or none, got {found}. It is not supported.")
    sizes = _sizes(header, architecture)
    has_bias = "blk.0.attn_q.bias" in header.tensors
    return {
        "model_type": architecture,
        **sizes,
        "hidden_act": "silu",
        "rms_norm_eps": header.require(f"{architecture}.attention.layer_norm_rms_epsilon", float),
        "rope_parameters": _rope_parameters(header, architecture, sizes, rope_factors),
        "attention_bias": architecture == "qwen2" or has_bias,
        "tie_word_embeddings": HEAD not in header.tensors,
        **_token_ids(header, sizes["vocab_size"]),
    }


def _sizes(header: GGUFHeader, architecture: str) -> dict[str, int]:
    names = {
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "intermediate_size": "feed_forward_length",
        "max_position_embeddings": "context_length",
    }
    sizes = {name: header.require(f"{architecture}.{key}", int) for name, key in names.items()}
    heads = sizes["num_attention_heads"]
    sizes["num_key_value_heads"] = header.get(f"{architecture}.attention.head_count_kv", int, heads)
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{header.function}: {name} of {header.path} must be at least 1, got {size}.")
    if sizes["num_hidden_layers"] > len(header.tensors):
        raise header.error(
            f"hold tensors for each of its {sizes['num_hidden_layers']} layers, got {len(header.tensors)} in all. "
            "Download it again."
        )
    head_dim = header.get(f"{architecture}.attention.key_length", int, sizes["hidden_size"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        other = header.get(f"{architecture}.{key}", int, head_dim)
        if other != head_dim:
            raise ValueError(
                f"{header.function}: {architecture}.{key} of {header.path} must be the size of a head, {head_dim}, got "
                f"{other}."
            )
    if head_dim < 2 or head_dim % 2 or heads % sizes["num_key_value_heads"]:
        raise header.error(
            f"hold heads of an even size, as many or a multiple of the key-value heads, got {heads} of {head_dim} and "
            f"{sizes['num_key_value_heads']} key-value heads."
        )
    if EMBEDDING not in header.tensors:
        raise header.error(f"hold {EMBEDDING}, got none.")
    vocab_size = header.tensors[EMBEDDING].shape[0]
    named = header.get(f"{architecture}.vocab_size", int, vocab_size)
    num_tokens = len(header.get("tokenizer.ggml.tokens", list, []))
    if named != vocab_size or num_tokens > vocab_size:
        raise header.error(
            f"hold an embedding for each token, got {vocab_size} for a vocab_size of {named} and {num_tokens} tokens."
        )
    return {**sizes, "head_dim": head_dim, "vocab_size": vocab_size}


def _token_ids(header: GGUFHeader, vocab_size: int) -> dict[str, int | list[int] | None]:
    """The ids of the control tokens that generation needs; a list of several ends."""
    ids = {name: header.get(f"tokenizer.ggml.{name}_token_id", int) for name in ("bos", *_ENDS)}
    ids["pad"] = header.get("tokenizer.ggml.padding_token_id", int)
    for name, token in ids.items():
        if token is not None and not 0 <= token < vocab_size:
            raise ValueError(
                f"{header.function}: the {name} token of {header.path} must be below the vocabulary's {vocab_size}, "
                f"got {token}."
            )
    ends: list[int] = list(dict.fromkeys(token for name in _ENDS if (token := ids[name]) is not None))
    return {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": ids["pad"],
    }


def _rope_parameters(
    header: GGUFHeader, architecture: str, sizes: dict[str, int], rope_factors: Sequence[float] | None
) -> dict[str, Any]:
    """transformers' ``rope_parameters``. A file with a factor and no type scales linearly, as llama.cpp has it."""
    key = f"{architecture}.rope.scaling"
    theta = header.get(f"{architecture}.rope.freq_base", float, 10000.0)
    default = {"rope_theta": theta, "rope_type": "default"}
    factor = header.get(f"{key}.factor", float, header.get(f"{architecture}.rope.scale_linear", float, 0.0))
    kind = header.get(f"{key}.type", str, "linear")
    if kind not in ("none", "linear", "yarn"):
        raise header.error(f"hold a {key}.type of none, linear or yarn, got {shown(kind)}. It is not supported.")
    is_scaled = kind != "none" and factor not in (0.0, 1.0)
    if rope_factors is not None and any(value != 1.0 for value in rope_factors):
        if is_scaled:
            raise header.error(f"hold rope_freqs or {key}, got both.")
        return {**default, **_llama3(header, sizes, theta, rope_factors)}
    if not is_scaled:
        return default
    if not math.isfinite(factor) or factor < 1.0:
        raise header.error(f"hold a {key}.factor of at least 1, got {factor}.")
    if kind == "linear":
        return {**default, "rope_type": "linear", "factor": factor}
    of_yarn = {
        "beta_fast": header.get(f"{key}.yarn_beta_fast", float),
        "beta_slow": header.get(f"{key}.yarn_beta_slow", float),
        "attention_factor": header.get(f"{key}.yarn_attn_factor", float),
    }
    return {
        **default,
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": header.get(
            f"{key}.original_context_length", int, sizes["max_position_embeddings"]
        ),
        **{name: value for name, value in of_yarn.items() if value is not None},
    }


def _llama3(header: GGUFHeader, sizes: dict[str, int], theta: float, rope_factors: Sequence[float]) -> dict[str, Any]:
    """Llama 3's scaling, where it makes exactly these factors. Raises ValueError for all others."""
    factor = float(max(rope_factors))
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_POSITIONS,
    }
    made = _llama3_factors(factor, theta, sizes["head_dim"])
    # The float32 in the file may have been computed in float32: two units in its last place for each operation.
    if len(made) != len(rope_factors) or not np.allclose(made, rope_factors, rtol=1e-6, atol=0.0):
        raise header.error(
            f"hold the rope_freqs of Llama 3, {sizes['head_dim'] // 2} factors made for {_LLAMA3_POSITIONS} positions, "
            f"got {len(rope_factors)} others up to {factor}. They are not supported."
        )
    return scaling


def _llama3_factors(factor: float, theta: float, head_dim: int) -> list[float]:
    """By what Llama 3 divides each frequency: long waves by ``factor``, short ones by 1, those between by a blend."""
    factors = []
    for index in range(head_dim // 2):
        turns = _LLAMA3_POSITIONS * theta ** (-2 * index / head_dim) / (2 * math.pi)
        smooth = min(max((turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
