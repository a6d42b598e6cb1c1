"""transformers' `assistant_early_exit` beside a draft: the same weights, layers that guess, prompt and tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from dynskip.models.hf_model import hf_layers
from dynskip.models.registry import get_architecture

# Lengths of transformers' guesses that are tried; the fastest is compared with.
CONSTANT_LENGTHS = (1, 2, 3, 4, 6, 8)


@dataclass
class Counted:
    """What transformers' guesses came to. looked_at: guesses up to the first wrong one of each verification."""

    num_verifications: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_looked_at: int = 0

    @property
    def acceptance(self) -> float:
        """The share of right ones among those that were looked at."""
        return self.num_accepted / max(self.num_looked_at, 1)


class TransformersDrafts:
    """A model of transformers that generates greedily, with and without guesses of its first ``num_exit`` layers.

    Its lengths of guesses are constant, `num_assistant_tokens`, and none is cut short for want of confidence: random
    weights are never sure.
    """

    def __init__(self, hf_model: Any, num_exit: int) -> None:
        self.hf_model, self.num_exit = hf_model, num_exit
        # No text of random weights ends before its length.
        hf_model.generation_config.eos_token_id = None
        hf_model.generation_config.pad_token_id = 0

    def scale(self, factor: float) -> None:
        """Scale what the layers behind the first ``num_exit`` add by ``factor``."""
        names = get_architecture(self.hf_model.config.model_type).layer
        with torch.no_grad():
            for layer in hf_layers(self.hf_model)[self.num_exit :]:
                for ours in ("out_proj", "fc2"):
                    name = names[ours]
                    assert isinstance(name, str), "a matrix of its own"
                    linear = layer.get_submodule(name)
                    for parameter in linear.parameters(recurse=False):
                        parameter.mul_(factor)

    def generate(self, prompt: list[int], num_tokens: int, length: int | None) -> list[int]:
        """The tokens behind ``prompt``, with ``length`` guesses a verification; None for no guesses."""
        options: dict[str, Any] = {}
        if length is not None:
            # transformers reads these from the model's own config, whatever a call says.
            config = self.hf_model.generation_config
            config.num_assistant_tokens, config.num_assistant_tokens_schedule = length, "constant"
            config.assistant_confidence_threshold = 0.0
            options["assistant_early_exit"] = self.num_exit
        ids = torch.tensor([prompt])
        output = self.hf_model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, **options
        )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens

    @contextmanager
    def counting(self) -> Iterator[Counted]:
        """Within the context the guesses of all calls are counted."""
        counted, update = Counted(), AssistedCandidateGenerator.update_candidate_strategy

        def look(generator: Any, input_ids: Any, scores: Any, num_matches: int) -> None:
            num_guesses = scores.shape[1] - 1
            counted.num_verifications += 1
            counted.num_drafted += num_guesses
            counted.num_accepted += int(num_matches)
            counted.num_looked_at += min(int(num_matches) + 1, num_guesses)
            update(generator, input_ids, scores, num_matches)

        AssistedCandidateGenerator.update_candidate_strategy = look
        try:
            yield counted
        finally:
            AssistedCandidateGenerator.update_candidate_strategy = update
