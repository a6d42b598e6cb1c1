"""The loss of responses without a [N, V] tensor in memory, and models of transformers whose pass returns it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from dynskip.data.batches import IGNORED

# Logits of 512 rows and 4096 tokens fill 8 MiB in fp32: what the softmax reads a second time is still in the cache.
_ROWS_PER_CHUNK = 512


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        bias_grad = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for start in range(0, len(targets), _ROWS_PER_CHUNK):
            rows = slice(start, start + _ROWS_PER_CHUNK)
            logits = functional.linear(hidden[rows], weight, bias).float()
            wanted = targets[rows, None]
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += (log_sum - logits.gather(1, wanted)).sum()
            probs = logits.sub_(log_sum).exp_()
            probs.scatter_add_(1, wanted, torch.full_like(wanted, -1.0, dtype=probs.dtype))
            if bias_grad is not None:
                bias_grad += probs.sum(0)
            logits_grad = probs.to(hidden.dtype)
            hidden_grad[rows] = logits_grad @ weight
            weight_grad += logits_grad.T @ hidden[rows]
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        ctx.num_rows = len(targets)
        return total / len(targets)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, *head_grads = ctx.saved_tensors
        scale, dtype = grad_outputs[0] / ctx.num_rows, hidden_grad.dtype
        of_head = [None if grad is None else (grad * scale).to(dtype) for grad in head_grads]
        return hidden_grad * scale.to(dtype), *of_head, None


def product_dtype(states: Tensor) -> torch.dtype:
    """The dtype that a product of ``states`` runs in: autocast's where autocast is on, else their own."""
    device_type = states.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else states.dtype


def head_loss(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Mean negative log likelihood of the labelled tokens, fp32 scalar, differentiable.

    hidden_states: [B, T, C], after the final norm. weight, bias: [V, C] and [V], the head's. labels: [B, T], int64:
        position t is scored by the state at t - 1; ``IGNORED`` is not scored, and costs nothing.
    The products run in autocast's dtype where autocast is on, else in that of ``hidden_states``; the softmax in fp32.
    Loss and gradients are made chunk by chunk in one pass, so neither logits nor their gradient are ever whole.
    """
    kept = labels[:, 1:] != IGNORED
    dtype = product_dtype(hidden_states)
    states = hidden_states[:, :-1][kept].to(dtype)
    if len(states) == 0:
        raise ValueError("head_loss: labels must keep at least one token, got none. Leave such a batch out.")
    with torch.autocast(hidden_states.device.type, enabled=False):
        loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]  # torch has no types for it
            states, weight.to(dtype), None if bias is None else bias.to(dtype), labels[:, 1:][kept]
        )
    return loss


class ResponseLoss:
    """A pass that ends in a loss and never holds all logits, for a class of transformers; see `with_response_loss`.

    The loss is made inside the pass because that is the call which the wrappers of several processes see.
    """

    def forward(self: Any, input_ids: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> dict[str, Tensor]:
        """The summed loss of the labelled tokens, divided by ``num_items_in_batch``; None: by their own number.

        input_ids, labels: [B, T], int64, padded on the right, where no token that counts sees the padding.
        """
        hidden_states = self.base_model(input_ids, use_cache=False).last_hidden_state
        head = self.get_output_embeddings()
        loss = head_loss(hidden_states, head.weight, head.bias, labels)
        if num_items_in_batch is not None:
            loss = loss * (labels[:, 1:] != IGNORED).sum() / num_items_in_batch
        return {"loss": loss}


@cache
def with_response_loss(kind: type[PreTrainedModel]) -> Any:
    """The class ``kind`` of transformers with the pass of `ResponseLoss`; in its name and what it saves it is that."""
    return type(kind.__name__, (ResponseLoss, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
