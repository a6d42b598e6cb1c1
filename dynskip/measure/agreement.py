"""The check before any timing: a model that computes something else may be as fast as it likes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynskip.causal_lm import CausalLM
from dynskip.engine.closed_batch import Generation
from dynskip.models.hf_model import hf_layers, only_layers
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams

PROMPT_LEN = 8
_HEAD_ROWS = 8192  # of the head's matrix, made float64 at a time


@dataclass(frozen=True)
class Agreement:
    """The largest error of some logits against float64, and the error that is allowed: twice eager PyTorch's."""

    what: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """True where the error is allowed; NaN is not."""
        return self.error <= self.allowed


class Gate:
    """Logits of a few prompts in float64 and in transformers' own arithmetic, each prompt along its own path.

    Computed once; ``check`` then holds others against them.
    """

    def __init__(self, hf_model: Any, paths: Sequence[LayerPath], seed: int = 0) -> None:
        self.paths = list(paths)
        generator = torch.Generator().manual_seed(seed)
        shape = (len(self.paths), PROMPT_LEN)
        self.prompts = torch.randint(0, hf_model.config.vocab_size, shape, generator=generator)
        with torch.no_grad():
            self.truth = _float64_logits(hf_model, self.prompts, self.paths)
            eager = [_eager_logits(hf_model, ids, path) for ids, path in zip(self.prompts, self.paths, strict=True)]
        self.allowed = 2 * _max_error(torch.stack(eager), self.truth)

    def check(self, what: str, logits: Tensor, truth: Tensor | None = None) -> Agreement:
        """How ``logits`` agree with the float64 ones, or with the part of them given as ``truth``.

        Raises RuntimeError where their error is larger than allowed: nothing may be timed then.
        """
        truth = self.truth if truth is None else truth
        agreement = Agreement(what, _max_error(logits, truth), self.allowed)
        if not agreement.passed:
            raise RuntimeError(
                f"benchmark: the logits of {what} must be within {self.allowed:.3g} of float64 (twice the error of "
                f"transformers), got {agreement.error:.3g}. Nothing was timed. Run `dynskip validate`."
            )
        return agreement

    @torch.no_grad()
    def check_model(self, model: CausalLM) -> list[Agreement]:
        """How ``model`` agrees, all prompts in one batch: on whole prompts, and on a token decoded from the cache."""
        whole = model(self.prompts, paths=self.paths).logits
        params = [SamplingParams(max_tokens=2, ignore_eos=True)] * len(self.paths)
        generation = Generation(model, self.prompts[:, :-1].tolist(), params, self.paths)
        generation.prefill()
        for sequence, token in zip(generation.sequences, self.prompts[:, -1].tolist(), strict=True):
            sequence.token_ids[-1] = token  # what the model chose is replaced by the token whose logits are known
        decoded = model.head(generation.executor.run(generation.next_step(), generation.cache))
        return [self.check("dynskip, prefill", whole), self.check("dynskip, decode", decoded, self.truth[:, -1])]


class NearTies:
    """Whether texts part at a near-tie: of two tokens whose logits are within the error of the arithmetic."""

    def __init__(self, model: CausalLM, gate: Gate) -> None:
        self.model, self.allowed = model, 2 * gate.allowed

    @torch.no_grad()
    def num_equal(self, what: str, prompt: list[int], ours: list[int], theirs: list[int]) -> int:
        """The tokens in which both begin alike; RuntimeError, about ``what``, where they part at no near-tie."""
        assert len(ours) == len(theirs), "both were asked for as many"
        place = next((at for at, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(ours))
        if place < len(ours):
            logits = self.model(torch.tensor([[*prompt, *ours[:place]]])).logits[0, -1].float()
            gap = float((logits[ours[place]] - logits[theirs[place]]).abs())
            if not gap <= self.allowed:
                raise RuntimeError(
                    f"benchmark: {what} must choose the same tokens but for near-ties, got token {place} with logits "
                    f"{gap:.3g} apart, {self.allowed:.3g} allowed. Nothing was timed."
                )
        return place


def _float64_logits(hf_model: Any, prompts: Tensor, paths: Sequence[LayerPath]) -> Tensor:
    """[B, T, V], float64: the logits of each prompt along its path; one layer at a time is held in float64."""
    layers, embedding = hf_layers(hf_model), hf_model.get_input_embeddings()
    exact = [
        _Float64Layer(layer, torch.tensor([index in path.layers for path in paths]))
        for index, layer in enumerate(layers)
    ]
    # A copy of all but the layers and the embedding: norms, projections, positions.
    known: dict[int, Any] = {id(layers): nn.ModuleList(exact), id(embedding): nn.Identity()}
    base = copy.deepcopy(hf_model.base_model, known).double()
    states = base(inputs_embeds=embedding(prompts).double(), use_cache=False).last_hidden_state
    head = hf_model.get_output_embeddings()
    logits = torch.cat([states @ part.double().T for part in head.weight.split(_HEAD_ROWS)], dim=-1)
    return logits if head.bias is None else logits + head.bias.double()


class _Float64Layer(nn.Module):
    """A layer of transformers that runs in float64, for the sequences that are ``active``, bool [B]."""

    def __init__(self, layer: nn.Module, active: Tensor) -> None:
        super().__init__()
        self._layer = [layer]  # in a list, where nn.Module does not look, so that it is not made float64 for good
        self._active = active

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = copy.deepcopy(self._layer[0]).double()(hidden_states, *args, **kwargs)
        # Of some architectures a layer returns more than its states.
        states, *others = output if isinstance(output, tuple) else (output,)
        states = torch.where(self._active[:, None, None], states, hidden_states)
        return (states, *others) if isinstance(output, tuple) else states


def _eager_logits(hf_model: Any, token_ids: Tensor, path: LayerPath) -> Tensor:
    """[T, V]: the logits of transformers' model with its list of layers cut to ``path``."""
    with only_layers(hf_model, path):
        logits: Tensor = hf_model(input_ids=token_ids[None], use_cache=False).logits[0]
        return logits


def _max_error(logits: Tensor, truth: Tensor) -> float:
    return float((logits.double() - truth).abs().max())
