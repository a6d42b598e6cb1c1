"""The check before any timing: a model that computes something else may be as fast as it likes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import OPTForCausalLM as HFOPTForCausalLM

from dynskip.causal_lm import CausalLM
from dynskip.engine.closed_batch import Generation
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams
from dynskip.training.response_loss import only_layers

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

    def __init__(self, hf_model: HFOPTForCausalLM, paths: Sequence[LayerPath], seed: int = 0) -> None:
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


def _float64_logits(hf_model: HFOPTForCausalLM, prompts: Tensor, paths: Sequence[LayerPath]) -> Tensor:
    """[B, T, V], float64: the logits of each prompt along its path; one layer at a time is held in float64."""
    decoder = hf_model.model.decoder
    positions = torch.arange(prompts.shape[1]) + decoder.embed_positions.offset
    states = decoder.embed_tokens(prompts).double() + decoder.embed_positions.weight[positions].double()
    for index, layer in enumerate(decoder.layers):
        seqs = [seq for seq, path in enumerate(paths) if index in path.layers]
        if seqs:
            states[seqs] = _run_layer(copy.deepcopy(layer).double(), states[seqs])
    states = copy.deepcopy(decoder.final_layer_norm).double()(states)
    return torch.cat([states @ part.double().T for part in hf_model.lm_head.weight.split(_HEAD_ROWS)], dim=-1)


def _run_layer(layer: nn.Module, states: Tensor) -> Tensor:
    output = layer(states)  # without a mask, transformers' attention is causal
    return output[0] if isinstance(output, tuple) else output


def _eager_logits(hf_model: HFOPTForCausalLM, token_ids: Tensor, path: LayerPath) -> Tensor:
    """[T, V]: the logits of transformers' model with its list of layers cut to ``path``."""
    with only_layers(hf_model, path):
        return hf_model(input_ids=token_ids[None], use_cache=False).logits[0]


def _max_error(logits: Tensor, truth: Tensor) -> float:
    return float((logits.double() - truth).abs().max())
