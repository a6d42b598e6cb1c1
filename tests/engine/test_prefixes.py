"""Prefixes that are kept for requests to come: what they save, when they go, and that no request becomes another."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from drafts import draw_lengths, random_draft, random_path, with_draft
from faults import Broken
from models import NUM_LAYERS, VOCAB_SIZE, random_prompts, tiny_model
from streams import PATHS, Ask, Parity, assert_empty, check_slots, drawn, engine, greedy, same, serve
from torch import Tensor

from dynskip import CausalLM, LayerPath, NonFiniteError, SamplingParams
from dynskip.engine.engine import Engine
from dynskip.engine.kv_pool import KVPool
from dynskip.engine.request import RequestOutput, Span
from dynskip.execution.executor import Predictions
from dynskip.execution.kv_cache import KVCache
from dynskip.scheduler.policies.make import POLICIES
from dynskip.speculation.draft import Draft

HALF, FULL = PATHS[2], PATHS[3]
CHUNK = 16
DRAFTS = [
    Draft(LayerPath.of(NUM_LAYERS, [0, 1, 2, 3, 4]), "path"),
    Draft(LayerPath.of(NUM_LAYERS, [0, 2, 4])),
    Draft(LayerPath.of(NUM_LAYERS, [0, 4]), "path"),
    Draft(FULL),
]


@functools.cache
def wide() -> CausalLM:
    """A model of float64 whose rows may depend on their neighbours: tokens are equal, bits are not."""
    return tiny_model(dtype=torch.float64, deterministic=False)


def exact(policy: str = "lockstep", num_slots: int | None = None, **options: Any) -> Engine:
    """An engine in deterministic mode, where whole chunks of prompts are shared."""
    return engine(policy, num_slots, **{"batch": 8, "max_prefill_tokens": CHUNK, **options})


def loose(policy: str = "lockstep", num_slots: int | None = None, **options: Any) -> Engine:
    """An engine outside of it, where any tokens are."""
    return engine(policy, num_slots, **{"batch": 8, "model": wide(), **options})


def tokens(output: RequestOutput) -> list[list[int]]:
    """Those of all outputs of a request."""
    assert output.error is None
    return [sample.token_ids for sample in output.samples]


def run(served: Engine, ask: Ask, **options: Any) -> RequestOutput:
    """What ``ask`` becomes beside nobody else, in an engine that goes on."""
    request_id = ask.add(served, **options)
    outputs = {output.request_id: output for output in served.run()}
    check_slots(served)
    return outputs[request_id]


def num_kept(served: Engine, ask: Ask, token_ids: Sequence[int]) -> int:
    """How many of the tokens are kept for the path of ``ask``."""
    assert served.kv.prefixes is not None
    return served.kv.prefixes._tree.find(ask.path, [*token_ids])


def rows_of(served: Engine, act: Callable[[], Any]) -> int:
    """The rows that layer 0 runs meanwhile."""
    before = served.runner.executor.row_counts.kv[0]
    act()
    return served.runner.executor.row_counts.kv[0] - before


# What it saves


def test_the_next_turn_of_a_chat_runs_only_what_is_new() -> None:
    served = loose()
    (history,) = random_prompts([20])
    for turn in range(4):
        ask = Ask([*history, 5 + turn, 6], greedy(5), HALF)
        expected = ask.alone(model=wide(), prefix_caching=False)
        outputs: list[RequestOutput] = []
        num_rows = rows_of(served, lambda ask=ask, outputs=outputs: outputs.append(run(served, ask)))
        (output,) = outputs
        assert tokens(output) == tokens(expected)
        # The answer's last token has never run.
        assert output.num_cached_tokens == (len(history) - 1 if turn else 0)
        assert num_rows == len(ask.prompt) - output.num_cached_tokens + 4
        history = [*ask.prompt, *output.token_ids]
    stats = served.stats()
    assert stats.num_prefix_queries == 22 + 29 + 36 + 43 and stats.num_prefix_hits == 26 + 33 + 40
    assert stats.prefix_hit_rate == stats.line()["prefix_hit_rate"] == 99 / 130
    assert stats.prefix_bytes == 47 * HALF.budget * wide().kv_entry_bytes and stats.kv_bytes == 0
    assert str(stats).endswith("| prefix hits 76%")
    assert_empty(served)


def test_in_deterministic_mode_whole_chunks_of_prompts_are_kept() -> None:
    served = exact()
    (prompt,) = random_prompts([39])
    first = Ask(prompt, drawn(10, 1), HALF)
    output = run(served, first)
    assert served.kv.num_kept == 32 * HALF.budget, "neither the rest of the prompt nor its output"
    for more, num_cached in (([], 32), ([*output.token_ids, 7], 32), (prompt[:9], 32)):
        ask = Ask([*prompt, *more], greedy(4), HALF)
        found = run(served, ask)
        assert found.num_cached_tokens == num_cached
        assert same(found, ask.alone(max_prefill_tokens=CHUNK, prefix_caching=False))
    again = Ask(prompt[:32], greedy(4), HALF)
    assert run(served, again).num_cached_tokens == 16, "the last token has to run, and with it its chunk"
    assert_empty(served)


def test_a_whole_prompt_that_is_kept_runs_its_last_token() -> None:
    served = loose()
    ask = Ask(*random_prompts([24]), greedy(3), FULL)
    first = run(served, ask)
    outputs: list[RequestOutput] = []
    assert rows_of(served, lambda: outputs.append(run(served, ask))) == 1 + 2
    assert outputs[0].num_cached_tokens == 23 and tokens(outputs[0]) == tokens(first)


@pytest.mark.parametrize("make", [exact, loose])
def test_other_paths_controllers_and_short_beginnings_find_nothing(make: Callable[[], Engine]) -> None:
    served = make()
    (prompt,) = random_prompts([32])
    run(served, Ask(prompt, greedy(4), HALF))
    others = [Ask(prompt, greedy(4), path) for path in (PATHS[0], PATHS[1], FULL)]
    others += [Ask(prompt, greedy(4), Parity(), {"kv_policy": name}) for name in ("propagate", "evict", "share")]
    others += [Ask([*prompt[:15], 5, 6, 7], greedy(4), HALF), Ask(prompt, greedy(4, prompt_logprobs=1), HALF)]
    others += [Ask(prompt, greedy(4), torch.ones(40, NUM_LAYERS, dtype=torch.bool), {"kv_policy": "evict"})]
    for ask in others:
        output = run(served, ask)
        assert output.num_cached_tokens == 0
        alone = ask.alone(model=served.model, max_prefill_tokens=served.config.max_prefill_tokens, prefix_caching=False)
        assert tokens(output) == tokens(alone)
    assert served.stats().num_shared_tokens == 0
    assert run(served, Ask(prompt, greedy(4), HALF)).num_cached_tokens > 0
    assert_empty(served)


def test_what_a_request_with_prompt_logprobs_leaves_is_used() -> None:
    (prompt,) = random_prompts([36])
    served = exact()
    run(served, Ask(prompt, greedy(4, prompt_logprobs=1), HALF))
    ask = Ask([*prompt, 5], greedy(4), HALF)
    output = run(served, ask)
    assert output.num_cached_tokens == 32
    assert same(output, ask.alone(max_prefill_tokens=CHUNK, prefix_caching=False))


def test_tokens_that_are_kept_take_no_place_in_a_step() -> None:
    (system,) = random_prompts([48])
    served = exact(max_prefill_tokens=CHUNK, batch=16)
    run(served, Ask([*system, 5], greedy(2), HALF))
    asks = [Ask([*system, 6, token], greedy(3), HALF) for token in range(6, 14)]
    ids = [ask.add(served) for ask in asks]
    served.step()
    assert served.stats().num_running == 8, "eight prompts of 50 tokens run in one step of 16"
    outputs = {output.request_id: output for output in served.run()}
    for request_id, ask in zip(ids, asks, strict=True):
        assert same(outputs[request_id], ask.alone(max_prefill_tokens=CHUNK, prefix_caching=False))
    assert_empty(served)


def test_a_prompt_goes_on_in_the_chunks_that_it_has_alone() -> None:
    served = loose(max_prefill_tokens=24)
    (prompt,) = random_prompts([52])
    run(served, Ask([*prompt[:20], 5], greedy(2), FULL))
    chunks: list[tuple[int, int]] = []
    run_prompt = served.runner.prompt

    def noting(spans: Sequence[Span], cache: Any) -> Predictions:
        chunks.extend((span.first, span.num_tokens) for span in spans)
        return run_prompt(spans, cache)

    served.runner.prompt = noting  # type: ignore[method-assign]
    ask = Ask(prompt, greedy(3), FULL)
    output = run(served, ask)
    assert chunks == [(20, 4), (24, 24), (48, 4)]
    assert tokens(output) == tokens(ask.alone(model=wide(), prefix_caching=False))


@pytest.mark.parametrize("prompt_logprobs", [None, 1])
def test_the_outputs_of_a_prompt_begin_with_what_is_kept(prompt_logprobs: int | None) -> None:
    (system,) = random_prompts([20])
    served = loose()
    run(served, Ask([*system, 4], greedy(2), HALF))
    ask = Ask([*system, 5, 6, 7], drawn(6, 3, n=4, prompt_logprobs=prompt_logprobs), HALF)
    ask.add(served)
    num_rows = rows_of(served, served.step)
    check_slots(served)
    (output,) = served.run()
    assert num_rows == (3 if prompt_logprobs is None else 23), "the prompt ran once"
    assert output.num_cached_tokens == (20 if prompt_logprobs is None else 0)
    assert tokens(output) == tokens(ask.alone(model=wide(), prefix_caching=False))
    assert len({tuple(sample) for sample in tokens(output)}) == 4
    assert_empty(served)


def test_outputs_that_share_what_another_request_has_run_meanwhile() -> None:
    """Two prompts that begin alike run in one step; the outputs of the second share slots that nothing else knows."""
    (system,) = random_prompts([20])
    served = loose()
    first = Ask([*system, 4], greedy(9), HALF)
    # Its outputs end one after the other.
    second = Ask([*system, 5, 6, 7], drawn(12, 3, n=4, ignore_eos=True, stop_token_ids=list(range(0, 101, 7))), HALF)
    ids = [first.add(served), second.add(served)]
    outputs: dict[Any, RequestOutput] = {}
    while served.has_unfinished:
        outputs.update({output.request_id: output for output in served.step()})
        check_slots(served)
    lengths = [len(sample.token_ids) for sample in outputs[ids[1]].samples]
    assert len({*lengths}) > 1
    for request_id, ask in zip(ids, (first, second), strict=True):
        assert tokens(outputs[request_id]) == tokens(ask.alone(model=wide(), prefix_caching=False))
    assert_empty(served)


def test_a_preempted_request_goes_on_with_what_is_left_of_its_entries() -> None:
    asks = [Ask(prompt, greedy(24), FULL) for prompt in random_prompts([18, 18])]
    num_rows = {}
    for caching in (False, True):
        served = loose(num_slots=66 * NUM_LAYERS, prefix_caching=caching)
        outputs: list[RequestOutput] = []
        num_rows[caching] = rows_of(served, lambda served=served, outputs=outputs: outputs.extend(serve(served, asks)))
        assert served.stats().outcome.num_preempted == 1
        for output, ask in zip(outputs, asks, strict=True):
            assert tokens(output) == tokens(ask.alone(model=wide(), prefix_caching=False))
    assert num_rows[True] < num_rows[False]


# Who goes


def filled(num_slots: int = 70) -> tuple[Engine, list[Ask]]:
    """An engine with room for ``num_slots`` tokens that keeps three prompts of 20, the first of which was used last."""
    served = loose(num_slots=num_slots * NUM_LAYERS)
    asks = [Ask(prompt, greedy(1), FULL) for prompt in random_prompts([20] * 3)]
    for ask in (*asks, asks[0]):
        run(served, ask)
    assert served.kv.num_kept == 60 * NUM_LAYERS and served.kv.num_used == 0
    return served, asks


def test_those_go_first_that_were_not_used_for_longest() -> None:
    served, asks = filled()
    run(served, Ask(*random_prompts([15], seed=9), greedy(1), FULL))  # five tokens too many
    assert [num_kept(served, ask, ask.prompt) for ask in asks] == [20, 15, 20]
    assert served.stats().num_prefix_evictions == 5 * NUM_LAYERS
    run(served, Ask(*random_prompts([31], seed=9), greedy(1), FULL))
    assert [num_kept(served, ask, ask.prompt) for ask in asks] == [20, 0, 19]
    assert served.stats().num_prefix_evictions == (5 + 15 + 1) * NUM_LAYERS
    assert run(served, asks[0]).num_cached_tokens == 19
    assert served.stats().outcome.num_preempted == 0
    assert_empty(served)


def test_what_is_continued_goes_behind_what_continues_it() -> None:
    (system,) = random_prompts([20])
    served = loose(num_slots=64 * NUM_LAYERS)
    tails = [Ask([*system, *tail], greedy(1), FULL) for tail in random_prompts([10] * 3, seed=1)]
    for ask in tails:
        run(served, ask)
    assert served.kv.num_kept == 50 * NUM_LAYERS
    run(served, Ask(*random_prompts([14 + 25], seed=2), greedy(1), FULL))
    assert [num_kept(served, ask, ask.prompt) for ask in tails] == [20, 20, 25]


def test_decode_rows_evict_before_they_preempt() -> None:
    served, asks = filled(num_slots=62)
    ask = Ask([5, 6], greedy(50), FULL)
    assert tokens(run(served, ask)) == tokens(ask.alone(model=wide(), prefix_caching=False))
    assert [num_kept(served, each, each.prompt) for each in asks] == [11, 0, 0]
    assert served.stats().outcome.num_preempted == 0


@pytest.mark.parametrize("draft", DRAFTS)
def test_drafts_evict_before_they_lose_their_own_entries(draft: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_lengths(monkeypatch)
    served, asks = filled(num_slots=100)
    dropped = []
    drop, reclaim = KVPool.drop_draft, KVPool.reclaim

    def noting(self: KVPool, num_slots: int) -> None:
        monkeypatch.setattr(KVPool, "drop_draft", lambda self, state: dropped.append(state) or drop(self, state))
        reclaim(self, num_slots)
        monkeypatch.setattr(KVPool, "drop_draft", drop)

    monkeypatch.setattr(KVPool, "reclaim", noting)
    ask = Ask(*random_prompts([6], seed=8), greedy(40), FULL)
    output = run(served, with_draft(ask, draft))
    assert tokens(output) == tokens(ask.alone(model=wide(), prefix_caching=False))
    assert output.num_drafted and served.stats().num_prefix_evictions and not dropped
    # What is left of the drafts' memory keeps nothing but verified entries.
    more = Ask([*ask.prompt, *output.token_ids, 7], greedy(9), FULL)
    found = run(served, more)
    assert found.num_cached_tokens == 6 + 39
    assert tokens(found) == tokens(more.alone(model=wide(), prefix_caching=False))
    assert num_kept(served, asks[1], asks[1].prompt) < 20
    assert_empty(served)


def decisions(policy: str, caching: bool) -> tuple[list[Any], Engine]:
    """What each step did with requests that have nothing in common, in an engine with too little memory."""
    served = loose(policy, num_slots=400, prefix_caching=caching, batch=5)
    draw, made = random.Random(3), []
    schedule = served.scheduler.schedule

    def noting() -> Any:
        decision = schedule()
        names = [state.owner.request.request_id for state in decision.preempt]
        chunks = [(each.sequence.owner.request.request_id, each.first + each.num_tokens) for each in decision.prefill]
        made.append((names, chunks, [state.owner.request.request_id for state in decision.decode]))
        return decision

    served.scheduler.schedule = noting  # type: ignore[method-assign]
    for index, prompt in enumerate(random_prompts([draw.randint(16, 30) for _ in range(40)], seed=4)):
        served.add_request(prompt, greedy(draw.randint(1, 25)), PATHS[index % 4])
        if index % 3 == 2:
            served.step()
    served.run()
    check_slots(served)
    return made, served


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_kept_changes_no_decision(policy: str) -> None:
    (plain, without), (made, served) = decisions(policy, caching=False), decisions(policy, caching=True)
    assert made == plain
    assert sum(len(names) for names, _, _ in made) >= 3 and served.stats().num_prefix_evictions > 400
    assert without.stats().num_prefix_queries == without.stats().prefix_bytes == without.kv.num_kept == 0


def test_a_request_that_waits_for_memory_evicts_nothing() -> None:
    served = loose(num_slots=70 * NUM_LAYERS)
    kept, holding, waiting = (
        Ask(prompt, greedy(max_tokens), FULL)
        for prompt, max_tokens in zip(random_prompts([40, 8, 62]), (1, 14, 1), strict=True)
    )
    run(served, kept)
    holding.add(served)
    served.step()
    waiting.add(served)
    for _ in range(10):
        served.step()
        assert served.stats().num_waiting == 1
    assert num_kept(served, kept, kept.prompt) == 40
    served.run()
    assert served.stats().num_prefix_evictions == (40 + 21 + 62 - 70) * NUM_LAYERS
    assert_empty(served)


# What is not kept


def failing_processor(output_ids: list[int], logits: Tensor) -> Tensor:
    """Fails at the third token."""
    return logits * float("nan") if len(output_ids) == 2 else logits


def failing_callback(_id: Any, _index: int, token: int) -> None:
    raise Broken


@pytest.mark.parametrize("make", [exact, loose])
@pytest.mark.parametrize("fault", ["processor", "callback", "logits", "prompt", "step"])
def test_nothing_is_kept_of_a_request_that_fails(
    make: Callable[..., Engine], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = make()
    (system,) = random_prompts([32])
    before = Ask([*system, 4], greedy(2), HALF)
    run(served, before)
    ask = Ask([*system, *random_prompts([32], seed=1)[0][:20]], greedy(6), HALF)
    callback = failing_callback if fault == "callback" else None
    if fault == "processor":
        ask = Ask(ask.prompt, greedy(6, logits_processors=[failing_processor]), HALF)
    name = {"logits": "decode", "prompt": "prompt", "step": "prompt"}.get(fault)
    if name is not None:
        real = getattr(served.runner, name)

        def broken(*args: Any) -> Predictions:
            predictions = real(*args)
            if fault == "step":
                raise Broken
            return Predictions(predictions.logits * float("nan"))

        monkeypatch.setattr(served.runner, name, broken)
    output = run(served, ask, on_token=callback)
    monkeypatch.undo()
    assert output.finish_reason == "error"
    assert isinstance(output.error, Broken if fault in ("callback", "step") else NonFiniteError)
    assert num_kept(served, ask, ask.prompt) <= 32
    again = Ask(ask.prompt, greedy(6), HALF)
    found = run(served, again)
    limits = {"max_prefill_tokens": served.config.max_prefill_tokens, "prefix_caching": False}
    assert found.num_cached_tokens <= 32 and tokens(found) == tokens(again.alone(model=served.model, **limits))
    assert_empty(served)


def test_a_request_that_fails_leaves_others_what_they_use() -> None:
    served = loose()
    (system,) = random_prompts([20])
    staying = Ask([*system, 4], greedy(12), HALF)
    request_id = staying.add(served)
    served.step()
    ask = Ask([*system, 4, 5], greedy(6), HALF)
    failed_id = ask.add(served, on_token=failing_callback)
    outputs = {output.request_id: output for output in served.step()}
    assert outputs[failed_id].num_cached_tokens == 21
    check_slots(served)
    assert num_kept(served, ask, ask.prompt) == 21, "not its own last token"
    outputs.update({output.request_id: output for output in served.run()})
    assert tokens(outputs[request_id]) == tokens(staying.alone(model=wide(), prefix_caching=False))
    assert_empty(served)


def test_an_aborted_request_leaves_what_it_has_run() -> None:
    served = loose()
    ask = Ask(*random_prompts([20]), greedy(30), HALF)
    request_id = ask.add(served)
    for _ in range(5):
        served.step()
    output = served.abort(request_id)
    check_slots(served)
    assert len(output.token_ids) == 5 and num_kept(served, ask, [*ask.prompt, *output.token_ids]) == 24
    more = Ask([*ask.prompt, *output.token_ids, 9], greedy(5), HALF)
    found = run(served, more)
    assert found.num_cached_tokens == 24
    assert tokens(found) == tokens(more.alone(model=wide(), prefix_caching=False))


def test_a_prompt_that_is_aborted_between_two_chunks_leaves_nothing() -> None:
    served = exact()
    ask = Ask(*random_prompts([50]), greedy(3), HALF)
    request_id = ask.add(served)
    for _ in range(2):
        served.step()
    served.abort(request_id)
    assert num_kept(served, ask, ask.prompt) == 0 == served.kv.num_kept
    assert_empty(served)


# The end


def test_reset_forgets_all_and_requests_that_run_go_on() -> None:
    served = loose()
    (system,) = random_prompts([20])
    asks = [Ask([*system, token], greedy(9), HALF) for token in (4, 5, 6)]
    run(served, asks[0])
    ids = [ask.add(served) for ask in asks[1:]]
    served.step()
    served.reset_prefix_cache()
    check_slots(served)
    assert served.kv.num_kept == served.stats().prefix_bytes == 0 and served.kv.num_used > 0
    late = Ask([*system, 7], greedy(3), HALF)
    ids.append(late.add(served))
    outputs = {output.request_id: output for output in served.run()}
    for request_id, ask in zip(ids, [*asks[1:], late], strict=True):
        assert tokens(outputs[request_id]) == tokens(ask.alone(model=wide(), prefix_caching=False))
    assert outputs[ids[-1]].num_cached_tokens == 0, "what ran before is not shared with those that come later"
    assert run(served, Ask([*system, 5, 6], greedy(2), HALF)).num_cached_tokens == 20
    served.close()
    served.reset_prefix_cache()
    assert served.stats().prefix_bytes == 0 and served.stats().num_prefix_hits == 20 * 3


def test_reset_is_refused_within_a_step() -> None:
    served = loose()
    served.add_request([5, 6], greedy(2), on_token=lambda *_: served.reset_prefix_cache())
    (output,) = served.run()
    assert isinstance(output.error, RuntimeError)
    assert "reset_prefix_cache: the engine must not be in a step" in str(output.error)


def test_reset_that_is_interrupted_loses_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    served, _ = filled()
    request_id = Ask([5, 6, 7], greedy(4), FULL).add(served)
    served.step()

    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "let_go", interrupted)
        with pytest.raises(KeyboardInterrupt):
            served.reset_prefix_cache()
    (output,) = served.run()
    assert output.request_id == request_id
    assert_empty(served)


def test_closing_gives_everything_back() -> None:
    served = loose()
    run(served, Ask(*random_prompts([20]), greedy(3), HALF))
    Ask(*random_prompts([20]), greedy(9), HALF).add(served)
    served.step()
    cache, prefixes = served.kv.cache, served.kv.prefixes
    served.close()
    assert prefixes is not None and not hasattr(prefixes, "_cache") and not hasattr(served.kv, "cache")
    assert cache.num_slots_used == 0 and not cache.pool.is_kept.any()


@pytest.mark.parametrize("options", [{"prefix_caching": False}, {"executor": "reference"}])
def test_without_it_nothing_is_shared(options: dict[str, Any]) -> None:
    served = loose(**options)
    (system,) = random_prompts([20])
    asks = [Ask([*system, token], greedy(9), HALF) for token in (4, 5, 6)]
    ids = []
    for ask in asks:
        ids.append(ask.add(served))
        served.step()
    outputs = {output.request_id: output for output in served.run()}
    assert served.kv.num_used == served.kv.cache.num_slots_used == served.kv.num_kept == 0
    stats = served.stats()
    assert stats.num_shared_tokens == stats.num_prefix_queries == stats.num_prefix_hits == 0
    for request_id, ask in zip(ids, asks, strict=True):
        assert tokens(outputs[request_id]) == tokens(ask.alone(model=wide()))
    served.reset_prefix_cache()


def test_the_option_is_a_bool() -> None:
    with pytest.raises(TypeError, match="Engine: prefix_caching must be True or False, got int"):
        engine(prefix_caching=1)


# All together


class Chats:
    """Conversations that go on from what others have become, along any path, with and without drafts."""

    def __init__(self, served: Engine, seed: int) -> None:
        self.served = served
        self.draw = random.Random(seed)
        self.histories = random_prompts([17, 20, 33], seed)
        self.paths = [FULL, FULL, *(random_path(self.draw) for _ in range(2))]
        self.asked: dict[Any, Ask] = {}
        self.outputs: dict[Any, RequestOutput] = {}

    def next(self) -> Ask:
        """A turn of a conversation."""
        draw = self.draw
        # The latest ones are likely to be there.
        history = draw.choice(self.histories[-8:] if draw.random() < 0.5 else self.histories)
        prompt = history[: draw.choice([44, draw.randint(1, 44)])] + [draw.randrange(4, 12) for _ in range(3)]
        ends = {"stop_token_ids": draw.sample(range(VOCAB_SIZE), 8)}
        changes = {"n": draw.choice([1, 1, 1, 3]), "prompt_logprobs": draw.choice([None] * 7 + [1]), **ends}
        max_tokens = draw.randint(1, 12)
        params = greedy(max_tokens, **changes) if draw.random() < 0.5 else drawn(max_tokens, 1, **changes)
        path = draw.choice(self.paths)
        if draw.random() < 0.1:
            return Ask(prompt, params, Parity(), {"kv_policy": draw.choice(["propagate", "evict", "share"])})
        return Ask(prompt, params, path)

    def run(self, num_requests: int) -> None:
        """Let requests come, go and be aborted."""
        for _ in range(num_requests):
            ask = self.next()
            takes_draft = isinstance(ask.path, LayerPath) and self.draw.random() < 0.4
            told = with_draft(ask, random_draft(self.draw, ask.path)) if takes_draft else ask
            self.asked[told.add(self.served)] = ask
            for _ in range(self.draw.choice([0, 0, 1, 3, 6])):
                self.step()
            if self.draw.random() < 0.07 and self.served._requests:
                request_id = self.draw.choice([*self.served._requests])
                self.ended(self.served.abort(request_id))
                check_slots(self.served)
        while self.served.has_unfinished:
            self.step()

    def step(self) -> None:
        for output in self.served.step():
            self.ended(output)
        check_slots(self.served)

    def ended(self, output: RequestOutput) -> None:
        self.outputs[output.request_id] = output
        self.histories.append([*output.prompt_ids, *output.token_ids])


@pytest.mark.parametrize(
    ("make", "policy", "num_slots"),
    [
        *((exact, policy, num_slots) for policy in POLICIES for num_slots in (20_000, 410)),
        # With each policy, and with each amount of memory.
        *((loose, policy, (410, 20_000)[place % 2]) for place, policy in enumerate(POLICIES)),
    ],
)
def test_random_chats_equal_each_request_alone(
    make: Callable[..., Engine], policy: str, num_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_lengths(monkeypatch)
    served = make(policy, num_slots, batch=4)
    chats = Chats(served, seed=len(policy))
    chats.run(60)
    stats, outputs = served.stats(), chats.outputs
    assert_empty(served)
    assert len(outputs) == 60 and all(output.error is None for output in outputs.values())
    alone = make(batch=4, prefix_caching=False)
    for request_id, ask in chats.asked.items():
        output, expected = outputs[request_id], run(alone, ask)
        if any(sample.finish_reason == "abort" for sample in output.samples):
            for ours, theirs in zip(tokens(output), tokens(expected), strict=True):
                assert ours == theirs[: len(ours)]
        elif make is exact:
            assert same(output, expected)
        else:
            assert tokens(output) == tokens(expected)
    assert stats.num_prefix_hits > 150 and stats.num_accepted and stats.num_aborted
    assert bool(stats.num_prefix_evictions) == (num_slots == 410)
    if num_slots != 410:
        # With memory for all each output is looked up once, and its request says what the first one has found.
        assert stats.num_prefix_hits >= sum(output.num_cached_tokens for output in outputs.values()) > 0


def test_stats_add_up() -> None:
    served = loose("cohort", batch=2, pool=2)
    (system,) = random_prompts([20])
    asks = [Ask([*system, token % 3, 5, token], greedy(5), PATHS[1 + token % 2]) for token in range(20)]
    outputs = serve(served, asks[:10]) + serve(served, asks[10:])  # what is kept goes in between
    stats = served.stats()
    assert stats.num_prefix_queries == sum(len(ask.prompt) for ask in asks)
    assert stats.num_prefix_hits == stats.num_shared_tokens == sum(output.num_cached_tokens for output in outputs) > 0
    params = SamplingParams(max_tokens=3, prompt_logprobs=1)
    served.add_request(asks[0].prompt, params, HALF)
    served.run()
    assert served.stats().num_prefix_queries == stats.num_prefix_queries, "nothing is looked for"
