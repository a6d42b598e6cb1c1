"""The architectures that there are, by transformers' ``model_type``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynskip.assets import find_model
from dynskip.models.architecture import Architecture, refuse
from dynskip.models.bloom import BLOOM
from dynskip.models.config import DecoderConfig
from dynskip.models.gpt2 import GPT2
from dynskip.models.gpt_neox import GPT_NEOX
from dynskip.models.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from dynskip.models.opt import OPT
from dynskip.models.phi import PHI
from dynskip.models.shapes import SHAPES

ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (OPT, LLAMA, MISTRAL, QWEN2, QWEN3, GPT_NEOX, BLOOM, GPT2, PHI)
}


def get_architecture(model_type: str) -> Architecture:
    """The architecture of that name. Raises ValueError for an unknown one."""
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"CausalLM: config must describe a model of type {', '.join(ARCHITECTURES)}, got model_type "
            f"{model_type!r}. Other architectures are not supported."
        )
    return ARCHITECTURES[model_type]


def decoder_config(config: Any) -> DecoderConfig:
    """The decoder that a config of transformers describes.

    Raises ValueError where it is none of ``ARCHITECTURES``, or cannot be built.
    """
    architecture = get_architecture(config.model_type)
    optional = [size for size in architecture.optional_sizes if getattr(config, size, None) is not None]
    for size in (*architecture.sizes, *optional):
        value = getattr(config, size)
        if type(value) is not int or value < 1:
            raise ValueError(f"CausalLM: {size} must be an integer of at least 1, got {value!r}.")
    # Of any architecture transformers then lets each token see those behind it.
    refuse(config, is_causal=True)
    decoder = architecture.decoder_config(config)
    if decoder.num_heads % decoder.num_kv_heads:
        raise ValueError(
            f"CausalLM: num_key_value_heads must divide num_attention_heads {decoder.num_heads}, "
            f"got {decoder.num_kv_heads}."
        )
    return decoder


def read_decoder_config(model: str) -> DecoderConfig:
    """The shape called ``model``, or the decoder of the checkpoint in the folder of that name.

    Raises ValueError where it is neither, or of an unknown architecture.
    """
    if model in SHAPES:
        return SHAPES[model]
    folder = Path(find_model(model))
    if folder.suffix == ".gguf":
        from transformers import AutoConfig

        from dynskip.models.gguf import read_gguf

        return decoder_config(AutoConfig.for_model(**read_gguf(folder, "read_decoder_config").config))
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"read_decoder_config: model must be one of {', '.join(SHAPES)}, a GGUF file, or a folder with a "
            f"config.json, got {model!r}."
        )
    from transformers import AutoConfig

    return decoder_config(AutoConfig.from_pretrained(folder))
