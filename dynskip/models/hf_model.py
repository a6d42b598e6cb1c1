"""A model of transformers: its class, its list of layers, and the model along some of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from dynskip.models.registry import get_architecture
from dynskip.paths import LayerPath


def hf_class(config: Any) -> Any:
    """transformers' class with a language-modelling head for a config of one of the architectures."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def layer_list(hf_model: Any) -> tuple[Any, str]:
    """The module of a transformers model that holds its list of layers, and the list's name there."""
    architecture = get_architecture(hf_model.config.model_type)
    owner, _, name = (architecture.prefix + architecture.layers).rpartition(".")
    return attrgetter(owner)(hf_model), name


def hf_layers(hf_model: Any) -> nn.ModuleList:
    """The list of layers of a transformers model."""
    owner, name = layer_list(hf_model)
    layers: nn.ModuleList = getattr(owner, name)
    return layers


@contextmanager
def replaced_layers(hf_model: Any, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context the decoder consists of ``layers``, one in place of each that it has."""
    owner, name = layer_list(hf_model)
    every_layer = getattr(owner, name)
    setattr(owner, name, nn.ModuleList(layers))
    try:
        yield
    finally:
        setattr(owner, name, every_layer)


@contextmanager
def only_layers(hf_model: Any, path: LayerPath) -> Iterator[None]:
    """Within the context the decoder consists of the path's layers: what is skipped is not computed.

    The config says so, too, and the layers count themselves anew: masks are chosen by the one, caches filled by the
    other.
    """
    config = hf_model.config
    layers = [hf_layers(hf_model)[layer] for layer in path.layers]
    kinds = getattr(config, "layer_types", None)
    numbered: list[tuple[Any, int, int]] = [
        (module, number, index)
        for number, layer in enumerate(layers)
        for module in layer.modules()
        if (index := getattr(module, "layer_idx", None)) is not None
    ]
    num_layers = config.num_hidden_layers
    with replaced_layers(hf_model, layers):
        for module, number, _ in numbered:
            module.layer_idx = number
        config.num_hidden_layers = len(layers)
        if kinds is not None:
            config.layer_types = [kinds[layer] for layer in path.layers]
        try:
            yield
        finally:
            for module, _, index in numbered:
                module.layer_idx = index
            config.num_hidden_layers = num_layers
            if kinds is not None:
                config.layer_types = kinds
