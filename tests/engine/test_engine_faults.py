"""What goes wrong in one request ends that request; the others become what they become alone, and memory comes back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from faults import Broken, FailsAt, Interrupt, Once
from models import NUM_LAYERS, random_prompts, tiny_model, word_tokenizer
from streams import PATHS, Ask, Parity, assert_empty, check_slots, drawn, engine, greedy, same
from torch import Tensor

from dynskip import NonFiniteError, OPTForCausalLM, SamplingParams
from dynskip.controllers import TokenContext
from dynskip.engine.engine import Engine
from dynskip.engine.request import RequestError, RequestOutput, Span
from dynskip.execution.kv_cache import KVCacheMemoryError

SERVERS: list[tuple[str, dict[str, Any]]] = [
    ("lockstep", {"batch": 16}),
    ("cohort", {"batch": 3}),
    ("by_path", {"batch": 16}),
    ("cohort", {"batch": 4, "num_slots": 150}),
]
on_servers = pytest.mark.parametrize(("policy", "options"), SERVERS, ids=lambda value: str(value))


def company() -> list[Ask]:
    """Requests that have nothing to do with a fault."""
    prompts = random_prompts([6, 3, 9, 5], seed=7)
    return [
        Ask(prompts[0], drawn(8, 1, n=2), PATHS[1]),
        Ask(prompts[1], greedy(11), PATHS[3]),
        Ask(prompts[2], drawn(7, 2), Parity(), {"kv_policy": "share"}),
        Ask(prompts[3], drawn(9, 3), PATHS[1]),
    ]


ALONE = [ask.alone() for ask in company()]


def serve_with(served: Engine, *adds: Callable[[], Any]) -> list[RequestOutput]:
    """What the requests that ``adds`` add become among `company`, whose outputs are what they are alone."""
    asks = company()
    ids = [ask.add(served) for ask in asks[:2]]
    added = [add() for add in adds]
    ids += [ask.add(served) for ask in asks[2:]]
    outputs = {output.request_id: output for output in served.run()}
    for request_id, alone in zip(ids, ALONE, strict=True):
        assert same(outputs.pop(request_id), alone)
    assert_empty(served)
    assert len(outputs) == len(added)
    return [outputs[request_id] for request_id in added]


def assert_failed(output: RequestOutput, error: BaseException, token_ids: list[int]) -> None:
    assert output.finish_reason == "error" and output.error is error
    assert output.token_ids == token_ids


@on_servers
@pytest.mark.parametrize("layer", [0, NUM_LAYERS - 1])
@pytest.mark.parametrize(("position", "num_tokens"), [(0, 0), (4, 0), (5, 1), (9, 5)])
def test_a_controller_that_breaks(
    policy: str, options: dict[str, Any], layer: int, position: int, num_tokens: int
) -> None:
    served, error = engine(policy, **options), Broken()
    for kv_policy in ("propagate", "evict", "share"):
        ask = Ask([4, 5, 6, 7, 8], drawn(9, 4, n=2), FailsAt(layer, position, error), {"kv_policy": kv_policy})
        whole = Ask(ask.prompt, ask.params, Parity(), ask.options).alone()
        (output,) = serve_with(served, partial(ask.add, served))
        assert_failed(output, error, whole.token_ids[:num_tokens])
        assert {sample.finish_reason for sample in output.samples} == {"error"}


@on_servers
def test_a_controller_of_many_that_breaks_for_one(policy: str, options: dict[str, Any]) -> None:
    error = Broken()
    shared = FailsAt(3, 9, error)
    asks = [Ask(prompt, greedy(4), shared) for prompt in random_prompts([5, 6, 4, 8])]
    served = engine(policy, **options)
    *outputs, longest = serve_with(served, *(partial(ask.add, served) for ask in asks))
    alone = [Ask(ask.prompt, ask.params, Parity()).alone() for ask in asks]
    assert_failed(longest, error, alone[3].token_ids[:2])  # its second token is the one at position 9
    assert all(map(same, outputs, alone[:3]))


@pytest.mark.parametrize("answer", [torch.ones(1), torch.ones(3, dtype=torch.bool), None])
def test_a_controller_whose_answer_is_none(answer: Any) -> None:
    class Wrong(Parity):
        def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
            right = super().active(layer, hidden_states, context)
            return answer if layer == 2 and not context.is_prompt.all() else right

    served = engine(batch=16)
    (output,) = serve_with(served, lambda: served.add_request([5, 6], greedy(6), Wrong()))
    assert output.finish_reason == "error" and len(output.token_ids) == 1
    assert isinstance(output.error, (TypeError, ValueError))


def test_a_sequence_controller_that_breaks_leaves_nothing() -> None:
    class Breaks:
        def choose_paths(self, prompt_ids: Any, prompt_embeddings: Any) -> Any:
            raise Broken

    served = engine(batch=16)
    ask = Ask([5, 6, 7], drawn(5, 9), PATHS[2])

    def add() -> Any:
        with pytest.raises(Broken):
            served.add_request([5, 6], greedy(6), Breaks())
        return ask.add(served)

    (output,) = serve_with(served, add)
    assert same(output, ask.alone())
    assert served.scheduler.counters.num_added == 6


@on_servers
@pytest.mark.parametrize("at", [1, 3, 9])
def test_a_callback_that_breaks(policy: str, options: dict[str, Any], at: int) -> None:
    served, error, told = engine(policy, **options), Broken(), []

    def on_token(_id: Any, index: int, token: int) -> None:
        told.append(token)
        if index == 1 and told.count(token) and sum(1 for _ in told) >= 2 * at:
            raise error

    ask = Ask([4, 5, 6, 7], drawn(9, 4, n=2), PATHS[2])
    (output,) = serve_with(served, partial(ask.add, served, on_token=on_token))
    alone = ask.alone()
    assert output.finish_reason == ("length" if at == 9 else "error") and output.error is error
    assert output.samples[1].finish_reason == "error"
    assert output.samples[1].token_ids == alone.samples[1].token_ids[: len(output.samples[1].token_ids)]
    assert output.token_ids == alone.token_ids[: len(output.token_ids)]


NAN = 60  # a token that no other prompt or output of these tests holds


def nan_model(token: int) -> OPTForCausalLM:
    """A model in which whoever reads ``token`` gets logits that are no numbers."""
    broken = tiny_model("untied", deterministic=True)
    with torch.no_grad():
        broken.decoder.embed_tokens.weight[token] = torch.nan
    return broken


@on_servers
def test_logits_that_are_no_numbers(policy: str, options: dict[str, Any]) -> None:
    broken = nan_model(NAN)
    asks = [Ask(ask.prompt, ask.params, ask.path, ask.options) for ask in company()]
    assert all(NAN not in ask.prompt for ask in asks)
    alone = [ask.alone(model=broken) for ask in asks]
    assert all(NAN not in sample.token_ids for output in alone for sample in output.samples)
    served = engine(policy, **options, model=broken)
    choices = (drawn(8, 1, n=3), greedy(8), greedy(8, logprobs=None))
    paths = (PATHS[1], PATHS[3], Parity())
    bad = [Ask([5, NAN, 7], params, path) for params, path in zip(choices, paths, strict=True)]
    mixed = [bad[0], *asks[:2], bad[1], *asks[2:], bad[2]]
    for _ in range(2):  # the second time on memory that held no numbers
        ids = [ask.add(served) for ask in mixed]
        outputs = {output.request_id: output for output in served.run()}
        assert_empty(served)
        for request_id, ask in zip(ids, mixed, strict=True):
            if ask in bad:
                assert_failed(outputs[request_id], outputs[request_id].error or Broken(), [])
                assert isinstance(outputs[request_id].error, NonFiniteError)
                assert "got NaN first in the embedding, in torch.float32" in str(outputs[request_id].error)
            else:
                assert same(outputs[request_id], alone[asks.index(ask)])


class BrokenTokenizer:
    """Decodes so many times."""

    def __init__(self, num_left: int, error: BaseException) -> None:
        self.num_left, self.error = num_left, error
        self.words = word_tokenizer()

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> Any:
        self.num_left -= 1
        if self.num_left < 0:
            raise self.error
        return self.words.decode(token_ids, skip_special_tokens=skip_special_tokens)


@on_servers
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_a_tokenizer_that_breaks(policy: str, options: dict[str, Any], num_tokens: int) -> None:
    error = Broken()
    tokenizer: Any = BrokenTokenizer(num_tokens - 1, error)
    served = engine(policy, **options, tokenizer=tokenizer)
    ask = Ask([4, 5, 6], greedy(9), PATHS[2])
    (output,) = serve_with(served, lambda: served.add_request(ask.prompt, greedy(9, stop="nowhere"), ask.path))
    assert_failed(output, error, ask.alone().token_ids[:num_tokens])


def test_stop_texts_end_a_request() -> None:
    served = engine(tokenizer=word_tokenizer())
    ask = Ask([4, 5, 6], greedy(9), PATHS[2])
    alone = ask.alone().token_ids
    stop = alone[3]
    (output,) = serve_with(served, lambda: served.add_request(ask.prompt, greedy(9, stop=f"w{stop:03}"), ask.path))
    assert output.finish_reason == "stop" and output.token_ids == alone[: alone.index(stop) + 1]


@pytest.mark.parametrize("function", ["step", "close"])
def test_a_callback_that_steps_the_engine_or_closes_it(function: str) -> None:
    served = engine(batch=16)
    ask = Ask([4, 5, 6], greedy(9), PATHS[2])
    (output,) = serve_with(served, lambda: ask.add(served, on_token=lambda *_: getattr(served, function)()))
    assert output.finish_reason == "error" and output.token_ids == ask.alone().token_ids[:1]
    with pytest.raises(RuntimeError, match=f"{function}: the engine must not be in a step, got a call from within"):
        raise output.error or Broken()


# What a model raises


@pytest.mark.parametrize("is_prompt", [True, False])
def test_memory_that_is_missing_for_many_is_asked_for_by_one(is_prompt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    served = engine(batch=16)
    name = "prompt" if is_prompt else "decode"
    run, sizes = getattr(served.runner, name), []

    def failing(spans: list[Span], cache: Any, *others: Any) -> Tensor:
        sizes.append(len(spans))
        logits = run(spans, cache, *others)  # entries were written, and have to be taken back
        if len(spans) > 1:
            raise KVCacheMemoryError
        return logits

    monkeypatch.setattr(served.runner, name, failing)
    ask = Ask([4, 5, 6], drawn(9, 1, n=2), PATHS[2])
    (output,) = serve_with(served, partial(ask.add, served))
    assert same(output, ask.alone())
    assert max(sizes) >= 3 and 1 in sizes


@pytest.mark.parametrize("shares_prefix", [False, True])
def test_those_who_relied_on_a_prompt_that_breaks_run_their_own(
    shares_prefix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = random_prompts([20])
    served = engine(batch=16, deterministic=False)
    first, *asks = [Ask(prompt, greedy(6, temperature=0.5, seed=seed), PATHS[2]) for seed in range(4)]
    if shares_prefix:
        first.add(served, request_id="before")
        served.step()
    run, error = served.runner.prompt, Broken()

    def failing(spans: list[Span], cache: Any) -> Tensor:
        if any(span.sequence.request.request_id == "breaks" for span in spans):
            raise error
        return run(spans, cache)

    monkeypatch.setattr(served.runner, "prompt", failing)
    ids = [ask.add(served, request_id=name) for ask, name in zip(asks, ["breaks", "b", "c"], strict=True)]
    outputs = {output.request_id: output for output in served.run()}
    assert_empty(served)
    assert_failed(outputs["breaks"], error, [])
    for request_id, ask in zip(ids[1:], asks[1:], strict=True):
        assert outputs[request_id].token_ids == ask.alone().token_ids


# Ctrl-C


def interrupted_run(served: Engine, asks: list[Ask], added: Callable[[], list[Any]]) -> None:
    """One Ctrl-C, raised once by what ``added`` adds, and then all requests, to which it means nothing."""
    ids = [ask.add(served) for ask in company()] + added()
    expected = [*ALONE, *(ask.alone() for ask in asks)]
    with pytest.raises(KeyboardInterrupt):
        served.run()
    assert served.has_unfinished
    outputs = {output.request_id: output for output in served.run()}
    assert_empty(served)
    assert len(outputs) == len(ids)
    for request_id, alone in zip(ids, expected, strict=True):
        assert same(outputs[request_id], alone)


@on_servers
@pytest.mark.parametrize("at", [1, 2, 9, 18])
def test_ctrl_c_in_a_callback(policy: str, options: dict[str, Any], at: int) -> None:
    served = engine(policy, **options)
    ask = Ask([4, 5, 6], drawn(9, 1, n=2), PATHS[2])
    interrupted_run(served, [ask], lambda: [ask.add(served, on_token=Once(at))])


@on_servers
@pytest.mark.parametrize("at", [1, 8, 30])
def test_ctrl_c_in_a_controller(policy: str, options: dict[str, Any], at: int) -> None:
    once = Once(at)

    class Interrupted(Parity):
        def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
            once()
            return super().active(layer, hidden_states, context)

    served = engine(policy, **options)
    asks = [Ask([4, 5, 6], drawn(9, 1, n=2), Parity(), {"kv_policy": name}) for name in ("evict", "share")]
    shown = [Ask(ask.prompt, ask.params, Interrupted(), ask.options) for ask in asks]
    interrupted_run(served, asks, lambda: [ask.add(served) for ask in shown])


@on_servers
@pytest.mark.parametrize("at", range(6, 40, 3))
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_the_clock(policy: str, options: dict[str, Any], at: int, times: int) -> None:
    served = engine(policy, **options, clock=Once(at, times))
    ids = [ask.add(served) for ask in company()]  # calls 2 to 5
    num_interrupts = 0
    outputs: dict[Any, RequestOutput] = {}
    while served.has_unfinished:
        try:
            outputs.update({output.request_id: output for output in served.run()})
        except KeyboardInterrupt:
            num_interrupts += 1
    assert 1 <= num_interrupts <= times
    assert_empty(served)
    assert all(same(outputs[request_id], alone) for request_id, alone in zip(ids, ALONE, strict=True))


def test_ctrl_c_in_the_tokenizer() -> None:
    class Interrupted(BrokenTokenizer):
        def decode(self, token_ids: list[int], skip_special_tokens: bool) -> Any:
            once()
            return self.words.decode(token_ids, skip_special_tokens=skip_special_tokens)

    tokenizer: Any = Interrupted(0, Broken())
    once = Once(5)
    served = engine(batch=16, tokenizer=tokenizer)
    ask = Ask([4, 5, 6], drawn(9, 1), PATHS[2])
    shown = Ask(ask.prompt, drawn(9, 1, stop="nowhere"), ask.path)
    interrupted_run(served, [ask], lambda: [shown.add(served)])


def test_ctrl_c_and_then_a_tokenizer_that_breaks() -> None:
    error = Broken()
    tokenizer: Any = BrokenTokenizer(1, error)
    served = engine(batch=16, tokenizer=tokenizer)
    ask = Ask([4, 5, 6], greedy(9), PATHS[2])
    # Interrupted in its second token, which is decoded for the first time on the way out.
    shown = Ask(ask.prompt, greedy(9, stop="nowhere"), ask.path)
    ids = [other.add(served) for other in company()]
    shown.add(served, request_id="breaks", on_token=Once(2))
    with pytest.raises(KeyboardInterrupt):
        served.run()
    outputs = {output.request_id: output for output in served.run()}
    assert_empty(served)
    assert_failed(outputs["breaks"], error, ask.alone().token_ids[:2])
    assert all(same(outputs[request_id], alone) for request_id, alone in zip(ids, ALONE, strict=True))


def test_ctrl_c_while_a_request_arrives_or_is_aborted() -> None:
    clock = Once(10**9)
    served = engine(batch=16, clock=clock)
    ids = [ask.add(served) for ask in company()]
    served.step()
    clock.at = clock.num_calls + 1
    with pytest.raises(KeyboardInterrupt):
        served.add_request([5, 6], greedy(5), request_id="new")
    assert served.scheduler.counters.num_added == 5
    served.add_request([5, 6], greedy(5), request_id="new")
    served.step()
    clock.at = clock.num_calls + 1
    with pytest.raises(KeyboardInterrupt):
        served.abort("new")
    outputs = {output.request_id: output for output in served.run()}
    assert_empty(served)
    assert outputs["new"].finish_reason == "abort"
    assert all(same(outputs[request_id], alone) for request_id, alone in zip(ids, ALONE, strict=True))


NUM_TRACED_SLOTS = 120  # so few that somebody is preempted, and kept entries are evicted


def traced_asks() -> list[Ask]:
    (prompt,) = random_prompts([18])
    return [
        Ask(prompt, drawn(4, 1, n=2), PATHS[2]),
        Ask([*prompt[:17], 5], drawn(5, 2), PATHS[2]),
        Ask([5, 6], greedy(1), PATHS[0]),
        Ask([7, 8, 9], drawn(8, 3, n=2), Parity(), {"kv_policy": "evict"}),
        Ask([4, 8, 9], drawn(8, 4), PATHS[3]),
    ]


def test_ctrl_c_at_any_line_loses_nothing() -> None:
    asks = traced_asks()
    alone = [ask.alone(max_prefill_tokens=16) for ask in asks]

    def make() -> tuple[Engine, list[Any]]:
        served = engine("cohort", num_slots=NUM_TRACED_SLOTS, batch=6, max_prefill_tokens=16)
        return served, [ask.add(served) for ask in asks]

    for _ in range(2):  # the first fills caches: its lines behind a miss are met by no later run
        whole = Interrupt(-1)
        served, _ = make()
        assert not whole.advance(served) and served.stats().outcome.num_preempted
    assert whole.num_lines > 3000
    # A prime step meets every line of every loop sooner or later.
    places = set()
    for at in range(1, whole.num_lines, 97):
        interrupt = Interrupt(at)
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
    assert len(places) > 35


# Clocks and consumers


def test_a_clock_that_goes_back_is_taken_to_stand_still() -> None:
    times = iter(range(10**6, 0, -1))
    served = engine(batch=16, clock=lambda: next(times))
    ask = Ask([4, 5, 6], drawn(9, 1, n=2), PATHS[2])
    (output,) = serve_with(served, partial(ask.add, served))
    assert same(output, ask.alone())
    assert (output.queue_s, output.ttft_s, output.tpot_s, output.latency_s) == (0, 0, 0, 0)
    stats = served.stats()
    assert stats.outcome.seconds == 0 and stats.outcome.tokens_per_s == 0 and set(stats.outcome.ttft_s) == {0}


def test_a_stream_ends_by_the_error_of_its_request() -> None:
    error = Broken()
    served = engine(batch=16)
    stream = served.stream([4, 5, 6], greedy(9), FailsAt(2, 5, error))
    whole = Ask([4, 5, 6], greedy(9), Parity()).alone().token_ids
    ids = [ask.add(served) for ask in company()]
    assert [next(stream) for _ in range(3)] == whole[:3]
    with pytest.raises(RequestError, match="stream: the request ended by Broken") as caught:
        next(stream)
    assert caught.value.__cause__ is error
    assert next(stream, None) is None
    outputs = {output.request_id: output for output in served.run()}
    assert_empty(served)
    assert all(same(outputs[request_id], alone) for request_id, alone in zip(ids, ALONE, strict=True))


def test_a_stream_whose_output_somebody_else_took_still_says_how_it_ended() -> None:
    error = Broken()
    served = engine()
    stream = served.stream([4, 5, 6], greedy(9), FailsAt(2, 5, error), request_id="x")
    (output,) = served.run()
    assert_failed(output, error, output.token_ids)
    # The id is free, and what has it now is none of the stream's business.
    later = Ask([7, 8], greedy(3), PATHS[1])
    later.add(served, request_id="x")
    served.advance()
    with pytest.raises(RequestError, match="stream: the request ended by Broken"):
        list(stream)
    stream.close()
    (output,) = served.run()
    assert same(output, later.alone())


def test_a_consumer_that_breaks_half_way() -> None:
    served = engine(batch=16)
    ids = [ask.add(served) for ask in company()]

    def consume() -> None:
        for token in served.stream([4, 5, 6], greedy(9), PATHS[2]):
            if token >= 0:
                raise Broken

    with pytest.raises(Broken):
        consume()
    outputs = {output.request_id: output for output in served.run()}
    assert served.stats().num_aborted == 1
    assert_empty(served)
    assert all(same(outputs[request_id], alone) for request_id, alone in zip(ids, ALONE, strict=True))


def test_ctrl_c_does_not_end_a_stream() -> None:
    served = engine(batch=16)
    ask = Ask([4, 5, 6], drawn(9, 1), PATHS[2])
    stream = served.stream(ask.prompt, ask.params, ask.path, on_token=Once(4))
    tokens = [next(stream) for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert tokens + list(stream) == ask.alone().token_ids
    assert_empty(served)


def test_params_that_nobody_checked_are_checked() -> None:
    served = engine()
    with pytest.raises(ValueError, match="SamplingParams: max_tokens must be an integer of at least 1, got 0"):
        served.add_request([5], SamplingParams(max_tokens=0))
    assert not served.has_unfinished


def test_a_request_aborted_between_its_prompt_and_its_token_leaves_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, other = random_prompts([20, 5], seed=3)
    last = Ask([*prefix, 9, 8, 7], greedy(8))
    served = engine(batch=4, deterministic=False)
    prompt = served.runner.prompt

    def only_alone(spans: list[Span], cache: Any) -> Tensor:
        if len(spans) > 1:
            raise MemoryError("too many at once")
        return prompt(spans, cache)

    def abort(_id: Any, _index: int, _token: int) -> None:
        if "aborted" in served._requests:
            served.abort("aborted")

    with monkeypatch.context() as patch:
        patch.setattr(served.runner, "prompt", only_alone)
        served.add_request(other, greedy(8), on_token=abort)
        served.add_request([*prefix, 5, 6], greedy(8), request_id="aborted")
        served.add_request([*prefix, 5, 6], greedy(8), request_id="copy")
        served.step()
    request_id = last.add(served)
    outputs = {output.request_id: output for output in served.run()}
    assert outputs[request_id].token_ids == last.alone(deterministic=False).token_ids
    assert outputs["copy"].token_ids == Ask([*prefix, 5, 6], greedy(8)).alone(deterministic=False).token_ids
    assert_empty(served)


def test_a_stream_may_be_collected_within_a_step() -> None:
    served = engine(batch=4)
    (prompt,) = random_prompts([5])
    stream = served.stream(prompt, greedy(20))
    next(stream)
    choose = served.scheduler.policy.choose
    streams = [stream]
    del stream

    def forget(*args: Any) -> Any:
        chosen = choose(*args)
        streams.clear()
        return chosen

    served.scheduler.policy.choose = forget  # type: ignore[method-assign]
    kept = Ask(prompt, greedy(9))
    request_id = kept.add(served)
    (output,) = served.run()
    assert output.request_id == request_id and same(output, kept.alone())
    assert served.stats().num_aborted == 1
    assert_empty(served)
