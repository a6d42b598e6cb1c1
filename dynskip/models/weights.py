"""The weights of a model by transformers' names, and by ours: read one by one, written back, and their shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynskip.models.architecture import Architecture, Stored
from dynskip.models.config import DecoderConfig

HEAD, EMBEDDING = "lm_head.weight", "decoder.embed_tokens.weight"


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made when it is asked for."""

    shape: torch.Size
    read: Callable[[], Tensor]


class StoredWeights:
    """The tensors of a checkpoint, taken out by our names; each is dropped when all that it holds was taken.

    tensors: by transformers' names, emptied on the way. keys: our names, of all that will be taken.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: DecoderConfig,
        tensors: dict[str, Tensor | Deferred],
        keys: Iterable[str],
    ) -> None:
        self.architecture = architecture
        self.head_size = config.head_size
        self.tensors = tensors
        self._uses = Counter(name for key in keys for name in stored_names(architecture, key))

    def take(self, key: str) -> Tensor:
        """The weight that we call ``key``: a part of what is stored, where it can be a view, else a copy."""
        stored, _, is_turned = _place(self.architecture, key)
        parts = []
        for name in stored_names(self.architecture, key):
            held = self.tensors[name]
            if isinstance(held, Deferred):
                held = self.tensors[name] = held.read()  # once, also where it holds query, key and value
            tensor = held.detach()
            self._uses[name] -= 1
            if not self._uses[name]:
                del self.tensors[name]
            tensor = tensor.t() if is_turned else tensor
            parts.append(tensor if stored.part is None else self._part(tensor, stored))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _part(self, tensor: Tensor, stored: Stored) -> Tensor:
        rest = tensor.shape[1:]
        if stored.by_head:
            return tensor.reshape(-1, 3, self.head_size, *rest)[:, stored.part].reshape(-1, *rest)
        return tensor.chunk(3)[stored.part or 0]


def stored_names(architecture: Architecture, key: str) -> list[str]:
    """Transformers' names of the tensors that hold the weight that we call ``key``."""
    stored, suffix, _ = _place(architecture, key)
    return [f"{name}.{suffix}" for name in stored.names]


def to_stored(
    architecture: Architecture, config: DecoderConfig, weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The ``weights``, by our names, as transformers stores them: names and tensors, one after the other."""
    parts: dict[str, list[Tensor]] = {}
    for key, tensor in weights.items():
        stored, _, is_turned = _place(architecture, key)
        names = stored_names(architecture, key)
        if stored.part is None:
            for name, rows in zip(names, tensor.chunk(len(names)), strict=True):
                yield name, rows.t() if is_turned else rows
            continue
        held = parts.setdefault(names[0], [])
        held.append(tensor)
        if len(held) == 3:
            # Query, key and value come in this order: they are parameters of a layer in it.
            if stored.by_head:
                rest = tensor.shape[1:]
                by_head = [part.reshape(-1, config.head_size, *rest) for part in held]
                whole = torch.stack(by_head, dim=1).reshape(-1, *rest)
            else:
                whole = torch.cat(held)
            yield names[0], whole.t() if is_turned else whole
            del parts[names[0]]
    assert not parts, "query, key and value are all there"


def stored_shapes(architecture: Architecture, config: DecoderConfig, model: nn.Module) -> dict[str, torch.Size]:
    """The shapes of all tensors that a checkpoint of ``model``, which may be on meta, holds, by transformers' names."""
    weights = {key: torch.empty(held.shape, device="meta") for key, held in model.named_parameters()}
    return {name: tensor.shape for name, tensor in to_stored(architecture, config, weights)}


def _place(architecture: Architecture, key: str) -> tuple[Stored, str, bool]:
    """Where the weight ``key`` is stored, what its name ends with, and whether it is turned there."""
    module, suffix = key.rsplit(".", 1)
    is_matrix = suffix == "weight" and ".layers." in module and not module.endswith("norm")
    return architecture.stored(module), suffix, architecture.transposed and is_matrix
