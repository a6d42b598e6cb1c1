"""`Generator`: the prompts of one API request through the engine, all together or piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from dynskip.async_llm import AsyncLLM, Piece
from dynskip.engine.request import RequestError, RequestOutput
from dynskip.sampling import SamplingParams
from dynskip.serving.depths import Depth
from dynskip.serving.errors import APIError, told
from dynskip.serving.limits import Admission
from dynskip.serving.metrics import ServerMetrics


@dataclass(frozen=True)
class Job:
    """What an API request asks of the engine.

    prompts: token ids, each with its parameters. field: where they stand. split_guessed: as in `AsyncLLM.stream`.
    """

    prompts: Sequence[tuple[list[int], SamplingParams]]
    depth: Depth
    field: str
    split_guessed: bool = False

    @property
    def num_outputs(self) -> int:
        """Of all prompts together."""
        return sum(params.n for _, params in self.prompts)


class Generator:
    """Runs jobs. One that fails, or whose consumer goes away, ends alone, and all of its prompts with it."""

    def __init__(self, served: AsyncLLM, admission: Admission, metrics: ServerMetrics) -> None:
        self._served = served
        self._admission = admission
        self._metrics = metrics

    async def outputs(self, job: Job) -> list[RequestOutput]:
        """What each prompt becomes. Raises APIError for bad input, and where a request ends by an error."""
        with self._running(job) as ended:
            tasks = [asyncio.ensure_future(self._output(job, index, ended)) for index in range(len(job.prompts))]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                await _cancel(tasks)

    async def pieces(self, job: Job) -> AsyncGenerator[tuple[int, Piece]]:
        """The pieces of all prompts as they come, with the number of the prompt; errors as in `outputs`."""
        path, draft = job.depth.named.path, job.depth.draft
        streams = [
            self._served.stream(prompt, params, path, draft=draft, split_guessed=job.split_guessed)
            for prompt, params in job.prompts
        ]
        with self._running(job) as ended:
            async with aclosing(_merged(streams)) as pieces:
                async for index, piece in pieces:
                    if piece.output is not None:
                        self._ended(piece.output, ended)
                    yield index, piece

    async def _output(self, job: Job, index: int, ended: list[RequestOutput]) -> RequestOutput:
        prompt, params = job.prompts[index]
        output = await self._served.generate(prompt, params, job.depth.named.path, draft=job.depth.draft)
        self._ended(output, ended)
        return output

    def _ended(self, output: RequestOutput, ended: list[RequestOutput]) -> None:
        if output.finish_reason == "abort":
            raise APIError(503, "The server is stopping.", code="stopping")
        ended.append(output)
        self._metrics.finished(output)
        self._admission.ended(output.latency_s)

    @contextmanager
    def _running(self, job: Job) -> Iterator[list[RequestOutput]]:
        """Holds a place for the job and counts how it ends: what has ended by itself is put into the list.

        What a client is to be told becomes an APIError.
        """
        ended: list[RequestOutput] = []
        reason = None
        with self._admission.hold(job.num_outputs):
            try:
                yield ended
            except RequestError as error:
                reason = "error"
                raise told(error, job.field) from error
            except (TypeError, ValueError) as error:  # refused by the engine, or a bug
                raise told(error, job.field) from error
            except BaseException:  # the client has gone away, or the server stops
                reason = "abort"
                raise
            finally:
                num_left = job.num_outputs - sum(len(output.samples) for output in ended)
                if reason is not None and num_left:
                    self._metrics.ended(reason, num_left)


async def _merged(streams: Sequence[AsyncGenerator[Piece]]) -> AsyncGenerator[tuple[int, Piece]]:
    """The pieces of all streams as they come, with the number of the stream; the first error ends all of them."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for piece in stream:
                yield 0, piece
        return
    arrived: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()
    tasks = [asyncio.ensure_future(_feed(arrived, index, stream)) for index, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            index, item = await arrived.get()
            if item is None:
                num_open -= 1
                await tasks[index]  # raises what its stream has raised
            else:
                yield index, item
    finally:
        await _cancel(tasks)


async def _feed(arrived: asyncio.Queue[tuple[int, Piece | None]], index: int, stream: AsyncGenerator[Piece]) -> None:
    """Put the pieces of ``stream`` into the queue, and None behind the last."""
    try:
        async with aclosing(stream):
            async for piece in stream:
                arrived.put_nowait((index, piece))
    finally:
        arrived.put_nowait((index, None))


async def _cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
