"""What stands between an engine and a controller that is evaluated: noise by sequence, counts of layers that run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dynskip.controllers import TokenContext, TokenController
from dynskip.engine.closed_batch import Generation


class _Counts:
    """By sequence and by layer how many decided tokens ran. keys: of each sequence, for its noise."""

    def __init__(self, controller: TokenController, keys: Sequence[int], num_layers: int) -> None:
        self.controller = controller
        self.keys = torch.tensor(keys, dtype=torch.int64)
        self.run = torch.zeros(len(keys), num_layers, dtype=torch.int64)
        self.decided = torch.zeros(len(keys), dtype=torch.int64)

    @property
    def num_run(self) -> list[int]:
        """[B]: how many layers the decided tokens of a sequence ran."""
        return [int(count) for count in self.run.sum(1)]

    @property
    def num_tokens(self) -> list[int]:
        """[B]: how many tokens of a sequence were decided on."""
        return [int(count) for count in self.decided]

    @property
    def layer_runs(self) -> list[int]:
        """[L]: how many decided tokens ran each layer."""
        return [int(count) for count in self.run.sum(0)]

    def decide(self, layer: int, hidden_states: Tensor, context: TokenContext, places: Tensor) -> Tensor:
        """[N], bool: what the controller says of rows of the sequences at ``places`` [N]."""
        keyed = dataclasses.replace(context, sequence_keys=self.keys[places].to(hidden_states.device))
        return self.controller.active(layer, hidden_states, keyed)

    def count(self, layer: int, active: Tensor, places: Tensor) -> None:
        """Count rows that were decided on, of the sequences at ``places``."""
        self.run[:, layer].index_add_(0, places, active.cpu().long())
        if layer == 0:
            self.decided.index_add_(0, places, torch.ones_like(places))


class SequenceCounter(_Counts):
    """Passes on what ``controller`` decides, and counts it by sequence of ``generation``, the one that asks."""

    generation: Generation | None = None

    def watch(self, generation: Generation) -> None:
        """Count for the sequences of ``generation``, which has this object for its paths."""
        if len(generation.sequences) != len(self.keys):
            raise ValueError(
                f"SequenceCounter.watch: generation must have the {len(self.keys)} sequences that keys were given for, "
                f"got {len(generation.sequences)}."
            )
        self.generation = generation

    def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
        """[N], bool: what the controller says."""
        assert self.generation is not None, "watch comes before the first step"
        places = torch.tensor(self.generation.running)[context.seq_ids.long().cpu()]
        active = self.decide(layer, hidden_states, context, places)
        self.count(layer, active, places)
        return active


class ResponseDecisions(_Counts):
    """A controller over whole texts at once: prompts run every layer, and what it says of responses is counted.

    prompt_lengths, lengths: [B], tokens of each prompt, and of prompt and response. The last token of a response is not
    counted: nothing is predicted from it.
    """

    def __init__(
        self,
        controller: TokenController,
        keys: Sequence[int],
        num_layers: int,
        prompt_lengths: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        super().__init__(controller, keys, num_layers)
        self.prompt_lengths, self.lengths = torch.tensor(prompt_lengths), torch.tensor(lengths)

    def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
        """[N], bool: True for tokens of prompts, and what the controller says of the others."""
        places, positions = context.seq_ids.long().cpu(), context.position_ids.cpu()
        active = self.decide(layer, hidden_states, context, places)
        is_prompt = positions < self.prompt_lengths[places]
        counted = ~is_prompt & (positions < self.lengths[places] - 1)
        self.count(layer, active.cpu()[counted], places[counted])
        return active | is_prompt.to(active.device)
