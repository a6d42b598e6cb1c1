"""What is Llama's own (arXiv 2302.13971), and that of Mistral, Qwen2 and Qwen3, which differ in little."""

from __future__ import annotations

from typing import Any

from dynskip.models.architecture import (
    GROUPED_SIZES,
    Architecture,
    Stored,
    activation_name,
    activation_of,
    head_size_of,
    read_sizes,
    refuse,
    rope_theta,
    rotary_of,
    size_values,
)
from dynskip.models.config import DecoderConfig, Rotary


def decoder_config(config: Any) -> DecoderConfig:
    """The decoder of a config of transformers of one of the four types."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = config.model_type
    if kind == "mistral":
        refuse(config, layer_types=None)  # with them transformers loads another architecture, ministral
    # Keys that a type does not know are not read, as in transformers.
    has_bias = kind in ("llama", "qwen3") and getattr(config, "attention_bias", False)
    window = (getattr(config, "sliding_window", None) or 0) if kind != "llama" else 0
    layer_types = _window_layers(getattr(config, "layer_types", None)) if kind in ("qwen2", "qwen3") else None
    if layer_types and not window:
        raise ValueError(f"CausalLM: sliding_window must be set where layers have one, got {layer_types} without.")
    rotary, head_size = rotary_of(config, LlamaRotaryEmbedding), head_size_of(config)
    if 2 * len(rotary.frequencies) != head_size:
        raise ValueError(
            f"CausalLM: rope_parameters must turn all {head_size} values of a head, got {2 * len(rotary.frequencies)}. "
            "Leave partial_rotary_factor at 1."
        )
    return DecoderConfig(
        architecture=kind,
        **read_sizes(config, GROUPED_SIZES),
        norm="rms",
        norm_eps=config.rms_norm_eps,
        activation=activation_of(config, "hidden_act"),
        gated=True,
        qkv_bias=kind == "qwen2" or has_bias,
        out_bias=has_bias,
        mlp_bias=kind == "llama" and getattr(config, "mlp_bias", False),
        qk_norm=kind == "qwen3",
        is_head_tied=config.tie_word_embeddings,
        rotary=rotary,
        window=window,
        window_layers=layer_types if window else None,
    )


def config_values(config: DecoderConfig) -> dict[str, Any]:
    """What a config of one of the four types says of ``config``."""
    kind = config.architecture
    if config.window_layers is not None or (config.window and kind in ("qwen2", "qwen3")):
        layers = range(config.num_layers) if config.window_layers is None else config.window_layers
        kinds = ["sliding_attention" if layer in layers else "full_attention" for layer in range(config.num_layers)]
        window: dict[str, Any] = {"use_sliding_window": True, "sliding_window": config.window, "layer_types": kinds}
    else:
        window = {} if kind == "llama" else {"sliding_window": config.window or None}
    # What not all four know.
    others: dict[str, tuple[Any, tuple[str, ...]]] = {
        "head_dim": (config.head_size, ("llama", "mistral", "qwen2", "qwen3")),
        "attention_bias": (config.qkv_bias, ("llama", "qwen3")),
        "mlp_bias": (config.mlp_bias, ("llama",)),
    }
    return {
        **size_values(config, GROUPED_SIZES),
        "rms_norm_eps": config.norm_eps,
        "hidden_act": activation_name(config),
        "tie_word_embeddings": config.is_head_tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta(config)},
        **window,
        **{name: value for name, (value, kinds) in others.items() if kind in kinds},
    }


def _window_layers(layer_types: list[str] | None) -> tuple[int, ...] | None:
    if layer_types is None:
        return None
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(
            f"CausalLM: layer_types must be full_attention or sliding_attention, got {', '.join(sorted(unknown))}."
        )
    return tuple(layer for layer, kind in enumerate(layer_types) if kind == "sliding_attention")


def _architecture(model_type: str) -> Architecture:
    return Architecture(
        model_type=model_type,
        decoder_config=decoder_config,
        config_values=config_values,
        sizes=tuple(GROUPED_SIZES.values()),
        prefix="model.",
        layers="layers",
        base={"embed_tokens": "embed_tokens", "final_norm": "norm"},
        layer={
            "attention_norm": "input_layernorm",
            "q_proj": "self_attn.q_proj",
            "k_proj": "self_attn.k_proj",
            "v_proj": "self_attn.v_proj",
            "q_norm": "self_attn.q_norm",
            "k_norm": "self_attn.k_norm",
            "out_proj": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "fc1": Stored(("mlp.gate_proj", "mlp.up_proj")),
            "fc2": "mlp.down_proj",
        },
        derived=("rotary_emb.inv_freq", "rotary_emb.original_inv_freq"),
        optional_sizes=("head_dim", "sliding_window"),
    )


LLAMA, MISTRAL, QWEN2, QWEN3 = map(_architecture, ("llama", "mistral", "qwen2", "qwen3"))


def llama_shape(
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    ffn_size: int,
    vocab_size: int,
    max_positions: int,
    theta: float,
    is_head_tied: bool = True,
    architecture: str = "llama",
    head_size: int | None = None,
    window: int = 0,
) -> DecoderConfig:
    """The decoder of a published model of these sizes; frequencies as they are before any scaling."""
    head_size = hidden_size // num_heads if head_size is None else head_size
    return DecoderConfig.of_sizes(
        architecture,
        num_layers,
        hidden_size,
        num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        ffn_size=ffn_size,
        vocab_size=vocab_size,
        max_positions=max_positions,
        norm="rms",
        activation="silu",
        gated=True,
        qkv_bias=architecture == "qwen2",
        out_bias=False,
        mlp_bias=False,
        qk_norm=architecture == "qwen3",
        is_head_tied=is_head_tied,
        rotary=Rotary.plain(head_size, theta),
        window=window,
    )
