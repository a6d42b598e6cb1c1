"""The engine: every request becomes what it becomes alone, whatever the company, the policy and the memory."""

from __future__ import annotations

import functools
import itertools
import random
from typing import Any

import pytest
import torch
from models import NUM_LAYERS, random_prompts, tiny_model, word_tokenizer
from streams import (
    PATHS,
    Ask,
    Parity,
    assert_empty,
    costs,
    drawn,
    engine,
    greedy,
    model,
    same,
    serve,
)
from torch import Tensor

from dynskip import LayerPath, SamplingParams
from dynskip.controllers import HiddenStateGate, StaticController, TokenContext
from dynskip.costs.defaults import UnmeasuredCostsWarning
from dynskip.engine.engine import Engine
from dynskip.engine.request import RequestOutput
from dynskip.scheduler.policies.make import POLICIES

KV_POLICIES = ("propagate", "evict", "share")


@functools.cache
def mixed_asks() -> list[Ask]:
    """Requests of all kinds: paths, controllers and masks of every key-value policy, seeds, copies, stop ids."""
    generator = torch.Generator().manual_seed(1)
    gate = HiddenStateGate(torch.randn(NUM_LAYERS, 2, 32, generator=generator))
    mask = torch.rand(30, NUM_LAYERS, generator=generator) < 0.5
    parity = Parity()
    kinds: list[tuple[Any, dict[str, Any]]] = [(path, {}) for path in PATHS]
    kinds += [(None, {}), (StaticController(PATHS[1]), {}), (mask[0], {})]
    kinds += [(parity, {"kv_policy": policy}) for policy in KV_POLICIES]
    kinds += [(mask, {"kv_policy": policy}) for policy in KV_POLICIES]
    kinds += [(gate, {"prompt_depth": "full"}), (~mask, {"prompt_depth": "full", "kv_policy": "evict"})]
    kinds += [(LayerPath.of(NUM_LAYERS, [], allow_empty=True), {})]
    draw = random.Random(2)
    asks = []
    for index, (path, options) in enumerate(kinds * 2):
        (prompt,) = random_prompts([draw.randint(1, 12)], seed=index)
        max_tokens = draw.randint(1, 14)
        params = drawn(max_tokens, index, n=1 + index % 3) if index % 2 else greedy(max_tokens, n=1 + index % 2)
        asks.append(Ask(prompt, params, path, options))
    for index in (0, 5, 8):  # ended by the third token of their own
        ask = asks[index]
        third = ask.alone().token_ids[:3][-1]
        asks.append(Ask(ask.prompt, greedy(ask.params.max_tokens, stop_token_ids=(third,)), ask.path, ask.options))
    return asks


@functools.cache
def mixed_alone() -> list[RequestOutput]:
    """What `mixed_asks` become alone."""
    return [ask.alone() for ask in mixed_asks()]


def tokens(output: RequestOutput) -> list[list[int]]:
    return [sample.token_ids for sample in output.samples]


@pytest.mark.parametrize("num_slots", [None, 400])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_stream_equals_each_request_alone(policy: str, num_slots: int | None) -> None:
    served = engine(policy, num_slots, batch=8)
    draw = random.Random(3)
    ids: list[Any] = []
    outputs = {}
    for ask in mixed_asks():
        ids.append(ask.add(served))
        for _ in range(draw.choice([0, 0, 1, 2])):
            outputs.update({output.request_id: output for output in served.step()})
    outputs.update({output.request_id: output for output in served.run()})
    assert_empty(served)
    assert len(outputs) == len(ids)
    for request_id, expected in zip(ids, mixed_alone(), strict=True):
        assert same(outputs[request_id], expected)
    assert {reason for output in outputs.values() for reason in [output.finish_reason]} == {"stop", "length"}
    assert bool(served.stats().outcome.num_preempted) == (num_slots is not None)


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_that_runs_out_changes_no_bit(policy: str) -> None:
    asks = [
        Ask(prompt, (drawn(15, index, n=1 + index % 3) if index % 2 else greedy(15)), PATHS[2 + index % 2])
        for index, prompt in enumerate(random_prompts([5, 9, 3, 7, 12, 6]))
    ]
    served = engine(policy, num_slots=160, batch=9)
    outputs = serve(served, asks)
    assert served.stats().outcome.num_preempted >= 2
    assert sum(output.num_preemptions for output in outputs) == served.stats().outcome.num_preempted
    assert served.kv.peak_used > 130
    for ask, output in zip(asks, outputs, strict=True):
        assert same(output, ask.alone())


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
def test_a_preempted_controller_decides_again_as_it_did(kv_policy: str) -> None:
    asks = [Ask(prompt, greedy(18), Parity(), {"kv_policy": kv_policy}) for prompt in random_prompts([2, 1, 3, 4])]
    shared = Parity()
    asks += [Ask(prompt, greedy(18), shared, {"kv_policy": kv_policy}) for prompt in random_prompts([5, 1, 2, 4])]
    served = engine(num_slots=132, batch=8, max_prefill_tokens=4)
    outputs = serve(served, asks)
    assert served.stats().outcome.num_preempted >= 2
    for ask, output in zip(asks, outputs, strict=True):
        assert same(output, ask.alone(max_prefill_tokens=4))


def test_requests_join_and_leave_at_any_step() -> None:
    first, second, joining, leaving = (
        Ask(prompt, drawn(10, index), PATHS[index]) for index, prompt in enumerate(random_prompts([6, 3, 5, 4]))
    )
    expected = {name: ask.alone() for name, ask in (("first", first), ("second", second), ("joining", joining))}
    alone = leaving.alone()
    for at in range(11):
        served = engine(batch=4)
        first.add(served, request_id="first")
        leaving.add(served, request_id="leaving")
        second.add(served, request_id="second")
        outputs = {}
        for step in itertools.count():
            if step == at:
                joining.add(served, request_id="joining")
                if at < 10:
                    left = served.abort("leaving")
                    assert left.finish_reason == "abort" and left.token_ids == alone.token_ids[:at]
            if not served.has_unfinished:
                break
            outputs.update({output.request_id: output for output in served.step()})
        if at == 10:
            assert same(outputs.pop("leaving"), alone)
        assert outputs.keys() == expected.keys()
        assert all(same(outputs[name], expected[name]) for name in expected)
        assert_empty(served)


@pytest.mark.parametrize("max_prefill_tokens", [1, 3, 7, 16])
def test_chunks_of_a_prompt_do_not_depend_on_the_company(max_prefill_tokens: int) -> None:
    asks = [
        Ask(prompt, greedy(6), PATHS[index % 4] if index % 3 else Parity())
        for index, prompt in enumerate(random_prompts([20, 5, 31, 16, 1, 7, 8]))
    ]
    served = engine("cohort", batch=3, max_prefill_tokens=max_prefill_tokens)
    for ask, output in zip(asks, serve(served, asks), strict=True):
        assert same(output, ask.alone(max_prefill_tokens=max_prefill_tokens))
    num_chunks = sum(-(-len(ask.prompt) // max_prefill_tokens) for ask in asks)
    num_tokens = sum(len(ask.prompt) for ask in asks)
    assert -(-num_tokens // max_prefill_tokens) <= served.tally.num_prefills <= num_chunks


@pytest.mark.parametrize("max_prefill_tokens", [1, 5, 16])
def test_prompts_in_chunks_give_the_tokens_of_whole_prompts(max_prefill_tokens: int) -> None:
    wide = model(torch.float64)
    asks = [
        Ask(prompt, greedy(6, temperature=0.7, seed=index), PATHS[index % 4] if index % 3 else Parity())
        for index, prompt in enumerate(random_prompts([20, 5, 31, 17, 1]))
    ]
    chunked = serve(engine(model=wide, max_prefill_tokens=max_prefill_tokens), asks)
    whole = serve(engine(model=wide), asks)
    assert [tokens(output) for output in chunked] == [tokens(output) for output in whole]


def test_a_long_prompt_runs_beside_decodes() -> None:
    short, long = Ask([5, 6], greedy(12), PATHS[0]), Ask(*random_prompts([40]), greedy(3), PATHS[3])
    served = engine(batch=2, max_prefill_tokens=8)
    times: dict[str, list[int]] = {"short": [], "long": []}
    for name, ask in (("short", short), ("long", long)):
        ask.add(
            served, request_id=name, on_token=lambda name, _index, _token: times[name].append(served.scheduler.step)
        )
    outputs = {output.request_id: output for output in served.run()}
    assert times["short"] == list(range(1, 13)), "the long prompt never keeps the short request waiting"
    # The first step has room for the two tokens of the short prompt and for no whole chunk besides.
    assert times["long"] == [6, 7, 8]
    assert same(outputs["short"], short.alone(max_prefill_tokens=8))
    assert same(outputs["long"], long.alone(max_prefill_tokens=8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_determinism_the_tokens_are_the_same_up_to_rounding(dtype: torch.dtype) -> None:
    loose = tiny_model(dtype=dtype)
    asks = mixed_asks()[:16]
    outputs = serve(engine("cohort", 300, batch=4, model=loose), asks)
    for ask, output in zip(asks, outputs, strict=True):
        alone = ask.alone(model=loose)
        assert tokens(output) == tokens(alone)
        for sample, expected in zip(output.samples, alone.samples, strict=True):
            for ours, theirs in zip(sample.logprobs or (), expected.logprobs or (), strict=True):
                assert ours == pytest.approx(theirs, abs=1e-4 if dtype is torch.float32 else 1e-11)


def test_the_flag_of_the_engine_overrides_that_of_the_model() -> None:
    loose = tiny_model()
    asks = [Ask(prompt, greedy(8), PATHS[index % 4]) for index, prompt in enumerate(random_prompts([5, 9, 3, 7]))]
    for ask, output in zip(asks, serve(engine(model=loose, deterministic=True), asks), strict=True):
        assert same(output, ask.alone())


def test_the_executor_that_is_the_specification_serves_the_same_tokens() -> None:
    wide = model(torch.float64)
    asks = mixed_asks()
    outputs = serve(engine("cohort", 400, batch=6, model=wide, executor="reference"), asks)
    expected = serve(engine("cohort", 400, batch=6, model=wide), asks)
    assert [tokens(output) for output in outputs] == [tokens(output) for output in expected]


# Memory


def held(served: Engine) -> int:
    """The key-value entries in use, on which all accounts agree."""
    stats = served.stats()
    assert served.kv.num_used + served.kv.num_kept == served.kv.cache.num_slots_used
    assert stats.kv_bytes == served.kv.num_used * model().kv_entry_bytes
    return served.kv.num_used


def test_a_prefix_is_held_once() -> None:
    common = random_prompts([20])[0]
    prompts = [common + tail for tail in ([5], [6, 7], [8, 9, 10])]
    served = engine(batch=8, max_prefill_tokens=16)
    asks = [Ask(prompt, greedy(9), PATHS[2]) for prompt in prompts]
    ids = [asks[0].add(served)]
    served.step()
    served.step()  # 16 tokens, then 5
    assert held(served) == 21 * 3
    ids += [ask.add(served) for ask in asks[1:]]
    other = Ask(prompts[0], greedy(9), PATHS[3])
    ids.append(other.add(served))
    outputs = {}
    for _ in range(4):
        outputs.update({output.request_id: output for output in served.step()})
    # Multiples of 16 tokens are shared: the chunks are those of a prompt alone. Another path shares nothing.
    assert served.stats().num_shared_tokens == 2 * 16
    outputs.update({output.request_id: output for output in served.run()})
    assert_empty(served)
    for request_id, ask in zip(ids, [*asks, other], strict=True):
        assert same(outputs[request_id], ask.alone(max_prefill_tokens=16))


def test_without_determinism_a_prefix_is_shared_to_its_last_token() -> None:
    common = random_prompts([20])[0]
    served = engine(batch=8, deterministic=False)
    first, second = (Ask([*common, token], greedy(9), PATHS[2]) for token in (5, 6))
    same_prompt, short = Ask([*common, 5], greedy(9), PATHS[2]), Ask([*common[:15], 5, 6, 7], greedy(9), PATHS[2])
    first.add(served)
    served.step()
    assert held(served) == 21 * 3
    for ask in (second, same_prompt, short):
        ask.add(served)
    served.step()
    # All but the last token of the same prompt; fifteen tokens are too few to look for.
    assert served.stats().num_shared_tokens == 20 + 20
    assert held(served) == (22 + 1 + 1 + 18) * 3
    served.abort(0)
    assert held(served) == (20 + 1 + 1 + 18) * 3, "what others own stays"
    served.run()
    assert_empty(served)


@pytest.mark.parametrize("path", [PATHS[2], Parity()])
def test_copies_of_a_prompt_are_run_and_held_once(path: Any) -> None:
    ask = Ask(*random_prompts([7]), drawn(6, 3, n=4), path)
    served = engine(batch=8)
    counts = served.runner.executor.row_counts
    counts.reset()
    ask.add(served)
    served.step()
    entries = held(served)
    assert max(counts.kv) == 7, "the prompt ran once"
    assert entries <= 7 * (6 if isinstance(path, Parity) else 3)
    assert served.stats().num_shared_tokens == 3 * 7
    served.step()
    assert entries < held(served) <= entries + 4 * 6
    (output,) = served.run()
    assert_empty(served)
    assert same(output, ask.alone(batch=1))  # one after the other, each with a prefill of its own
    assert len({tuple(sample.token_ids) for sample in output.samples}) == 4


def test_requests_of_one_prompt_and_path_share_a_prefill() -> None:
    (prompt,) = random_prompts([7])
    served = engine(batch=8)
    served.runner.executor.row_counts.reset()
    asks = [Ask(prompt, drawn(5, seed), PATHS[2]) for seed in range(3)] + [Ask(prompt, greedy(5), PATHS[3])]
    for ask in asks:
        ask.add(served)
    served.step()
    assert served.runner.executor.row_counts.kv[PATHS[2].layers[0]] == 14
    assert held(served) == 7 * 3 + 7 * 6
    outputs = served.run()
    assert all(same(output, ask.alone()) for ask, output in zip(asks, outputs, strict=True))


@pytest.mark.parametrize("policy", ["lockstep", "cohort"])
def test_memory_of_a_mix_is_its_share_of_full_depth(policy: str) -> None:
    lengths = [9, 4, 12, 7, 5, 11, 3, 8]
    depths = [PATHS[index % 4] for index in range(8)]

    def peak(paths: list[LayerPath]) -> int:
        served = engine(policy, batch=8)
        for prompt, path in zip(random_prompts(lengths), paths, strict=True):
            served.add_request(prompt, greedy(10), path)
        most = 0
        while served.has_unfinished:
            served.step()
            most = max(most, held(served))
        return most

    mixed, full = peak(depths), peak([PATHS[3]] * 8)
    assert full == sum(length + 8 for length in lengths) * NUM_LAYERS  # the last token is never run, the ninth ends it
    assert mixed == sum((length + 8) * path.budget for length, path in zip(lengths, depths, strict=True))


def test_a_budget_in_bytes_holds_more_of_those_that_are_shallow() -> None:
    def num_resident(path: LayerPath) -> int:
        served = engine("cohort", num_slots=240, batch=64)
        for prompt in random_prompts([9] * 64):
            served.add_request(prompt, greedy(4), path)
        served.step()
        assert held(served) <= 240
        count = served.stats().num_running
        served.run()
        assert_empty(served)
        return count

    assert num_resident(PATHS[3]) == 4  # nine tokens and the next, through six layers
    assert num_resident(PATHS[2]) == 8
    assert num_resident(PATHS[0]) == 24


# Requests


def test_lockstep_admits_in_the_order_of_arrival() -> None:
    served = engine(batch=3)
    firsts: list[Any] = []

    def note(request_id: Any, _index: int, _token: int) -> None:
        if request_id not in firsts:
            firsts.append(request_id)

    draw = random.Random(0)
    for index, prompt in enumerate(random_prompts([5] * 20)):
        served.add_request(prompt, greedy(draw.randint(1, 9)), PATHS[index % 4], request_id=f"r{index}", on_token=note)
    served.run()
    assert firsts == [f"r{index}" for index in range(20)]


def test_ids_are_the_callers_or_the_next_number() -> None:
    served = engine()
    assert served.add_request([5], greedy(2)) == 0
    assert served.add_request([5], greedy(2), request_id=1) == 1
    assert served.add_request([5], greedy(2), request_id=("a", 2)) == ("a", 2)
    assert served.add_request([5], greedy(2)) == 2, "a number in use is passed over"
    assert sorted(map(str, (output.request_id for output in served.run()))) == ["('a', 2)", "0", "1", "2"]
    assert served.add_request([5], greedy(2), request_id="again") == "again"
    served.run()
    assert served.add_request([5], greedy(2), request_id="again") == "again", "an id is free once it was handed out"
    assert served.add_request([5], greedy(2)) == 3


def test_tokens_are_told_as_they_come() -> None:
    told: list[tuple[Any, int, int]] = []
    ask = Ask([5, 6, 7], drawn(4, 1, n=2), PATHS[2])
    served = engine()
    ask.add(served, request_id="x", on_token=lambda *what: told.append(what))
    served.step()
    assert len(told) == 2
    (output,) = served.run()
    assert {what[0] for what in told} == {"x"}
    assert [[token for _, index, token in told if index == place] for place in range(2)] == tokens(output)


def test_abort_at_each_stage() -> None:
    served = engine(batch=2, max_prefill_tokens=4)
    running = Ask([5, 6], greedy(12), PATHS[2])
    chunked = Ask(*random_prompts([11]), greedy(5), PATHS[3])
    waiting = Ask([7, 8, 9], greedy(5, n=2), PATHS[1])
    staying = Ask([4, 4], drawn(9, 1), PATHS[0])
    ids = [ask.add(served) for ask in (running, chunked, waiting, staying)]
    for _ in range(3):
        assert served.step() == []
    stats = served.stats()
    assert (stats.num_running, stats.num_prefilling, stats.num_waiting) == (1, 1, 3)
    assert served.kv.num_used == 4 * 3 + 11 * 6, "a prompt in chunks has its room from the beginning"
    assert served.kv.cache.num_slots_used == 4 * 3 + 8 * 6
    gone = served.abort(ids[2])
    assert (gone.finish_reason, gone.token_ids, gone.queue_s, gone.ttft_s) == ("abort", [], None, None)
    assert [sample.finish_reason for sample in gone.samples] == ["abort"] * 2
    gone = served.abort(ids[1])
    assert (gone.finish_reason, gone.token_ids) == ("abort", []) and gone.queue_s is not None
    assert held(served) == 4 * 3
    gone = served.abort(ids[0])
    assert gone.finish_reason == "abort" and gone.token_ids == running.alone().token_ids[:3]
    assert held(served) == 0
    (output,) = served.run()
    assert output.request_id == ids[3] and same(output, staying.alone())
    assert_empty(served)
    stats = served.stats()
    assert (stats.num_finished, stats.num_aborted) == (1, 4)


def test_abort_keeps_the_outputs_that_had_ended() -> None:
    ask = Ask([5, 6, 7], drawn(9, 4, n=3), PATHS[2])
    alone = ask.alone()
    stop = alone.samples[0].token_ids[2]
    assert all(stop not in sample.token_ids[:4] for sample in alone.samples[1:])
    served = engine()
    request_id = served.add_request(ask.prompt, drawn(9, 4, n=3, stop_token_ids=(stop,)), ask.path)
    for _ in range(4):
        served.step()
    output = served.abort(request_id)
    assert [sample.finish_reason for sample in output.samples] == ["stop", "abort", "abort"]
    assert [len(sample.token_ids) for sample in output.samples] == [3, 4, 4]
    assert_empty(served)


def test_a_callback_may_abort_and_add() -> None:
    served = engine(batch=4)
    first, second, third = (
        Ask(prompt, greedy(8), PATHS[index]) for index, prompt in enumerate(random_prompts([5, 3, 4]))
    )
    aborted = []

    def on_token(request_id: Any, _index: int, _token: int) -> None:
        if served.scheduler.step == 3:
            aborted.append(served.abort("second"))
            third.add(served, request_id="third")
        if served.scheduler.step == 5:
            aborted.append(served.abort(request_id))

    first.add(served, request_id="first", on_token=on_token)
    second.add(served, request_id="second")
    (output,) = served.run()
    assert same(output, third.alone())
    assert [gone.request_id for gone in aborted] == ["second", "first"]
    assert [gone.token_ids for gone in aborted] == [second.alone().token_ids[:2], first.alone().token_ids[:5]]
    assert_empty(served)


def test_unfinished_is_what_was_not_handed_out() -> None:
    served = engine()
    assert not served.has_unfinished and served.step() == [] and served.run() == []
    served.add_request([5], greedy(1))
    assert served.has_unfinished
    served.advance()
    assert served.has_unfinished, "the output waits to be handed out"
    assert served.stats().num_finished == 1
    (output,) = served.step()
    assert output.finish_reason == "length" and not served.has_unfinished


def test_closing_gives_the_memory_back() -> None:
    with engine() as served:
        served.add_request([5], greedy(5))
        served.add_request([6], greedy(5))
        served.step()
        assert held(served)
    assert not served.has_unfinished and served.step() == []
    assert served.kv.num_used == 0
    served.close()
    with pytest.raises(RuntimeError, match=r"add_request: the engine must be open, got one that was closed\."):
        served.add_request([5], greedy(5))


# Streams of tokens


def test_a_stream_gives_tokens_as_they_come_and_carries_the_others_on() -> None:
    ask, other = Ask([5, 6, 7], drawn(6, 1), PATHS[2]), Ask([8, 9], drawn(4, 2), PATHS[1])
    served = engine()
    other.add(served)
    stream = served.stream(ask.prompt, ask.params, ask.path)
    assert served.stats().num_waiting == 2, "the request is there before its first token is asked for"
    expected = ask.alone().token_ids
    for num_steps, token in enumerate(stream, start=1):
        assert token == expected[num_steps - 1] and served.tally.num_steps == num_steps
    assert num_steps == 6
    (output,) = served.step()
    assert same(output, other.alone())
    assert_empty(served)


def test_streams_take_turns() -> None:
    asks = [Ask(prompt, greedy(5 + index), PATHS[index]) for index, prompt in enumerate(random_prompts([3, 8, 5]))]
    served = engine("cohort", batch=2)
    streams = [served.stream(ask.prompt, ask.params, ask.path) for ask in asks]
    rounds = list(itertools.zip_longest(*streams))
    for index, ask in enumerate(asks):
        assert [tokens[index] for tokens in rounds if tokens[index] is not None] == ask.alone().token_ids
    assert_empty(served)


@pytest.mark.parametrize("num_taken", [0, 1, 3])
def test_a_stream_that_is_closed_aborts_its_request(num_taken: int) -> None:
    ask, other = Ask([5, 6, 7], greedy(6), PATHS[2]), Ask([8, 9], greedy(4), PATHS[1])
    served = engine()
    other.add(served)
    stream = served.stream(ask.prompt, ask.params, ask.path)
    assert list(itertools.islice(stream, num_taken)) == ask.alone().token_ids[:num_taken]
    stream.close()
    assert next(stream, None) is None
    assert served.stats().num_aborted == 1
    (output,) = served.run()
    assert same(output, other.alone())
    assert_empty(served)


def test_a_stream_that_nobody_holds_any_more_aborts_its_request() -> None:
    served = engine()
    stream = served.stream([5, 6], greedy(5))
    next(stream)
    del stream
    assert_empty(served)


# Figures


class Clock:
    """Seconds that go on when somebody says so."""

    def __init__(self) -> None:
        self.time_s = 100.0

    def __call__(self) -> float:
        return self.time_s


def test_figures_are_those_counted_by_hand() -> None:
    clock = Clock()
    served = engine(num_slots=200, batch=2, clock=clock)
    # Tokens 3, 2 and 2; prompts of 4, 2 and 1 tokens through 3, 2 and 6 layers, of which the first two share layer 4.
    paths = [PATHS[2], PATHS[1], PATHS[3]]
    assert [path.layers for path in paths] == [(0, 2, 4), (1, 4), tuple(range(6))]
    for prompt, max_tokens, path in zip(random_prompts([4, 2, 1]), (3, 2, 2), paths, strict=True):
        served.add_request(prompt, greedy(max_tokens), path)
    used, outputs = [], []
    while served.has_unfinished:
        clock.time_s += 1
        outputs += served.step()
        used.append(served.kv.num_used)
    # Step 1: prefill of two. 2: both decode, the second ends. 3: prefill of the third, the first decodes and ends.
    # 4: the third decodes and ends.
    assert used == [4 * 3 + 2 * 2, 5 * 3, 1 * 6, 0]
    assert [output.request_id for output in outputs] == [1, 0, 2]
    by_id = {output.request_id: output for output in outputs}
    assert [by_id[i].queue_s for i in range(3)] == [1, 1, 3]
    assert [by_id[i].ttft_s for i in range(3)] == [1, 1, 3]
    assert [by_id[i].tpot_s for i in range(3)] == [1, 1, 1]
    assert [by_id[i].samples[0].token_times_s for i in range(3)] == [[1, 2, 3], [1, 2], [3, 4]]
    assert [by_id[i].latency_s for i in range(3)] == [3, 2, 4]
    stats = served.stats()
    assert (stats.num_finished, stats.num_aborted, stats.num_shared_tokens) == (3, 0, 0)
    assert stats.kv_capacity_bytes == 200 * model().kv_entry_bytes
    assert stats.peak_kv_bytes == (6 * 3 + 1 * 6) * model().kv_entry_bytes
    outcome = stats.outcome
    assert (outcome.num_requests, outcome.num_decode_steps, outcome.num_prefills) == (3, 3, 2)
    assert (outcome.rows, outcome.paths) == (4 / 3, 4 / 3)
    assert outcome.layers == (3 + 2 + 3 + 6) / 4
    assert outcome.union == (4 + 3 + 6) / 3
    assert (outcome.seconds, outcome.tokens_per_s) == (4, 7 / 4)
    assert outcome.ttft_s == (1, 3, 3) and outcome.queue_s == (1, 3, 3) and outcome.mean_tpot_ms == 1000
    assert (outcome.num_preempted, outcome.longest_wait) == (0, 1)
    assert served.tally.num_steps == 4 and served.tally.num_tokens == 7
    assert 0 < stats.bookkeeping_share < 1
    line = stats.line()
    assert line["num_requests"] == 3 and line["kv_bytes"] == 0 and line["union"] == outcome.union
    assert str(stats).startswith("3 done, 0 running, 0 waiting | 2 tokens/s | rows 1.3 | layers 3.5 of union 4.3 | KV")


def test_requests_of_one_token_have_no_time_per_token() -> None:
    served = engine(clock=Clock())
    served.add_request([5], greedy(1))
    (output,) = served.run()
    assert output.tpot_s is None and output.ttft_s == 0
    assert served.stats().outcome.mean_tpot_ms == 0


def test_params_are_those_of_a_greedy_request_unless_given() -> None:
    served = engine()
    served.add_request([5, 6])
    served.add_request([5, 6], SamplingParams(max_tokens=16, temperature=0.0), LayerPath.full(NUM_LAYERS))
    first, second = served.run()
    assert first.token_ids == second.token_ids and first.path == second.path == LayerPath.full(NUM_LAYERS)


def test_costs_that_nobody_measured_are_predicted_with_a_warning(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNSKIP_CACHE", str(tmp_path))
    with pytest.warns(UnmeasuredCostsWarning, match="No costs were measured for l6-c32-f64-v101-float32 on") as caught:
        served = Engine(model())
    assert caught[0].filename == __file__
    served.add_request([5], greedy(3))
    assert len(served.run()) == 1
    Engine(model(), policy="lockstep")  # asks for none
    Engine(model(), costs=costs())


def test_a_preempted_request_comes_back_a_row_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    served = engine(batch=4, num_slots=60 * NUM_LAYERS)
    runs: list[str] = []
    for name in ("prompt", "decode"):
        run = getattr(served.runner, name)
        monkeypatch.setattr(served.runner, name, lambda *args, run=run, name=name: runs.append(name) or run(*args))
    asks = [Ask(prompt, greedy(40)) for prompt in random_prompts([10, 8])]
    ids = [ask.add(served) for ask in asks]
    outputs = {}
    while served.has_unfinished:
        runs.clear()
        outputs |= {output.request_id: output for output in served.step()}
        assert runs.count("prompt") <= 1 and runs.count("decode") <= 1
    assert outputs[ids[1]].num_preemptions > 0
    for request_id, ask in zip(ids, asks, strict=True):
        assert same(outputs[request_id], ask.alone())
    assert served.tally.num_tokens == 80, "a token is counted when it is chosen, not when it is run again"


def test_layers_of_a_controller_are_those_that_ran() -> None:
    class First:
        def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
            return torch.full((hidden_states.shape[0],), layer == 0)

    served = engine(batch=4)
    (prompt,) = random_prompts([5])
    served.add_request(prompt, greedy(8), First(), kv_policy="evict")
    served.run()
    outcome = served.stats().outcome
    assert (outcome.rows, outcome.layers, outcome.union) == (1, 1, 1)
    served.add_request(prompt, greedy(8), First(), kv_policy="evict")
    served.add_request(prompt, greedy(8), PATHS[1])
    served.run()
    outcome = served.stats().outcome
    assert outcome.layers == (7 + 7 + 7 * 2) / 21 and outcome.union == (7 + 7 * 3) / 14


def test_the_peak_is_what_was_held() -> None:
    served = engine(batch=4)
    (prompt,) = random_prompts([20])
    served.add_request(prompt, drawn(1, 1, n=4))
    served.run()
    assert served.stats().peak_kv_bytes == 20 * NUM_LAYERS * model().kv_entry_bytes


def test_throughput_counts_from_the_first_arrival() -> None:
    clock = Clock()
    served = engine(clock=clock)
    clock.time_s += 1000
    served.add_request([5, 6], greedy(4))
    while served.has_unfinished:
        clock.time_s += 1
        served.step()
    outcome = served.stats().outcome
    assert (outcome.seconds, outcome.tokens_per_s) == (4, 1)


def test_a_stop_text_is_looked_for_among_the_last_tokens() -> None:
    served = engine(tokenizer=word_tokenizer())
    decoded: list[int] = []
    decode = served.execution.tokenizer.decode

    def watched(token_ids: list[int], **options: Any) -> Any:
        decoded.append(len(token_ids))
        return decode(token_ids, **options)

    served.execution.tokenizer.decode = watched
    served.add_request([5, 6], greedy(50, stop="no"))
    (output,) = served.run()
    assert output.finish_reason == "length" and len(decoded) == 50 and max(decoded) == 16
