"""Parameters that change logits, through the engine: against a loop over the whole text, alone and in company."""

from __future__ import annotations

import functools
import math
import pickle
import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import NUM_LAYERS, VOCAB_SIZE, random_prompts, tiny_model, word_tokenizer
from streams import (
    PATHS,
    Ask,
    Parity,
    assert_empty,
    drawn,
    engine,
    fewer_of_the_last,
    greedy,
    model,
    more_of_the_prompt,
    random_changes,
    same,
    serve,
)
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from dynskip import LLM, LayerPath, SamplingParams
from dynskip.engine.diagnosis import NonFiniteError
from dynskip.engine.step import StepExecution
from dynskip.ops import choice, choice_reference
from dynskip.ops.choice import choice_columns
from dynskip.sampling import Choice
from dynskip.scheduler.policies.make import POLICIES

FULL = PATHS[3]


@functools.cache
def wide() -> Any:
    """The tiny model in float64: its prompts and decode steps have the same tokens, if not the same bits."""
    return tiny_model(dtype=torch.float64)


def by_the_whole_text(ask: Ask, output: int = 0, ends: tuple[int, ...] = ()) -> list[int]:
    """The output of ``ask`` in which nothing is kept from token to token: the text runs whole each time."""
    params, text, num_prompt = ask.params, list(ask.prompt), len(ask.prompt)
    before = LogitsProcessorList()
    if params.logit_bias:
        before.append(SequenceBiasLogitsProcessor([[[token], value] for token, value in params.logit_bias.items()]))
    if params.min_tokens and ends:
        before.append(MinNewTokensLengthLogitsProcessor(num_prompt, params.min_tokens, list(ends), device="cpu"))
    before.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    assert params.max_tokens is not None
    while len(text) < num_prompt + params.max_tokens:
        logits = wide()(torch.tensor([text]), paths=ask.path).logits[0, -1].float()
        for processor in params.logits_processors or ():
            ids = (text[:num_prompt], text[num_prompt:])
            logits = processor(*(ids if processor is more_of_the_prompt else ids[1:]), logits)
        logits = before(torch.tensor([text]), logits.float()[None])
        counts = torch.bincount(torch.tensor(text[num_prompt:], dtype=torch.int64), minlength=VOCAB_SIZE)
        logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
        if params.min_p and not params.greedy:
            warped = MinPLogitsWarper(params.min_p)(torch.tensor([text]), logits / params.temperature)
            logits = logits.masked_fill(warped == -math.inf, -math.inf)
        columns = choice_columns(
            [Choice(replace(params, min_p=0.0), params.seed or 0, output, len(text) - num_prompt)],
            VOCAB_SIZE,
            torch.device("cpu"),
        )
        text.append(int(choice_reference.choose_tokens(logits, *columns)))
        if text[-1] in params.stop_token_ids:
            break
    return text[num_prompt:]


def asks_of(count: int, seed: int) -> list[Ask]:
    """Requests that change their logits in all ways, beside some that do not."""
    draw = random.Random(seed)
    asks = []
    for index, prompt in enumerate(random_prompts([draw.randint(1, 20) for _ in range(count)], seed)):
        max_tokens = draw.randint(2, 16)
        params = greedy(max_tokens) if index % 2 else drawn(max_tokens, index, n=draw.choice([1, 3]))
        if index % 4:
            params = replace(params, **random_changes(draw))
        if index % 3 == 0:
            stop_token_ids = tuple(draw.sample(range(VOCAB_SIZE), 20))
            params = replace(params, stop_token_ids=stop_token_ids, min_tokens=draw.randint(0, max_tokens))
        asks.append(Ask(prompt, params, PATHS[index % 4]))
    return asks


# What the tokens are


def test_tokens_are_those_of_a_loop_over_the_whole_text() -> None:
    asks = asks_of(24, 1)
    outputs = serve(engine(model=wide(), batch=8), asks)
    for ask, output in zip(asks, outputs, strict=True):
        ends = (*wide().eos_token_ids, *ask.params.stop_token_ids)
        expected = [by_the_whole_text(ask, index, ends) for index in range(ask.params.n)]
        assert [sample.token_ids for sample in output.samples] == expected


@pytest.mark.parametrize("num_slots", [None, 230])
@pytest.mark.parametrize("policy", POLICIES)
def test_company_and_preemptions_change_nothing(policy: str, num_slots: int | None) -> None:
    asks = asks_of(24, 2)
    served = engine(policy, num_slots, batch=6)
    for ask, output in zip(asks, serve(served, asks), strict=True):
        assert same(output, ask.alone())
    assert bool(served.stats().outcome.num_preempted) == (num_slots is not None)


def test_controllers_of_each_token_go_with_them() -> None:
    asks = [Ask(ask.prompt, ask.params, Parity()) for ask in asks_of(8, 3)]
    for ask, output in zip(asks, serve(engine(batch=6), asks), strict=True):
        assert same(output, ask.alone())


def test_rows_that_change_nothing_are_chosen_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynskip.engine import choosing

    def fails(*_: Any) -> Any:
        raise AssertionError("no logits are to be changed")

    plain = [Ask(prompt, greedy(9), FULL) for prompt in random_prompts([3, 7])]
    plain.append(Ask([5, 6], greedy(9, min_p=0.9), FULL))  # the likeliest is the likeliest
    plain.append(Ask([5, 6], drawn(9, 4, top_p=0.9, top_k=50, min_p=0.02), FULL))
    expected = [ask.alone() for ask in plain]
    asks = [*plain, Ask([7, 8], greedy(9, presence_penalty=1.0), FULL)]
    assert all(map(same, serve(engine(batch=8), asks), expected))
    monkeypatch.setattr(choosing, "_chosen_behind_changes", fails)
    assert all(map(same, serve(engine(batch=8), plain), expected))


def test_an_interrupted_step_loses_no_count() -> None:
    calls: list[int] = []

    def interrupts(output_ids: list[int], logits: Tensor) -> Tensor:
        calls.append(len(output_ids))
        if len(calls) in (3, 8, 9):
            raise KeyboardInterrupt
        return logits

    changes = {"repetition_penalty": 1.6, "frequency_penalty": 0.7}
    ask = Ask(*random_prompts([9]), drawn(14, 3, logits_processors=[interrupts], **changes), FULL)
    served, outputs = engine(), []
    ask.add(served)
    num_interrupts = 0
    while served.has_unfinished:
        try:
            outputs += served.step()
        except KeyboardInterrupt:
            num_interrupts += 1
    assert num_interrupts == 3
    assert same(outputs[0], Ask(ask.prompt, replace(ask.params, logits_processors=()), FULL).alone())


def test_log_probabilities_are_those_of_the_model() -> None:
    bias = {7: 50.0}
    (output,) = serve(engine(), [Ask(*random_prompts([5]), greedy(4, logit_bias=bias), FULL)])
    assert output.token_ids == [7] * 4 and output.logprobs is not None
    everything = torch.tensor([output.prompt_ids + output.token_ids])
    expected = model()(everything, paths=FULL).logits[0].log_softmax(-1)[4:-1]
    for row, reported in zip(expected, output.logprobs, strict=True):
        assert reported[7] == pytest.approx(float(row[7]), abs=1e-5)
        assert reported[7] < max(reported.values())


def test_a_processor_gets_lists_of_its_own_and_sees_the_output() -> None:
    seen: list[tuple[list[int], list[int]]] = []

    def watches(prompt_ids: list[int], output_ids: list[int], logits: Tensor) -> Tensor:
        assert logits.shape == (VOCAB_SIZE,) and logits.dtype == torch.float32
        seen.append(([*prompt_ids], [*output_ids]))
        prompt_ids.clear()
        output_ids.append(3)
        return logits

    ask = Ask(*random_prompts([5]), greedy(6, logits_processors=[watches, watches]), FULL)
    (output,) = serve(engine(), [ask])
    assert seen == [(ask.prompt, output.token_ids[:count]) for count in range(6) for _ in range(2)]
    assert same(output, Ask(ask.prompt, greedy(6), FULL).alone())


# Minimum lengths and ends


def test_no_end_comes_before_min_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    (free,) = serve(engine(), [Ask(*random_prompts([5]), greedy(12), FULL)])
    eos, stop = free.token_ids[2], free.token_ids[0]
    monkeypatch.setattr(model().config, "eos_token_id", [eos, 10**6])
    for ignore_eos in (False, True):
        params = SamplingParams(max_tokens=12, min_tokens=8, stop_token_ids=[stop], ignore_eos=ignore_eos)
        (output,) = serve(engine(), [Ask(free.prompt_ids, params, FULL)])
        assert not {eos, stop} & {*output.token_ids[:8]} and len(output.token_ids) >= 9
    (output,) = serve(engine(), [Ask(free.prompt_ids, SamplingParams(max_tokens=12, min_tokens=12), FULL)])
    assert output.finish_reason == "length" and eos not in output.token_ids
    (output,) = serve(engine(), [Ask(free.prompt_ids, SamplingParams(max_tokens=12, min_tokens=2), FULL)])
    assert output.token_ids == free.token_ids[: free.token_ids.index(eos) + 1]


@pytest.fixture
def llm() -> LLM:
    return LLM(model(), tokenizer=word_tokenizer())


def test_stop_texts_count_behind_min_tokens(llm: LLM) -> None:
    prompts = random_prompts([5])
    (free,) = llm.generate(prompts, greedy(12, repetition_penalty=1e9), FULL)
    words = free.text.split() if free.text else []
    assert len({*words}) == len(words) == 12, "each comes once"
    for min_tokens in range(13):
        for at in (0, 4, 11):
            params = greedy(12, repetition_penalty=1e9, stop=words[at], min_tokens=min_tokens)
            (output,) = llm.generate(prompts, params, FULL)
            has_stopped = at >= min_tokens
            assert output.token_ids == free.token_ids[: at + 1 if has_stopped else 12]
            assert output.finish_reason == ("stop" if has_stopped else "length")
            assert output.text == " ".join(
                [*words[:at], ""] if has_stopped and at else words[: 0 if has_stopped else 12]
            )
    # It begins within the first tokens and ends behind them.
    params = greedy(12, repetition_penalty=1e9, stop=f"{words[3]} {words[4]}", min_tokens=4)
    (output,) = llm.generate(prompts, params, FULL)
    assert output.text == " ".join([*words[:3], ""]) and output.finish_reason == "stop"


def test_the_text_may_include_the_stop_text(llm: LLM) -> None:
    prompts = random_prompts([5])
    (free,) = llm.generate(prompts, greedy(12), FULL)
    assert free.text is not None
    words = free.text.split()
    params = greedy(12, stop=[words[7], words[3][:3], words[3][:2]], include_stop_str_in_output=True)
    (output,) = llm.generate(prompts, params, FULL)
    assert output.finish_reason == "stop" and output.text == words[0][:2], "of those at one place the shortest"
    params = greedy(12, stop=[words[7], words[3]], include_stop_str_in_output=True)
    (output,) = llm.generate(prompts, params, FULL)
    assert output.text == " ".join(words[: words.index(words[3]) + 1])
    assert output.text == llm.text(output.token_ids, params) != llm.text(output.token_ids, params.stop)


def test_special_tokens_may_be_shown_and_sought(llm: LLM) -> None:
    prompts, bias = random_prompts([5]), {2: 1000.0}
    shown = greedy(3, logit_bias=bias, skip_special_tokens=False)
    texts = [llm.generate(prompts, params, FULL)[0].text for params in (shown, greedy(3, logit_bias=bias))]
    assert texts == ["</s> </s> </s>", ""]
    (output,) = llm.generate(prompts, replace(shown, stop="</s>"), FULL)
    assert (output.finish_reason, output.token_ids, output.text) == ("stop", [2], "")
    (output,) = llm.generate(prompts, greedy(3, logit_bias=bias, stop="</s>"), FULL)
    assert output.finish_reason == "length", "what is left out of the text is not found in it"


# What ends a request, and no other


def nan(output_ids: list[int], logits: Tensor) -> Tensor:
    return logits * (math.nan if len(output_ids) == 3 else 1.0)


def infinite(output_ids: list[int], logits: Tensor) -> Tensor:
    logits[9] = math.inf
    return logits


def nothing(output_ids: list[int], logits: Tensor) -> Tensor:
    return logits.fill_(-math.inf)


def raises(output_ids: list[int], logits: Tensor) -> Tensor:
    raise KeyError("unknown")


def short(output_ids: list[int], logits: Tensor) -> Tensor:
    return logits[1:]


def integers(output_ids: list[int], logits: Tensor) -> Tensor:
    return logits.int()


def returns_nothing(output_ids: list[int], logits: Tensor) -> Any:
    logits += 1


FAULTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"logits_processors": [nan]},
        NonFiniteError,
        "logits must be finite, .* behind logits_processors.* got NaN. Leave a",
    ),
    ({"logits_processors": [infinite]}, NonFiniteError, "got inf. Leave a token"),
    ({"logits_processors": [nothing]}, NonFiniteError, "got -inf for every token. Leave a token"),
    ({"logit_bias": dict.fromkeys(range(VOCAB_SIZE), -math.inf)}, NonFiniteError, "got -inf for every token"),
    ({"stop_token_ids": range(VOCAB_SIZE), "min_tokens": 1}, NonFiniteError, "got -inf for every token"),
    ({"repetition_penalty": 2e-38, "logit_bias": dict.fromkeys(range(VOCAB_SIZE), 99.0)}, NonFiniteError, "got inf"),
    ({"logits_processors": [raises]}, KeyError, "unknown"),
    (
        {"logits_processors": [short]},
        TypeError,
        r"logits_processors must return logits of \[101\], got \[100\], torch.f",
    ),
    ({"logits_processors": [integers]}, TypeError, r"must return logits of \[101\], got \[101\], torch.int32"),
    ({"logits_processors": [returns_nothing]}, TypeError, r"must return logits of \[101\], got <class 'NoneType'>"),
]


@pytest.mark.parametrize("is_drafted", [False, True])
@pytest.mark.parametrize(("params", "kind", "message"), FAULTS)
def test_a_fault_ends_its_request_alone(
    params: dict[str, Any], kind: type[Exception], message: str, is_drafted: bool
) -> None:
    neighbours = [
        Ask([5, 6, 7], greedy(8), FULL),
        Ask([5, 6, 9], drawn(8, 3, frequency_penalty=1.0, logits_processors=[fewer_of_the_last]), FULL),
    ]
    served = engine(batch=8)
    ids = [ask.add(served) for ask in neighbours]
    options: dict[str, Any] = {"draft": LayerPath.of(NUM_LAYERS, [0, 1, 2, 3, 4])} if is_drafted else {}
    ids.append(served.add_request([8, 9, 10], greedy(8, n=2, **params), FULL, **options))
    outputs = {output.request_id: output for output in served.run()}
    assert_empty(served)
    failed = outputs[ids[-1]]
    assert failed.finish_reason == "error" and isinstance(failed.error, kind)
    with pytest.raises(kind, match=message):
        raise failed.error
    for request_id, ask in zip(ids[:-1], neighbours, strict=True):
        assert same(outputs[request_id], ask.alone())


def test_a_closed_batch_goes_on_without_one_whose_logits_have_no_token(llm: LLM) -> None:
    prompts = random_prompts([5, 6])
    params = [greedy(6, logits_processors=[nan]), greedy(6)]
    failed, sound = llm.generate(prompts, params, FULL)
    assert isinstance(failed.error, NonFiniteError) and len(failed.token_ids) == 3
    assert sound == llm.generate(prompts[1:], params[1], FULL)[0]
    with pytest.raises(KeyError, match="unknown"):
        llm.generate(prompts, greedy(6, logits_processors=[raises]), FULL)


def test_what_cannot_be_chosen_together_is_chosen_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynskip.engine import choosing

    asks = [ask for ask in asks_of(12, 5) if ask.params.n == 1]
    expected = [ask.alone() for ask in asks]
    sizes: list[int] = []

    def chooses_one(logits: Tensor, *rest: Any, **named: Any) -> list[int]:
        sizes.append(len(logits))
        if len(logits) > 1:
            raise MemoryError("no room")
        return choice.choose_tokens(logits, *rest, **named)

    monkeypatch.setattr(choosing, "choose_tokens", chooses_one)
    assert all(map(same, serve(engine(batch=8), asks), expected))
    assert max(sizes) > 1


def test_damaged_weights_are_still_diagnosed() -> None:
    damaged = tiny_model("untied", deterministic=True)
    with torch.no_grad():
        damaged.decoder.layers[2].fc2.bias[3] = math.nan
    served = engine(model=damaged)
    served.add_request([5, 6], greedy(4, repetition_penalty=1.5), FULL)
    (output,) = served.run()
    assert isinstance(output.error, NonFiniteError) and "output of layer 2" in str(output.error)


# Tokens that are read late


def test_logits_that_change_are_not_read_late() -> None:
    served = engine()
    requests = [
        served.add_route([5, 6], params, served_route(served), draft=None)
        for params in (
            SamplingParams(),
            SamplingParams(temperature=1.0, top_p=0.9),
            SamplingParams(min_tokens=2),
            SamplingParams(logit_bias={3: 1.0}),
        )
    ]
    for request in requests:
        request.sequences[0].state.num_generated = 1  # as in a decode step
    served.runner.reads_late = True
    may_fly = StepExecution._may_fly
    assert [may_fly(served.execution, request.sequences) for request in requests] == [True, True, False, False]


def served_route(served: Any) -> Any:
    from dynskip.routing.routes import resolve

    return resolve(FULL, NUM_LAYERS, [torch.tensor([5, 6])], served.model.embed_tokens, None, "path")[0]


# Parameters


def one_argument(logits: Tensor) -> Tensor:
    return logits


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"min_p": 1.01}, "min_p must lie in 0..1, got 1.01."),
    ({"min_p": math.nan}, "min_p must lie in 0..1, got nan."),
    ({"min_p": "0.1"}, "min_p must lie in 0..1, got '0.1'."),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, within float32, got 0.0."),
    ({"repetition_penalty": 1e-46}, "repetition_penalty must be above 0, within float32, got 1e-46."),
    ({"repetition_penalty": 1e39}, "repetition_penalty must be above 0, within float32, got 1e+39."),
    ({"repetition_penalty": True}, "repetition_penalty must be above 0, within float32, got True."),
    ({"presence_penalty": 2.1}, "presence_penalty must lie in -2..2, got 2.1."),
    ({"frequency_penalty": -2.1}, "frequency_penalty must lie in -2..2, got -2.1."),
    (
        {"logit_bias": [3, 1.0]},
        "logit_bias must be None or a dict of token ids and numbers within float32, or -inf, got",
    ),
    ({"logit_bias": {-1: 1.0}}, "logit_bias must be None or a dict of token ids and"),
    ({"logit_bias": {1.5: 1.0}}, "logit_bias must be None or a dict of token ids and"),
    ({"logit_bias": {"7": 1.0}}, "logit_bias must be None or a dict of token ids and"),
    ({"logit_bias": {7: math.inf}}, "logit_bias must be None or a dict of token ids and"),
    ({"logit_bias": {7: math.nan}}, "logit_bias must be None or a dict of token ids and"),
    ({"logit_bias": {7: -1e39}}, "logit_bias must be None or a dict of token ids and"),
    ({"logit_bias": {7: None}}, "logit_bias must be None or a dict of token ids and"),
    ({"min_tokens": -1}, "min_tokens must be an integer of at least 0, got -1."),
    ({"min_tokens": None}, "min_tokens must be an integer of at least 0, got None."),
    ({"min_tokens": 17}, "min_tokens must be at most max_tokens, 16, got 17."),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output must be True or False, got 1."),
    ({"skip_special_tokens": None}, "skip_special_tokens must be True or False, got None."),
    ({"prompt_logprobs": -1}, "prompt_logprobs must be at least 0 or None, got -1."),
    (
        {"logits_processors": fewer_of_the_last},
        "logits_processors must be functions of (output_ids, logits) or (prompt",
    ),
    ({"logits_processors": [5]}, "logits_processors must be functions of (output_ids, logits) or (prompt"),
    ({"logits_processors": [one_argument]}, "logits_processors must be functions of (output_ids, logits) or (prompt"),
    ({"logits_processors": "ab"}, "logits_processors must be functions of (output_ids, logits) or (prompt"),
]


@pytest.mark.parametrize(("params", "message"), MISTAKES)
def test_bad_parameters_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"SamplingParams: {message}")):
        SamplingParams(**params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias must hold token ids in 0..100, got 101."),
        ({"prompt_logprobs": VOCAB_SIZE + 1}, "prompt_logprobs must be at most 101, the vocabulary, got 102."),
    ],
)
def test_parameters_beyond_the_vocabulary_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"add_request: {message}"):
        engine().add_request([5, 6], SamplingParams(**params))
    with pytest.raises(ValueError, match=f"generate: prompt 0: {message}"):
        LLM(model()).generate([[5, 6]], SamplingParams(**params))


def test_numbers_of_all_libraries_are_taken_and_copied() -> None:
    import numpy as np

    bias = {np.int64(4): torch.tensor(2.0), 7: np.float32(0.5)}
    params = SamplingParams(
        logit_bias=bias, min_p=np.float32(0.5), min_tokens=np.int32(3), repetition_penalty=torch.tensor(2.0)
    )
    bias[8] = 1.0
    assert params.logit_bias == {4: 2.0, 7: 0.5}
    assert (params.min_p, params.min_tokens, params.repetition_penalty) == (0.5, 3, 2.0)
    assert SamplingParams(logits_processors=None) == SamplingParams()


def test_parameters_are_equal_hashed_and_pickled() -> None:
    params = SamplingParams(logit_bias={4: 2.0}, logits_processors=[fewer_of_the_last, more_of_the_prompt])
    assert [takes for _, takes in params.processors] == [False, True]
    twin = SamplingParams(logit_bias={4: 2.0}, logits_processors=(fewer_of_the_last, more_of_the_prompt))
    assert params == twin and hash(params) == hash(twin)
    assert params.bias_columns[0].tolist() == [4]
    assert pickle.loads(pickle.dumps(params)) == params
    changed = replace(params, logit_bias={5: 1.0})
    assert changed != params and changed.bias_columns[0].tolist() == [5]


def test_which_parameters_change_logits() -> None:
    assert not SamplingParams(temperature=1.0, top_k=4, top_p=0.5, seed=1, logprobs=3).changes_logits()
    assert not SamplingParams(min_p=0.5, temperature=1.0).changes_logits(), "it filters, as top_p does"
    assert [SamplingParams(min_tokens=2).changes_logits(position) for position in range(4)] == [
        True,
        True,
        False,
        False,
    ]
    for params in ({"presence_penalty": 1.0}, {"logit_bias": {1: 0.0}}, {"logits_processors": [fewer_of_the_last]}):
        assert SamplingParams(**params).changes_logits(9)
    assert not SamplingParams(logit_bias={}, logits_processors=[]).changes_logits()
