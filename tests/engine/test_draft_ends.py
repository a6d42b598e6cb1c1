"""What ends, stops or breaks inside of a draft: the request becomes what it becomes without one."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from drafts import DRAFTS, FULL, asks_of, draft_options, random_draft, with_draft
from models import NUM_LAYERS, random_prompts, word_tokenizer
from streams import (
    Ask,
    assert_empty,
    engine,
    greedy,
    model,
    same,
    serve,
)

from dynskip import LLM, SamplingParams
from dynskip.engine.drafting import DraftWarning
from dynskip.engine.model_runner import ModelRunner
from dynskip.engine.request import RequestOutput
from dynskip.execution.turns import Turns
from dynskip.scheduler.policies.make import POLICIES
from dynskip.speculation.draft import Draft


@pytest.mark.parametrize("stop", ["w053", "w053 w", "3 w0"])
def test_stop_texts_that_end_inside_of_what_is_guessed(stop: str, random_lengths: random.Random) -> None:
    llm = LLM(model(), tokenizer=word_tokenizer())
    prompts = random_prompts([3, 5, 8, 4])
    params = SamplingParams(max_tokens=24, stop=stop, ignore_eos=True)
    expected = llm.generate(prompts, params, FULL)
    for draft in DRAFTS[:4]:
        outputs = llm.generate(prompts, params, FULL, **draft_options(draft))
        assert [(o.text, o.token_ids, o.finish_reason) for o in outputs] == [
            (o.text, o.token_ids, o.finish_reason) for o in expected
        ]


@pytest.mark.parametrize("policy", POLICIES)
def test_streams_end_at_stop_texts_inside_of_what_is_guessed(policy: str, random_lengths: random.Random) -> None:
    words = word_tokenizer()
    seen: dict[tuple[Any, int], list[int]] = {}

    def on_token(request_id: Any, index: int, token: int) -> None:
        seen.setdefault((request_id, index), []).append(token)

    served, asks, ids, outputs = engine(policy, batch=4, tokenizer=words), [], [], {}
    for index, ask in enumerate(asks_of(24, 3)):
        text = words.decode(ask.alone().token_ids, skip_special_tokens=True)
        begin = random_lengths.randrange(max(len(text) - 6, 1))
        # A part of a word, of two, or of three: what ends an output may begin in a token that was guessed before.
        stop = text[begin : begin + random_lengths.choice([1, 3, 7])] or "nowhere"
        params = replace(ask.params, stop=stop)
        asks.append(Ask(ask.prompt, params, ask.path))
        draft = Draft(ask.path) if index % 2 else random_draft(random_lengths, ask.path)  # the path itself is right
        ids.append(with_draft(asks[-1], draft).add(served, on_token=on_token))
        for _ in range(random_lengths.choice([0, 0, 1, 2])):
            outputs.update({output.request_id: output for output in served.step()})
    outputs.update({output.request_id: output for output in served.run()})
    assert_empty(served)
    num_ended_by_a_guess = 0
    for request_id, ask in zip(ids, asks, strict=True):
        output = outputs[request_id]
        assert same(output, ask.alone(tokenizer=words))
        for place, sample in enumerate(output.samples):
            assert seen[request_id, place] == sample.token_ids
            num_ended_by_a_guess += sample.finish_reason == "stop" and bool((sample.was_guessed or [False])[-1])
    assert num_ended_by_a_guess >= 3


# What becomes of it in mid-draft


def test_a_callback_sees_each_token_once_and_none_behind_the_end(random_lengths: random.Random) -> None:
    seen: list[int] = []
    ask = Ask(*random_prompts([6]), greedy(20), FULL)
    expected = ask.alone()
    stop = expected.token_ids[7]
    served = engine()
    params = replace(ask.params, stop_token_ids=(stop,))
    with_draft(Ask(ask.prompt, params, FULL), DRAFTS[6]).add(
        served, on_token=lambda _id, _index, token: seen.append(token)
    )
    (output,) = served.run()
    assert seen == output.token_ids == expected.token_ids[: expected.token_ids.index(stop) + 1]


@pytest.mark.parametrize("draft", [DRAFTS[6], DRAFTS[3]], ids=["always right", "own entries"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_request_that_is_aborted_inside_of_a_verification(
    policy: str, draft: Draft, random_lengths: random.Random
) -> None:
    for at in range(1, 12):
        served = engine(policy, batch=4)
        ask = Ask(*random_prompts([6]), greedy(20), FULL)
        other = Ask(*random_prompts([4], 1), greedy(20), FULL)
        seen = []

        def on_token(request_id: Any, _index: int, _token: int, at: int = at, seen: list[int] = seen) -> None:
            seen.append(1)
            if len(seen) == at:
                served.abort(request_id)  # noqa: B023  # called before the next turn

        with_draft(ask, draft).add(served, on_token=on_token)
        with_draft(other, DRAFTS[3]).add(served, request_id="other")
        outputs = {output.request_id: output for output in served.run()}
        assert same(outputs["other"], other.alone())
        assert len(seen) == at
        assert_empty(served)


def test_a_callback_that_interrupts_a_verification_loses_nothing(random_lengths: random.Random) -> None:
    served = engine(batch=4)
    ask = Ask(*random_prompts([6]), greedy(20), FULL)
    seen: list[int] = []

    def on_token(_id: Any, _index: int, token: int) -> None:
        seen.append(token)
        if len(seen) in (3, 9):
            raise KeyboardInterrupt

    with_draft(ask, DRAFTS[6]).add(served, on_token=on_token)
    outputs: list[RequestOutput] = []
    while served.has_unfinished:
        with contextlib.suppress(KeyboardInterrupt):
            outputs += served.step()
    assert same(outputs[0], ask.alone())
    assert_empty(served)


@pytest.mark.parametrize("draft", [DRAFTS[3], DRAFTS[4]], ids=["own entries", "entries of the path"])
def test_what_an_interrupted_verification_would_give_back_is_given_back_by_no_other(
    draft: Draft, random_lengths: random.Random
) -> None:
    """Guesses are wrong here, and the sequences behind the one that interrupts have their places in the cache anew."""
    asks = [Ask(prompt, greedy(16), FULL) for prompt in random_prompts([6, 4, 9])]
    alone = [ask.alone() for ask in asks]
    num_rejected = 0
    for at in range(1, 40):
        served = engine(batch=4)
        seen: list[int] = []

        def on_token(_id: Any, _index: int, token: int, at: int = at, seen: list[int] = seen) -> None:
            seen.append(token)
            if len(seen) == at:
                raise KeyboardInterrupt

        for index, ask in enumerate(asks):
            with_draft(ask, draft).add(served, request_id=str(index), on_token=on_token)
        outputs: dict[str, RequestOutput] = {}
        while served.has_unfinished:
            with contextlib.suppress(KeyboardInterrupt):
                outputs |= {output.request_id: output for output in served.step()}
        assert all(same(outputs[str(index)], expected) for index, expected in enumerate(alone)), at
        num_rejected += served.tally.num_drafted - served.tally.num_accepted
        assert_empty(served)
    assert num_rejected > 39


def test_a_fault_in_a_draft_ends_nothing(monkeypatch: pytest.MonkeyPatch, random_lengths: random.Random) -> None:
    guess, calls = ModelRunner.guess, []

    def fails(self: ModelRunner, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("a draft fails")
        return guess(self, *args)

    monkeypatch.setattr(ModelRunner, "guess", fails)
    asks = [Ask(prompt, greedy(16), FULL) for prompt in random_prompts([6, 4])]
    served = engine(batch=4)
    with pytest.warns(DraftWarning, match="a draft fails"):
        outputs = serve(served, [with_draft(ask, draft) for ask, draft in zip(asks, DRAFTS[2:4], strict=True)])
    for ask, output in zip(asks, outputs, strict=True):
        assert same(output, ask.alone())


@pytest.mark.parametrize("is_alone", [False, True])
def test_a_fault_in_one_draft_leaves_the_others_theirs(
    is_alone: bool, monkeypatch: pytest.MonkeyPatch, random_lengths: random.Random
) -> None:
    guess, bad = ModelRunner.guess, DRAFTS[3].path

    def fails(self: ModelRunner, turns: Turns, *args: Any) -> Any:
        if bad in turns.paths:
            guess(self, turns, *args)  # entries are there already
            raise RuntimeError("this draft fails")
        return guess(self, turns, *args)

    monkeypatch.setattr(ModelRunner, "guess", fails)
    drafts = [bad] if is_alone else [DRAFTS[1].path, DRAFTS[2].path, bad, DRAFTS[1].path]
    asks = [Ask(prompt, greedy(24), FULL) for prompt in random_prompts([6, 4, 9, 12][: len(drafts)])]
    served = engine(batch=4)
    told = [with_draft(ask, Draft(draft)) for ask, draft in zip(asks, drafts, strict=True)]
    with pytest.warns(DraftWarning, match="this draft fails") as warned:
        outputs = serve(served, told)
    assert sum("goes on without" in str(each.message) for each in warned) == 1
    for ask, draft, output in zip(asks, drafts, outputs, strict=True):
        assert same(output, ask.alone())
        assert bool(output.num_drafted) == (draft != bad)
    assert_empty(served)


def test_a_verification_that_fails_runs_without_guesses(
    monkeypatch: pytest.MonkeyPatch, random_lengths: random.Random
) -> None:
    decode = ModelRunner.decode

    def fails(self: ModelRunner, spans: Sequence[Any], *args: Any) -> Any:
        if any(span.num_tokens > 1 for span in spans):
            raise MemoryError("no room")
        return decode(self, spans, *args)

    monkeypatch.setattr(ModelRunner, "decode", fails)
    asks = [Ask(prompt, greedy(8), FULL) for prompt in random_prompts([6, 4])]
    outputs = serve(engine(batch=4), [with_draft(ask, draft) for ask, draft in zip(asks, DRAFTS[2:4], strict=True)])
    for ask, output in zip(asks, outputs, strict=True):
        assert same(output, ask.alone())
        assert output.num_accepted == 0


def test_own_entries_of_drafts_go_before_anything_is_preempted(random_lengths: random.Random) -> None:
    asks = [Ask(prompt, greedy(12), FULL) for prompt in random_prompts([10, 10, 10])]
    needed = 3 * (10 + 12 - 1) * NUM_LAYERS
    served = engine(num_slots=needed + 20, batch=4)
    outputs = serve(served, [with_draft(ask, DRAFTS[3]) for ask in asks])
    assert served.stats().outcome.num_preempted == 0
    assert sum(output.num_drafted for output in outputs) > 0
    for ask, output in zip(asks, outputs, strict=True):
        assert same(output, ask.alone())


def test_known_tokens_of_a_preempted_request_run_several_at_a_time() -> None:
    asks = [Ask(prompt, greedy(15), FULL) for prompt in random_prompts([5, 9, 3, 7])]
    served = engine(num_slots=270, batch=4)
    outputs = serve(served, asks)
    num_preempted = served.stats().outcome.num_preempted
    assert num_preempted >= 1
    num_known = sum(len(output.token_ids) for output in outputs if output.num_preemptions)
    assert served.tally.num_decode_steps < 14 * 4 + num_preempted * num_known
    for ask, output in zip(asks, outputs, strict=True):
        assert same(output, ask.alone())


@pytest.mark.parametrize("policy", POLICIES)
def test_drafts_up_to_the_last_place_of_a_context(policy: str, random_lengths: random.Random) -> None:
    """Tables hold max_context_len entries of a sequence: the last verifications have no room for a whole draft."""
    num_longest = 19
    served, asks, ids = engine(policy, batch=4, max_context_len=num_longest), [], []
    for index, prompt in enumerate(random_prompts([3, 7, 11, 16, 18, 5, 9, 14])):
        ask = Ask(prompt, greedy(num_longest - len(prompt)), FULL)
        asks.append(ask)
        ids.append(with_draft(ask, DRAFTS[index % len(DRAFTS)]).add(served))
    outputs = {output.request_id: output for output in served.run()}
    assert_empty(served)
    for request_id, ask in zip(ids, asks, strict=True):
        assert same(outputs[request_id], ask.alone())
        assert len(outputs[request_id].token_ids) == num_longest - len(ask.prompt)
    assert sum(output.num_accepted for output in outputs.values()) > 0
