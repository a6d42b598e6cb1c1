"""What is OPT's own (arXiv 2205.01068)."""

from __future__ import annotations

from typing import Any

from dynskip.models.architecture import Architecture, activation_name, activation_of, head_size_of
from dynskip.models.config import DecoderConfig

POSITION_OFFSET = 2  # rows 0 and 1 of OPT's position table are never used


def decoder_config(config: Any) -> DecoderConfig:
    """The decoder of transformers' ``OPTConfig``."""
    return DecoderConfig(
        architecture="opt",
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_size=head_size_of(config),
        ffn_size=config.ffn_dim,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        embedding_size=config.word_embed_proj_dim or config.hidden_size,
        norm_affine=config.layer_norm_elementwise_affine,
        norm_first=config.do_layer_norm_before,
        final_norm=config.do_layer_norm_before and not config._remove_final_layer_norm,
        position_offset=POSITION_OFFSET,
        activation=activation_of(config, "activation_function"),
        qkv_bias=config.enable_bias,
        out_bias=config.enable_bias,
        mlp_bias=config.enable_bias,
        is_head_tied=config.tie_word_embeddings,
    )


def config_values(config: DecoderConfig) -> dict[str, Any]:
    """What an ``OPTConfig`` of ``config`` says."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_dim": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "word_embed_proj_dim": config.embedding_size,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.is_head_tied,
        "do_layer_norm_before": config.norm_first,
        "layer_norm_elementwise_affine": config.norm_affine,
        "_remove_final_layer_norm": config.norm_first and not config.final_norm,
        "activation_function": activation_name(config),
        "enable_bias": config.qkv_bias,
    }


OPT = Architecture(
    model_type="opt",
    decoder_config=decoder_config,
    config_values=config_values,
    sizes=(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "ffn_dim",
        "num_attention_heads",
        "max_position_embeddings",
        "word_embed_proj_dim",
    ),
    prefix="model.",
    layers="decoder.layers",
    base={
        "embed_tokens": "decoder.embed_tokens",
        "embed_positions": "decoder.embed_positions",
        "project_in": "decoder.project_in",
        "project_out": "decoder.project_out",
        "final_norm": "decoder.final_layer_norm",
    },
    layer={
        "attention_norm": "self_attn_layer_norm",
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "out_proj": "self_attn.out_proj",
        "ffn_norm": "final_layer_norm",
        "fc1": "fc1",
        "fc2": "fc2",
    },
    derived=(".decoder.version",),
    layer_dropout="layerdrop",
)


def opt_shape(num_layers: int, hidden_size: int, num_heads: int, ffn_size: int | None = None) -> DecoderConfig:
    """The decoder of a published OPT model of these sizes; ffn_size: None for four times the hidden size."""
    return DecoderConfig.of_sizes(
        "opt",
        num_layers,
        hidden_size,
        num_heads,
        ffn_size=4 * hidden_size if ffn_size is None else ffn_size,
        vocab_size=50272,
        max_positions=2048,
        position_offset=POSITION_OFFSET,
    )
