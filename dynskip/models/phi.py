"""What is Phi's own (arXiv 2306.11644), that of Phi-1, Phi-1.5 and Phi-2."""

from __future__ import annotations

from typing import Any

from dynskip.models.architecture import (
    Architecture,
    activation_name,
    activation_of,
    head_size_of,
    refuse,
    rope_theta,
    rotary_of,
)
from dynskip.models.config import DecoderConfig


def decoder_config(config: Any) -> DecoderConfig:
    """The decoder of transformers' ``PhiConfig``."""
    from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

    refuse(config, qk_layernorm=False)
    return DecoderConfig(
        architecture="phi",
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=head_size_of(config),
        ffn_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        embedding_size=config.hidden_size,
        norm_eps=config.layer_norm_eps,
        activation=activation_of(config, "hidden_act"),
        head_bias=True,
        is_head_tied=config.tie_word_embeddings,
        parallel=True,
        shared_norm=True,
        rotary=rotary_of(config, PhiRotaryEmbedding),
    )


def config_values(config: DecoderConfig) -> dict[str, Any]:
    """What a ``PhiConfig`` says of ``config``."""
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.ffn_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.is_head_tied,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": activation_name(config),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rope_theta(config),
            "partial_rotary_factor": config.rotary_size / config.head_size,
        },
    }


PHI = Architecture(
    model_type="phi",
    decoder_config=decoder_config,
    config_values=config_values,
    sizes=(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    ),
    prefix="model.",
    layers="layers",
    base={"embed_tokens": "embed_tokens", "final_norm": "final_layernorm"},
    layer={
        "attention_norm": "input_layernorm",
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "out_proj": "self_attn.dense",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    },
    derived=("rotary_emb.inv_freq", "rotary_emb.original_inv_freq"),
)
