"""A controller of somebody else's: one class, ten lines."""

import torch
from torch import Tensor, nn

from dynskip.controllers import LearnedTokenController, ModelSizes, TokenContext


class ByPosition(LearnedTokenController):
    """Logits that grow with a token's position, at a slope learned per layer."""

    def __init__(self, sizes: ModelSizes, argument: str = "0.1") -> None:
        super().__init__(sizes, argument)
        self.slope = nn.Parameter(torch.full((sizes.num_layers,), float(argument)))

    def logits(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
        """[N, 2]: skip is zero, run grows."""
        run = context.position_ids.float() * self.slope[layer] - 1
        return nn.functional.pad(run[:, None], (1, 0))
