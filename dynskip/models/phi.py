"""What is Phi's own (arXiv 2306.11644), that of Phi-1, Phi-1.5 and Phi-2."""

from __future__ import annotations

from typing import Any

from dynskip.models.architecture import (
    GROUPED_SIZES,
    Architecture,
    activation_name,
    activation_of,
    read_sizes,
    refuse,
    rope_theta,
    rotary_of,
    size_values,
)
from dynskip.models.config import DecoderConfig, Rotary


def decoder_config(config: Any) -> DecoderConfig:
    """The decoder of transformers' ``PhiConfig``."""
    from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

    refuse(config, qk_layernorm=False)
    return DecoderConfig(
        architecture="phi",
        **read_sizes(config, GROUPED_SIZES),
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
        **size_values(config, GROUPED_SIZES),
        "head_dim": config.head_size,
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
    sizes=tuple(GROUPED_SIZES.values()),
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


def phi_shape(
    num_layers: int, hidden_size: int, num_heads: int, vocab_size: int, rotary_share: float = 0.5
) -> DecoderConfig:
    """The decoder of a published model of these sizes."""
    head_size = hidden_size // num_heads
    return DecoderConfig.of_sizes(
        "phi",
        num_layers,
        hidden_size,
        num_heads,
        vocab_size=vocab_size,
        max_positions=2048,
        activation="gelu_tanh",
        head_bias=True,
        is_head_tied=False,
        parallel=True,
        shared_norm=True,
        rotary=Rotary.plain(int(head_size * rotary_share), 10000),
    )
