"""The asyncio front: the outputs of `LLM.generate`, to many consumers at once, whatever becomes of any of them."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import io
import signal
import sys
import threading
import time
import warnings
from collections.abc import Coroutine, Iterator
from contextlib import aclosing
from typing import Any

import pytest
import torch
from drafts import DRAFTS, draw_lengths
from models import NUM_LAYERS, random_prompts, tiny_model, word_tokenizer
from torch import Tensor

from dynskip import LLM, AsyncLLM, Engine, LayerPath, RequestError, SamplingParams
from dynskip.async_llm import Piece
from dynskip.costs.step_costs import StepCosts
from dynskip.engine.worker import EngineWorker, MetricsWarning
from dynskip.speculation.draft import ENTRIES, Draft, DraftEntries

COSTS = dataclasses.replace(StepCosts.h200(), num_layers=NUM_LAYERS)
FULL = LayerPath.full(NUM_LAYERS)
PATHS = [FULL, LayerPath.uniform(NUM_LAYERS, 3), LayerPath.uniform(NUM_LAYERS, 2)]
LONG = SamplingParams(max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    """A tiny model with a tokenizer, whose rows do not depend on their neighbours."""
    return LLM(tiny_model(deterministic=True), word_tokenizer())


def serve(llm: LLM, **options: Any) -> AsyncLLM:
    """An AsyncLLM of a small pool."""
    return AsyncLLM(llm, **{"batch": 4, "costs": COSTS, **options})


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What the coroutine returns, in an event loop of its own. None of these tests may hang."""
    return asyncio.run(asyncio.wait_for(coroutine, timeout=60))


async def collect(served: AsyncLLM, prompt: Any, params: SamplingParams, path: Any = None) -> list[Piece]:
    """All pieces of a stream."""
    return [piece async for piece in served.stream(prompt, params, path)]


async def until_released(served: AsyncLLM) -> Any:
    """The stats once no request is left."""
    while (stats := await served.stats()).num_running or stats.num_waiting or stats.num_prefilling:
        await asyncio.sleep(0.01)
    assert stats.kv_bytes == 0
    return stats


def num_engine_threads() -> int:
    """How many engines run."""
    return sum(thread.name == "dynskip-engine" for thread in threading.enumerate())


class Breaks:
    """A controller of tokens that raises in the step in which its token of position 6 comes."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def active(self, layer: int, hidden_states: Tensor, context: Any) -> Tensor:
        if int(context.position_ids.max()) >= 6:
            raise self.error
        return torch.ones(len(hidden_states), dtype=torch.bool)


# What a caller hands over


def test_a_caller_may_reuse_its_buffers_once_it_has_called(llm: LLM) -> None:
    (prompt,) = random_prompts([5])
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    mask = torch.rand(12, NUM_LAYERS, generator=torch.Generator().manual_seed(1)) < 0.6
    expected = llm.generate([prompt], params, mask[None])[0].token_ids
    assert llm.generate([prompt], params)[0].token_ids != expected, "the layers make a difference"

    async def main() -> None:
        async with serve(llm) as served:
            ids, buffer = list(prompt), mask.clone()
            stream, output = served.stream(ids, params, buffer), served.generate(ids, params, buffer)
            ids[:] = [1] * 5
            buffer.fill_(True)
            assert [token async for piece in stream for token in piece.token_ids] == expected
            assert (await output).token_ids == expected
            listed = [FULL]
            output = served.generate(prompt, params, listed)
            listed.append(FULL)
            assert len((await output).token_ids) == 6

    run(main())


# Outputs


@pytest.mark.parametrize("entries", ENTRIES)
def test_drafts_give_what_generate_gives(entries: DraftEntries, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_lengths(monkeypatch)
    prompts = random_prompts([3, 5, 7, 4])
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
    options: Any = {"draft": DRAFTS[3].path, "draft_entries": entries}
    expected = llm.generate(prompts, params)

    async def main() -> list[tuple[list[Piece], Any]]:
        async def both(prompt: list[int]) -> tuple[list[Piece], Any]:
            pieces = [piece async for piece in served.stream(prompt, params, **options)]
            return pieces, await served.generate(prompt, params, **options)

        async with serve(llm) as served:
            return await asyncio.gather(*map(both, prompts))

    for (pieces, output), wanted in zip(run(main()), expected, strict=True):
        assert [token for piece in pieces for token in piece.token_ids] == wanted.token_ids == output.token_ids
        assert output.draft == Draft(DRAFTS[3].path, entries) and output.num_drafted >= output.num_accepted
        guessed = [flag for piece in pieces for flag in piece.was_guessed or ()]
        streamed = pieces[-1].output
        assert streamed is not None and len(guessed) == 12 and sum(guessed) == streamed.num_accepted > 0


@pytest.mark.parametrize("policy", ["cohort", "lockstep", "by_path"])
def test_many_consumers_get_what_generate_gives(llm: LLM, policy: str) -> None:
    prompts = random_prompts([3, 5, 7, 4] * 5)
    paths = [PATHS[index % 3] for index in range(20)]
    params = [SamplingParams(max_tokens=5 + index % 9, temperature=index % 2, seed=index) for index in range(20)]
    expected = llm.generate(prompts, params, paths)

    async def main() -> tuple[list[list[Piece]], list[Any]]:
        async with serve(llm, policy=policy) as served:
            requests = list(zip(prompts, params, paths, strict=True))
            streams = [collect(served, *request) for request in requests]
            outputs = [served.generate(*request) for request in requests]
            return await asyncio.gather(*streams), await asyncio.gather(*outputs)

    streams, outputs = run(main())
    for pieces, output, wanted in zip(streams, outputs, expected, strict=True):
        assert [token for piece in pieces for token in piece.token_ids] == wanted.token_ids == output.token_ids
        assert "".join(piece.text or "" for piece in pieces) == wanted.text == output.text
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [wanted.finish_reason]
        assert len({piece.request_id for piece in pieces}) == 1
        assert output.finish_reason == wanted.finish_reason
        assert output.path == wanted.path
    assert any(len(pieces) > 3 for pieces in streams), "tokens come while the request runs"


def test_samples_and_logprobs_come_with_their_texts(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=1.0, n=3, logprobs=2, seed=5)
    (wanted,) = llm.generate(["w007 w008"], params)

    async def main() -> Any:
        async with serve(llm) as served:
            return await served.generate("w007 w008", params)

    output = run(main())
    assert output.texts == tuple(sample.text for sample in wanted.samples)
    assert [sample.token_ids for sample in output.samples] == [sample.token_ids for sample in wanted.samples]
    assert output.logprobs == wanted.logprobs
    assert output.latency_s >= output.ttft_s >= output.queue_s >= 0


def test_a_stop_text_ends_the_stream_before_it(llm: LLM) -> None:
    (unstopped,) = llm.generate(["w007 w008"], LONG)
    words = (unstopped.text or "").split()
    params = dataclasses.replace(LONG, stop=" ".join(words[5:7]))

    async def main() -> tuple[list[Piece], Any]:
        async with serve(llm) as served:
            return await collect(served, "w007 w008", params), await served.generate("w007 w008", params)

    pieces, output = run(main())
    assert "".join(piece.text or "" for piece in pieces) == output.text == " ".join(words[:5]) + " "
    assert pieces[-1].finish_reason == output.finish_reason == "stop"


def test_parameters_that_change_logits_and_texts(llm: LLM) -> None:
    changes: dict[str, Any] = {"repetition_penalty": 1e9, "logit_bias": {2: float("-inf")}, "prompt_logprobs": 2}
    (unstopped,) = llm.generate(["w007 w008"], dataclasses.replace(LONG, **changes))
    words = (unstopped.text or "").split()
    shown: dict[str, Any] = {"include_stop_str_in_output": True, "skip_special_tokens": False, "min_tokens": 4}
    params = dataclasses.replace(LONG, stop=[words[2], f"{words[5]} {words[6]}"], **changes, **shown)
    (wanted,) = llm.generate(["w007 w008"], params)

    async def main() -> tuple[list[Piece], Any]:
        async with serve(llm) as served:
            return await collect(served, "w007 w008", params), await served.generate("w007 w008", params)

    pieces, output = run(main())
    assert "".join(piece.text or "" for piece in pieces) == output.text == wanted.text
    assert (
        output.finish_reason == "stop" and output.prompt_logprobs == wanted.prompt_logprobs == unstopped.prompt_logprobs
    )
    assert wanted.text is not None and wanted.text.endswith(f"{words[5]} {words[6]}")


def test_without_a_tokenizer_there_is_no_text() -> None:
    async def main() -> tuple[list[Piece], Any]:
        async with serve(LLM(tiny_model())) as served:
            return await collect(served, [5, 6, 7], LONG), await served.generate([5, 6, 7], LONG)

    pieces, output = run(main())
    assert {piece.text for piece in pieces} == {output.text} == {None}
    assert [token for piece in pieces for token in piece.token_ids] == output.token_ids


def test_a_slow_consumer_gets_all_tokens_in_fewer_pieces(llm: LLM) -> None:
    (wanted,) = llm.generate([[5, 6, 7]], LONG)

    async def main() -> list[Piece]:
        pieces = []
        async with serve(llm) as served:
            async for piece in served.stream([5, 6, 7], LONG):
                pieces.append(piece)
                if len(pieces) == 1:
                    while (await served.stats()).num_running:
                        await asyncio.sleep(0.01)
        return pieces

    pieces = run(main())
    assert len(pieces) == 2
    assert pieces[0].token_ids + pieces[1].token_ids == wanted.token_ids


def test_one_front_serves_several_event_loops(llm: LLM) -> None:
    (wanted,) = llm.generate([[5, 6, 7]], LONG)
    served = serve(llm)
    for _ in range(2):
        assert run(served.generate([5, 6, 7], LONG)).token_ids == wanted.token_ids
    run(served.close())


# Consumers that go away


def test_a_consumer_that_stops_iterating_aborts_its_request(llm: LLM) -> None:
    async def main() -> Any:
        async with serve(llm) as served:
            async for piece in served.stream([5, 6, 7], LONG):
                assert piece.finish_reason is None
                break
            async with aclosing(served.stream([5, 6, 7], LONG)) as stream:
                await anext(stream)
            return await until_released(served)

    stats = run(main())
    assert (stats.num_aborted, stats.num_finished) == (2, 0)


def test_a_cancelled_consumer_aborts_its_request(llm: LLM) -> None:
    (wanted,) = llm.generate([[8, 9, 10]], LONG)

    async def main() -> tuple[Any, Any]:
        async with serve(llm) as served:
            others = asyncio.gather(*(served.generate([8, 9, 10], LONG) for _ in range(3)))
            tasks = [
                asyncio.create_task(collect(served, [5, 6, 7], LONG)),
                asyncio.create_task(served.generate([5, 6, 7], LONG)),
            ]
            at_once = asyncio.create_task(served.generate([5, 6, 7], LONG))  # cancelled before it has begun
            at_once.cancel()
            while (await served.stats()).num_running < 5:
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, at_once, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)
            return await others, await until_released(served)

    others, stats = run(main())
    assert [output.token_ids for output in others] == [wanted.token_ids] * 3
    assert (stats.num_aborted, stats.num_finished) == (2, 3)


def test_a_request_that_is_cancelled_while_it_is_added_is_not_left_behind(llm: LLM) -> None:
    class Slow:
        def __init__(self) -> None:
            self.has_begun = threading.Event()
            self.may_go_on = threading.Event()

        def choose_paths(self, prompt_ids: Any, prompt_embeddings: Any) -> list[LayerPath]:
            self.has_begun.set()
            assert self.may_go_on.wait(60)
            return [FULL]

    async def main() -> Any:
        slow = Slow()
        async with serve(llm) as served:
            task = asyncio.create_task(served.generate([5, 6, 7], LONG, slow))
            await asyncio.to_thread(slow.has_begun.wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            slow.may_go_on.set()
            return await until_released(served)

    assert run(main()).num_aborted == 1


def test_the_requests_of_a_closed_event_loop_are_aborted(llm: LLM) -> None:
    worker = EngineWorker(Engine(llm.model, costs=COSTS, batch=4))
    loop = asyncio.new_event_loop()

    async def submit() -> Any:
        ticket = worker.submit(
            lambda engine, on_token: engine.add_request([5, 6, 7], LONG, None, on_token=on_token), True
        )
        await ticket.next()

    loop.run_until_complete(submit())
    loop.close()
    begin_s = time.monotonic()
    while (stats := worker.call(Engine.stats).result(60)).num_running and time.monotonic() < begin_s + 60:
        time.sleep(0.01)
    worker.close()
    assert stats.num_aborted == 1
    assert stats.kv_bytes == 0


# Ends


def test_abort_ends_a_request_for_its_consumer(llm: LLM) -> None:
    async def main() -> tuple[list[Piece], Any, Any]:
        async with serve(llm) as served:
            pieces = []
            stream = served.stream([5, 6, 7], LONG, request_id="mine")
            async for piece in stream:
                pieces.append(piece)
                if len(pieces) == 1:
                    output = await served.abort("mine")
            with pytest.raises(
                ValueError, match="abort: request_id must be of a request that has not ended, got 'mine'"
            ):
                await served.abort("mine")
            return pieces, output, await until_released(served)

    pieces, output, stats = run(main())
    assert pieces[-1].finish_reason == output.finish_reason == "abort"
    assert [token for piece in pieces for token in piece.token_ids] == output.token_ids
    assert 0 < len(output.token_ids) < 40
    assert stats.num_aborted == 1


def test_closing_aborts_what_has_not_ended(llm: LLM) -> None:
    async def main() -> None:
        served = serve(llm)
        tasks = [asyncio.create_task(collect(served, [5, 6, 7], LONG)), asyncio.create_task(served.generate([5], LONG))]
        while (await served.stats()).num_running < 2:
            await asyncio.sleep(0)
        await served.close()
        pieces, output = await asyncio.gather(*tasks)
        assert pieces[-1].finish_reason == output.finish_reason == "abort"
        await served.close()
        for call in (served.generate([5], LONG), served.stats(), served.abort(0), collect(served, [5], LONG)):
            with pytest.raises(RequestError, match="AsyncLLM: it must be open, got one that was closed"):
                await call

    run(main())
    assert num_engine_threads() == 0


def test_a_front_that_nobody_holds_ends_its_thread(llm: LLM) -> None:
    served = serve(llm)
    assert run(served.generate([5, 6, 7], LONG)).finish_reason == "length"
    assert num_engine_threads() == 1
    del served
    gc.collect()
    assert num_engine_threads() == 0


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises, as in a foreground process: shells let what they start in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_everything(llm: LLM) -> None:
    """Ctrl-C, as asyncio takes it: the main task is cancelled, and KeyboardInterrupt leaves asyncio.run."""
    fronts = []

    async def main() -> None:
        async with serve(llm) as served:
            fronts.append(served)
            other = asyncio.create_task(collect(served, [5, 6, 7], LONG))
            async for _ in served.stream([5, 6, 7], LONG):
                signal.raise_signal(signal.SIGINT)
                # The cancellation arrives here; another turn would send another signal.
                await asyncio.gather(other, asyncio.sleep(60))

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert num_engine_threads() == 0
    with pytest.raises(RequestError, match="closed"):
        asyncio.run(fronts[0].stats())


# Faults


def test_a_controller_that_raises_ends_its_request_only(llm: LLM) -> None:
    (wanted,) = llm.generate([[5, 6, 7]], LONG)

    async def main() -> tuple[list[Any], Any]:
        async with serve(llm) as served:
            calls = [
                served.generate([5, 6, 7], LONG),
                served.generate([5, 6, 7], LONG, Breaks(ZeroDivisionError("mine"))),
                collect(served, [5, 6, 7], LONG, Breaks(ZeroDivisionError("yours"))),
            ]
            return await asyncio.gather(*calls, return_exceptions=True), await until_released(served)

    (good, bad, bad_stream), stats = run(main())
    assert good.token_ids == wanted.token_ids
    for error, function, cause in ((bad, "generate", "mine"), (bad_stream, "stream", "yours")):
        assert isinstance(error, RequestError)
        assert str(error) == f"{function}: the request ended by ZeroDivisionError('{cause}')."
        assert isinstance(error.__cause__, ZeroDivisionError)
    assert (stats.num_finished, stats.num_aborted) == (1, 2)


def test_tokens_before_an_error_are_given_out(llm: LLM) -> None:
    async def main() -> list[Piece]:
        pieces: list[Piece] = []

        async def consume(served: AsyncLLM) -> None:
            async for piece in served.stream([5, 6, 7], LONG, Breaks(ZeroDivisionError())):
                pieces.append(piece)  # noqa: PERF401  # a comprehension would lose what came before the error

        async with serve(llm) as served:
            with pytest.raises(RequestError, match="stream: the request ended by ZeroDivisionError"):
                await consume(served)
        return pieces

    pieces = run(main())
    # Tokens of positions 3 to 6: the step in which the last of them runs raises.
    assert sum(len(piece.token_ids) for piece in pieces) == 4
    assert {piece.finish_reason for piece in pieces} == {None}


def test_a_controller_that_cannot_choose_raises_in_its_caller(llm: LLM) -> None:
    class Chooses:
        def choose_paths(self, prompt_ids: Any, prompt_embeddings: Any) -> list[LayerPath]:
            raise ZeroDivisionError("no path")

    async def main() -> None:
        async with serve(llm) as served:
            for call in (served.generate([5], LONG, Chooses()), collect(served, [5], LONG, Chooses())):
                with pytest.raises(ZeroDivisionError, match="no path"):
                    await call
            assert (await served.generate([5], LONG)).finish_reason == "length"

    run(main())


def broken(engine: Engine) -> None:
    """Let the scheduler of ``engine`` fail in the fifth step from now."""
    schedule, num_steps = engine.scheduler.schedule, 0

    def fail() -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 5:
            raise ArithmeticError("the books are wrong")
        return schedule()

    engine.scheduler.schedule = fail  # type: ignore[method-assign]


@pytest.mark.parametrize("death", ["scheduler", "exit"])
def test_all_who_wait_hear_of_the_death_of_the_engine(llm: LLM, death: str) -> None:
    async def main() -> None:
        async with serve(llm) as served:
            calls = [served.generate([5, 6, 7], LONG), collect(served, [5, 6, 7], LONG)]
            if death == "scheduler":
                await asyncio.wrap_future(served._worker.call(broken))
                cause: type[BaseException] = ArithmeticError
            else:
                calls.append(served.generate([5, 6, 7], LONG, Breaks(SystemExit(3))))
                cause = SystemExit
            errors = await asyncio.gather(*calls, return_exceptions=True)
            for call in (served.generate([5], LONG), served.stats(), served.abort(0), collect(served, [5], LONG)):
                errors += await asyncio.gather(call, return_exceptions=True)
            assert len(errors) >= 6
            for error in errors:
                assert isinstance(error, RequestError), error
                assert "AsyncLLM: the engine's thread must be alive" in str(error)
                assert isinstance(error.__cause__, cause)

    run(main())
    assert num_engine_threads() == 0


def test_a_call_that_ends_the_engine_is_told(llm: LLM) -> None:
    class Leaves:
        def choose_paths(self, prompt_ids: Any, prompt_embeddings: Any) -> list[LayerPath]:
            raise SystemExit(1)

    async def main() -> None:
        async with serve(llm) as served:
            with pytest.raises(RequestError, match="must be alive, got SystemExit"):
                await served.generate([5], LONG, Leaves())

    run(main())


# Bad input


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ("", {}, ValueError, "prompt must hold at least one token, got empty text"),
        (7, {}, TypeError, "prompt must be text or a list of token ids, got int"),
        ([], {}, ValueError, "add_request: token_ids must"),
        ([5000], {}, ValueError, "add_request: token_ids must"),
        ([5], {"params": {"max_tokens": 3}}, TypeError, "params must be SamplingParams, got dict"),
        ([5], {"params": SamplingParams(max_tokens=64)}, ValueError, "add_request: token_ids must"),
        ([5], {"path": LayerPath.full(12)}, ValueError, "paths must be for 6 layers, got a path for 12"),
        ([5], {"path": "full"}, TypeError, "paths must be a LayerPath"),
        ([5], {"kv_policy": "evict"}, ValueError, "kv_policy must be left out"),
        ([5], {"prompt_depth": "half"}, ValueError, "prompt_depth must be 'path' or 'full'"),
    ],
)
def test_bad_input_raises_in_the_caller(
    llm: LLM, prompt: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    async def main() -> None:
        async with serve(llm) as served:
            with pytest.raises(error, match=message):
                await served.generate(prompt, **options)
            with pytest.raises(error, match=message):
                await anext(served.stream(prompt, **options))
            stats = await until_released(served)
            assert stats.num_aborted == stats.num_finished == 0

    run(main())


def test_an_id_in_use_is_refused(llm: LLM) -> None:
    async def main() -> None:
        async with serve(llm) as served:
            first = asyncio.create_task(served.generate([5, 6, 7], LONG, request_id="mine"))
            await asyncio.sleep(0)
            with pytest.raises(ValueError, match="request_id must be new, got 'mine'"):
                await served.generate([5], LONG, request_id="mine")
            assert (await first).finish_reason == "length"

    run(main())


def test_a_stream_has_every_output_with_its_index_and_logprobs(llm: LLM) -> None:
    params = SamplingParams(max_tokens=9, temperature=1.0, n=3, seed=4, logprobs=2)
    (expected,) = llm.generate(["w007 w008"], params)

    async def main() -> list[Piece]:
        async with serve(llm) as served:
            return await collect(served, "w007 w008", params)

    pieces = run(main())
    for index, sample in enumerate(expected.samples):
        own = [piece for piece in pieces if piece.index == index]
        assert [token for piece in own for token in piece.token_ids] == sample.token_ids
        assert [each for piece in own for each in piece.logprobs or []] == sample.logprobs
        assert "".join(piece.text or "" for piece in own) == sample.text
        assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + [sample.finish_reason]
    assert [piece.output is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert pieces[-1].output == dataclasses.replace(
        expected, text=None, samples=tuple(dataclasses.replace(sample, text=None) for sample in expected.samples)
    )


def test_what_was_not_asked_for_is_not_in_a_piece(llm: LLM) -> None:
    async def main() -> list[Piece]:
        async with serve(llm) as served:
            assert (served.pool, served.max_context_len) == (16, 64)
            return await collect(served, [5, 6], SamplingParams(max_tokens=3))

    assert all(piece.logprobs is None and piece.index == 0 for piece in run(main()))


def test_text_needs_a_tokenizer() -> None:
    async def main() -> None:
        async with serve(LLM(tiny_model())) as served:
            with pytest.raises(ValueError, match="generate: prompt must be token ids, got text and no tokenizer"):
                await served.generate("w007")

    run(main())


def test_options_nobody_knows_are_refused(llm: LLM) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        serve(llm, batchsize=4)


def test_a_live_line_that_cannot_be_shown_costs_no_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)

    async def main() -> None:
        served = serve(llm, live=True, metrics_every_s=1e-9)
        terminal.close()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            output = await served.generate([5, 6], LONG)
            await until_released(served)
        assert len(output.token_ids) == 40
        assert [warning.category for warning in caught] == [MetricsWarning]
        engine = served._worker._engine
        await served.close()
        assert not engine._is_open

    run(main())
