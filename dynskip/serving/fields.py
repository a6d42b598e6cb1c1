"""From the fields of a request to `SamplingParams`, and what the fields that are not supported may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynskip.sampling import SamplingParams
from dynskip.serving.errors import bad_request, told, unsupported
from dynskip.serving.protocol import ChatRequest, CompletionRequest, Fields, Sampled

# Without one, as OpenAI has it; the library's is 0.
DEFAULT_TEMPERATURE = 1.0
DEFAULT_MAX_TOKENS = 16

# Fields of `Sampled` that are parameters of the same name.
SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "prompt_logprobs",
)

# Fields that say nothing of the output.
HARMLESS = frozenset(
    ("user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls", "service_tier", "request_id")
)
# Fields that clients send though they ask for nothing, with the values that do not; null asks for nothing anywhere.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "suffix": ("",),
    "best_of": (1,),
    "echo": (False,),
    "store": (False,),
    "priority": (0,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "bad_words": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "documents": ([],),
}
# Whether the tokenizer puts its own tokens around the text: around a prompt it does, a chat template has them already.
_ADD_SPECIAL_TOKENS = "add_special_tokens"


def check_others(request: Fields) -> None:
    """Raise an APIError for a field that ``request`` has beyond its model, unless it asks for nothing."""
    neutral = {**NEUTRAL, _ADD_SPECIAL_TOKENS: (not isinstance(request, ChatRequest),)}
    for name, value in (request.model_extra or {}).items():
        if value is None or name in HARMLESS or value in neutral.get(name, ()):
            continue
        raise unsupported(name, "It is not supported." if name in neutral else "There is no such field.")


def sampling_params(request: Sampled, max_tokens: int | None) -> SamplingParams:
    """The parameters that ``request`` asks for; an APIError names the field that is wrong."""
    values: dict[str, Any] = {"temperature": DEFAULT_TEMPERATURE, "max_tokens": max_tokens}
    for name in SAMPLING_FIELDS:
        value = getattr(request, name)
        if value is not None:
            values[name] = _logit_bias(value) if name == "logit_bias" else value
    values["logprobs"] = _num_logprobs(request)
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        values["prompt_logprobs"] = request.logprobs
    try:
        return SamplingParams(**values)
    except (TypeError, ValueError) as error:
        raise told(error) from error


def _num_logprobs(request: Sampled) -> int | None:
    if isinstance(request, ChatRequest):
        if request.top_logprobs and not request.logprobs:
            raise bad_request("top_logprobs: logprobs must be true with it, got none.", "top_logprobs")
        return (request.top_logprobs or 0) if request.logprobs else None
    assert isinstance(request, CompletionRequest), "there are two kinds"
    return request.logprobs


def _logit_bias(biases: Mapping[str, float]) -> dict[int, float]:
    if not all(token.isascii() and token.isdigit() and len(token) < 10 for token in biases):
        raise bad_request("logit_bias: its keys must be token ids, got others.", "logit_bias")
    return {int(token): bias for token, bias in biases.items()}
