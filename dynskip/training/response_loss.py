"""An OPT model whose pass returns the loss of the responses, along whichever layers it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import OPTForCausalLM

from dynskip.data.batches import IGNORED
from dynskip.paths import LayerPath
from dynskip.training.head_loss import head_loss


@contextmanager
def only_layers(model: OPTForCausalLM, path: LayerPath) -> Iterator[None]:
    """Within the context the decoder consists of the path's layers: what is skipped is not computed."""
    decoder = model.model.decoder
    every_layer = decoder.layers
    decoder.layers = nn.ModuleList([every_layer[layer] for layer in path.layers])
    try:
        yield
    finally:
        decoder.layers = every_layer


class ResponseLossOPT(OPTForCausalLM):
    """transformers' OPT with a pass that ends in a loss and never holds all logits.

    The loss is made inside the pass because that is the call which the wrappers of several processes see.
    """

    def forward(self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> dict[str, Tensor]:
        """The summed loss of the labelled tokens, divided by ``num_items_in_batch``; None: by their own number.

        input_ids, labels: [B, T], int64, padded on the right. OPT counts positions from its first token, so on
        which side the padding stands changes no loss.
        """
        hidden_states = self.model(input_ids, use_cache=False).last_hidden_state
        loss = head_loss(hidden_states, self.lm_head.weight, labels)
        if num_items_in_batch is not None:
            loss = loss * (labels[:, 1:] != IGNORED).sum() / num_items_in_batch
        return {"loss": loss}
