"""The architectures that there are, by transformers' ``model_type``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynskip.assets import find_model
from dynskip.models import opt
from dynskip.models.config import DecoderConfig
from dynskip.models.shapes import SHAPES

ARCHITECTURES = {opt.MODEL_TYPE: opt}


def decoder_config(config: Any) -> DecoderConfig:
    """The decoder that a config of transformers describes. Raises ValueError where it is none of ``ARCHITECTURES``."""
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"CausalLM: config must describe a model of type {', '.join(ARCHITECTURES)}, got model_type "
            f"{config.model_type!r}. Other architectures are not supported."
        )
    return ARCHITECTURES[config.model_type].decoder_config(config)


def read_decoder_config(model: str) -> DecoderConfig:
    """The shape called ``model``, or the decoder of the checkpoint in the folder of that name.

    Raises ValueError where it is neither, or of an unknown architecture.
    """
    if model in SHAPES:
        return SHAPES[model]
    folder = Path(find_model(model))
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"read_decoder_config: model must be one of {', '.join(SHAPES)}, or a folder with a config.json, "
            f"got {model!r}."
        )
    from transformers import AutoConfig

    return decoder_config(AutoConfig.from_pretrained(folder))
