"""A model under a learned controller, every layer computed and blended by its gate: for training only.

Running a model so saves no time. Afterwards the controller runs through the executor, which computes what it asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynskip.controllers.gumbel import gumbel_gate, gumbel_noise
from dynskip.controllers.learned import LearnedController, LearnedSequenceController, LearnedTokenController
from dynskip.controllers.protocol import TokenContext
from dynskip.data.batches import IGNORED
from dynskip.models.hf_model import hf_layers, replaced_layers
from dynskip.training.response_loss import head_loss

# The gate of a layer, [B, T, 1], for its input [B, T, C]; None where every row runs it.
Gate = Callable[[int, Tensor], Tensor | None]


class _GatedLayer(nn.Module):
    """A layer with its gate; what it is asked for besides its pass is the layer's."""

    def __init__(self, layer: nn.Module, index: int, gate: Gate) -> None:
        super().__init__()
        self.layer, self.index, self.gate = layer, index, gate

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(hidden_states, *args, **kwargs)
        gate = self.gate(self.index, hidden_states)
        if gate is None:
            return output
        # Of some architectures a layer returns more than its states.
        states, *others = output if isinstance(output, tuple) else (output,)
        gate = gate.to(states.dtype)
        # Not input + gate * (output - input): a gate of exactly one then gives exactly the layer's output.
        blended = gate * states + (1 - gate) * hidden_states
        return (blended, *others) if isinstance(output, tuple) else blended


def gated_layers(model: PreTrainedModel, gate: Gate) -> AbstractContextManager[None]:
    """Within the context each layer's output is blended with its input by its gate.

    A skipped token leaves the keys and values of its passed-through state: the KV policy "propagate".
    """
    return replaced_layers(model, [_GatedLayer(layer, index, gate) for index, layer in enumerate(hf_layers(model))])


class ControlledModel(nn.Module):
    """A controller and its backbone, with a pass that returns cross-entropy plus the price of the layers.

    joint: the backbone is trained as well; otherwise it is frozen, and no part of what this module saves.
    alpha: the price of the mean fraction of layers executed. target_layers: where given, alpha is the price of the
    distance of a micro-batch's mean from so many layers. temperature, hard: of the Gumbel-Softmax.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        controller: LearnedController,
        *,
        alpha: float,
        target_layers: float | None = None,
        hard: bool = True,
        joint: bool = False,
    ) -> None:
        super().__init__()
        self.controller = controller
        self.joint = joint
        self.alpha = alpha
        self.target_layers = target_layers
        self.hard = hard
        if joint:
            self.backbone = backbone
        else:
            backbone.requires_grad_(False)
            backbone.train(False)
            self._frozen = [backbone]  # in a list, where nn.Module does not look

    @property
    def model(self) -> PreTrainedModel:
        """The backbone."""
        return self.backbone if self.joint else self._frozen[0]

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Keep only the inputs of the backbone's layers, and compute the rest again while going back."""
        enable: Any = self.model.gradient_checkpointing_enable
        enable(**options)

    def _apply(self, fn: Any, recurse: bool = True) -> ControlledModel:
        # Wherever the controller goes, the frozen backbone goes too.
        if not self.joint:
            backbone: Any = self._frozen[0]
            backbone._apply(fn)
        moved: ControlledModel = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it bare
        return moved

    def forward(self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> dict[str, Tensor]:
        """``loss``, and its parts without gradient: ``cross_entropy`` and ``num_layers``, all summed over the response
        tokens and divided by ``num_items_in_batch``; None: by their number.

        input_ids, labels: [B, T], int64, padded on the right; prompts carry no label.
        """
        is_response = labels != IGNORED
        num_tokens = is_response.sum()
        divisor = num_tokens if num_items_in_batch is None else num_items_in_batch
        gates = _Gates(self, input_ids, is_response)
        with gated_layers(self.model, gates):
            hidden_states = self.model.base_model(input_ids, use_cache=False).last_hidden_state
        share, head = num_tokens / divisor, self.model.get_output_embeddings()
        cross_entropy = head_loss(hidden_states, head.weight, head.bias, labels) * share
        fraction = gates.num_layers / self.controller.num_layers
        if self.target_layers is None:
            price = fraction / divisor
        else:
            price = (fraction / num_tokens - self.target_layers / self.controller.num_layers).abs() * share
        return {
            "loss": cross_entropy + self.alpha * price,
            "cross_entropy": cross_entropy.detach(),
            "num_layers": gates.num_layers.detach() / divisor,
        }


class _Gates:
    """The gates of one pass, and the layers that response tokens have run so far, with gradient.

    Per token: responses are gated, prompts run everything. Per sequence: prompt and response run the sequence's path.
    """

    def __init__(self, owner: ControlledModel, input_ids: Tensor, is_response: Tensor) -> None:
        self.owner = owner
        self.controller = owner.controller
        self.is_response = is_response
        self.num_layers = torch.zeros((), device=input_ids.device)
        self.noisy = owner.controller.training
        seq_ids = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(is_response.sum(1))
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)[is_response]
        self.context = TokenContext(seq_ids.int(), positions, torch.zeros_like(positions, dtype=torch.bool))
        self.by_sequence: Tensor | None = None
        if isinstance(self.controller, LearnedSequenceController):
            self.by_sequence = self._sequence_gates(self.controller, input_ids)

    def _sequence_gates(self, controller: LearnedSequenceController, input_ids: Tensor) -> Tensor:
        embed = self.owner.model.get_input_embeddings()
        lengths = self.is_response.int().argmax(1).tolist()
        with torch.no_grad():
            prompts = [embed(ids[:length]).float() for ids, length in zip(input_ids, lengths, strict=True)]
        with torch.autocast(input_ids.device.type, enabled=False):
            return self._gate(controller.logits(prompts))

    def _gate(self, logits: Tensor) -> Tensor:
        noise = gumbel_noise(tuple(logits.shape), logits.device) if self.noisy else None
        # Without noise the gate is what a running model does: argmax.
        return gumbel_gate(logits, self.controller.temperature, self.owner.hard or not self.noisy, noise)

    def __call__(self, layer: int, hidden_states: Tensor) -> Tensor | None:
        if layer in self.controller.always:
            self.num_layers = self.num_layers + self.is_response.sum()
            return None
        if self.by_sequence is not None:
            gate = self.by_sequence[:, layer]
            self.num_layers = self.num_layers + (gate * self.is_response.sum(1)).sum()
            return gate[:, None, None]
        assert isinstance(self.controller, LearnedTokenController), "there are two kinds of learned controllers"
        with torch.autocast(hidden_states.device.type, enabled=False):
            rows = hidden_states.detach()[self.is_response].float()
            chosen = self._gate(self.controller.logits(layer, rows, self.context))
        self.num_layers = self.num_layers + chosen.sum()
        gate = torch.ones(hidden_states.shape[:2], device=hidden_states.device)
        return gate.masked_scatter(self.is_response, chosen)[:, :, None]
