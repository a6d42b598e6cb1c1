"""OPT-shaped models with random weights: as fast or slow as the real ones, and made without a download."""

from __future__ import annotations

import torch
from torch import nn
from transformers import OPTConfig
from transformers import OPTForCausalLM as HFOPTForCausalLM

from dynskip.models.shapes import get_shape


def opt_config(shape: str, vocab_size: int = 50272) -> OPTConfig:
    """The transformers config of a shape in `SHAPES`."""
    sizes = get_shape(shape)
    return OPTConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.hidden_size,
        ffn_dim=sizes.ffn_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        word_embed_proj_dim=sizes.embedding_size,
        max_position_embeddings=sizes.max_positions,
        tie_word_embeddings=sizes.is_head_tied,
    )


def weight_bytes(config: OPTConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of the weights of a model of ``config``, a tied head counted once."""
    with torch.device("meta"):
        model = HFOPTForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def random_hf_model(
    config: OPTConfig, seed: int = 0, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> HFOPTForCausalLM:
    """A transformers model with random weights, made in place in ``dtype``: its memory never holds a second copy."""
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model = HFOPTForCausalLM(config)
    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            if module is model.lm_head and config.tie_word_embeddings:
                continue
            value = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
            if "layer_norm" in name and key == "weight":
                value += 1
            setattr(module, key, nn.Parameter(value, requires_grad=False))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.decoder.embed_tokens.weight
    return model.eval()
