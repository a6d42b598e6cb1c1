"""Sampling parameters, and what the choice of a token depends on besides logits."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynskip.arguments import as_float, as_int, as_token_ids, is_unicode, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Outputs of one prompt, and stop texts with their characters: what each costs is bounded before anything is made of it.
MAX_OUTPUTS = 1024
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
NOT_FINITE = -1
"""In place of a token, where the logits that it would be chosen from are not finite."""
_FLOAT32 = torch.finfo(torch.float32)
# From the output so far, or prompt and output, and the logits of the next token to other logits.
LogitsProcessor = Callable[[list[int], Tensor], Tensor] | Callable[[list[int], list[int], Tensor], Tensor]


@dataclass(frozen=True)
class SamplingParams:
    """How the output of one prompt is chosen, and when it ends. Numbers may be those of Python, numpy or torch.

    Names and meaning are vLLM's. The logits of a token are changed in this order, in float32: logits_processors,
    logit_bias, min_tokens, repetition_penalty, frequency_penalty, presence_penalty, temperature, min_p, top_k, top_p.

    max_tokens: new tokens at most, at least 1; None for as many as fit behind the prompt.
    temperature: 0 takes the most likely token; otherwise logits are divided by it.
    top_k: sample among the k most likely tokens; None, 0 or -1 for all.
    top_p: sample among the fewest tokens whose probabilities sum to at least top_p, in (0, 1].
    n: how many outputs for the prompt, at most 1024.
    logprobs: also report the log-probabilities of this many most likely tokens and of the chosen one; None for none.
        They are those of the model, before all that changes logits.
    stop: text, or up to 64 texts of up to 1024 characters, that end the output; the output is cut before it.
    stop_token_ids: token ids that end the output, besides the model's end-of-sequence token.
    ignore_eos: go on after the end-of-sequence token.
    seed: makes sampling repeatable. Output j of a prompt is a function of seed, j and logits: equal for any n above j.
        None or -1 draws a new seed from torch's random state for each request, which its output reports.
    min_p: sample among tokens at least min_p times as likely as the likeliest, in 0..1; 0 for all.
    repetition_penalty: above 1, tokens of prompt and output become less likely: positive logits are divided by it,
        others multiplied. 1 for none.
    presence_penalty: subtracted from the logits of tokens that the output has, in -2..2.
    frequency_penalty: the same, times how often the output has the token, in -2..2.
    logit_bias: added to the logits, by token id; -inf for a token that must not come.
    logits_processors: functions of (output token ids, logits) or of (prompt token ids, output token ids, logits) that
        return the logits, [V], float32, to go on with; they may change theirs in place. One that raises, or leaves no
        finite logit, ends its request. They must be pure: a draft's guesses and preempted tokens ask them again.
    min_tokens: before so many tokens neither the end-of-sequence token nor one of stop_token_ids comes, and a stop text
        that is complete by then ends nothing.
    include_stop_str_in_output: the text is cut behind the stop text, and has that of a token which ends the output.
    skip_special_tokens: the text, also that in which stop texts are sought, leaves special tokens out.
    prompt_logprobs: also report the log-probabilities of this many most likely tokens in the place of each token of the
        prompt, and its own; None for none. Such a prompt is run whole: it takes over no entries of another.
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
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    logits_processors: Sequence[LogitsProcessor] | None = ()
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        self._take_int("max_tokens", 1, None, "be an integer of at least 1")
        self._take_int("n", 1, MAX_OUTPUTS, f"be an integer in 1..{MAX_OUTPUTS}", may_be_none=False)
        self._take_int("top_k", -1, None, "be at least 1, or None, 0 or -1 for all")
        if self.top_k in (0, -1):
            object.__setattr__(self, "top_k", None)
        self._take_int("logprobs", 0, None, "be at least 0 or None")
        self._take_int("prompt_logprobs", 0, None, "be at least 0 or None")
        self._take_int("seed", -1, 2**63 - 1, "lie in 0..2**63-1, or be None or -1")
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        self._take_int("min_tokens", 0, None, "be an integer of at least 0", may_be_none=False)
        fits = self.max_tokens is None or self.min_tokens <= self.max_tokens
        self._take("min_tokens", self.min_tokens, fits, f"be at most max_tokens, {shown(self.max_tokens)}")
        self._take_float("temperature", lambda value: 0 <= value < math.inf, "be at least 0, and finite")
        self._take_float("top_p", lambda value: 0 < value <= 1, "lie in (0, 1]")
        self._take_float("min_p", lambda value: 0 <= value <= 1, "lie in 0..1")
        self._take_float(
            "repetition_penalty", lambda value: _FLOAT32.tiny <= value <= _FLOAT32.max, "be above 0, within float32"
        )
        self._take_float("presence_penalty", lambda value: -2 <= value <= 2, "lie in -2..2")
        self._take_float("frequency_penalty", lambda value: -2 <= value <= 2, "lie in -2..2")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            self._take(name, getattr(self, name), isinstance(getattr(self, name), bool), "be True or False")
        self._take_stop()
        tokens = as_token_ids(self.stop_token_ids)
        self._take("stop_token_ids", tokens, tokens is not None and min(tokens, default=0) >= 0, "be token ids")
        object.__setattr__(self, "stop_token_ids", tuple(tokens or ()))
        self._take_logit_bias()
        self._take_processors()

    def _take_int(self, name: str, least: int, most: int | None, requirement: str, *, may_be_none: bool = True) -> None:
        given = getattr(self, name)
        value = as_int(given)
        is_int = value is not None and least <= value and (most is None or value <= most)
        self._take(name, value, is_int or (given is None and may_be_none), requirement)

    def _take_float(self, name: str, is_valid: Callable[[float], bool], requirement: str) -> None:
        value = as_float(getattr(self, name))
        self._take(name, value, value is not None and is_valid(value), requirement)

    def _take_logit_bias(self) -> None:
        if self.logit_bias is None:
            return
        requirement = "be None or a dict of token ids and numbers within float32, or -inf"
        self._take("logit_bias", self.logit_bias, isinstance(self.logit_bias, Mapping), requirement)
        bias = {as_int(token): as_float(value) for token, value in self.logit_bias.items()}
        is_valid = all(
            token is not None
            and token >= 0
            and value is not None
            and (abs(value) <= _FLOAT32.max or value == -math.inf)
            for token, value in bias.items()
        )
        self._take("logit_bias", bias, is_valid, requirement)

    def _take_processors(self) -> None:
        given = () if self.logits_processors is None else self.logits_processors
        requirement = "be functions of (output_ids, logits) or (prompt_ids, output_ids, logits)"
        is_list = isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray)
        self._take("logits_processors", given, is_list, requirement)
        are_valid = all(takes_prompt(processor) is not None for processor in given)
        self._take("logits_processors", tuple(given), are_valid, requirement)

    def _take_stop(self) -> None:
        given = self.stop
        stop = (given,) if isinstance(given, str) else given
        is_list = isinstance(stop, Sequence) and not isinstance(stop, bytes | bytearray)
        self._take("stop", given, is_list, "be text that is not empty")
        self._take("stop", given, len(stop) <= MAX_STOPS, f"be at most {MAX_STOPS} texts")
        are_texts = all(isinstance(text, str) and text for text in stop)
        self._take("stop", given, are_texts, "be text that is not empty")
        are_short = all(len(text) <= MAX_STOP_CHARS for text in stop)
        self._take("stop", given, are_short, f"be texts of at most {MAX_STOP_CHARS} characters")
        are_valid = all(map(is_unicode, stop))
        self._take("stop", tuple(stop), are_valid, "be text without lone surrogates")

    def _take(self, name: str, value: object, valid: bool, requirement: str) -> None:
        if not valid:
            raise ValueError(f"SamplingParams: {name} must {requirement}, got {shown(getattr(self, name))}.")
        object.__setattr__(self, name, value)

    def check_vocabulary(self, vocab_size: int, what: str) -> None:
        """Raise ValueError, beginning with ``what``, where a model of ``vocab_size`` tokens lacks some."""
        for name, number in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if number is not None and number > vocab_size:
                raise ValueError(f"{what}: {name} must be at most {vocab_size}, the vocabulary, got {shown(number)}.")
        for name, tokens in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias or ())):
            largest = max(tokens, default=0)
            if largest >= vocab_size:
                raise ValueError(f"{what}: {name} must hold token ids in 0..{vocab_size - 1}, got {shown(largest)}.")

    def num_new_tokens(self, room: int) -> int:
        """New tokens at most where ``room`` tokens fit behind the prompt: max_tokens, even if it is more."""
        return max(room, 1) if self.max_tokens is None else self.max_tokens

    def stop_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """The tokens that end an output of a model with these end-of-sequence tokens."""
        return frozenset((*self.stop_token_ids, *(() if self.ignore_eos else eos_token_ids)))

    @property
    def greedy(self) -> bool:
        """True where no random number is drawn."""
        return self.temperature == 0

    @cached_property
    def penalizes(self) -> bool:
        """Whether tokens that have come have other logits by it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @cached_property
    def processors(self) -> tuple[tuple[Callable[..., Any], bool], ...]:
        """The logits_processors, and whether they take the prompt, too."""
        return tuple((processor, bool(takes_prompt(processor))) for processor in self.logits_processors or ())

    @cached_property
    def bias_columns(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Token ids and values of logit_bias, [K] each."""
        bias = self.logit_bias or {}
        return np.fromiter(bias.keys(), np.int64, len(bias)), np.fromiter(bias.values(), np.float32, len(bias))

    @cached_property
    def _always_changes_logits(self) -> bool:
        return self.penalizes or bool(self.logit_bias) or bool(self.logits_processors)

    def changes_logits(self, position: int = 0) -> bool:
        """Whether token number ``position`` of an output is chosen from other logits than the model's.

        Where it is not, temperature, min_p, top_k and top_p are all that the choice depends on.
        """
        return self._always_changes_logits or position < self.min_tokens


class Choice(NamedTuple):
    """How the next token of one output is chosen, besides its logits.

    seed: 0 where params are greedy. output: which of the prompt's ``n`` outputs it is. position: how many tokens the
    output has. The noise of a draw depends on these three alone, so nothing has to be remembered or taken back.
    """

    params: SamplingParams
    seed: int
    output: int
    position: int


def takes_prompt(processor: object) -> bool | None:
    """Whether a logits processor takes the prompt, before output and logits; None for what takes neither two nor three.

    One that could take both takes two.
    """
    if not callable(processor):
        return None
    try:
        signature = inspect.signature(processor)
    except (TypeError, ValueError):  # of some functions in C nothing is known
        return None
    for count in (2, 3):
        try:
            signature.bind(*[None] * count)
        except TypeError:
            continue
        return count == 3
    return None


def draw_seed(params: SamplingParams) -> int | None:
    """The seed of a request: that of ``params``, or one drawn from torch's random state; None where none is used.

    One that is drawn lies below 2**53: JSON's readers in JavaScript round larger numbers, and it would not come again.
    """
    if params.greedy:
        return None
    return int(torch.randint(2**53, ())) if params.seed is None else params.seed
