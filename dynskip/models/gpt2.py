"""What is GPT-2's own."""

from __future__ import annotations

from typing import Any

from dynskip.models.architecture import Architecture, activation_name, activation_of, head_size_of, qkv_parts, refuse
from dynskip.models.config import DecoderConfig


def decoder_config(config: Any) -> DecoderConfig:
    """The decoder of transformers' ``GPT2Config``."""
    refuse(config, add_cross_attention=False)
    return DecoderConfig(
        architecture="gpt2",
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_size=head_size_of(config),
        ffn_size=4 * config.hidden_size if config.n_inner is None else config.n_inner,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        embedding_size=config.hidden_size,
        norm_eps=config.layer_norm_epsilon,
        activation=activation_of(config, "activation_function"),
        is_head_tied=config.tie_word_embeddings,
        attention_scale=None if config.scale_attn_weights else 1.0,
        scale_by_depth=config.scale_attn_by_inverse_layer_idx,
    )


def config_values(config: DecoderConfig) -> dict[str, Any]:
    """What a ``GPT2Config`` of ``config`` says."""
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.ffn_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": activation_name(config),
        "tie_word_embeddings": config.is_head_tied,
        "scale_attn_weights": config.attention_scale is None,
        "scale_attn_by_inverse_layer_idx": config.scale_by_depth,
    }


GPT2 = Architecture(
    model_type="gpt2",
    decoder_config=decoder_config,
    config_values=config_values,
    sizes=(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ),
    prefix="transformer.",
    layers="h",
    base={"embed_tokens": "wte", "embed_positions": "wpe", "final_norm": "ln_f"},
    layer={
        "attention_norm": "ln_1",
        **qkv_parts("attn.c_attn"),
        "out_proj": "attn.c_proj",
        "ffn_norm": "ln_2",
        "fc1": "mlp.c_fc",
        "fc2": "mlp.c_proj",
    },
    transposed=True,
    derived=(".attn.bias", ".attn.masked_bias"),
    optional_sizes=("n_inner",),
    attention_dropout="attn_pdrop",
)


def gpt2_shape(num_layers: int, hidden_size: int, num_heads: int) -> DecoderConfig:
    """The decoder of a published model of these sizes."""
    return DecoderConfig.of_sizes(
        "gpt2",
        num_layers,
        hidden_size,
        num_heads,
        vocab_size=50257,
        max_positions=1024,
        activation="gelu_tanh",
    )
