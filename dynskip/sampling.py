"""Sampling parameters, and what the choice of a token depends on besides logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dynskip.arguments import as_float, as_int, as_token_ids, is_unicode, shown

# Outputs of one prompt, and stop texts with their characters: what each costs is bounded before anything is made of it.
MAX_OUTPUTS = 1024
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
NOT_FINITE = -1
"""In place of a token, where the logits that it would be chosen from are not finite."""


@dataclass(frozen=True)
class SamplingParams:
    """How the output of one prompt is chosen, and when it ends. Numbers may be those of Python, numpy or torch.

    max_tokens: new tokens at most, at least 1; None for as many as fit behind the prompt.
    temperature: 0 takes the most likely token; otherwise logits are divided by it.
    top_k: sample among the k most likely tokens; None, 0 or -1 for all.
    top_p: sample among the fewest tokens whose probabilities sum to at least top_p, in (0, 1].
    n: how many outputs for the prompt, at most 1024.
    logprobs: also report the log-probabilities of this many most likely tokens and of the chosen one; None for none.
        They are those of the model, before temperature, top_k and top_p.
    stop: text, or up to 64 texts of up to 1024 characters, that end the output; the output is cut before it.
    stop_token_ids: token ids that end the output, besides the model's end-of-sequence token.
    ignore_eos: go on after the end-of-sequence token.
    seed: makes sampling repeatable. Output j of a prompt is a function of seed, j and logits: equal for any n above j.
        None draws a new seed from torch's random state for each request, which its output reports.
    """

    max_tokens: int | None = 16
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    n: int = 1
    logprobs: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        self._take_int("max_tokens", 1, None, "be an integer of at least 1")
        self._take_int("n", 1, MAX_OUTPUTS, f"be an integer in 1..{MAX_OUTPUTS}", may_be_none=False)
        self._take_int("top_k", -1, None, "be at least 1 or None")
        if self.top_k in (0, -1):
            object.__setattr__(self, "top_k", None)
        self._take_int("logprobs", 0, None, "be at least 0 or None")
        self._take_int("seed", 0, 2**63 - 1, "lie in 0..2**63-1 or be None")
        temperature, top_p = as_float(self.temperature), as_float(self.top_p)
        self._take("temperature", temperature, temperature is not None and 0 <= temperature < math.inf, "be at least 0")
        self._take("top_p", top_p, top_p is not None and 0 < top_p <= 1, "lie in (0, 1]")
        self._take("ignore_eos", self.ignore_eos, isinstance(self.ignore_eos, bool), "be True or False")
        self._take_stop()
        tokens = as_token_ids(self.stop_token_ids)
        self._take("stop_token_ids", tokens, tokens is not None and min(tokens, default=0) >= 0, "be token ids")
        object.__setattr__(self, "stop_token_ids", tuple(tokens or ()))

    def _take_int(self, name: str, least: int, most: int | None, requirement: str, *, may_be_none: bool = True) -> None:
        given = getattr(self, name)
        value = as_int(given)
        is_int = value is not None and least <= value and (most is None or value <= most)
        self._take(name, value, is_int or (given is None and may_be_none), requirement)

    def _take_stop(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        is_list = isinstance(stop, Sequence) and not isinstance(stop, bytes | bytearray)
        self._take("stop", stop, is_list, "be text that is not empty")
        self._take("stop", stop, len(stop) <= MAX_STOPS, f"be at most {MAX_STOPS} texts")
        self._take(
            "stop", tuple(stop), all(isinstance(text, str) and text for text in stop), "be text that is not empty"
        )
        for text in stop:
            self._take(
                "stop", self.stop, len(text) <= MAX_STOP_CHARS, f"be texts of at most {MAX_STOP_CHARS} characters"
            )
            self._take("stop", self.stop, is_unicode(text), "be text without lone surrogates")

    def _take(self, name: str, value: object, valid: bool, requirement: str) -> None:
        if not valid:
            raise ValueError(f"SamplingParams: {name} must {requirement}, got {shown(getattr(self, name))}.")
        object.__setattr__(self, name, value)

    def check_vocabulary(self, vocab_size: int, what: str) -> None:
        """Raise ValueError, beginning with ``what``, where a model of ``vocab_size`` tokens lacks some."""
        if self.logprobs is not None and self.logprobs > vocab_size:
            raise ValueError(
                f"{what}: logprobs must be at most {vocab_size}, the vocabulary, got {shown(self.logprobs)}."
            )
        largest = max(self.stop_token_ids, default=0)
        if largest >= vocab_size:
            raise ValueError(
                f"{what}: stop_token_ids must hold token ids in 0..{vocab_size - 1}, got {shown(largest)}."
            )

    def num_new_tokens(self, room: int) -> int:
        """New tokens at most where ``room`` tokens fit behind the prompt: max_tokens, even if it is more."""
        return max(room, 1) if self.max_tokens is None else self.max_tokens

    @property
    def greedy(self) -> bool:
        """True where no random number is drawn."""
        return self.temperature == 0


class Choice(NamedTuple):
    """How the next token of one output is chosen, besides its logits.

    seed: 0 where params are greedy. output: which of the prompt's ``n`` outputs it is. position: how many tokens the
    output has. The noise of a draw depends on these three alone, so nothing has to be remembered or taken back.
    """

    params: SamplingParams
    seed: int
    output: int
    position: int


def draw_seed(params: SamplingParams) -> int | None:
    """The seed of a request: that of ``params``, or one drawn from torch's random state; None where none is used."""
    if params.greedy:
        return None
    return int(torch.randint(2**63 - 1, ())) if params.seed is None else params.seed
