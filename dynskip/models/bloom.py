"""What is BLOOM's own (arXiv 2211.05100)."""

from __future__ import annotations

from typing import Any

from dynskip.models.architecture import Architecture, head_size_of, qkv_parts, refuse
from dynskip.models.config import DecoderConfig

# Its positions have no end; those of a config that names none are what BLOOM was trained on.
MAX_POSITIONS = 2048


def decoder_config(config: Any) -> DecoderConfig:
    """The decoder of transformers' ``BloomConfig``."""
    refuse(config, apply_residual_connection_post_layernorm=False)
    if getattr(config, "pretraining_tp", 1) > 1:
        refuse(config, slow_but_exact=False)  # sums of slices, without two biases
    return DecoderConfig(
        architecture="bloom",
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_size=head_size_of(config),
        ffn_size=4 * config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=getattr(config, "seq_length", None) or MAX_POSITIONS,
        embedding_size=config.hidden_size,
        norm_eps=config.layer_norm_epsilon,
        activation="gelu_tanh",
        is_head_tied=config.tie_word_embeddings,
        embedding_norm=True,
        alibi=True,
    )


def config_values(config: DecoderConfig) -> dict[str, Any]:
    """What a ``BloomConfig`` of ``config`` says."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "seq_length": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.is_head_tied,
    }


BLOOM = Architecture(
    model_type="bloom",
    decoder_config=decoder_config,
    config_values=config_values,
    sizes=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    prefix="transformer.",
    layers="h",
    base={
        "embed_tokens": "word_embeddings",
        "embed_norm": "word_embeddings_layernorm",
        "final_norm": "ln_f",
    },
    layer={
        "attention_norm": "input_layernorm",
        **qkv_parts("self_attention.query_key_value", by_head=True),
        "out_proj": "self_attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "fc1": "mlp.dense_h_to_4h",
        "fc2": "mlp.dense_4h_to_h",
    },
    optional_sizes=("seq_length",),
)


def bloom_shape(num_layers: int, hidden_size: int, num_heads: int) -> DecoderConfig:
    """The decoder of a published model of these sizes."""
    return DecoderConfig.of_sizes(
        "bloom",
        num_layers,
        hidden_size,
        num_heads,
        vocab_size=250880,
        max_positions=MAX_POSITIONS,
        activation="gelu_tanh",
        embedding_norm=True,
        alibi=True,
    )
