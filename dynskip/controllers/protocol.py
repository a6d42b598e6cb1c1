"""The two protocols that the engine knows: decide once per sequence, or at each layer for each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from dynskip.paths import LayerPath


@dataclass(frozen=True)
class TokenContext:
    """What a per-token controller may know of the rows of a step besides their hidden states.

    seq_ids: [N], int32, the sequence of each row within the step.
    position_ids: [N], int64, the position of each row in its sequence, from 0.
    is_prompt: [N], bool, True for prompt tokens of a generation, False for generated ones and outside generation.
    sequence_keys: [N], int64, a number of the sequence of each row that is the same in any batch; None where no caller
        has given one. Noise of sampled decisions is drawn by it.
    """

    seq_ids: Tensor
    position_ids: Tensor
    is_prompt: Tensor
    sequence_keys: Tensor | None = None


@runtime_checkable
class SequenceController(Protocol):
    """Chooses one path per sequence, once, before its first step. The path holds for prompt and output."""

    def choose_paths(self, prompt_ids: Sequence[Tensor], prompt_embeddings: Sequence[Tensor]) -> list[LayerPath]:
        """One path per prompt.

        prompt_ids: per prompt [T], int64. prompt_embeddings: per prompt [T, E], token embeddings without positions.
        """
        ...


@runtime_checkable
class TokenController(Protocol):
    """Decides, when a layer's input is known, which rows run the layer."""

    def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
        """[N], bool: True where the row runs ``layer``. ``hidden_states``: [N, C], the layer's input, to be left alone.

        A row's decision must not depend on other rows of the step, or batched results differ from results alone.
        """
        ...
