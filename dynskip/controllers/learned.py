"""The base classes of controllers with parameters. A new one is a class with one method: logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynskip.controllers.gumbel import RUN, SKIP, keyed_noise
from dynskip.controllers.protocol import TokenContext
from dynskip.paths import LayerPath


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What a controller must know of its model: L, C and E, the sizes of hidden states and of token embeddings."""

    num_layers: int
    hidden_size: int
    embedding_size: int


class LearnedController(nn.Module):
    """What all controllers with parameters share: which layers always run, and how a choice is made when a model runs.

    sizes: of the model. argument: the text behind the controller's name, such as "32" in ``mlp:32``; "" without one.
    always: layers that run whatever is learned; by default the first and the last (arXiv 2410.20022, section 3.2).
    ``sample`` and ``seed``: whether a running model samples its decisions or takes the likelier one, which is the
    default; the same seed gives the same decisions.
    """

    temperature: float = 1.0
    sample: bool = False
    seed: int = 0

    def __init__(self, sizes: ModelSizes, argument: str = "", always: Iterable[int] | None = None) -> None:
        super().__init__()
        num_layers = sizes.num_layers
        self.sizes = sizes
        self.argument = argument
        self.always = frozenset((0, num_layers - 1) if always is None else always)
        for layer in self.always:
            if not 0 <= layer < num_layers:
                raise ValueError(f"{type(self).__name__}: always must name layers in 0..{num_layers - 1}, got {layer}.")

    @property
    def num_layers(self) -> int:
        """How many layers the controller decides for."""
        return self.sizes.num_layers

    def refuse_argument(self) -> None:
        """Raise ValueError where the name came with an argument; for controllers that take none."""
        if self.argument:
            raise ValueError(
                f"{type(self).__name__}: argument must be left out, got {self.argument!r}. Write the name alone."
            )


class LearnedTokenController(LearnedController):
    """Decides for each token at each layer, from logits that a subclass computes."""

    def logits(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
        """[N, 2], float32: "skip" and "run" for each row of ``hidden_states`` [N, C] float32, the input of ``layer``.

        While it is trained the rows are those of many sequences side by side, without gradient.
        """
        raise NotImplementedError

    @torch.no_grad()
    def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
        """[N], bool: True where the row runs ``layer``; equal logits run."""
        if hidden_states.shape[1] != self.sizes.hidden_size:
            raise ValueError(
                f"{type(self).__name__}: hidden_states must be [N, {self.sizes.hidden_size}], "
                f"got {list(hidden_states.shape)}. The controller was trained on another model."
            )
        if layer in self.always:
            return torch.ones(hidden_states.shape[0], dtype=torch.bool, device=hidden_states.device)
        logits = self.logits(layer, hidden_states.detach().float(), context)
        margin = logits[:, RUN] - logits[:, SKIP]
        if self.sample:
            margin = margin + keyed_noise(self.seed, context.sequence_keys, layer, context.position_ids)
        return margin >= 0


class LearnedSequenceController(LearnedController):
    """Decides once for each sequence, from its prompt; the path holds for prompt and output."""

    def logits(self, prompt_embeddings: Sequence[Tensor]) -> Tensor:
        """[B, L, 2], float32: "skip" and "run" of each layer for each prompt, [T, E] float32 token embeddings."""
        raise NotImplementedError

    @torch.no_grad()
    def choose_paths(self, prompt_ids: Sequence[Tensor], prompt_embeddings: Sequence[Tensor]) -> list[LayerPath]:
        """One path per prompt; a sampled one depends on the prompt's tokens and the seed."""
        logits = self.logits([embedding.float() for embedding in prompt_embeddings])
        margins = (logits[..., RUN] - logits[..., SKIP]).cpu()
        paths = []
        for ids, margin in zip(prompt_ids, margins, strict=True):
            if self.sample:
                # The prompt stands where a token has its position: other prompts draw other noise.
                place = torch.tensor([sum((n + 1) * i for n, i in enumerate(ids.tolist())) % 2**31])
                noise = [keyed_noise(self.seed, None, layer, place) for layer in range(self.num_layers)]
                margin = margin + torch.cat(noise)
            runs = {layer for layer in range(self.num_layers) if margin[layer] >= 0}
            paths.append(LayerPath.of(self.num_layers, runs | self.always, allow_empty=True))
        return paths
