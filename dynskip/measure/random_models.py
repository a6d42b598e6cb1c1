"""Models of known shapes with random weights: as fast or slow as the real ones, and made without a download."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING

from dynskip.models.config import DecoderConfig
from dynskip.models.hf_model import hf_class
from dynskip.models.registry import get_architecture
from dynskip.models.shapes import get_shape


def hf_config(shape: str | DecoderConfig, vocab_size: int | None = None) -> Any:
    """The transformers config of a decoder, or of a shape in `SHAPES`; vocab_size: another than its own.

    Raises ValueError for an unknown shape, or a decoder with scaled rotary positions.
    """
    decoder = get_shape(shape) if isinstance(shape, str) else shape
    if vocab_size is not None:
        decoder = replace(decoder, vocab_size=vocab_size)
    values = get_architecture(decoder.architecture).config_values(decoder)
    kind = CONFIG_MAPPING[decoder.architecture]
    # Tokens that a config names by default may lie outside of a small vocabulary.
    ends = {name: getattr(kind(), name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    outside: dict[str, Any] = {
        name: None for name, token in ends.items() if token is not None and token >= decoder.vocab_size
    }
    return kind(**values, **outside)


def weight_bytes(config: Any, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of the weights of a model of ``config``, a tied head counted once."""
    with torch.device("meta"):
        model = hf_class(config)(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def random_hf_model(
    config: Any, seed: int = 0, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> Any:
    """A transformers model with random weights, made in place in ``dtype``: its memory never holds a second copy."""
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model = hf_class(config)(config)
    head = model.get_output_embeddings()
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            _fill_buffers(module, config, device)
        for key, parameter in list(module.named_parameters(recurse=False)):
            if module is head and config.tie_word_embeddings:
                continue
            value = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
            if "Norm" in type(module).__name__ and key == "weight":
                value += 1
            setattr(module, key, nn.Parameter(value, requires_grad=False))
    if config.tie_word_embeddings:
        head.weight = model.get_input_embeddings().weight
    return model.eval()


def _fill_buffers(module: nn.Module, config: Any, device: torch.device | str) -> None:
    """Give ``module`` the buffers that it has where it is not made on meta: the frequencies of rotary positions."""
    with torch.device("cpu"):
        made = type(module)(config)
    for name, buffer in made.named_buffers(recurse=False):
        setattr(module, name, buffer.to(device))
