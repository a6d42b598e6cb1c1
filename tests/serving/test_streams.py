"""Streams: their chunks, their usage, their ends, and that they are what the whole answer is."""

from __future__ import annotations

from typing import Any

import pytest
from api import NAME, events_of, greedy, local, run, tiny_llm

from dynskip import LLM

PROMPT = {"prompt": [5, 6, 7], "temperature": 0, "max_tokens": 6, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "w005 w006"}], "temperature": 0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm()


def stream(llm: LLM, route: str, body: dict[str, Any]) -> list[Any]:
    """The events of the stream that answers ``body``, without the end."""

    async def main() -> list[Any]:
        async with local(llm) as server:
            answer = await server.post(route, {**body, "stream": True})
            assert answer.status_code == 200, answer.text
            assert answer.headers["content-type"].startswith("text/event-stream")
            await server.until_idle()
            *chunks, end = events_of(answer.text)
            assert end == "[DONE]"
            return chunks

    return run(main())


def whole(llm: LLM, route: str, body: dict[str, Any]) -> Any:
    """The answer of one piece."""

    async def main() -> Any:
        async with local(llm) as server:
            return (await server.post(route, body)).json()

    return run(main())


def told(facts: dict[str, Any]) -> dict[str, Any]:
    """All that does not depend on the time."""
    return {name: value for name, value in facts.items() if name != "milliseconds"}


def test_the_chunks_of_a_completion_are_its_text(llm: LLM) -> None:
    expected = whole(llm, "/v1/completions", PROMPT)
    chunks = stream(llm, "/v1/completions", PROMPT)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected["choices"][0]["text"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk["object"] == "text_completion" and chunk["model"] == NAME for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks)
    assert [told(chunk["dynskip"]) for chunk in chunks if "dynskip" in chunk] == [told(expected["dynskip"])]
    assert "dynskip" in chunks[-1]


@pytest.mark.parametrize("options", [{"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}])
def test_usage_comes_in_a_chunk_without_choices(llm: LLM, options: dict[str, bool]) -> None:
    *chunks, last = stream(llm, "/v1/chat/completions", {**CHAT, "stream_options": options})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 6
    assert last["dynskip"]["path"] == "full"
    assert not any("dynskip" in chunk for chunk in chunks)
    counts = [chunk["usage"] and chunk["usage"]["completion_tokens"] for chunk in chunks]
    if "continuous_usage_stats" in options:
        assert counts == sorted(counts)
        assert counts[-1] == 6
    else:
        assert counts == [None] * len(chunks)


def test_usage_tells_how_much_of_the_prompts_was_there(llm: LLM) -> None:
    prompts = [[*range(5, 45)], [*range(45, 85)]]
    body = {**PROMPT, "prompt": prompts[0]}

    async def main() -> tuple[list[int], list[Any]]:
        async with local(llm, max_prefill_tokens=16) as server:
            counts = []
            for prompt in (prompts[0], prompts[0], prompts, prompts):
                answer = await server.post("/v1/completions", {**body, "prompt": prompt})
                counts.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
            options = {"include_usage": True, "continuous_usage_stats": True}
            answer = await server.post("/v1/completions", {**body, "stream": True, "stream_options": options})
            await server.until_idle()
            return counts, events_of(answer.text)[:-1]

    counts, (*chunks, last) = run(main())
    assert counts == [0, 32, 32, 64]
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}
    assert all("prompt_tokens_details" not in chunk["usage"] for chunk in chunks)


def test_a_chat_begins_with_its_role(llm: LLM) -> None:
    first, *others = stream(llm, "/v1/chat/completions", CHAT)
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in others)
    expected = whole(llm, "/v1/chat/completions", CHAT)["choices"][0]["message"]["content"]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in others) == expected


def test_several_prompts_with_several_outputs_are_interleaved(llm: LLM) -> None:
    body = {**PROMPT, "prompt": [[5, 6, 7], [8, 9]], "n": 2, "temperature": 0.9, "seed": 1, "return_token_ids": True}
    expected = whole(llm, "/v1/completions", body)
    assert [choice["index"] for choice in expected["choices"]] == [0, 1, 2, 3]
    chunks = stream(llm, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    for choice in expected["choices"]:
        own = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [token for part in own for token in part["token_ids"]] == choice["token_ids"]
        assert own[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + ["length"]
    assert (
        chunks[-1]["usage"]
        == expected["usage"]
        == {
            "prompt_tokens": 5,
            "completion_tokens": 24,
            "total_tokens": 29,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
    )


def test_log_probabilities_come_with_their_tokens(llm: LLM) -> None:
    expected = whole(llm, "/v1/completions", {**PROMPT, "logprobs": 2})["choices"][0]["logprobs"]
    chunks = stream(llm, "/v1/completions", {**PROMPT, "logprobs": 2})
    for name, values in expected.items():
        assert [
            value
            for chunk in chunks
            if chunk["choices"][0]["logprobs"]
            for value in chunk["choices"][0]["logprobs"][name]
        ] == values
    body = {**CHAT, "logprobs": True, "top_logprobs": 2}
    content = whole(llm, "/v1/chat/completions", body)["choices"][0]["logprobs"]["content"]
    parts = [chunk["choices"][0]["logprobs"] for chunk in stream(llm, "/v1/chat/completions", body)]
    assert [entry for part in parts if part for entry in part["content"]] == content
    assert len(content) == 6
    (output,) = llm.generate([llm.chat_prompt("w005 w006")], greedy(6, logprobs=2))
    pairs = zip(output.token_ids, output.logprobs, strict=True)
    assert [entry["logprob"] for entry in content] == [known[token] for token, known in pairs]


def test_echo_comes_first(llm: LLM) -> None:
    chunks = stream(llm, "/v1/completions", {**PROMPT, "echo": True})
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == whole(llm, "/v1/completions", {**PROMPT, "echo": True})["choices"][0]["text"]
    assert text.startswith(llm.text([5, 6, 7]))
    (only,) = stream(llm, "/v1/completions", {**PROMPT, "echo": True, "max_tokens": 0})
    assert only["choices"][0]["text"] == llm.text([5, 6, 7])
    assert only["choices"][0]["finish_reason"] == "length"


def test_drafts_are_counted(llm: LLM) -> None:
    body = {**PROMPT, "max_tokens": 30, "draft": "full", "path": "full"}
    facts = stream(llm, "/v1/completions", body)[-1]["dynskip"]
    plain = whole(llm, "/v1/completions", {**PROMPT, "max_tokens": 30})
    assert plain["dynskip"]["num_drafted"] == 0
    assert 0 <= facts["num_accepted"] <= facts["num_drafted"]
    drafted = whole(llm, "/v1/completions", body)
    assert drafted["choices"] == plain["choices"]
