"""How often drafts are asked for, and looked at where they do not seem to pay; lengths: see tests/speculation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from drafts import DRAFTS, FULL, with_draft
from models import NUM_LAYERS, VOCAB_SIZE, random_prompts, tiny_hf, tiny_model
from streams import (
    Ask,
    costs,
    engine,
    greedy,
    guess_three,
    same,
    serve,
)

from dynskip import CausalLM, LayerPath
from dynskip.engine import drafting
from dynskip.engine.drafting import Drafting, DraftWarning
from dynskip.engine.model_runner import ModelRunner
from dynskip.engine.request import Span
from dynskip.execution.turns import Guesses, Turns
from dynskip.measure.calibration import add_draft_costs
from dynskip.speculation.draft import ENTRIES, Draft, DraftEntries
from dynskip.speculation.lengths import Candidate, DraftLengths

# How many tokens are guessed: see tests/speculation


def tick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Lets steps and guesses take what they cost, by a clock of their own; its milliseconds."""
    now_ms, own = [0.0], costs()
    decode, guess, prefill = ModelRunner.decode, ModelRunner.guess, ModelRunner.prefill_draft

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

    for name, patched in (("decode", decoding), ("guess", guessing), ("prefill_draft", prefilling)):
        monkeypatch.setattr(ModelRunner, name, patched)
    monkeypatch.setattr(drafting, "time", SimpleNamespace(perf_counter=lambda: now_ms[0] / 1e3))
    return now_ms


def test_a_draft_that_is_never_right_is_tried_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    tick(monkeypatch)
    monkeypatch.setattr(DraftLengths, "plain", lambda *_: None)
    ask = Ask(*random_prompts([5]), greedy(56), FULL)
    expected = ask.alone(model=tiny_model(deterministic=True), batch=1)
    chosen = [*expected.prompt_ids, *expected.token_ids]
    guess = ModelRunner.guess

    def guessing(self: ModelRunner, turns: Turns, *args: Any) -> Guesses:
        guesses = guess(self, turns, *args)
        begin = turns.first_positions[0] + len(turns.tokens[0])
        wrong = [(token + 1) % VOCAB_SIZE for token in chosen[begin : begin + len(guesses.tokens[0])]]
        return guesses._replace(tokens=[wrong])

    monkeypatch.setattr(ModelRunner, "guess", guessing)
    served = engine(model=tiny_model(deterministic=True), batch=1)
    (output,) = serve(served, [with_draft(ask, Draft(LayerPath.of(NUM_LAYERS, [5])))])
    assert same(output, expected)
    assert output.num_accepted == 0 and 0 < output.num_drafted <= 8


@pytest.mark.parametrize("prompt_len", [5, 20])
@pytest.mark.parametrize("entries", ENTRIES)
def test_looks_lose_a_hundredth_of_the_time(
    entries: DraftEntries, prompt_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a look loses is what a plain step would not have taken for the same tokens. Long prompts, whose entries it
    would have to make, are looked at, too."""
    now_ms, lost_ms = tick(monkeypatch), [0.0]
    plain_ms = costs().decode_ms([(FULL, 1)])
    end_step = Drafting.end_step

    def ending(self: Drafting) -> None:
        if self._is_probe and self._guessed_ms:
            lost_ms.append(now_ms[0] - 1e3 * self._begin_s - self._num_given * plain_ms)
        end_step(self)
        assert sum(lost_ms) < 0.01 * now_ms[0] + plain_ms, "but for the last look, which may lose more than expected"

    monkeypatch.setattr(Drafting, "end_step", ending)
    wrong = Draft(LayerPath.of(NUM_LAYERS, [5]), entries)
    served = engine(model=tiny_model(deterministic=True), batch=1)
    prompts = random_prompts([prompt_len] * 12)
    serve(served, [with_draft(Ask(prompt, greedy(61 - prompt_len), FULL), wrong) for prompt in prompts])
    assert len(lost_ms) > (4 if entries == "path" else 10) and sum(lost_ms) > 0


@pytest.mark.parametrize("prompt_len", [5, 20])
@pytest.mark.parametrize("entries", ENTRIES)
def test_a_draft_that_was_thought_dear_comes_back(
    entries: DraftEntries, prompt_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks see that its guesses take what they cost, those that have to make their entries, too."""
    tick(monkeypatch)
    hf_model = tiny_hf()
    with torch.no_grad():  # layers behind the first do nothing, so that it is always right
        for layer in hf_model.model.decoder.layers[1:]:
            for linear in (layer.fc2, layer.self_attn.out_proj):
                linear.weight.zero_()
                linear.bias.zero_()
    own = CausalLM.from_hf(hf_model, backend="torch", deterministic=True)
    right = Draft(LayerPath.of(NUM_LAYERS, [0]), entries)
    dear = replace(costs(), draft_ratios={1: (5.0, 1.0)})
    served = engine(model=own, batch=1, costs=dear)
    asks = [Ask(prompt, greedy(61 - prompt_len), FULL) for prompt in random_prompts([prompt_len] * 24)]
    outputs = serve(served, [with_draft(ask, right) for ask in asks])
    drafted = [output.num_drafted for output in outputs]
    assert drafted[0] < 8 and min(drafted[-4:]) > 16, drafted
    lengths = served.execution.drafting.lengths
    assert lengths is not None and lengths.ratios(1).guess < 2


@pytest.mark.parametrize("is_worth", [False, True])
def test_own_entries_are_made_where_they_save_more_than_they_take(
    is_worth: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guesses that halve the time of a token save half a plain step on each token that an output has left."""
    guess_three(monkeypatch)
    choose = DraftLengths.choose
    monkeypatch.setattr(DraftLengths, "choose", lambda *args: replace(choose(*args), gain=2.0))
    monkeypatch.setattr(DraftLengths, "observe", lambda *_: None)  # other processes may be busy meanwhile
    draft = Draft(LayerPath.of(NUM_LAYERS, [1, 4]))
    entries_ms = costs().prefill_ms([(draft.path, 21)], 0)  # of the prompt, and of the token behind it
    least = int(entries_ms / (costs().decode_ms([(FULL, 1)]) / 2)) + 1
    assert least > 3, "fewer tokens are left than would be guessed"
    ask = Ask(*random_prompts([20]), greedy(least + is_worth), FULL)  # the prompt gives one token
    (output,) = serve(engine(model=tiny_model(deterministic=True), batch=1), [with_draft(ask, draft)])
    assert (output.num_drafted > 0) == is_worth
    assert same(output, ask.alone())


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


def test_guesses_stand_beside_no_plain_step_behind_steps_without_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    guess_three(monkeypatch)
    served = engine(model=tiny_model(deterministic=True), batch=1)
    ask = Ask(*random_prompts([5]), greedy(20), FULL)
    request_id = with_draft(ask, DRAFTS[3]).add(served)
    for _ in range(4):
        served.step()
    lengths = served.execution.drafting.lengths
    assert lengths is not None
    lengths._of(1).add_guesses(1.0, 1.0)
    recent = lengths._of(1)._recent
    served.step()
    assert recent, "the last steps had guesses"
    served.abort(request_id)
    ask.add(served)
    for _ in range(4):
        served.step()
    assert recent, "a few steps are no while"
    for _ in range(8):
        served.step()
    assert not recent, "a plain step to come does not follow them"


def test_a_draft_that_fails_is_none_that_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("no guess")

    guess_three(monkeypatch)
    monkeypatch.setattr(ModelRunner, "guess", failing)
    with pytest.raises(DraftWarning, match=r"A draft failed.*no guess"):
        add_draft_costs(tiny_model(), costs(), [1])
