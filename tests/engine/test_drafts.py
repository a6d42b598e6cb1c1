"""Drafts: a request with one becomes, bit for bit, what it becomes without, and nothing is left of its guesses."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Hashable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from drafts import draft_options, draw_lengths, random_draft, random_path, with_draft
from models import NUM_LAYERS, random_prompts, tiny_hf, tiny_model, word_tokenizer
from streams import (
    PATHS,
    Ask,
    Parity,
    assert_empty,
    costs,
    drawn,
    engine,
    fewer_of_the_last,
    greedy,
    guess_three,
    model,
    random_changes,
    same,
    serve,
)
from torch import Tensor

from dynskip import LLM, CausalLM, LayerPath, SamplingParams
from dynskip.engine import drafting
from dynskip.engine.drafting import Drafting, DraftWarning
from dynskip.engine.model_runner import ModelRunner
from dynskip.engine.request import RequestOutput, Span
from dynskip.execution.turns import Turns
from dynskip.measure.agreement import Gate, NearTies
from dynskip.ops.backends import available_backends
from dynskip.scheduler.policies.make import POLICIES
from dynskip.speculation.draft import ENTRIES, Draft, DraftEntries
from dynskip.speculation.lengths import Candidate, Choice, DraftLengths

FULL = PATHS[3]
# A layer of a random model changes little: leaving one out is right about half of the time.
DRAFTS = [
    Draft(LayerPath.of(NUM_LAYERS, [0, 1, 2, 3, 4]), "path"),
    Draft(LayerPath.of(NUM_LAYERS, [0, 1, 2, 3, 4])),
    Draft(LayerPath.of(NUM_LAYERS, [0, 2, 3, 5]), "path"),
    Draft(LayerPath.of(NUM_LAYERS, [1, 2, 4, 5])),
    Draft(LayerPath.of(NUM_LAYERS, [], allow_empty=True)),
    Draft(FULL),
    Draft(FULL, "path"),
]


@pytest.fixture
def random_lengths(monkeypatch: pytest.MonkeyPatch) -> random.Random:
    """Lengths drawn at random, in place of those that pay."""
    return draw_lengths(monkeypatch)


def asks_of(count: int, seed: int, changes_logits: bool = False) -> list[Ask]:
    """Requests of all lengths, paths, ways to choose a token and to end; two of three change logits, if any does."""
    draw = random.Random(seed)
    asks = []
    for index, prompt in enumerate(random_prompts([draw.randint(1, 20) for _ in range(count)], seed)):
        max_tokens = draw.randint(1, 16)
        copies = draw.choice([1, 1, 1, 3])
        params = (
            greedy(max_tokens, n=copies)
            if index % 2
            else drawn(max_tokens, index, n=copies, top_p=draw.choice([1.0, 0.7]), top_k=draw.choice([None, 5]))
        )
        if changes_logits and index % 3:
            params = replace(params, **random_changes(draw))
        asks.append(Ask(prompt, params, random_path(draw) if draw.random() < 0.5 else FULL))
    return asks


# Equal to the same request without a draft


@pytest.mark.parametrize("changes_logits", [False, True])
@pytest.mark.parametrize("num_slots", [None, 340])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_stream_with_drafts_equals_the_one_without(
    policy: str, num_slots: int | None, changes_logits: bool, random_lengths: random.Random
) -> None:
    asks = asks_of(28, 1, changes_logits)
    alone = [ask.alone() for ask in asks]
    for index, output in list(enumerate(alone))[::4]:  # ended by a token inside of what is guessed
        stop = output.token_ids[min(3, len(output.token_ids) - 1)]
        # Withheld in the first places, the token may come where it has not come before.
        min_tokens = index % 3 if changes_logits and index % 3 < asks[index].params.max_tokens else 0
        params = replace(asks[index].params, stop_token_ids=(stop,), min_tokens=min_tokens)
        asks[index] = Ask(asks[index].prompt, params, asks[index].path)
        alone[index] = asks[index].alone()
    served = engine(policy, num_slots, batch=6)
    ids, outputs = [], {}
    for index, ask in enumerate(asks):
        told = ask if index % 5 == 4 else with_draft(ask, random_draft(random_lengths, ask.path))
        ids.append(told.add(served))
        for _ in range(random_lengths.choice([0, 0, 1, 2])):
            outputs.update({output.request_id: output for output in served.step()})
    outputs.update({output.request_id: output for output in served.run()})
    assert_empty(served)
    for request_id, expected in zip(ids, alone, strict=True):
        assert same(outputs[request_id], expected)
    found = [outputs[request_id] for request_id in ids]
    assert sum(output.num_drafted for output in found) == served.tally.num_drafted > 100
    assert 0 < served.tally.num_accepted < served.tally.num_drafted
    assert all(output.num_drafted == 0 for output in found[4::5])
    assert bool(served.stats().outcome.num_preempted) == (num_slots is not None)


@pytest.mark.parametrize("num_slots", [None, 340])
@pytest.mark.parametrize("policy", POLICIES)
def test_lengths_that_pay_change_as_little_as_any(
    policy: str, num_slots: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    observe = DraftLengths.observe

    def as_predicted(self: DraftLengths, choice: Choice, num_seqs: int, *_: float) -> None:
        observe(self, choice, num_seqs, choice.guess_ms, choice.verify_ms)

    # Other processes may be busy meanwhile: steps take what is predicted, and choosing takes nothing.
    monkeypatch.setattr(DraftLengths, "observe", as_predicted)
    monkeypatch.setattr(drafting, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    hf_model = tiny_hf()
    with torch.no_grad():  # layers behind the first two add little, so that these are right more often than not
        for layer in hf_model.model.decoder.layers[2:]:
            for linear in (layer.fc2, layer.self_attn.out_proj):
                linear.weight.mul_(0.05)
                linear.bias.mul_(0.05)
    own = CausalLM.from_hf(hf_model, backend="torch", deterministic=True)  # of which nothing has been learnt
    asks = [replace(ask, path=FULL) if index % 3 else ask for index, ask in enumerate(asks_of(24, 2))]
    served = engine(policy, num_slots, batch=4, model=own)
    first = Draft(LayerPath.of(NUM_LAYERS, [0, 1]))
    told = [ask if index % 5 == 4 else with_draft(ask, first) for index, ask in enumerate(asks)]
    for ask, output in zip(asks, serve(served, told), strict=True):
        assert same(output, ask.alone(model=own))
    assert_empty(served)
    assert served.tally.num_drafted >= served.tally.num_accepted > 0


@pytest.mark.parametrize("draft", DRAFTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_draft_alone(draft: Draft, dtype: torch.dtype, random_lengths: random.Random) -> None:
    own = model(dtype)
    for ask in (Ask(*random_prompts([9]), greedy(24), FULL), Ask(*random_prompts([9]), drawn(24, 3, n=2), FULL)):
        served = engine(model=own, batch=4)
        (output,) = serve(served, [with_draft(ask, draft)])
        assert same(output, ask.alone(model=own))
        assert output.draft is not None and output.draft.path == draft.path
        assert 0 <= output.num_accepted <= output.num_drafted
        assert output.num_drafted >= 8
        for sample in output.samples:
            assert sample.was_guessed is not None and len(sample.was_guessed) == len(sample.token_ids)
        guessed = sum(sum(sample.was_guessed or ()) for sample in output.samples)
        assert guessed == output.num_accepted
        if draft.path == FULL:
            assert output.num_accepted == output.num_drafted, "the path agrees with itself"


def test_a_draft_that_is_the_beginning_of_the_path_needs_no_entries_of_its_own() -> None:
    assert DRAFTS[1].for_path(FULL) == DRAFTS[0]
    assert DRAFTS[3].for_path(FULL) == DRAFTS[3]


@pytest.mark.parametrize("executor", ["compact", "reference"])
def test_without_determinism_tokens_are_the_same(executor: Any, random_lengths: random.Random) -> None:
    wide = tiny_model(dtype=torch.float64)
    asks = asks_of(12, 2, changes_logits=True)
    expected = serve(engine(model=wide), asks)
    told = [with_draft(ask, DRAFTS[3]) for ask in asks]
    outputs = serve(engine(model=wide, executor=executor), told)
    tokens = [[sample.token_ids for sample in output.samples] for output in outputs]
    assert tokens == [[sample.token_ids for sample in output.samples] for output in expected]
    assert sum(output.num_accepted for output in outputs) > 0


def test_elsewhere_the_first_token_that_differs_is_a_near_tie(random_lengths: random.Random) -> None:
    loose = tiny_model(dtype=torch.bfloat16)
    ties = NearTies(loose, Gate(tiny_hf(dtype=torch.bfloat16), [FULL]))
    for index, prompt in enumerate(random_prompts([9] * 8)):
        ask = Ask(prompt, greedy(20), FULL)
        (output,) = serve(engine(model=loose), [with_draft(ask, DRAFTS[index % 4])])
        assert output.num_drafted > 0
        ties.num_equal("drafts", prompt, output.token_ids, ask.alone(model=loose).token_ids)


@pytest.mark.gpu
@pytest.mark.parametrize("draft", [DRAFTS[0], DRAFTS[3]], ids=str)
def test_fused_steps_take_several_rows_of_a_sequence(draft: Draft, random_lengths: random.Random) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hf_model = tiny_hf().to(device)
    reason = available_backends(device)["triton"]
    if reason is not None:
        pytest.skip(f"no triton backend: {reason}")
    fused = CausalLM.from_hf(hf_model, backend="triton", deterministic=True)
    ask = Ask(*random_prompts([5]), greedy(7), FULL)
    expected = ask.alone(model=fused)
    (output,) = serve(engine(model=fused, batch=2), [with_draft(ask, draft)])
    assert same(output, expected)
    assert output.num_drafted >= 5 and output.num_accepted


def test_prefixes_are_shared_and_only_verified_entries_are(random_lengths: random.Random) -> None:
    common = random_prompts([20])[0]
    served = engine(batch=8, max_prefill_tokens=16)
    asks = [Ask([*common, *tail], greedy(12), PATHS[2]) for tail in ([5], [6, 7], [8, 9, 10])]
    ids = [with_draft(asks[0], DRAFTS[3]).add(served)]
    for _ in range(4):
        served.step()
    ids += [with_draft(ask, DRAFTS[3]).add(served) for ask in asks[1:]]
    outputs = {output.request_id: output for output in served.run()}
    assert served.stats().num_shared_tokens == 2 * 16
    assert_empty(served)
    for request_id, ask in zip(ids, asks, strict=True):
        assert same(outputs[request_id], ask.alone(max_prefill_tokens=16))


def planned_rows(
    path: LayerPath, draft: Draft, num_prompt: int, num_given: int, rounds: Sequence[tuple[Hashable, int, int, int]]
) -> list[int]:
    """The rows of each layer for the outputs of a prompt whose entries are made once for the path and once for a draft.

    num_given: tokens that decode rows gave. rounds: of steps with guesses the output, the place of its last token, how
    many tokens were guessed behind it, and how many tokens the step gave; steps without give a token a row.
    """
    num_common = draft.num_common_layers(path)
    num_verified, num_begun, num_drafted = num_prompt + num_given - sum(num_kept for *_, num_kept in rounds), 0, 0
    own: dict[Hashable, int] = {}  # tokens whose entries the draft has made
    for output, last, num_guesses, num_kept in rounds:
        num_verified += 1 + num_guesses
        if not num_guesses:
            continue
        num_begun += num_guesses
        # The draft runs what it lacks up to the last token, and all guesses but the last.
        num_made = own.get(output, num_prompt if own else 0) if draft.entries == "own" else last
        num_drafted += last + num_guesses - num_made
        own[output] = last + min(num_kept, num_guesses)
    return [
        (num_verified - num_begun * (layer < num_common)) * (layer in path.layers)
        + num_drafted * (layer in draft.path.layers)
        for layer in range(path.num_layers)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_the_rows_of_each_layer_are_those_of_the_plan(
    seed: int, random_lengths: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, accepted = random.Random(seed), Drafting.accepted
    path = FULL if seed % 2 else random_path(draw)
    rounds: list[tuple[Hashable, int, int, int]] = []

    def noted(self: Drafting, span: Span, num_kept: int) -> None:
        rounds.append((span.sequence.state, span.first, len(span.sequence.guesses), num_kept))
        accepted(self, span, num_kept)

    monkeypatch.setattr(Drafting, "accepted", noted)
    ask = Ask(*random_prompts([40], seed), drawn(20, 3, n=4), path)
    served = engine(batch=8)
    (output,) = serve(served, [with_draft(ask, random_draft(draw, path))])
    assert output.draft is not None and output.num_drafted > 40
    counts = served.runner.executor.row_counts
    assert counts.run == counts.kv == planned_rows(path, output.draft, 40, 4 * 19, rounds)
    monkeypatch.undo()
    assert same(output, ask.alone())


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


def test_rows_that_are_verified_together_see_the_guesses_before_them(random_lengths: random.Random) -> None:
    # A path agrees with itself: all guesses are right as long as nothing changes its logits.
    changes = {"frequency_penalty": 2.0, "repetition_penalty": 1.5}
    for params in (greedy(24, **changes), drawn(24, 5, **changes), greedy(24, logits_processors=[fewer_of_the_last])):
        ask = Ask(*random_prompts([9]), params, FULL)
        (output,) = serve(engine(batch=4), [with_draft(ask, DRAFTS[6])])
        plain = Ask(
            ask.prompt,
            replace(params, frequency_penalty=0.0, repetition_penalty=1.0, logits_processors=()),
            FULL,
        ).alone()
        assert same(output, ask.alone()) and not same(output, plain)
        assert 0 < output.num_accepted < output.num_drafted


def test_what_a_processor_makes_of_wrong_guesses_ends_nothing(random_lengths: random.Random) -> None:
    ask = Ask(*random_prompts([9]), greedy(24), FULL)
    expected = ask.alone()

    def refuses(output_ids: list[int], logits: Tensor) -> Tensor:
        if output_ids != expected.token_ids[: len(output_ids)]:
            raise ValueError("this output never comes")
        return logits

    asked = Ask(ask.prompt, greedy(24, logits_processors=[refuses]), FULL)
    (output,) = serve(engine(batch=4), [with_draft(asked, DRAFTS[3])])
    assert same(output, expected)
    assert 0 < output.num_accepted < output.num_drafted


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


def test_a_request_that_is_aborted_inside_of_a_verification(random_lengths: random.Random) -> None:
    for at in range(1, 12):
        served = engine(batch=4)
        ask = Ask(*random_prompts([6]), greedy(20), FULL)
        other = Ask(*random_prompts([4], 1), greedy(20), FULL)
        seen = []

        def on_token(request_id: Any, _index: int, _token: int, at: int = at, seen: list[int] = seen) -> None:
            seen.append(1)
            if len(seen) == at:
                served.abort(request_id)  # noqa: B023  # called before the next turn

        with_draft(ask, DRAFTS[6]).add(served, on_token=on_token)
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


# What is said of them


def test_stats_say_what_a_verification_verifies_and_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    guess_three(monkeypatch)
    served = engine()
    assert served.stats().drafts_per_verification == served.stats().tokens_per_verification == 0.0
    for draft in (DRAFTS[6], DRAFTS[3]):  # one that is always right, and one that is not
        tokens: list[int] = []
        served = engine()
        ask = with_draft(Ask(*random_prompts([5]), greedy(24), FULL), draft)
        ask.add(served, on_token=lambda _id, _index, token, tokens=tokens: tokens.append(token))
        guessed, given = [], []
        while served.has_unfinished:
            before = len(tokens)
            served.step()
            if before and before < 23:  # the last token is never guessed
                guessed.append(min(3, 23 - before))
                given.append(len(tokens) - before)
        stats = served.stats()
        assert stats.drafts_per_verification == sum(guessed) / len(guessed)
        assert stats.tokens_per_verification == pytest.approx(sum(given) / len(given))
        assert stats.acceptance == (sum(given) - len(given)) / sum(guessed)
        assert stats.line()["drafts_per_verification"] == stats.drafts_per_verification > 2
        assert stats.line()["tokens_per_verification"] == stats.tokens_per_verification
        assert (stats.acceptance == 1) == (draft == DRAFTS[6]) and stats.tokens_per_verification > 1


# Exact sampling


def test_tokens_are_drawn_with_the_probabilities_of_the_path(random_lengths: random.Random) -> None:
    from scipy.stats import chisquare

    tiny = CausalLM.from_hf(tiny_hf(vocab_size=12), backend="torch", deterministic=True)
    (prompt,) = [[5, 6, 7, 8]]
    num_draws = 1000
    params = SamplingParams(max_tokens=3, temperature=1.0, seed=11, n=num_draws, ignore_eos=True)
    served = engine(model=tiny, batch=64)
    served.add_request(prompt, params, FULL, draft=DRAFTS[3].path)
    (output,) = served.run()
    begins = [tuple(sample.token_ids[:2]) for sample in output.samples]
    common = max(set(begins), key=begins.count)
    thirds = [sample.token_ids[2] for sample in output.samples if tuple(sample.token_ids[:2]) == common]
    logits = tiny(torch.tensor([[*prompt, *common]]), paths=FULL).logits[0, -1].double()
    expected = logits.softmax(0) * len(thirds)
    counts = torch.bincount(torch.tensor(thirds), minlength=12).double()
    assert output.num_accepted > 200, "third tokens whose place was guessed are among them"
    assert len(thirds) > 50
    assert chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3


# How many tokens are guessed: see tests/speculation


def test_a_draft_that_is_never_right_is_tried_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftLengths, "plain", lambda *_: None)
    monkeypatch.setattr(DraftLengths, "observe", lambda *_: None)  # other processes may be busy meanwhile
    served = engine(model=tiny_model(deterministic=True), batch=1)
    ask = Ask(*random_prompts([5]), greedy(56), FULL)
    wrong = Draft(LayerPath.of(NUM_LAYERS, [5]))
    (output,) = serve(served, [with_draft(ask, wrong)])
    assert output.num_accepted <= 0.3 * output.num_drafted
    assert 0 < output.num_drafted <= 24


@pytest.mark.parametrize("prompt_len", [5, 20])
@pytest.mark.parametrize("entries", ENTRIES)
def test_looks_lose_a_hundredth_of_the_time(
    entries: DraftEntries, prompt_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps and guesses take what they cost, by a clock of their own; what a look loses is what a plain step would not
    have taken for the same tokens. Long prompts, whose entries it would have to make, are looked at, too."""
    now_ms, lost_ms, own = [0.0], [0.0], costs()
    plain_ms = own.decode_ms([(FULL, 1)])
    decode, guess, prefill = ModelRunner.decode, ModelRunner.guess, ModelRunner.prefill_draft
    end_step = Drafting.end_step

    def decoding(self: ModelRunner, spans: Sequence[Span], *args: Any) -> Any:
        now_ms[0] += own.decode_ms([(FULL, sum(span.num_tokens for span in spans))])
        return decode(self, spans, *args)

    def guessing(self: ModelRunner, turns: Turns, *args: Any) -> Any:
        (path,), (num_missing,), (length,) = turns.paths, map(len, turns.tokens), turns.num_guesses
        now_ms[0] += own.decode_ms([(path, num_missing)]) + (length - 1) * own.decode_ms([(path, 1)])
        return guess(self, turns, *args)

    def prefilling(self: ModelRunner, tokens: list[int], place: tuple[int, int], path: LayerPath, *args: Any) -> None:
        now_ms[0] += own.prefill_ms([(path, len(tokens))], 0)
        prefill(self, tokens, place, path, *args)

    def ending(self: Drafting) -> None:
        if self._is_probe and self._guessed_ms:
            lost_ms.append(now_ms[0] - 1e3 * self._begin_s - self._num_given * plain_ms)
        end_step(self)
        assert sum(lost_ms) < 0.01 * now_ms[0] + plain_ms, "but for the last look, which may lose more than expected"

    for name, patched in (("decode", decoding), ("guess", guessing), ("prefill_draft", prefilling)):
        monkeypatch.setattr(ModelRunner, name, patched)
    monkeypatch.setattr(Drafting, "end_step", ending)
    monkeypatch.setattr(drafting, "time", SimpleNamespace(perf_counter=lambda: now_ms[0] / 1e3))
    wrong = Draft(LayerPath.of(NUM_LAYERS, [5]), entries)
    served = engine(model=tiny_model(deterministic=True), batch=1)
    prompts = random_prompts([prompt_len] * 12)
    serve(served, [with_draft(Ask(prompt, greedy(61 - prompt_len), FULL), wrong) for prompt in prompts])
    assert len(lost_ms) > (4 if entries == "path" else 10) and sum(lost_ms) > 0


@pytest.mark.parametrize(
    ("asking_ms", "expected"),
    [(0.0, [2] * 4 + [1] * 4), (0.65, [2] * 2 + [1] * 2)],
    ids=["at steps 1, 5, 12 and 25, and anew once fewer step", "ten steps of 6.5 ms and more behind each"],
)
@pytest.mark.parametrize("num_probed", [None, 1])
def test_the_question_is_asked_rarely_where_no_guess_pays(
    num_probed: int | None, asking_ms: float, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """num_probed: guesses of a look that is refused, because it is not worth the entries that it wants."""
    times = itertools.count(step=asking_ms / 1e3)
    monkeypatch.setattr(drafting, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    monkeypatch.setattr(DraftLengths, "observe", lambda *_: None)
    monkeypatch.setattr(DraftLengths, "slowness", lambda *_: 1.0)
    choose, asked = DraftLengths.choose, []

    def counted(self: DraftLengths, candidates: Sequence[Candidate], others: Sequence[LayerPath] = ()) -> Any:
        asked.append(len(candidates) + len(others))
        choice = choose(self, candidates, others)
        return replace(choice, lengths=(0,) * len(candidates), gain=1.0)

    monkeypatch.setattr(DraftLengths, "choose", counted)
    monkeypatch.setattr(DraftLengths, "plain", lambda *_: None)
    monkeypatch.setattr(
        Drafting,
        "_probe",
        lambda _, candidates, *_others: None if num_probed is None else (num_probed,) * len(candidates),
    )
    monkeypatch.setattr(Drafting, "_is_worth_entries", lambda *_: False)
    served = engine(batch=2)
    asks = [Ask(*random_prompts([5]), greedy(56), FULL), Ask(*random_prompts([6]), greedy(30), FULL)]
    outputs = serve(served, [with_draft(ask, DRAFTS[3]) for ask in asks])
    assert all(same(output, ask.alone()) for output, ask in zip(outputs, asks, strict=True))
    assert asked == expected


# Requests without a draft in the guesses of others


SHALLOW = LayerPath.of(NUM_LAYERS, [1, 4])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_shallow_request_runs_along_with_the_guesses_of_deep_ones(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = DraftLengths.choose

    def three(self: DraftLengths, candidates: Sequence[Candidate], others: Sequence[LayerPath] = ()) -> Any:
        return replace(choose(self, candidates, others), lengths=tuple(min(3, each.most) for each in candidates))

    monkeypatch.setattr(DraftLengths, "choose", three)
    monkeypatch.setattr(DraftLengths, "plain", lambda *_: None)
    deep = Ask(*random_prompts([6]), greedy(24), FULL)
    shallow = [Ask(random_prompts([7])[0], greedy(24, logprobs=2), SHALLOW), Ask([5, 6], drawn(24, 3, n=2), SHALLOW)]
    served = engine(policy, batch=6)
    outputs = serve(served, [with_draft(deep, DRAFTS[1]), *shallow])
    for output, ask in zip(outputs, [deep, *shallow], strict=True):
        assert same(output, ask.alone())
    assert_empty(served)
    assert outputs[0].num_drafted == served.tally.num_drafted > 0
    for output in outputs[1:]:
        assert output.num_drafted == 0 and output.draft is None
        assert all(sample.was_guessed is None for sample in output.samples)
    # Four tokens of a shallow request a step, as long as others guess in it.
    assert (served.tally.num_decode_steps < 24) == (policy != "by_path")


def test_rows_that_ride_run_each_of_their_layers_once(random_lengths: random.Random) -> None:
    def num_rows(is_drafted: bool) -> list[int]:
        served = engine(model=tiny_model(deterministic=True), batch=4)
        deep = Ask(*random_prompts([6]), greedy(20), LayerPath.of(NUM_LAYERS, [0, 2, 3, 5]))
        told = with_draft(deep, Draft(LayerPath.of(NUM_LAYERS, [0, 2]), "path")) if is_drafted else deep
        serve(served, [told, Ask([5, 6, 7], greedy(20), SHALLOW)])
        return [served.runner.executor.row_counts.run[layer] for layer in SHALLOW.layers]

    assert num_rows(True) == num_rows(False)


# Bad input


BAD: list[tuple[dict[str, Any], str]] = [
    ({"draft": LayerPath.full(3)}, "draft must be of 6 layers"),
    ({"draft": "fast"}, "draft must be a LayerPath, 'auto' or None"),
    ({"draft": 4}, "draft must be a LayerPath, 'auto' or None"),
    ({"draft": [LayerPath.full(6)] * 2}, "one for all or one per prompt"),
    ({"draft": LayerPath.full(6), "draft_entries": "mine"}, "draft_entries must be 'own' or 'path'"),
    ({"draft": LayerPath.full(6), "draft_entries": "path", "path": PATHS[1]}, "layers of the path only"),
    ({"draft": LayerPath.full(6), "path": Parity()}, "draft must be None for a request whose tokens"),
    ({"draft": LayerPath.full(6), "path": torch.ones(30, NUM_LAYERS, dtype=torch.bool)}, "draft must be None"),
    ({"draft": "auto", "path": Parity()}, "draft must be None for a request whose tokens .* got 'auto'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_drafts_are_refused(options: dict[str, Any], message: str) -> None:
    served = engine()
    with pytest.raises((TypeError, ValueError), match=message):
        served.add_request([5, 6, 7], greedy(4), **{"path": FULL, **options})
    assert_empty(served)
