"""`Planner`: from the body of a request to a `Plan`, with everything read and checked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

from dynskip.arguments import shown
from dynskip.sampling import SamplingParams
from dynskip.serving.answers import Envelope, Kind
from dynskip.serving.depths import Depth, DepthTable
from dynskip.serving.errors import CONTEXT_LENGTH, bad_request, told, too_long
from dynskip.serving.fields import DEFAULT_MAX_TOKENS, check_others, sampling_params
from dynskip.serving.generation import Job
from dynskip.serving.limits import Admission
from dynskip.serving.prompts import PromptReader, prompts_in
from dynskip.serving.protocol import ChatRequest, CompletionRequest, Sampled


@dataclass(frozen=True)
class Plan:
    """A request that was read and checked.

    has_texts: whether its prompts are texts, not token ids.
    echoes: the text before the outputs of each prompt; None for no echo. drops_output: nothing but the echo is asked
    for; the token that the engine makes all the same is left out.
    """

    kind: Kind
    body: Sampled
    envelope: Envelope
    job: Job
    echoes: Sequence[str] | None = None
    drops_output: bool = False
    has_texts: bool = True

    @property
    def hides_special(self) -> bool:
        """Whether outputs are shown without special tokens."""
        return self.body.skip_special_tokens is not False

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts together."""
        return sum(len(prompt) for prompt, _ in self.job.prompts)


class Planner:
    """Reads requests. max_context_len: most tokens of a prompt and its output. admission: most outputs of a request."""

    def __init__(self, table: DepthTable, reader: PromptReader, max_context_len: int, admission: Admission) -> None:
        self._table = table
        self._reader = reader
        self._admission = admission
        self._max_context_len = max_context_len

    async def completion(self, body: CompletionRequest, request_id: str) -> Plan:
        """What ``body`` asks for; an APIError names what is wrong."""
        check_others(body)
        if body.best_of not in (None, body.n or 1):
            raise bad_request("best_of: it must be n, for all outputs are returned, got another.", "best_of")
        if body.echo and body.logprobs is not None and body.stream:
            raise bad_request("logprobs: it must be left out of a stream with echo, got both.", "logprobs")
        drops_output = bool(body.echo) and body.max_tokens == 0
        if drops_output and body.min_tokens:
            raise bad_request(
                f"min_tokens: it must be at most max_tokens, 0, got {shown(body.min_tokens)}.", "min_tokens"
            )
        given = 1 if drops_output else body.max_tokens
        envelope, depth, params = self._begun("completion", body, request_id, given)
        given_prompts = prompts_in(body.prompt)
        self._admission.check(len(given_prompts) * params.n, "n" if params.n > 1 else "prompt")
        prompts = await self._reader.completions(given_prompts)
        rooms = [self._room(len(prompt), given, "prompt") for prompt in prompts]
        try:
            bounded = [
                replace(params, max_tokens=min(DEFAULT_MAX_TOKENS, room) if given is None else given) for room in rooms
            ]
        except ValueError as error:  # parameters that do not go together with so few
            raise told(error) from error
        job = Job(list(zip(prompts, bounded, strict=True)), depth, "prompt", bool(body.return_token_ids))
        echoes = await self._echoes(body.prompt, prompts) if body.echo else None
        has_texts = isinstance(body.prompt, str) or _is_texts(body.prompt)
        return Plan("completion", body, envelope, job, echoes, drops_output, has_texts)

    async def chat(self, body: ChatRequest, request_id: str) -> Plan:
        """What ``body`` asks for; an APIError names what is wrong."""
        check_others(body)
        limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        given: int | None = getattr(body, limit)
        if given is not None and given < 1:
            raise bad_request(f"{limit}: it must be at least 1, got {shown(given)}.", limit)
        envelope, depth, params = self._begun("chat", body, request_id, given)
        prompt = await self._reader.chat(body.messages)
        self._room(len(prompt), given, "messages", limit)
        job = Job([(prompt, params)], depth, "messages", bool(body.return_token_ids))
        return Plan("chat", body, envelope, job)

    def _begun(
        self, kind: Kind, body: Sampled, request_id: str, max_tokens: int | None
    ) -> tuple[Envelope, Depth, SamplingParams]:
        """What needs no tokenizer."""
        if body.stream_options is not None and not body.stream:
            raise bad_request("stream_options: it must be left out without stream, got a value.", "stream_options")
        if body.prompt_logprobs is not None and body.stream:
            raise bad_request("prompt_logprobs: it must be left out of a stream, got a value.", "prompt_logprobs")
        depth = self._table.of(body.model, body.path, body.depth, body.draft)
        params = sampling_params(body, max_tokens)
        return Envelope(kind, request_id, int(time.time()), body.model or self._table.name), depth, params

    def _room(self, num_prompt: int, max_tokens: int | None, field: str, limit: str = "max_tokens") -> int:
        """The tokens that fit behind a prompt; an APIError where it, or what is asked for, does not fit."""
        longest = self._max_context_len
        if num_prompt >= longest:
            raise too_long(field, longest, num_prompt)
        if max_tokens is not None and num_prompt + max_tokens > longest:
            raise bad_request(
                f"{limit}: prompt and {limit} must be at most {longest} tokens together, got {num_prompt} and "
                f"{shown(max_tokens)}.",
                limit,
                CONTEXT_LENGTH,
            )
        return longest - num_prompt

    async def _echoes(
        self, given: str | list[int] | list[str] | list[list[int]], prompts: list[list[int]]
    ) -> list[str]:
        """The text of each prompt: as it was given, or of its token ids."""
        if isinstance(given, str):
            return [given]
        return given if _is_texts(given) else [await self._reader.text(prompt) for prompt in prompts]


def _is_texts(prompts: Sequence[object]) -> TypeGuard[list[str]]:
    return all(isinstance(prompt, str) for prompt in prompts)
