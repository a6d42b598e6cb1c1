"""`Chunks`: from the pieces of a request's outputs to the chunks of its stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from dynskip.async_llm import Piece
from dynskip.engine.request import RequestOutput
from dynskip.serving.answers import Characters, TokenTexts, delta_of, facts, usage
from dynskip.serving.planning import Plan
from dynskip.serving.protocol import ChatRequest, StreamOptions


class Chunks:
    """The stream that answers ``plan``. texts: of single tokens, for log-probabilities."""

    def __init__(self, plan: Plan, texts: TokenTexts) -> None:
        self._plan = plan
        self._texts = texts
        self._num_tokens = 0
        self._characters: dict[int, Characters] = {}  # by choice: those of its tokens, once it has begun
        self._outputs: list[RequestOutput] = []

    async def of(self, pieces: AsyncGenerator[tuple[int, Piece]]) -> AsyncGenerator[dict[str, Any]]:
        """The chunks, in the order of ``pieces``. The last one has the object ``dynskip``."""
        plan = self._plan
        options = plan.body.stream_options or StreamOptions()
        async with aclosing(pieces):
            async for number, piece in pieces:
                if piece.output is not None:
                    self._outputs.append(piece.output)
                is_end = piece.output is not None and len(self._outputs) == len(plan.job.prompts)
                for choice in self._choices(number, piece):
                    others: dict[str, Any] = {}
                    if options.continuous_usage_stats:
                        others["usage"] = self._usage()
                    elif options.include_usage:
                        others["usage"] = None
                    if is_end and choice["finish_reason"] is not None and not options.include_usage:
                        others["dynskip"] = facts(plan.job.depth.named, self._outputs)
                    yield plan.envelope.chunk([choice], **others)
        if options.include_usage:
            ran = facts(plan.job.depth.named, self._outputs)
            yield plan.envelope.chunk([], usage=self._usage(self._outputs), dynskip=ran)

    def _usage(self, outputs: Sequence[RequestOutput] | None = None) -> dict[str, Any]:
        return usage(self._plan.num_prompt_tokens, self._num_tokens, outputs)

    def _choices(self, number: int, piece: Piece) -> list[dict[str, Any]]:
        """What ``piece`` adds to its output; before the first one of a chat comes its role."""
        plan = self._plan
        prompt, params = plan.job.prompts[number]
        index = number * params.n + piece.index
        is_first = index not in self._characters
        if is_first:
            self._characters[index] = Characters(self._texts)
        text, tokens, logprobs = piece.text or "", piece.token_ids, piece.logprobs
        finish_reason = piece.finish_reason
        if plan.drops_output:
            text, tokens, logprobs = "", [], None
            finish_reason = None if finish_reason is None else "length"
        self._num_tokens += len(tokens)
        if is_first and plan.echoes is not None:
            text = plan.echoes[number] + text
        shown = None
        if logprobs is not None and isinstance(plan.body, ChatRequest):
            shown = self._texts.chat_logprobs(tokens, logprobs, plan.body.top_logprobs or 0)
        elif logprobs is not None:
            offsets = self._characters[index].add(tokens, plan.hides_special)
            shown = self._texts.completion_logprobs(tokens, logprobs, offsets)
        choice = delta_of(plan.kind, index, text, finish_reason, shown)
        if plan.body.return_token_ids:
            choice["token_ids"] = tokens
            if piece.was_guessed is not None:
                choice["was_guessed"] = piece.was_guessed[: len(tokens)]
            if is_first:
                choice["prompt_token_ids"] = prompt
        if is_first and plan.kind == "chat":
            return [delta_of(plan.kind, index, "", None, role=True), choice]
        return [choice]
