"""What clients send: the fields of a request, their types, and what each of them may hold."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

T = TypeVar("T")

# What a number of most likely tokens is bounded by: each of them is sent with its text, for each token.
MAX_LOGPROBS = 20
_Count = Annotated[int, Field(ge=0)]
# A list is read up to its first mistake: a body of a million would keep all others waiting, and fill the memory.
_List = Annotated[list[T], Field(fail_fast=True)]
_TokenIds = _List[int]


def _numbers(value: object) -> object:
    """The same for an object of numbers, which pydantic reads to its end: of a wrong one its first mistake is left."""
    if not isinstance(value, dict):
        return value
    wrong = next(((key, each) for key, each in value.items() if type(each) not in (int, float)), None)
    return value if wrong is None else dict([wrong])


class Fields(BaseModel):
    """A request. Types are not converted; fields that no model names are judged by `fields.check_others`."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = Field(default=None, description="A name of /v1/models; without one the model that is served.")


class StreamOptions(BaseModel):
    """What a stream tells besides text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = Field(default=None, description="A last chunk with usage and no choices.")
    continuous_usage_stats: bool | None = Field(default=None, description="Usage so far with each chunk.")
    include_obfuscation: bool | None = Field(default=None, description="Passes; no chunk is padded.")


class Sampled(Fields):
    """What both kinds of generation have in common; the meaning of each sampling field is that of SamplingParams."""

    n: int | None = None
    temperature: float | None = Field(default=None, description="1 without one.")
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | _List[str] | None = None
    stop_token_ids: _TokenIds | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_numbers)] = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: _Count | None = Field(default=None, le=MAX_LOGPROBS)
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = Field(
        None, description="Also the ids of the prompt and of each output, and which of them a draft had guessed."
    )
    path: str | None = Field(
        None, description="The layers to run: full, uniform:8, exit:8, random:8:0, found:20 or layers:0,5,23."
    )
    depth: int | str | None = Field(
        None, description='Layers to run at least, or their share such as "50%": the next path of the server\'s table.'
    )
    draft: str | None = Field(default=None, description="A path that guesses tokens, or auto, or none.")


class CompletionRequest(Sampled):
    """The body of POST /v1/completions."""

    # In this order a list of token ids is one prompt.
    prompt: str | _TokenIds | _List[str] | _List[_TokenIds]
    echo: bool | None = None
    logprobs: _Count | None = Field(default=None, le=MAX_LOGPROBS)
    best_of: int | None = Field(default=None, description="As many as n: all outputs are returned.")


class ContentPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | _List[ContentPart] | None = None


class ChatRequest(Sampled):
    """The body of POST /v1/chat/completions."""

    messages: _List[ChatMessage] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: _Count | None = Field(default=None, le=MAX_LOGPROBS)
    max_completion_tokens: int | None = None


class TokenizeRequest(Fields):
    """The body of POST /tokenize: a prompt, or messages."""

    prompt: str | None = None
    messages: _List[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Fields):
    """The body of POST /detokenize."""

    tokens: _TokenIds


class ErrorDetails(BaseModel):
    """Why a request failed."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The body of every answer from status 400 on."""

    error: ErrorDetails
