"""`Service`: what a server is made of, and its answers."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from dynskip.async_llm import AsyncLLM
from dynskip.engine.request import RequestOutput
from dynskip.serving.answers import Characters, TokenTexts, as_json, choice_of, facts, usage
from dynskip.serving.depths import DepthTable
from dynskip.serving.errors import as_api_error, internal_error
from dynskip.serving.generation import Generator
from dynskip.serving.limits import Admission
from dynskip.serving.metrics import ServerMetrics
from dynskip.serving.planning import Plan, Planner
from dynskip.serving.prompts import PromptReader
from dynskip.serving.protocol import ChatRequest, Sampled
from dynskip.serving.sse import DONE, EventStream, event, unless_gone
from dynskip.serving.streaming import Chunks

T = TypeVar("T")
Planned: TypeAlias = Callable[[], Coroutine[Any, Any, Plan]]


class Service:
    """served: the model and its engine. table: the depths on offer. max_queue: as in `Admission`."""

    def __init__(self, served: AsyncLLM, table: DepthTable, max_queue: int) -> None:
        self.served, self.table = served, table
        self.admission = Admission(served.pool, max_queue)
        self.metrics = ServerMetrics(table.name)
        self.reader = PromptReader(served.llm, served.max_context_len)
        self.planner = Planner(table, self.reader, served.max_context_len, self.admission)
        self.created = int(time.time())
        self._generator = Generator(served, self.admission, self.metrics)
        self._texts = TokenTexts(served.llm.tokenizer)

    def close(self) -> None:
        """End what the service has begun itself; ``served`` is the caller's."""
        self.reader.close()

    async def answer(self, body: Sampled, planned: Planned, request: Request) -> Response:
        """The answer to ``body``, whole or as a stream. What goes wrong before the first token is an APIError.

        planned: reads the request, once there is room for it.
        """
        if body.stream:
            first, chunks = await unless_gone(self._begun(planned), request.receive)
            return EventStream(_events(first, chunks))
        whole = await unless_gone(self._done(planned), request.receive)
        return Response(as_json(whole), media_type="application/json")

    async def read(self, work: Callable[[], Coroutine[Any, Any, T]], request: Request) -> T:
        """What ``work`` makes of a request's texts, while there is room for it, and somebody who waits for it."""
        with self.admission.read():
            return await unless_gone(work(), request.receive)

    async def _begun(self, planned: Planned) -> tuple[dict[str, Any], AsyncGenerator[dict[str, Any]]]:
        """The first chunk, which every request has, and those behind it."""
        with self.admission.read():
            plan = await planned()
        chunks = Chunks(plan, self._texts).of(self._generator.pieces(plan.job))
        return await anext(chunks), chunks

    async def _done(self, planned: Planned) -> dict[str, Any]:
        with self.admission.read():
            plan = await planned()
        return self._whole(plan, await self._generator.outputs(plan.job))

    def _whole(self, plan: Plan, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = [choice for number, output in enumerate(outputs) for choice in self._choices(plan, number, output)]
        num_tokens = sum(len(sample.token_ids) for output in outputs for sample in output.samples)
        others: dict[str, Any] = {
            "usage": usage(plan.num_prompt_tokens, 0 if plan.drops_output else num_tokens, outputs),
            "dynskip": facts(plan.job.depth.named, outputs),
        }
        if plan.kind == "chat":
            others |= self._of_prompt(plan, outputs[0])
        return plan.envelope.whole(choices, **others)

    def _choices(self, plan: Plan, number: int, output: RequestOutput) -> list[dict[str, Any]]:
        """The choices that the outputs of prompt ``number`` are."""
        choices = []
        for index, sample in enumerate(output.samples):
            text, tokens, logprobs = sample.text or "", sample.token_ids, sample.logprobs
            finish_reason = sample.finish_reason
            if plan.drops_output:
                text, tokens, logprobs, finish_reason = "", [], None if logprobs is None else [], "length"
            echo = "" if plan.echoes is None else plan.echoes[number]
            choice = choice_of(
                plan.kind,
                number * len(output.samples) + index,
                echo + text,
                finish_reason,
                self._logprobs(plan, output, tokens, logprobs),
            )
            if plan.body.return_token_ids:
                choice["token_ids"] = tokens
                if sample.was_guessed is not None:
                    choice["was_guessed"] = sample.was_guessed[: len(tokens)]
            if plan.kind == "completion":
                choice |= self._of_prompt(plan, output)
            choices.append(choice)
        return choices

    def _logprobs(
        self, plan: Plan, output: RequestOutput, tokens: list[int], logprobs: list[dict[int, float]] | None
    ) -> dict[str, Any] | None:
        """``logprobs`` of a choice of these tokens; None unless asked for."""
        if logprobs is None:
            return None
        if isinstance(plan.body, ChatRequest):
            return self._texts.chat_logprobs(tokens, logprobs, plan.body.top_logprobs or 0)
        characters = Characters(self._texts)
        if plan.echoes is None:
            return self._texts.completion_logprobs(tokens, logprobs, characters.add(tokens, plan.hides_special))
        # A text is sent back without what the tokenizer put around it, token ids with all that they stand for.
        offsets = characters.add(output.prompt_ids, plan.has_texts) + characters.add(tokens, plan.hides_special)
        of_prompt = _prompt_logprobs(output)
        return self._texts.completion_logprobs([*output.prompt_ids, *tokens], [*of_prompt, *logprobs], offsets)

    def _of_prompt(self, plan: Plan, output: RequestOutput) -> dict[str, Any]:
        """What an answer has of its prompt, where it was asked for."""
        found: dict[str, Any] = {}
        if plan.body.return_token_ids:
            found["prompt_token_ids"] = output.prompt_ids
        if plan.body.prompt_logprobs is not None:
            found["prompt_logprobs"] = self._texts.prompt_logprobs(_prompt_logprobs(output))
        return found


def _prompt_logprobs(output: RequestOutput) -> list[dict[int, float] | None]:
    found: list[dict[int, float] | None] | None = getattr(output, "prompt_logprobs", None)
    assert found is not None, "they were asked for"
    return found


async def _events(first: dict[str, Any], chunks: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[bytes]:
    """A stream's events: an error in its middle is data, and the end is said in any case."""
    async with aclosing(chunks):
        try:
            yield event(first)
            async for chunk in chunks:
                yield event(chunk)
        except Exception as error:
            found = as_api_error(error)
            yield event((found or internal_error()).body)
            yield DONE
            if found is None:
                raise  # a bug: the log has it
        else:
            yield DONE
