"""`Scaled`: a model of random weights in which a draft is right as often as wanted."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence

import torch

from dynskip.causal_lm import CausalLM
from dynskip.engine.closed_batch import Generation
from dynskip.engine.drafting import forget_acceptance
from dynskip.models.linear import Linear
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams
from dynskip.speculation.draft import Draft

# Texts that agreement is measured on, at most.
_MOST_TEXTS = 16
# The factors that are looked through. Behind the largest what a draft's layers add is lost.
_FACTORS = (1e-3, 64.0)
_NEAR = 0.02


class Scaled:
    """A model of random weights, the outputs of some of whose layers are scaled.

    Random weights agree with nothing; the less the layers that a draft leaves out add, the more often it is right.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self._original: dict[Linear, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._known: dict[tuple[Draft, float], float] = {}
        self._now: tuple[tuple[int, ...], float] | None = None

    def scale(self, layers: Sequence[int], factor: float) -> None:
        """Scale what all layers but ``layers`` add by ``factor``; those have the outputs that they were made with."""
        if self._now == (tuple(layers), factor):
            return
        for index, layer in enumerate(self.model.decoder.layers):
            for linear in (layer.out_proj, layer.fc2):
                if linear not in self._original:
                    bias = linear.bias
                    made = linear.dense_weight().detach().clone(), None if bias is None else bias.detach().clone()
                    self._original[linear] = made
                weight, bias = self._original[linear]
                own = 1.0 if index in layers else factor
                was_packed = linear.packed
                linear.unpack_().requires_grad_(False)
                assert linear.weight is not None, "dense"
                linear.weight.copy_(weight * own)
                if bias is not None and linear.bias is not None:
                    linear.bias.copy_(bias * own)
                if was_packed:
                    linear.pack_(self.model.backend.name == "native")
        self._now = tuple(layers), factor
        # It was that of other weights.
        forget_acceptance(self.model)

    def seek(
        self, draft: Draft, wanted: float, prompts: Sequence[list[int]], num_tokens: int, num_tries: int = 9
    ) -> tuple[float, list[float]]:
        """Scale until ``draft`` agrees with the full model ``wanted`` of the time, or about.

        Agreement is that on the full model's own texts of ``num_tokens`` behind ``prompts``. Returns the factor and the
        agreement of each text: those whose mean is the nearest of ``num_tries``. It begins with the factor that was
        found for other prompts.
        """
        low, high = _FACTORS
        factor = self._known.get((draft, wanted), math.sqrt(low * high))
        found: dict[float, list[float]] = {}
        for _ in range(num_tries):
            self.scale(draft.path.layers, factor)
            found[factor] = measured_agreements(self.model, draft, prompts, num_tokens)
            agreement = statistics.fmean(found[factor])
            print(f"outputs of other layers x {factor:.4f}: agreement {agreement:.2f}", file=sys.stderr)
            if abs(agreement - wanted) <= _NEAR:
                break
            low, high = (factor, high) if agreement > wanted else (low, factor)
            factor = math.sqrt(low * high)
        best = min(found, key=lambda each: abs(statistics.fmean(found[each]) - wanted))
        self.scale(draft.path.layers, best)
        self._known[draft, wanted] = best
        return best, found[best]


@torch.no_grad()
def measured_agreements(model: CausalLM, draft: Draft, prompts: Sequence[list[int]], num_tokens: int) -> list[float]:
    """How often the draft's most likely token is the full model's, on each of the full model's own texts.

    The draft must read entries of its own, or be the path's beginning, which is the same.
    """
    is_beginning = draft.path == LayerPath.early_exit(model.num_layers, draft.path.budget)
    assert draft.entries == "own" or is_beginning, "a pass along the draft reads entries of its own"
    texts = prompts[:_MOST_TEXTS]
    params = [SamplingParams(max_tokens=num_tokens, ignore_eos=True)] * len(texts)
    outputs = Generation(model, texts, params).run()
    rates = []
    for prompt, output in zip(texts, outputs, strict=True):
        ids = torch.tensor([prompt + output.token_ids])
        guesses = model(ids[:, :-1], paths=draft.path).logits[0, len(prompt) - 1 :].argmax(-1)
        rates.append(float((guesses == ids[0, len(prompt) :]).float().mean()))
    return rates
