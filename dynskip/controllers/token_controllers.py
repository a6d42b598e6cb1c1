"""Learned controllers that decide for each token: fixed, hidden, and MLPs of growing width."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynskip.controllers.gate import HiddenStateGate
from dynskip.controllers.learned import LearnedTokenController, ModelSizes
from dynskip.controllers.protocol import TokenContext

# A fresh controller runs a layer with probability sigmoid(2) = 0.88: training starts near the full model.
_INITIAL_MARGIN = 2.0


def layer_weights(num_layers: int, num_out: int, num_in: int) -> nn.Parameter:
    """[L, out, in]: one matrix a layer, uniform as nn.Linear draws it."""
    bound = num_in**-0.5
    return nn.Parameter(torch.empty(num_layers, num_out, num_in).uniform_(-bound, bound))


def margin_bias(num_layers: int) -> nn.Parameter:
    """[L, 2]: the bias of a fresh controller's logits, which prefers to run."""
    return nn.Parameter(torch.tensor([-_INITIAL_MARGIN / 2, _INITIAL_MARGIN / 2]).repeat(num_layers, 1))


class LinearController(LearnedTokenController):
    """A linear map per layer; a subclass says of what."""

    def __init__(self, sizes: ModelSizes, argument: str = "") -> None:
        super().__init__(sizes, argument)
        self.refuse_argument()
        # Zero: hidden states have no fixed scale, and a random map of large ones would decide from the start.
        self.weight = nn.Parameter(torch.zeros(sizes.num_layers, 2, sizes.hidden_size))
        self.bias = margin_bias(sizes.num_layers)

    def linear_map(self) -> tuple[Tensor, Tensor]:
        """[L, 2, C] and [L, 2]: the map of hidden states that gives the logits, as it is now."""
        raise NotImplementedError

    def to_gate(self) -> HiddenStateGate:
        """The same decisions, argmax, as the gate that the fused kernels know."""
        weight, bias = self.linear_map()
        return HiddenStateGate(weight.clone(), bias.clone(), self.always)


class HiddenController(LinearController):
    """``hidden``: one linear map per layer on the layer's input (arXiv 2410.20022, section 3.2)."""

    def logits(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
        """[N, 2]: a linear map of the rows."""
        return F.linear(hidden_states, self.weight[layer], self.bias[layer])

    def linear_map(self) -> tuple[Tensor, Tensor]:
        """[L, 2, C] and [L, 2]: the parameters."""
        return self.weight.detach(), self.bias.detach()


class FixedController(LinearController):
    """``fixed``: the linear map of ``hidden`` fed with ones, that is a learned constant per layer."""

    def logits(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
        """[N, 2]: the layer's constant for every row."""
        constant: Tensor = self.weight[layer].sum(-1) + self.bias[layer]
        return constant.expand(hidden_states.shape[0], 2)

    @torch.no_grad()
    def linear_map(self) -> tuple[Tensor, Tensor]:
        """[L, 2, C] and [L, 2]: no weight, all bias."""
        return torch.zeros_like(self.weight), self.weight.sum(-1) + self.bias


def parse_width(text: str, hidden_size: int) -> int:
    """The width that ``text`` names: a number, or ``hidden`` or ``hidden/N`` of the model's hidden size."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    base, slash, divisor = text.partition("/")
    if base == "hidden" and (not slash or (divisor.isdecimal() and int(divisor) > 0)):
        return max(1, hidden_size // int(divisor or 1))
    raise ValueError(f"MLPController: argument must be a width, hidden or hidden/N, got {text!r}. Write mlp:hidden/8.")


class MLPController(LearnedTokenController):
    """``mlp:WIDTH``: per layer a normalised input, one hidden layer of ReLU, two logits; mlp:hidden/8 is the paper's.

    The input is divided by its root mean square, without which the growth of the residual stream over the layers
    would set another scale, and another speed of learning, for each layer.
    """

    def __init__(self, sizes: ModelSizes, argument: str = "hidden/8") -> None:
        super().__init__(sizes, argument)
        self.width = parse_width(argument, sizes.hidden_size)
        self.inner_weight = layer_weights(sizes.num_layers, self.width, sizes.hidden_size)
        self.inner_bias = nn.Parameter(torch.zeros(sizes.num_layers, self.width))
        self.weight = layer_weights(sizes.num_layers, 2, self.width)
        self.bias = margin_bias(sizes.num_layers)
        with torch.no_grad():
            self.weight.mul_(1 / math.sqrt(self.width))

    def logits(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
        """[N, 2]: two linear maps of the normalised rows with ReLU between them."""
        rows = F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6)
        inner = F.relu(F.linear(rows, self.inner_weight[layer], self.inner_bias[layer]))
        return F.linear(inner, self.weight[layer], self.bias[layer])
