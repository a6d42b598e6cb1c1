"""Drafts: a request with one becomes, bit for bit, what it becomes without, and nothing is left of its guesses."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from drafts import DRAFTS, FULL, asks_of, random_draft, random_path, serve_with_drafts, with_draft
from models import NUM_LAYERS, random_prompts, tiny_hf, tiny_model
from streams import (
    PATHS,
    Ask,
    Parity,
    assert_empty,
    drawn,
    engine,
    greedy,
    guess_three,
    model,
    same,
    serve,
)

from dynskip import LLM, CausalLM, LayerPath, SamplingParams
from dynskip.engine import drafting
from dynskip.engine.drafting import Drafting
from dynskip.engine.request import Span
from dynskip.measure.agreement import Gate, NearTies
from dynskip.ops.backends import available_backends
from dynskip.scheduler.policies.make import POLICIES
from dynskip.speculation.draft import Draft
from dynskip.speculation.lengths import Candidate, Choice, DraftLengths

# Equal to the same request without a draft


@pytest.mark.parametrize(
    ("policy", "num_slots", "changes_logits"),
    [  # each pair of the three
        (policy, num_slots, bool((place + index) % 2))
        for place, policy in enumerate(POLICIES)
        for index, num_slots in enumerate((None, 340))
    ],
)
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
    found = serve_with_drafts(served, asks, random_lengths)
    assert_empty(served)
    for output, expected in zip(found, alone, strict=True):
        assert same(output, expected)
    for output in found:
        came = sum(sum(sample.was_guessed or ()) for sample in output.samples)
        assert output.num_accepted == came, "guesses behind an end are not accepted"
    assert sum(output.num_accepted for output in found) == served.tally.num_accepted
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


def test_each_prompt_has_its_own_draft_or_none(random_lengths: random.Random) -> None:
    llm, prompts = LLM(model()), random_prompts([5, 9, 7])
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    drafts = [DRAFTS[3].path, None, DRAFTS[2].path]
    outputs = llm.generate(prompts, params, FULL, draft=drafts)
    assert [output.token_ids for output in outputs] == [o.token_ids for o in llm.generate(prompts, params, FULL)]
    assert [output.draft and output.draft.path for output in outputs] == drafts
    assert [output.num_drafted > 0 for output in outputs] == [True, False, True]


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


def test_a_request_whose_logits_change_does_not_ride(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others guess for it from logits that nothing has changed, so that it would not get each of these tokens."""
    asked: list[Candidate] = []
    choose = DraftLengths.choose

    def noted(self: DraftLengths, candidates: Sequence[Candidate], others: Sequence[LayerPath] = ()) -> Any:
        asked.extend(candidates)
        return replace(choose(self, candidates, others), lengths=tuple(min(3, each.most) for each in candidates))

    monkeypatch.setattr(DraftLengths, "choose", noted)
    monkeypatch.setattr(DraftLengths, "plain", lambda *_: None)
    for params, num_later in ((greedy(24, frequency_penalty=1.0), 0), (greedy(24, min_tokens=8), 16)):
        asked.clear()
        deep, shallow = Ask(*random_prompts([6]), greedy(24), FULL), Ask([5, 6, 7], params, SHALLOW)
        outputs = serve(engine(batch=4), [with_draft(deep, DRAFTS[1]), shallow])
        assert same(outputs[0], deep.alone()) and same(outputs[1], shallow.alone())
        riding = [each for each in asked if each.rides]
        assert len(riding) <= num_later and bool(riding) == bool(num_later)


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
    ({"draft": "auto", "draft_entries": "path"}, "draft_entries must be left out with 'auto', which knows them"),
    ({"draft": ["auto"]}, "draft of a prompt must be a LayerPath or None, got 'auto'"),
    ({"draft": b"auto"}, "draft must be a LayerPath, 'auto' or None, got bytes"),
    ({"draft": "auto", "path": Parity()}, "draft must be None for a request whose tokens .* got 'auto'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_drafts_are_refused(options: dict[str, Any], message: str) -> None:
    served = engine()
    with pytest.raises((TypeError, ValueError), match=message):
        served.add_request([5, 6, 7], greedy(4), **{"path": FULL, **options})
    assert_empty(served)
