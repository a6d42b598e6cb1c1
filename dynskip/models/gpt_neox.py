"""What is GPT-NeoX's own (arXiv 2204.06745), Pythia's architecture."""

from __future__ import annotations

from typing import Any

from dynskip.models.architecture import (
    SIZES,
    Architecture,
    activation_name,
    activation_of,
    qkv_parts,
    read_sizes,
    rope_theta,
    rotary_of,
    size_values,
)
from dynskip.models.config import DecoderConfig, Rotary


def decoder_config(config: Any) -> DecoderConfig:
    """The decoder of transformers' ``GPTNeoXConfig``."""
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

    return DecoderConfig(
        architecture="gpt_neox",
        **read_sizes(config),
        norm_eps=config.layer_norm_eps,
        activation=activation_of(config, "hidden_act"),
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        is_head_tied=config.tie_word_embeddings,
        parallel=config.use_parallel_residual,
        rotary=rotary_of(config, GPTNeoXRotaryEmbedding),
    )


def config_values(config: DecoderConfig) -> dict[str, Any]:
    """What a ``GPTNeoXConfig`` of ``config`` says."""
    return {
        **size_values(config),
        "layer_norm_eps": config.norm_eps,
        "hidden_act": activation_name(config),
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": config.is_head_tied,
        "use_parallel_residual": config.parallel,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rope_theta(config),
            "partial_rotary_factor": config.rotary_size / config.head_size,
        },
    }


GPT_NEOX = Architecture(
    model_type="gpt_neox",
    decoder_config=decoder_config,
    config_values=config_values,
    sizes=tuple(SIZES.values()),
    prefix="gpt_neox.",
    layers="layers",
    base={"embed_tokens": "embed_in", "final_norm": "final_layer_norm"},
    layer={
        "attention_norm": "input_layernorm",
        **qkv_parts("attention.query_key_value", by_head=True),
        "out_proj": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "fc1": "mlp.dense_h_to_4h",
        "fc2": "mlp.dense_4h_to_h",
    },
    head="embed_out",
    derived=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq", "rotary_emb.original_inv_freq"),
)


def gpt_neox_shape(
    num_layers: int, hidden_size: int, num_heads: int, ffn_size: int, vocab_size: int, rotary_share: float = 0.25
) -> DecoderConfig:
    """The decoder of a published model of these sizes."""
    head_size = hidden_size // num_heads
    return DecoderConfig.of_sizes(
        "gpt_neox",
        num_layers,
        hidden_size,
        num_heads,
        ffn_size=ffn_size,
        vocab_size=vocab_size,
        max_positions=2048,
        activation="gelu",
        is_head_tied=False,
        parallel=True,
        rotary=Rotary.plain(int(head_size * rotary_share), 10000),
    )
