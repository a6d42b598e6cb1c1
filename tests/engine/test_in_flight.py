"""Tokens that the host reads one step late: nothing but the time of their arrival changes."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch
from faults import Broken, FailsAt, Interrupt, Once
from models import random_prompts, tiny_model, word_tokenizer
from streams import PATHS, Ask, Parity, assert_empty, check_slots, drawn, engine, greedy, model, same, serve

from dynskip import LLM, AsyncLLM, NonFiniteError, SamplingParams
from dynskip.engine.closed_batch import Generation
from dynskip.engine.engine import Engine
from dynskip.engine.in_flight import TokensInFlight
from dynskip.engine.model_runner import ModelRunner
from dynskip.engine.request import RequestOutput
from dynskip.scheduler.policies.make import POLICIES

PROMPTS = random_prompts([6, 3, 9, 5, 1], seed=7)


def late(policy: str = "lockstep", num_slots: int | None = None, **options: Any) -> Engine:
    served = engine(policy, num_slots, **options)
    assert not served.runner.reads_late, "on a CPU nothing is gained by it"
    served.runner.reads_late = True
    return served


def plain(max_tokens: int, **options: Any) -> SamplingParams:
    """Params whose tokens are read late."""
    return greedy(max_tokens, logprobs=None, **options)


def num_read_late(served: Engine) -> list[int]:
    """Counts, in its one element, the tokens of ``served`` that arrive late from now on."""
    counts = [0]
    land = served.execution._land

    def counting(in_flight: TokensInFlight) -> None:
        counts[0] += len(in_flight.sequences)
        land(in_flight)

    served.execution._land = counting  # type: ignore[method-assign]
    return counts


def stopping(ask: Ask, place: int) -> Ask:
    """The same request, with its token at ``place`` for an end."""
    stop = ask.alone().token_ids[place]
    return Ask(ask.prompt, plain(ask.params.max_tokens, stop_token_ids=[stop]), ask.path)


NUM_PLAIN = 18


def all_asks() -> list[Ask]:
    """Requests of every kind, the first `NUM_PLAIN` of which are read late."""
    prefix = random_prompts([20], seed=3)[0]
    asks = [Ask(prompt, plain(4 + 2 * i), PATHS[i % 4]) for i, prompt in enumerate(PROMPTS)]
    asks += [stopping(Ask(prompt, plain(12), PATHS[i % 4]), i + 1) for i, prompt in enumerate(PROMPTS)]
    asks += [Ask([*prefix, i], plain(7 + i), PATHS[2]) for i in (5, 6)]
    asks += [Ask(PROMPTS[0], plain(9, n=3), PATHS[1]), Ask(PROMPTS[1], plain(1), PATHS[3]), Ask([4, 5], plain(2))]
    asks += [Ask(PROMPTS[2], drawn(8, 1, n=2, logprobs=None), PATHS[1])]
    asks += [Ask(PROMPTS[i], drawn(7, i, logprobs=None, top_k=9, top_p=0.9), PATHS[i]) for i in (0, 3)]
    assert len(asks) == NUM_PLAIN
    asks += [Ask(PROMPTS[2], drawn(8, 1, n=2), PATHS[1]), Ask(PROMPTS[3], greedy(9), PATHS[0])]
    asks += [Ask(PROMPTS[4], plain(9), Parity(), {"kv_policy": name}) for name in ("evict", "share")]
    return asks


ASKS = all_asks()
ALONE = [ask.alone() for ask in ASKS]


@pytest.mark.parametrize("num_slots", [None, 130])
@pytest.mark.parametrize("policy", POLICIES)
def test_random_streams_equal_each_request_alone(policy: str, num_slots: int | None) -> None:
    options: dict[str, Any] = {"batch": 5, "max_prefill_tokens": 16}
    preempted = num_late = 0
    for seed in range(4):
        num_kinds = len(ASKS) if seed % 2 else NUM_PLAIN
        draw = random.Random(seed)
        served = late(policy, num_slots, **options)
        counts = num_read_late(served)
        expected: dict[Any, RequestOutput] = {}
        outputs: dict[Any, RequestOutput] = {}
        told: dict[Any, list[int]] = {}

        def tell(request_id: Any, _index: int, token: int, told: dict[Any, list[int]] = told) -> None:
            told[request_id].append(token)

        for _ in range(40):
            for _ in range(draw.choice([0, 0, 1, 3])):
                place = draw.randrange(num_kinds)
                request_id = ASKS[place].add(served, on_token=tell)
                expected[request_id], told[request_id] = ALONE[place], []
            open_ids = [request_id for request_id in expected if request_id in served._requests]
            if open_ids and draw.random() < 0.1:
                request_id = draw.choice(open_ids)
                output, whole = served.abort(request_id), expected.pop(request_id)
                assert len(told[request_id]) == sum(len(sample.token_ids) for sample in output.samples)
                for ours, theirs in zip(output.samples, whole.samples, strict=True):
                    assert ours.token_ids == theirs.token_ids[: len(ours.token_ids)]
            outputs.update({output.request_id: output for output in served.step()})
        outputs.update({output.request_id: output for output in served.run()})
        assert_empty(served)
        assert served.execution.in_flight is None
        num_late += counts[0]
        assert outputs.keys() == expected.keys()
        for request_id, output in outputs.items():
            assert same(output, expected[request_id])
            assert len(told[request_id]) == sum(len(sample.token_ids) for sample in output.samples)
        preempted += served.scheduler.counters.num_preempted
    assert (preempted > 0) == (num_slots is not None)
    assert num_late > 300


@pytest.mark.parametrize("policy", POLICIES)
def test_steps_and_rows_are_the_same_where_ends_are_known_beforehand(policy: str) -> None:
    asks = [Ask(prompt, plain(3 + 5 * i), PATHS[i % 4]) for i, prompt in enumerate(PROMPTS)]
    now, later = engine(policy, batch=3), late(policy, batch=3)
    assert list(map(same, serve(later, asks), serve(now, asks))) == [True] * len(asks)
    for name in ("num_steps", "num_decode_steps", "num_rows", "num_row_layers", "num_tokens", "num_union_layers"):
        assert getattr(later.tally, name) == getattr(now.tally, name), name


def test_an_end_that_nobody_knew_costs_one_row() -> None:
    ask = Ask(PROMPTS[0], plain(12), PATHS[2])
    asks = [stopping(ask, 4), Ask(PROMPTS[1], plain(20), PATHS[2])]
    now, later = engine(), late()
    assert all(map(same, serve(later, asks), serve(now, asks)))
    assert later.tally.num_rows == now.tally.num_rows + 1
    assert later.tally.num_tokens == now.tally.num_tokens


def test_the_host_reads_a_step_once_the_next_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    served, events = late(), []
    decode, read = ModelRunner.decode, TokensInFlight.read

    def decoding(self: ModelRunner, *args: Any) -> Any:
        events.append("decode")
        return decode(self, *args)

    def reading(self: TokensInFlight) -> list[int]:
        events.append("read")
        return read(self)

    monkeypatch.setattr(ModelRunner, "decode", decoding)
    monkeypatch.setattr(TokensInFlight, "read", reading)
    Ask(PROMPTS[0], plain(5)).add(served)
    told: list[int] = []
    Ask(PROMPTS[1], plain(5), PATHS[0]).add(served, on_token=lambda _id, _index, token: told.append(token))
    num_told = []
    while served.has_unfinished:
        served.step()
        num_told.append(len(told))
    # The first token comes with the prompt, the last two together: nothing runs behind the last step.
    assert num_told == [1, 1, 2, 3, 5] or num_told == [2, 3, 5], num_told
    assert events == ["decode", "decode", "read", "decode", "read", "decode", "read", "read"]


def test_a_token_chosen_in_another_way_waits_for_those_in_flight() -> None:
    asks = [Ask(PROMPTS[0], plain(12), PATHS[2]), Ask(PROMPTS[1], plain(9), PATHS[1])]
    joins = [Ask(PROMPTS[2], drawn(3, 1), PATHS[2]), Ask(PROMPTS[3], greedy(3), PATHS[1])]
    served = late(batch=8)
    ids = [ask.add(served) for ask in asks]
    for _ in range(3):
        served.step()
    assert served.execution.in_flight is not None
    ids += [ask.add(served) for ask in joins]
    served.step()  # whose prompts bring their first tokens
    assert served.execution.in_flight is not None
    served.step()
    assert served.execution.in_flight is None
    outputs = {output.request_id: output for output in served.run()}
    assert_empty(served)
    for request_id, ask in zip(ids, asks + joins, strict=True):
        assert same(outputs[request_id], ask.alone())


@pytest.mark.parametrize("policy", POLICIES)
def test_numbers_that_are_not_finite_are_found_late(policy: str) -> None:
    sound, worse = (tiny_model("untied", deterministic=True) for _ in range(2))
    ask = Ask(PROMPTS[0], plain(9), PATHS[2])
    whole = ask.alone(model=sound).token_ids
    place = 3  # whoever reads the token that stands there gets no numbers
    assert whole[place] not in whole[:place]
    with torch.no_grad():
        worse.decoder.embed_tokens.weight[whole[place]] = torch.nan
    others = [Ask(prompt, plain(9), path) for prompt in PROMPTS[1:] for path in PATHS]
    alone = []
    for other in others:
        own = engine(model=worse)
        other.add(own)
        alone += own.run()
    assert sum(output.error is None for output in alone) >= 4
    served = late(policy, batch=4, model=worse)
    request_id = ask.add(served)
    ids = [other.add(served) for other in others]
    outputs = {output.request_id: output for output in served.run()}
    assert_empty(served)
    failed = outputs[request_id]
    assert failed.finish_reason == "error" and failed.token_ids == whole[: place + 1]
    assert isinstance(failed.error, NonFiniteError) and "embedding" in str(failed.error)
    for other_id, expected in zip(ids, alone, strict=True):
        assert outputs[other_id].samples == expected.samples
        assert str(outputs[other_id].error) == str(expected.error)


def test_those_who_fail_get_what_was_chosen_before() -> None:
    error = Broken()
    served = late(batch=8)
    ask = Ask(PROMPTS[0], plain(9), PATHS[2])
    ids = [ask.add(served), ask.add(served)]
    whole = ask.alone()
    run, num_calls = served.runner.decode, 0

    def failing(spans: Any, *args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls >= 4 and spans[-1].sequence.request.request_id == ids[1]:
            raise error
        return run(spans, *args)

    served.runner.decode = failing  # type: ignore[method-assign,assignment]
    outputs = {output.request_id: output for output in served.run()}
    assert_empty(served)
    assert same(outputs[ids[0]], whole)
    assert outputs[ids[1]].error is error and outputs[ids[1]].token_ids == whole.token_ids[:4]


@pytest.mark.parametrize("at", range(1, 9))
def test_who_is_left_when_a_batch_fails_runs_alone(at: int) -> None:
    served = late(batch=8)
    asks = [stopping(Ask(PROMPTS[0], plain(12), PATHS[2]), 4), Ask(PROMPTS[1], plain(9), PATHS[2])]
    run, num_calls = served.runner.decode, 0

    def failing(spans: Any, *args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls >= at and len(spans) > 1:
            raise MemoryError("too many at once")
        return run(spans, *args)

    served.runner.decode = failing  # type: ignore[method-assign,assignment]
    assert all(map(same, serve(served, asks), [ask.alone() for ask in asks]))


def test_a_controller_beside_them_breaks_where_it_would_alone() -> None:
    error = Broken()
    served = late(batch=8)
    asks = [Ask(PROMPTS[0], plain(12), PATHS[2]), Ask(PROMPTS[1], plain(9), PATHS[1])]
    ids = [ask.add(served) for ask in asks]
    bad = Ask([4, 5, 6], plain(9), FailsAt(2, 6, error)).add(served)
    outputs = {output.request_id: output for output in served.run()}
    assert_empty(served)
    whole = Ask([4, 5, 6], plain(9), Parity()).alone()
    assert outputs[bad].error is error and outputs[bad].token_ids == whole.token_ids[:4]
    assert all(same(outputs[request_id], ask.alone()) for request_id, ask in zip(ids, asks, strict=True))


@pytest.mark.parametrize("aborts_itself", [True, False])
def test_a_callback_that_aborts(aborts_itself: bool) -> None:
    served = late(batch=8)
    ask = Ask(PROMPTS[0], plain(12), PATHS[2])
    told: list[int] = []
    aborted: list[RequestOutput] = []

    def stop(_id: Any, _index: int, token: int) -> None:
        told.append(token)
        if len(told) == 4:
            aborted.append(served.abort("itself" if aborts_itself else "other"))

    ask.add(served, request_id="itself", on_token=stop)
    ask.add(served, request_id="other")
    outputs = {output.request_id: output for output in served.run()}
    assert_empty(served)
    whole = ask.alone()
    assert aborted[0].finish_reason == "abort"
    assert aborted[0].token_ids == whole.token_ids[: len(aborted[0].token_ids)]
    assert len(aborted[0].token_ids) in ((4,) if aborts_itself else (3, 4))
    assert same(outputs["other" if aborts_itself else "itself"], whole)


def test_abort_and_close_between_the_last_step_and_its_tokens() -> None:
    served = late(batch=8)
    short, longer = Ask(PROMPTS[0], plain(3), PATHS[2]), Ask(PROMPTS[1], plain(9), PATHS[2])
    ids = [short.add(served), longer.add(served)]
    while not (served.execution.in_flight and not served.scheduler.knows(served._requests[ids[0]].sequences[0])):
        served.step()
    assert served.abort(ids[1]).finish_reason == "abort"
    # The scheduler knows of nobody any more, but a token is still to come.
    assert not served.scheduler.has_unfinished and served.has_unfinished
    (output,) = served.run()
    assert same(output, short.alone())
    assert_empty(served)
    for ask in (short, longer):
        ask.add(served)
    while served.execution.in_flight is None:
        served.step()
    served.close()
    assert not served.has_unfinished and served.execution.in_flight is None


def test_streams_and_stop_texts() -> None:
    served = late(tokenizer=word_tokenizer())
    ask = Ask([4, 5, 6], plain(9), PATHS[2])
    whole = ask.alone().token_ids
    end = whole.index(whole[3]) + 1
    other = Ask(PROMPTS[2], plain(20), PATHS[1])
    request_id = other.add(served)
    stream = served.stream(ask.prompt, plain(9, stop=f"w{whole[3]:03}"), ask.path)
    assert list(stream) == whole[:end]
    (output,) = served.run()
    assert output.request_id == request_id and same(output, other.alone())
    assert_empty(served)


def test_ctrl_c_at_any_line_loses_nothing() -> None:
    prefix = random_prompts([18])[0]
    asks = [
        Ask(prefix, plain(4, n=2), PATHS[2]),
        Ask([*prefix[:17], 5], plain(5), PATHS[2]),
        Ask([5, 6], plain(1), PATHS[0]),
        stopping(Ask([7, 8, 9], plain(9), PATHS[1]), 3),
        Ask([4, 8, 9], plain(8), PATHS[3]),
    ]
    alone = [ask.alone(max_prefill_tokens=16) for ask in asks]

    def make() -> tuple[Engine, list[Any]]:
        served = late("cohort", num_slots=112, batch=6, max_prefill_tokens=16)
        return served, [ask.add(served) for ask in asks]

    def count(interrupt: Interrupt) -> Interrupt:
        interrupt.files = (*Interrupt.files, "in_flight.py")
        return interrupt

    whole = count(Interrupt(-1))
    served, _ = make()
    assert not whole.advance(served) and served.stats().outcome.num_preempted
    places = set()
    for at in range(1, whole.num_lines, 89):
        interrupt = count(Interrupt(at))
        served, ids = make()
        assert interrupt.advance(served)
        places.add(interrupt.where)
        outputs = {output.request_id: output for output in served.run()}
        check_slots(served)
        served.reset_prefix_cache()
        assert served.kv.num_used == served.kv.cache.num_slots_used == 0, interrupt.where
        assert served.kv.num_free_seqs == served.scheduler.policy.pool, interrupt.where
        for request_id, expected in zip(ids, alone, strict=True):
            assert same(outputs[request_id], expected), interrupt.where
    assert len(places) > 25


@pytest.mark.parametrize("at", [2, 5, 9])
def test_ctrl_c_in_a_callback(at: int) -> None:
    served = late(batch=8)
    asks = [Ask(prompt, plain(3 + 3 * i), PATHS[i % 4]) for i, prompt in enumerate(PROMPTS)]
    ids = [ask.add(served) for ask in asks[:-1]] + [asks[-1].add(served, on_token=Once(at))]
    with pytest.raises(KeyboardInterrupt):
        served.run()
    outputs = {output.request_id: output for output in served.run()}
    assert_empty(served)
    assert all(same(outputs[request_id], ask.alone()) for request_id, ask in zip(ids, asks, strict=True))


def always_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine reads late from now on, as on a GPU."""
    make = ModelRunner.__init__

    def init(self: ModelRunner, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        self.reads_late = True

    monkeypatch.setattr(ModelRunner, "__init__", init)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("executor", ["compact", "reference"])
def test_a_closed_batch(executor: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(model(dtype), tokenizer=word_tokenizer())
    paths = [PATHS[i % 4] for i in range(len(PROMPTS))]
    free = llm.generate(PROMPTS, plain(9), paths, executor=executor)
    params: list[SamplingParams] = [plain(9), plain(9, stop_token_ids=[free[1].token_ids[2]]), drawn(6, 1)]
    params += [plain(7, stop=f"w{free[3].token_ids[3]:03}"), plain(1)]
    expected = llm.generate(PROMPTS, params, paths, executor=executor)
    always_late(monkeypatch)
    assert llm.generate(PROMPTS, plain(9), paths, executor=executor) == free
    assert llm.generate(PROMPTS, params, paths, executor=executor, progress=True) == expected


def test_whoever_makes_the_steps_of_a_closed_batch_finds_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    always_late(monkeypatch)
    generation = Generation(model(), PROMPTS, [plain(4)] * len(PROMPTS))
    assert generation.reads_late
    generation.prefill()
    for num_tokens in (1, 2, 3):
        assert {len(sequence.token_ids) for sequence in generation.sequences} == {num_tokens}
        generation.step()
    assert not generation.running


def test_an_async_llm_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(model(), tokenizer=word_tokenizer())
    asks = [Ask(prompt, plain(5 + 2 * i), PATHS[i % 4]) for i, prompt in enumerate(PROMPTS)]
    alone = [ask.alone() for ask in asks]
    always_late(monkeypatch)

    async def consume() -> None:
        async with AsyncLLM(llm, "lockstep", batch=3) as served:

            async def tokens(ask: Ask) -> list[int]:
                return [
                    token
                    async for piece in served.stream(ask.prompt, ask.params, ask.path)
                    for token in piece.token_ids
                ]

            streamed = await asyncio.gather(*map(tokens, asks))
            outputs = await asyncio.gather(*(served.generate(ask.prompt, ask.params, ask.path) for ask in asks))
        assert list(streamed) == [output.token_ids for output in alone]
        assert [output.token_ids for output in outputs] == [output.token_ids for output in alone]

    asyncio.run(asyncio.wait_for(consume(), 60))


def test_a_choice_that_cannot_be_launched_is_each_row_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr("dynskip.engine.step.launch_choice", fail)
    served, asks = late(batch=4), ASKS[:2] + ASKS[NUM_PLAIN - 2 : NUM_PLAIN]
    counts = num_read_late(served)
    ids = [ask.add(served) for ask in asks]
    outputs = {output.request_id: output for output in served.run()}
    assert counts == [0] and all(
        same(outputs[request_id], ask.alone()) for request_id, ask in zip(ids, asks, strict=True)
    )


def test_only_rows_whose_tokens_are_in_flight_take_them_from_the_device() -> None:
    served = late(batch=8)
    ask, other = Ask(PROMPTS[0], plain(12), PATHS[2]), Ask(PROMPTS[1], plain(12), PATHS[2])
    ask.add(served)
    served.step()
    served.step()
    other.add(served)
    served.step()  # the prompt of `other` brings its token, for which those in flight are read
    served.step()
    assert served.execution.in_flight is not None
    num_known = [len(sequence.token_ids) for sequence in served.execution.in_flight.sequences]
    assert num_known == [3, 1]
    found = sorted(output.token_ids for output in served.run())
    assert found == sorted([ask.alone().token_ids, other.alone().token_ids])
