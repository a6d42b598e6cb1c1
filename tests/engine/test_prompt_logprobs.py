"""Log-probabilities of prompts: those of a forward pass, whatever the chunks, the company and the preemptions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from models import NUM_LAYERS, VOCAB_SIZE, random_prompts, tiny_model
from streams import PATHS, Ask, Parity, assert_empty, drawn, engine, greedy, model, same, serve

from dynskip import LLM, LayerPath, SamplingParams
from dynskip.engine import prompt_logprobs
from dynskip.engine.request import RequestOutput
from dynskip.ops import native
from dynskip.scheduler.policies.make import POLICIES

FULL = PATHS[3]


def assert_those_of_a_forward_pass(output: RequestOutput, own: Any, num_top: int, path: Any, atol: float) -> None:
    prompt = output.prompt_ids
    rows = own(torch.tensor([prompt]), paths=path).logits[0].float().log_softmax(-1)[:-1]
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for row, token, reported in zip(rows, prompt[1:], output.prompt_logprobs[1:], strict=True):
        assert reported is not None and token in reported
        best = row.topk(num_top)
        assert num_top <= len(reported) <= num_top + 1
        if num_top:
            assert min(reported.values()) >= float(min(best.values[-1], row[token])) - atol
        for name, value in reported.items():
            assert value == pytest.approx(float(row[name]), abs=atol)


@pytest.mark.parametrize("num_top", [0, 3])
@pytest.mark.parametrize("executor", ["compact", "reference"])
def test_they_are_those_of_a_forward_pass(num_top: int, executor: Any) -> None:
    prompts = random_prompts([1, 2, 9, 30])
    asks = [Ask(prompt, greedy(3, prompt_logprobs=num_top), path) for prompt, path in zip(prompts, PATHS, strict=True)]
    for ask, output in zip(asks, serve(engine(executor=executor), asks), strict=True):
        assert_those_of_a_forward_pass(output, model(), num_top, ask.path, 1e-4)


@pytest.mark.skipif(native.unavailable_reason() is not None, reason="needs the C++ extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_prompts_tell_them(dtype: torch.dtype) -> None:
    own = tiny_model(dtype=dtype, backend="native")
    outputs = LLM(own).generate(random_prompts([9, 5, 1]), greedy(3, prompt_logprobs=2), FULL)
    for output in outputs:
        assert_those_of_a_forward_pass(output, own, 2, FULL, 1e-4 if dtype == torch.float32 else 0.1)


def test_what_follows_is_not_touched() -> None:
    for params in (greedy(6), drawn(6, 3, n=3)):
        ask = Ask(*random_prompts([20]), params, PATHS[2])
        told = Ask(ask.prompt, replace(params, prompt_logprobs=2), PATHS[2])
        output, expected = told.alone(), ask.alone()
        assert output.samples == expected.samples and expected.prompt_logprobs is None


def test_parameters_that_change_logits_change_none_of_them() -> None:
    (prompt,) = random_prompts([12])
    changed = greedy(3, prompt_logprobs=2, repetition_penalty=3.0, logit_bias={5: 9.0})
    output, expected = Ask(prompt, changed, FULL).alone(), Ask(prompt, greedy(3, prompt_logprobs=2), FULL).alone()
    assert output.prompt_logprobs == expected.prompt_logprobs != output.samples


def test_few_logits_are_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Ask(*random_prompts([40]), greedy(2, prompt_logprobs=3), FULL)
    expected = ask.alone()
    for num_rows in (1, 7, 39):
        monkeypatch.setattr(prompt_logprobs, "MOST_LOGITS", num_rows * VOCAB_SIZE)
        served = engine()
        heads: list[int] = []
        head = served.runner.executor.head

        def watched(states: Any, heads: list[int] = heads, head: Any = head) -> Any:
            heads.append(len(states))
            return head(states)

        monkeypatch.setattr(served.runner.executor, "head", watched)
        (output,) = serve(served, [ask])
        assert same(output, expected), "and the bits do not depend on how many"
        prompt_heads = heads[: -(-39 // num_rows)]
        assert max(prompt_heads) <= num_rows and sum(prompt_heads) == 39


@pytest.mark.parametrize("num_slots", [None, 340])
@pytest.mark.parametrize("policy", POLICIES)
def test_chunks_company_and_preemptions_change_nothing(policy: str, num_slots: int | None) -> None:
    prompts = random_prompts([20, 33, 5, 20, 17, 40, 1, 2, 30, 12])
    asks = []
    for index, prompt in enumerate(prompts):
        params = greedy(12) if index % 2 else drawn(12, index, n=1 + index % 3)
        if index % 4 < 3:
            params = replace(params, prompt_logprobs=index % 3)
        asks.append(Ask(prompt, params, PATHS[2 + (index + index // 4) % 2]))
    options = {"max_prefill_tokens": 16}
    served = engine(policy, num_slots, batch=6, **options)
    for ask, output in zip(asks, serve(served, asks), strict=True):
        assert same(output, ask.alone(**options))
        num_known = None if output.prompt_logprobs is None else len(output.prompt_logprobs)
        assert num_known == (None if ask.params.prompt_logprobs is None else len(ask.prompt))
    assert bool(served.stats().outcome.num_preempted) == (num_slots is not None)


def test_controllers_of_each_token_tell_them() -> None:
    ask = Ask(*random_prompts([12]), greedy(3, prompt_logprobs=1), Parity())
    output = ask.alone()
    assert_those_of_a_forward_pass(output, model(), 1, Parity(), 1e-4)


def test_they_share_no_prefix_but_others_share_theirs() -> None:
    common = random_prompts([32])[0]
    asks = [Ask([*common, tail], greedy(8, prompt_logprobs=1), PATHS[2]) for tail in (5, 6)]
    served = engine(batch=8, max_prefill_tokens=16)
    ids = [asks[0].add(served)]
    for _ in range(4):
        served.step()
    ids.append(asks[1].add(served))
    for _ in range(4):
        served.step()
    assert served.stats().num_shared_tokens == 0
    plain = Ask([*common, 7], greedy(4), PATHS[2])
    ids.append(plain.add(served))
    outputs = {output.request_id: output for output in served.run()}
    assert served.stats().num_shared_tokens == 32
    assert_empty(served)
    for request_id, ask in zip(ids, [*asks, plain], strict=True):
        assert same(outputs[request_id], ask.alone(max_prefill_tokens=16))


def test_equal_prompts_of_one_step_each_tell_their_own() -> None:
    (prompt,) = random_prompts([20])
    params = [greedy(4), greedy(4, prompt_logprobs=2), greedy(4, prompt_logprobs=0), greedy(4, n=3, prompt_logprobs=1)]
    asks = [Ask(prompt, each, FULL) for each in params]
    for order in (asks, asks[::-1]):
        for ask, output in zip(order, serve(engine(batch=8), order), strict=True):
            assert same(output, ask.alone())
    outputs = LLM(model()).generate([prompt] * 4, params, FULL)
    assert [output.prompt_logprobs for output in outputs] == [ask.alone().prompt_logprobs for ask in asks]


def test_drafts_go_with_them() -> None:
    ask = Ask(*random_prompts([20]), greedy(12, prompt_logprobs=2), FULL)
    draft = LayerPath.of(NUM_LAYERS, [0, 1, 2, 3, 4])
    (output,) = serve(engine(), [Ask(ask.prompt, ask.params, FULL, {"draft": draft})])
    assert same(output, ask.alone())


def test_a_request_that_ends_early_has_those_of_what_has_run() -> None:
    (prompt,) = random_prompts([40])
    served = engine(max_prefill_tokens=16)
    request_id = served.add_request(prompt, SamplingParams(prompt_logprobs=0), FULL)
    served.step()
    output = served.abort(request_id)
    expected = Ask(prompt, greedy(2, prompt_logprobs=0), FULL).alone(max_prefill_tokens=16)
    assert output.prompt_logprobs is not None and expected.prompt_logprobs is not None
    assert output.prompt_logprobs == expected.prompt_logprobs[:17]
    request_id = served.add_request(prompt, SamplingParams(prompt_logprobs=0), FULL)
    assert served.abort(request_id).prompt_logprobs == [None]


def test_a_prompt_whose_head_fails_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    served = engine(batch=4)
    other = Ask([5, 6, 7], greedy(4), FULL)
    ids = [served.add_request([8, 9, 10], greedy(4, prompt_logprobs=1), FULL), other.add(served)]

    def fails(*_: Any) -> Any:
        raise MemoryError("no room for logits")

    monkeypatch.setattr("dynskip.engine.model_runner.add_prompt_logprobs", fails)
    outputs = {output.request_id: output for output in served.run()}
    assert isinstance(outputs[ids[0]].error, MemoryError)
    assert same(outputs[ids[1]], other.alone())
    assert_empty(served)
