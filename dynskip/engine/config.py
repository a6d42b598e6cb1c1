"""`EngineConfig`: the options of an `Engine`, checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynskip.arguments import as_int, shown
from dynskip.causal_lm import CausalLM, ExecutorName
from dynskip.costs.step_costs import StepCosts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, CausalLM), "a dynskip.CausalLM"),
    "deterministic": (lambda value: value is None or isinstance(value, bool), "True, False or None"),
    "prefix_caching": (lambda value: isinstance(value, bool), "True or False"),
    "costs": (lambda value: value is None or isinstance(value, StepCosts), "StepCosts or None"),
    "tokenizer": (lambda value: value is None or hasattr(value, "decode"), "a transformers tokenizer or None"),
    "clock": (callable, "callable"),
}
_INTEGERS = ("batch", "max_prefill_tokens")
_OPTIONAL_INTEGERS = ("kv_bytes", "pool", "max_wait", "max_context_len")


@dataclass(frozen=True)
class EngineConfig:
    """What an `Engine` was made with; it says what each option means. Integers of any type become ints.

    Raises TypeError or ValueError for an option that is wrong by itself or does not fit the model.
    """

    model: CausalLM
    kv_bytes: int | None
    policy: str
    deterministic: bool | None
    batch: int
    pool: int | None
    max_wait: int | None
    max_prefill_tokens: int
    max_context_len: int | None
    prefix_caching: bool
    costs: StepCosts | None
    tokenizer: PreTrainedTokenizerBase | None
    executor: ExecutorName
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        for name, (fits, requirement) in _TYPES.items():
            value = getattr(self, name)
            if not fits(value):
                raise TypeError(f"Engine: {name} must be {requirement}, got {type(value).__name__}.")
        for name in (*_INTEGERS, *_OPTIONAL_INTEGERS):
            value = getattr(self, name)
            number = as_int(value)
            if number is None and (value is not None or name in _INTEGERS):
                raise TypeError(f"Engine: {name} must be an integer, got {shown(value)}.")
            object.__setattr__(self, name, number)
        longest = self.model.decoder_config.max_positions
        if self.max_context_len is not None and not 1 <= self.max_context_len <= longest:
            raise ValueError(f"Engine: max_context_len must lie in 1..{longest}, got {shown(self.max_context_len)}.")
        if self.max_prefill_tokens < 1:
            raise ValueError(f"Engine: max_prefill_tokens must be at least 1, got {shown(self.max_prefill_tokens)}.")
        num_layers = self.model.num_layers
        if self.costs is not None and self.costs.num_layers != num_layers:
            raise ValueError(
                f"Engine: costs must be of {num_layers} layers, got {self.costs.num_layers}. Run `dynskip calibrate`."
            )
