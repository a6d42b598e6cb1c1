"""`AsyncLLM`: many consumers in an event loop, one engine whose steps run in a thread of their own."""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections.abc import AsyncGenerator, Coroutine, Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from dynskip.causal_lm import CausalLM
from dynskip.engine.engine import Engine
from dynskip.engine.metrics import MetricsLog
from dynskip.engine.request import RequestError, RequestOutput
from dynskip.engine.stats import EngineStats
from dynskip.engine.text_stream import TextStream
from dynskip.engine.watch import Watched
from dynskip.engine.worker import Add, EngineWorker, NewToken
from dynskip.llm import LLM, Prompt
from dynskip.routing.routes import Paths
from dynskip.sampling import SamplingParams
from dynskip.speculation.draft import DraftEntries, Drafts


@dataclass(frozen=True)
class Piece:
    """What came of a request since its last piece.

    token_ids: new tokens, at least one but in the last piece of an output; several where the consumer is slower than
        the engine.
    text: new text; None without a tokenizer. It may be empty: a character that is not whole yet, and what could be the
        beginning of a stop text, come with a later piece.
    finish_reason: of the last piece of an output, see `RequestOutput`; else None.
    index: which of the ``n`` outputs it is a piece of.
    logprobs: those of the new tokens, as in `RequestOutput`; None unless asked for.
    was_guessed: of each new token, whether the draft had guessed it; None without a draft.
    output: with the last piece of all, what the request has become, its texts left out; else None.
    """

    request_id: Hashable
    token_ids: list[int]
    text: str | None
    finish_reason: str | None
    index: int = 0
    logprobs: list[dict[int, float]] | None = None
    was_guessed: list[bool] | None = None
    output: RequestOutput | None = None


TextOutput = RequestOutput


class AsyncLLM:
    """Serves any number of consumers at once from one model.

    model: an LLM, or what LLM takes for one. No other caller may run the model while requests are served.
    dtype, device, backend, adapter: as in LLM; not with an LLM or a model object.
    policy, engine_options: as in `Engine`.
    metrics_path, metrics_every_s, live: `path`, `every_s` and `live` of a `MetricsLog`.
    pool, max_context_len: most resident outputs, and most tokens of a request, as the engine has them.

    Use it in ``async with``, or `close` it. A consumer that stops iterating, or is cancelled, aborts its request.
    An exception in what belongs to a request, such as its controller, ends that request: its consumer gets a
    RequestError. Should the engine itself fail, all consumers get one, and so do all later calls.
    """

    def __init__(
        self,
        model: LLM | CausalLM | str | Path | None = None,
        policy: str = "cohort",
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        backend: str | None = None,
        adapter: str | Path | None = None,
        metrics_path: Path | str | None = None,
        metrics_every_s: float = 1.0,
        live: bool = False,
        **engine_options: Any,
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, "device": device, "backend": backend, "adapter": adapter}
        given = [name for name, value in options.items() if value is not None]
        if isinstance(model, LLM) and given:
            raise ValueError(f"AsyncLLM: {given[0]} must be left out with an LLM, got both.")
        self.llm = model if isinstance(model, LLM) else LLM(model, **options)
        engine = Engine(self.llm.model, policy=policy, tokenizer=self.llm.tokenizer, **engine_options)
        self.pool, self.max_context_len = engine.scheduler.policy.pool, engine.max_context_len
        log = MetricsLog(engine, metrics_path, metrics_every_s, live) if live or metrics_path is not None else None
        self._worker = EngineWorker(engine, log)
        weakref.finalize(self, self._worker.close)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        path: Paths = None,
        *,
        request_id: Hashable = None,
        kv_policy: str | None = None,
        prompt_depth: str = "path",
        draft: Drafts = None,
        draft_entries: DraftEntries = "own",
        split_guessed: bool = False,
    ) -> AsyncGenerator[Piece]:
        """The outputs of ``prompt`` piece by piece; other arguments as in ``Engine.add_request``.

        split_guessed: tokens that the draft had guessed come in pieces of their own, so that it is known of each text.
        Of several outputs each piece is of one, and the last pieces of all come together at the end.

        Arguments are copied by this call; the request is made when the first piece is asked for. Raises TypeError or
        ValueError for a prompt that is none; for other bad input these, or what a controller raises, before the first
        piece; RequestError where it ends by an error later. Tokens that were not asked for wait, n * max_tokens
        at most.
        """
        params = SamplingParams() if params is None else params
        options = {"request_id": request_id, "kv_policy": kv_policy, "prompt_depth": prompt_depth}
        options |= {"draft": draft, "draft_entries": draft_entries}
        return self._stream(self._adding("stream", prompt, params, path, **options), params, split_guessed)

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        path: Paths = None,
        *,
        request_id: Hashable = None,
        kv_policy: str | None = None,
        prompt_depth: str = "path",
        draft: Drafts = None,
        draft_entries: DraftEntries = "own",
    ) -> Coroutine[Any, Any, TextOutput]:
        """What ``prompt`` becomes, to be awaited; arguments as in ``Engine.add_request``, errors as in `stream`."""
        params = SamplingParams() if params is None else params
        options = {"request_id": request_id, "kv_policy": kv_policy, "prompt_depth": prompt_depth}
        options |= {"draft": draft, "draft_entries": draft_entries}
        return self._generate(self._adding("generate", prompt, params, path, **options), params)

    async def abort(self, request_id: Hashable) -> RequestOutput:
        """End a request where it stands; returns what it has become, which its consumer gets, too.

        Raises ValueError unless it is unfinished.
        """
        return await asyncio.wrap_future(self._worker.abort(request_id))

    def check(self) -> None:
        """Raise RequestError where the engine takes no request any more; waits for nothing."""
        self._worker.check()

    async def stats(self) -> EngineStats:
        """What the engine did since it was made, and what it holds now."""
        return await asyncio.wrap_future(self._worker.call(Engine.stats))

    async def watch(self, since: int = 0) -> Watched:
        """What the engine holds now, and its last steps; see `Engine.watch`."""
        return await asyncio.wrap_future(self._worker.call(lambda engine: engine.watch(since)))

    async def reset_prefix_cache(self) -> None:
        """Share nothing that has run so far with requests to come: see `Engine.reset_prefix_cache`."""
        await asyncio.wrap_future(self._worker.call(Engine.reset_prefix_cache))

    async def close(self) -> None:
        """Abort what has not ended, and give back the memory of the engine. Nothing works after it."""
        await asyncio.to_thread(self._worker.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _adding(self, function: str, prompt: Prompt, params: SamplingParams, path: Paths, **options: Any) -> Add:
        """What adds the request, with copies of prompt and path; raises TypeError or ValueError for no prompt."""
        prompt_ids = self.llm.encode(prompt, f"{function}: prompt")
        # The worker's thread looks at the path later than the caller may write to it.
        if isinstance(path, Tensor):
            path = path.detach().clone()
        elif isinstance(path, list):
            path = list(path)
        return lambda engine, on_token: engine.add_request(prompt_ids, params, path, on_token=on_token, **options)

    async def _stream(self, add: Add, params: SamplingParams, split_guessed: bool) -> AsyncGenerator[Piece]:
        ticket = self._worker.submit(add, streams=True)
        try:
            known_id = await asyncio.wrap_future(ticket.added)
            tokenizer = self.llm.tokenizer
            eos_ids = self.llm.model.eos_token_ids
            texts = [None if tokenizer is None else TextStream(tokenizer, params, eos_ids) for _ in range(params.n)]
            output = None
            while output is None:
                tokens, output = await ticket.next()
                has_failed = output is not None and output.error is not None
                for piece in _pieces(known_id, texts, tokens, None if has_failed else output, split_guessed):
                    yield piece
            _raise_error("stream", output)
        finally:
            self._worker.abandon(ticket)

    async def _generate(self, add: Add, params: SamplingParams) -> TextOutput:
        ticket = self._worker.submit(add, streams=False)
        try:
            await asyncio.wrap_future(ticket.added)
            output = await ticket.end()
        finally:
            self._worker.abandon(ticket)
        _raise_error("generate", output)
        return output.with_text(partial(self.llm.text, stop=params))


def _raise_error(function: str, output: RequestOutput) -> None:
    """Raise RequestError where the request has ended by an error."""
    if output.error is not None:
        raise RequestError(f"{function}: the request ended by {output.error!r}.") from output.error


def _pieces(
    request_id: Hashable,
    texts: list[TextStream | None],
    tokens: list[NewToken],
    output: RequestOutput | None,
    split_guessed: bool,
) -> Iterator[Piece]:
    """One piece for each output that has new tokens or, where the request has become ``output``, for each.

    split_guessed: as in `AsyncLLM.stream`; then an output may have several.
    """
    for index, text in enumerate(texts):
        own = [token for token in tokens if token.output == index]
        if not own and output is None:
            continue
        runs = [own]
        if split_guessed and own:
            runs = [list(run) for _, run in itertools.groupby(own, lambda token: token.was_guessed)]
        for number, run in enumerate(runs, 1):
            end = output if number == len(runs) else None
            token_ids = [token.token_id for token in run]
            new_text = None if text is None else text.add(token_ids)
            if text is not None and new_text is not None and end is not None:
                new_text += text.finish()
            logprobs = [token.logprobs for token in run if token.logprobs is not None]
            was_guessed = [token.was_guessed for token in run if token.was_guessed is not None]
            yield Piece(
                request_id,
                token_ids,
                new_text,
                None if end is None else end.samples[index].finish_reason,
                index,
                logprobs or None,
                was_guessed or None,
                end if index == len(texts) - 1 else None,
            )
