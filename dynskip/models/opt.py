"""What is OPT's own, as data: its config read into a `DecoderConfig`."""

from __future__ import annotations

from typing import Any

from dynskip.models.config import DecoderConfig

MODEL_TYPE = "opt"
POSITION_OFFSET = 2  # rows 0 and 1 of OPT's position table are never used


def decoder_config(config: Any) -> DecoderConfig:
    """The decoder of transformers' ``OPTConfig``. Raises ValueError where none can be built of it."""
    if config.num_hidden_layers < 1:
        raise ValueError(f"CausalLM: num_hidden_layers must be at least 1, got {config.num_hidden_layers}.")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"CausalLM: num_attention_heads must divide hidden_size {config.hidden_size}, "
            f"got {config.num_attention_heads}."
        )
    return DecoderConfig(
        architecture=MODEL_TYPE,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_size=config.hidden_size // config.num_attention_heads,
        ffn_size=config.ffn_dim,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        embedding_size=config.word_embed_proj_dim or config.hidden_size,
        norm_affine=config.layer_norm_elementwise_affine,
        norm_first=config.do_layer_norm_before,
        final_norm=config.do_layer_norm_before and not config._remove_final_layer_norm,
        position_offset=POSITION_OFFSET,
        activation=config.activation_function,
        has_bias=config.enable_bias,
        is_head_tied=config.tie_word_embeddings,
    )


def opt_shape(num_layers: int, hidden_size: int, num_heads: int, ffn_size: int | None = None) -> DecoderConfig:
    """The decoder of a published OPT model of these sizes; ffn_size: None for four times the hidden size."""
    return DecoderConfig(
        architecture=MODEL_TYPE,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=hidden_size // num_heads,
        ffn_size=4 * hidden_size if ffn_size is None else ffn_size,
        vocab_size=50272,
        max_positions=2048,
        embedding_size=hidden_size,
        position_offset=POSITION_OFFSET,
    )
