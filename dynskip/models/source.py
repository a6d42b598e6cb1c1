"""A model that is to be converted: its config and all of its tensors, checked to be complete and plain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynskip.models.architecture import Architecture
from dynskip.models.config import DecoderConfig
from dynskip.models.decoder import Decoder
from dynskip.models.linear import Linear
from dynskip.models.registry import decoder_config, get_architecture
from dynskip.models.weights import EMBEDDING, HEAD, Deferred, stored_names, stored_shapes
from dynskip.ops.checks import dtype_name

# float64 is what results are compared with; the ops take the others.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What a config may say that no decoder here knows of, and what to do about it.
_FOREIGN_KEYS = {
    "auto_map": "Code of a model folder is never run.",
    "quantization_config": "Save the model dequantised.",
    "transformers_weights": "Put the weights into model.safetensors.",
}


@dataclass(frozen=True)
class Source:
    """A model that is to be converted. Made by `Source.of`, which checks its parts.

    function: what asks for it; errors begin with it. name: what they call the source.
    config: transformers', untied where the tensors hold a head of their own. decoder_config: ours, of it.
    tensors: by transformers' names, every one that the config says, in its shape; a tied head is left out.
    adapter: the folder of the adapter that is merged into them; None for none.
    """

    function: str
    name: str
    config: Any
    architecture: Architecture
    decoder_config: DecoderConfig
    tensors: dict[str, Tensor | Deferred]
    adapter: Path | None = None

    @staticmethod
    def of(function: str, name: str, config: Any, tensors: Mapping[str, Tensor | Deferred]) -> Source:
        """The source of a config and of all tensors, buffers included, that came with it; reads values of heads only.

        Names may lack the base's prefix, as where the model was saved without its head. Raises ValueError that names
        the tensor where one is missing, has another shape, is no plain tensor in memory, or has no place in the model.
        A head beside a tied config unties the model, unless it is the embedding.
        """
        architecture = get_architecture(config.model_type)
        [head], [embedding] = stored_names(architecture, HEAD), stored_names(architecture, EMBEDDING)
        is_base = not any(key.startswith(architecture.prefix) for key in tensors)
        held: dict[str, Tensor | Deferred] = {}
        for key, tensor in tensors.items():
            stored = head if key == HEAD else architecture.prefix + key if is_base and key != head else key
            if not stored.endswith(architecture.derived):
                held[stored] = tensor
        for key in sorted(held):
            check_tensor(f"{function}: {key} of {name}", held[key])
        if config.tie_word_embeddings and head in held:
            if embedding not in held or _equal(held[head], held[embedding]):
                held[embedding] = held.pop(head)
            else:
                config.tie_word_embeddings = False
        decoder = decoder_config(config)
        _check_complete(function, name, held, _shapes(architecture, decoder))
        return Source(function, name, config, architecture, decoder, held)


def check_keys(function: str, name: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError for a config that asks for code, or for weights in a form of their own."""
    for key, remedy in _FOREIGN_KEYS.items():
        if config.get(key) is not None:
            raise ValueError(
                f"{function}: config of {name} must describe a plain model, got {key} {str(config[key])[:100]}. "
                f"{remedy}"
            )


def check_end_tokens(what: str, ends: object) -> None:
    """Raise ValueError, beginning with ``what``, unless ``ends`` is a token id, a list of them, or None."""
    if ends is not None and not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends])):
        raise ValueError(f"{what} must be a token id or a list of them, got {str(ends)[:100]}.")


def check_tensor(what: str, tensor: object) -> None:
    """Raise ValueError, beginning with ``what``, unless ``tensor`` is a dense one of numbers that are in memory."""
    if isinstance(tensor, Deferred):
        return
    if type(tensor) not in (Tensor, nn.Parameter):
        kind = type(tensor)
        raise ValueError(
            f"{what} must be a plain tensor, got {kind.__module__}.{kind.__qualname__}. Dequantise or gather it."
        )
    assert isinstance(tensor, Tensor), "both kinds are tensors"
    if tensor.device.type == "meta":
        raise ValueError(f"{what} must be in memory, got a tensor on meta: offloaded, or never loaded.")
    if tensor.layout != torch.strided:
        raise ValueError(f"{what} must be dense, got {tensor.layout}. Use to_dense().")
    if tensor.dtype not in _DTYPES:
        raise ValueError(
            f"{what} must be {', '.join(map(dtype_name, _DTYPES))}, got {dtype_name(tensor.dtype)}. Quantised weights "
            "are not supported: save the model dequantised."
        )


def one_line(error: BaseException) -> str:
    """The text of an error in at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def _equal(one: Tensor | Deferred, other: Tensor | Deferred) -> bool:
    one, other = (held.read() if isinstance(held, Deferred) else held for held in (one, other))
    if one is other:
        return True
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(one, other.to(one.device))


def _shapes(architecture: Architecture, config: DecoderConfig) -> dict[str, torch.Size]:
    """The shape of every tensor that a source of ``config`` holds, by name; a tied head is none of its own."""
    with torch.device("meta"):
        model = nn.ModuleDict({"decoder": Decoder(config)})
        head = Linear(config.embedding_size, config.vocab_size, bias=config.head_bias)
        if config.is_head_tied:
            del head.weight
        model["lm_head"] = head
    return stored_shapes(architecture, config, model)


def _check_complete(
    function: str, name: str, tensors: Mapping[str, Tensor | Deferred], shapes: Mapping[str, torch.Size]
) -> None:
    """Raise ValueError unless the tensors read are all there are and all there must be."""
    missing = sorted(shapes.keys() - tensors.keys())
    if missing:
        raise ValueError(
            f"{function}: {name} must hold every weight of its config, got {len(missing)} missing, such as "
            f"{missing[0]}."
        )
    unknown = sorted(tensors.keys() - shapes.keys())
    if unknown:
        raise ValueError(
            f"{function}: {name} must hold the weights of its config only, got {len(unknown)} more, such as "
            f"{unknown[0]}."
        )
    for key in sorted(shapes):
        if tensors[key].shape != shapes[key]:
            raise ValueError(
                f"{function}: {key} of {name} must have the shape {list(shapes[key])} of its config, "
                f"got {list(tensors[key].shape)}."
            )
