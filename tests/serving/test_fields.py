"""Every field of a request: what passes, what is refused, and by which name the answer blames it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from api import JSON, NAME, TABLE, greedy, local, run, tiny_llm
from models import NUM_LAYERS

from dynskip import LLM, LayerPath, SamplingParams
from dynskip.serving.fields import SAMPLING_FIELDS
from dynskip.serving.prompts import PromptReader

COMPLETION = {"prompt": "w005 w006 w007", "max_tokens": 3, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "w005 w006"}], "max_tokens": 3, "temperature": 0}
SUPPORTED = {each.name for each in dataclasses.fields(SamplingParams)}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm()


def post(llm: LLM, route: str, *bodies: Any, folder: Path | None = None, **options: Any) -> list[httpx2.Response]:
    """The answers to ``bodies``, one after the other."""

    async def main() -> list[httpx2.Response]:
        async with local(llm, folder=folder, table=None if folder is None else TABLE, **options) as server:
            answers = [await server.post(route, body) for body in bodies]
            await server.until_idle()
            return answers

    return run(main())


BOTH: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "0.7"}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 100_000}, "n"),
    ({"n": True}, "n"),
    ({"n": 300}, "n"),
    ({"seed": -2}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"max_tokens": 64}, "max_tokens"),
    ({"max_tokens": 2**70}, "max_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 65}, "stop"),
    ({"stop": ["x" * 1025]}, "stop"),
    ({"stop": 7}, "stop"),
    ({"stop": ["x", 7]}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [101]}, "stop_token_ids"),
    ({"stop_token_ids": "5"}, "stop_token_ids"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"min_p": "a"}, "min_p"),
    ({"logit_bias": {"x": 1.0}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 3}}, "stream_options"),
    ({"stream": True, "stream_options": {"colour": True}}, "stream_options"),
    ({"path": "uniform:7"}, "path"),
    ({"path": "zigzag"}, "path"),
    ({"path": ""}, "path"),
    ({"path": "layers:0,0"}, "path"),
    ({"path": "found:2"}, "path"),
    ({"path": 4}, "path"),
    ({"path": "full", "depth": 2}, "path"),
    ({"depth": 0}, "depth"),
    ({"depth": 7}, "depth"),
    ({"depth": -1}, "depth"),
    ({"depth": "0%"}, "depth"),
    ({"depth": "101%"}, "depth"),
    ({"depth": "half"}, "depth"),
    ({"depth": 2.5}, "depth"),
    ({"depth": True}, "depth"),
    ({"model": f"{NAME}@2", "depth": 2}, "depth"),
    ({"draft": "auto"}, "draft"),
    ({"draft": "uniform:9"}, "draft"),
    ({"draft": 3}, "draft"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "text", "strict": True}}, "response_format"),
    ({"logits_processors": ["x"]}, "logits_processors"),
    ({"store": True}, "store"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"chat_template": "x"}, "chat_template"),
    ({"max_token": 5}, "max_token"),
]
OF_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": ["w005", 7]}, "prompt"),
    ({"prompt": [5, 101]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [[5], [101]]}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": ["w005"] * 300}, "prompt"),
    ({"prompt": [[5]] * 100, "n": 3}, "n"),
    ({"prompt": [5] * 10**6}, "prompt"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 1, "echo": True, "stream": True}, "logprobs"),
    ({"min_tokens": 17, "max_tokens": None}, "min_tokens"),
    ({"add_special_tokens": False}, "add_special_tokens"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"messages": []}, "messages"),
]
OF_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "w005"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, "messages"),
    ({"messages": [{"role": "tool", "content": "w005"}]}, "messages"),
    ({"messages": [{"content": "w005"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "w005", "tool_calls": [{}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "w005", "name": 7}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "w005", "detail": "low"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "w005", "type": "image"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_completion_tokens": 64}, "max_completion_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"echo": True}, "echo"),
    ({"best_of": 2}, "best_of"),
    ({"prompt": "w005"}, "prompt"),
    ({"add_special_tokens": True}, "add_special_tokens"),
]


def cases() -> list[Any]:
    """Route, body, and the field that the answer blames."""
    found = []
    for route, base, tables in (
        ("/v1/completions", COMPLETION, (BOTH, OF_COMPLETIONS)),
        ("/v1/chat/completions", CHAT, (BOTH, OF_CHATS)),
    ):
        for change, param in (case for table in tables for case in table):
            name = f"{route.split('/')[2]}-{json.dumps(change)[:60]}"
            found.append(pytest.param(route, {**base, **change}, param, id=name))
    return found


def test_a_bad_field_is_a_400_that_names_it(llm: LLM, tmp_path: Path) -> None:
    async def main() -> None:
        async with local(llm, folder=tmp_path, table=TABLE, max_queue=32) as server:
            for case in cases():
                route, body, param = case.values
                # Lone surrogates survive as escapes.
                answer = await server.client.post(route, content=json.dumps(body), headers=JSON)
                assert answer.status_code == 400, (case.id, answer.status_code, answer.text)
                error = answer.json()["error"]
                assert error["param"] == param, (case.id, error)
                assert error["type"] == "invalid_request_error"
                assert error["code"]
                assert error["message"].startswith(param), (case.id, error)
                assert "SamplingParams" not in error["message"] and "add_request" not in error["message"], error
            stats = await server.until_idle()
            assert stats.num_finished == 0
            # The same server goes on as if nothing had been asked.
            assert (await server.generated(max_tokens=2))["usage"]["completion_tokens"] == 2

    run(main())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"prompt": [5], "top_p": NaN}',
    ],
    ids=["empty", "open", "list", "null", "no-utf-8", "deep", "long-integer", "nan"],
)
def test_what_is_no_request_is_a_400(llm: LLM, body: bytes) -> None:
    async def main() -> None:
        async with local(llm) as server:
            for headers in (JSON, {"content-type": "text/plain"}, {}):
                answer = await server.client.post("/v1/completions", content=body, headers=headers)
                assert answer.status_code == 400, answer.text
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert error["code"] != "http_error"

    run(main())


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "prompt_cache_key": "x", "safety_identifier": "y"},
        {"best_of": 1, "suffix": None, "logprobs": None, "logit_bias": None, "stop": None, "seed": None},
        {"suffix": "", "store": False, "tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "service_tier": "auto", "use_beam_search": False, "length_penalty": 1.0},
        {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0, "min_tokens": 0},
        {"logit_bias": {}, "include_stop_str_in_output": False, "skip_special_tokens": True, "stop": []},
        {"return_tokens_as_token_ids": False},
        {"top_k": 0, "top_p": 1, "n": 1, "echo": False, "stream": False, "stream_options": None, "model": NAME},
        {"tools": None, "response_format": None, "anything": None, "spaces_between_special_tokens": True},
        {"seed": -1, "stream_options": None, "temperature": 0},
        {"depth": None, "path": None, "draft": "none", "return_token_ids": False, "add_special_tokens": True},
    ],
    ids=lambda fields: "-".join(fields)[:50],
)
def test_a_field_that_asks_for_nothing_changes_nothing(llm: LLM, fields: dict[str, Any]) -> None:
    plain, same = post(llm, "/v1/completions", COMPLETION, {**COMPLETION, **fields})
    assert same.status_code == 200, same.text
    assert same.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_p", 0.2),
        ("repetition_penalty", 1.3),
        ("presence_penalty", 0.5),
        ("frequency_penalty", 0.5),
        ("logit_bias", {"9": 100.0}),
        ("min_tokens", 3),
        ("include_stop_str_in_output", True),
        ("skip_special_tokens", False),
        ("prompt_logprobs", 2),
    ],
)
def test_a_parameter_reaches_the_library(llm: LLM, name: str, value: Any) -> None:
    body = {**COMPLETION, "max_tokens": 8, "return_token_ids": True, "temperature": 0.9, "seed": 3, name: value}
    (answer,) = post(llm, "/v1/completions", body)
    given = {int(token): bias for token, bias in value.items()} if name == "logit_bias" else value
    (expected,) = llm.generate(
        ["w005 w006 w007"], SamplingParams(max_tokens=8, temperature=0.9, seed=3, **{name: given})
    )
    (choice,) = answer.json()["choices"]
    assert choice["token_ids"] == expected.token_ids
    assert choice["text"] == expected.text


def test_every_parameter_has_a_field() -> None:
    elsewhere = {"max_tokens", "logprobs", "logits_processors"}
    assert set(SAMPLING_FIELDS) >= SUPPORTED - elsewhere


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({**COMPLETION, "stop": ""}, "stop: it must be text that is not empty, got ''."),
        ({**COMPLETION, "\ud83d": 1}, "body: it must be an object with names in Unicode"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "body: it must be JSON, without numbers of thousands of digits"),
    ],
    ids=["stop", "name", "digits"],
)
def test_what_is_wrong_is_said_as_it_was_sent(llm: LLM, body: Any, said: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def main() -> httpx2.Response:
        async with local(llm) as server:
            return await server.client.post("/v1/completions", content=content, headers=JSON)

    answer = run(main())
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_echo_with_logprobs_has_those_of_the_prompt(llm: LLM) -> None:
    (answer,) = post(llm, "/v1/completions", {**COMPLETION, "echo": True, "logprobs": 1})
    params = greedy(3, logprobs=1, ignore_eos=False, prompt_logprobs=1)
    (expected,) = llm.generate(["w005 w006 w007"], params)
    (choice,) = answer.json()["choices"]
    ids = [*expected.prompt_ids, *expected.token_ids]
    known = [*expected.prompt_logprobs, *expected.logprobs]
    values = [None if each is None else each[token] for token, each in zip(ids, known, strict=True)]
    assert choice["logprobs"]["token_logprobs"] == values
    assert choice["text"] == f"w005 w006 w007{expected.text}"


def test_max_tokens_of_none_fills_the_context_and_that_of_zero_echoes(llm: LLM) -> None:
    body = {"prompt": [5, 6, 7], "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    default, short, echoed = post(
        llm,
        "/v1/completions",
        body,
        {**body, "prompt": [5] * 60},
        {**body, "max_tokens": 0, "echo": True},
    )
    assert len(default.json()["choices"][0]["token_ids"]) == 16
    assert len(short.json()["choices"][0]["token_ids"]) == 4
    assert echoed.json()["choices"][0]["text"] == llm.text([5, 6, 7])
    details = {"prompt_tokens_details": {"cached_tokens": 0}}
    assert echoed.json()["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3, **details}
    # The token that is left out may have been one that ends an output.
    ends = {**body, "max_tokens": 0, "echo": True, "stop_token_ids": list(range(101)), "ignore_eos": False}
    bodies = (ends, {**ends, "stream": True}, {**ends, "min_tokens": 3})
    whole, streamed, refused = post(llm, "/v1/completions", *bodies)
    assert whole.json()["choices"][0]["finish_reason"] == "length"
    assert '"finish_reason":"length"' in streamed.text and '"stop"' not in streamed.text
    assert refused.json()["error"]["message"] == "min_tokens: it must be at most max_tokens, 0, got 3."
    chat = {**CHAT, "max_tokens": None, "ignore_eos": True}
    (filled,) = post(llm, "/v1/chat/completions", chat)
    usage = filled.json()["usage"]
    assert usage["total_tokens"] == 64


def test_a_prompt_that_is_too_long_is_told_both_lengths(llm: LLM) -> None:
    for route, change, param in (
        ("/v1/completions", {"prompt": [5] * 64}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "w005 " * 63}]}, "messages"),
    ):
        base = COMPLETION if param == "prompt" else CHAT
        (answer,) = post(llm, route, {**base, **change})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, param, "context_length_exceeded")
        assert "at most 63 tokens" in error["message"]
        assert "got 64" in error["message"]
    (answer,) = post(llm, "/v1/completions", {**COMPLETION, "prompt": [5] * 10, "max_tokens": 30}, max_context_len=32)
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "at most 32 tokens together, got 10 and 30" in error["message"]


def test_a_request_that_the_memory_could_never_hold_is_a_400(llm: LLM) -> None:
    (answer,) = post(llm, "/v1/completions", {**COMPLETION, "max_tokens": 40}, kv_bytes=20 * llm.model.kv_entry_bytes)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", 7, "prompt: Input should be a valid string, or: Input should be a valid list."),
        ("prompt", ["w005", 7], "prompt.1: Input should be a valid string."),
        ("prompt", [5, True], "prompt.1: Input should be a valid integer."),
        ("prompt", [-1], "prompt: it must"),
        ("stop", 7, "stop: Input should be a valid string, or: Input should be a valid list."),
        ("depth", [], "depth: Input should be a valid integer, or: Input should be a valid string."),
        ("stop_token_ids", [5, "x"], "stop_token_ids.1: Input should be a valid integer."),
        ("logit_bias", {"5": "x"}, "logit_bias.5: Input should be a valid number."),
    ],
)
def test_a_field_of_another_type_is_told_all_that_it_may_be(llm: LLM, field: str, value: Any, message: str) -> None:
    (answer,) = post(llm, "/v1/completions", {**COMPLETION, field: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field)
    assert error["message"].startswith(message), error["message"]
    assert "str:" not in error["message"] and "list[" not in error["message"], error["message"]


def test_content_parts_and_roles_of_newer_clients(llm: LLM) -> None:
    parts = [{"type": "text", "text": "w005"}, {"type": "text", "text": "w006"}]
    developer = [{"role": "developer", "content": "w009"}, {"role": "user", "content": parts}]
    system = [{"role": "system", "content": "w009"}, {"role": "user", "content": "w005\nw006", "name": "ann"}]
    answered = {"role": "assistant", "content": "w005", "refusal": None, "tool_calls": [], "annotations": []}
    first, second, third = post(
        llm,
        "/v1/chat/completions",
        {**CHAT, "messages": developer},
        {**CHAT, "messages": system},
        {**CHAT, "messages": [*system, answered, *system]},
    )
    assert first.json()["choices"] == second.json()["choices"]
    assert third.status_code == 200, third.text


def test_tokenize_and_detokenize(llm: LLM) -> None:
    text, chat, ids, back, wrong, both = (
        *post(llm, "/tokenize", {"prompt": "w005 w006", "return_token_strs": True}),
        *post(llm, "/tokenize", {"messages": [{"role": "user", "content": "w005"}], "model": NAME}),
        *post(llm, "/tokenize", {"prompt": "w005 w006", "add_special_tokens": False}),
        *post(llm, "/detokenize", {"tokens": [5, 6]}),
        *post(llm, "/detokenize", {"tokens": [5, 101]}),
        *post(llm, "/tokenize", {}),
    )
    assert text.json() == {
        "count": 2,
        "max_model_len": 64,
        "tokens": llm.encode("w005 w006"),
        "token_strs": ["w005", "w006"],
    }
    assert chat.json()["tokens"] == llm.chat_prompt("w005")
    assert ids.json()["tokens"] == [5, 6]
    assert back.json() == {"prompt": "w005 w006"}
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "tokens")
    assert (both.status_code, both.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize("add", [True, False])
def test_what_is_no_unicode_cannot_be_tokenized(llm: LLM, add: bool) -> None:
    body = json.dumps({"prompt": "w005 \ud800", "add_special_tokens": add})

    async def main() -> httpx2.Response:
        async with local(llm) as server:
            return await server.client.post("/tokenize", content=body, headers=JSON)

    answer = run(main())
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_a_text_that_cannot_fit_is_refused_unread(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptReader, "_run", None)  # whoever reads it fails
    long = "w005 " * 200_000
    for route, body, field in (
        ("/v1/completions", {"prompt": long}, "prompt"),
        ("/v1/completions", {"prompt": ["w005", long]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}, "messages"),
        ("/tokenize", {"prompt": long}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": long}]}, "messages"),
    ):
        (answer,) = post(llm, route, body)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, field, "context_length_exceeded")
        assert error["message"].startswith(f"{field}: it must be at most 63 tokens long")
        assert "1000000 characters" in error["message"]


def test_token_ids_wait_for_no_text(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptReader, "_run", None)
    (answer,) = post(llm, "/v1/completions", {"prompt": [[5, 6], [7]], "max_tokens": 2, "temperature": 0})
    assert [choice["finish_reason"] for choice in answer.json()["choices"]] == ["length"] * 2


def test_parameters_that_leave_no_token_are_to_blame(llm: LLM) -> None:
    every = range(llm.model.decoder_config.vocab_size)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("min_tokens", {"min_tokens": 2, "stop_token_ids": [*every]}),
        ("logit_bias", {"logit_bias": {"5": 3.4e38}, "repetition_penalty": 0.5, "prompt": [5, 6]}),
    ]
    for field, changes in cases:
        for stream in (False, True):
            (answer,) = post(llm, "/v1/completions", {**COMPLETION, **changes, "stream": stream})
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert (error["param"], error["type"]) == (field, "invalid_request_error")
            assert error["message"].startswith(f"{field}: it must leave a token that may come")


def test_a_body_of_another_type_is_told_so(llm: LLM) -> None:
    async def main() -> httpx2.Response:
        async with local(llm) as server:
            return await server.client.post("/v1/completions", content=json.dumps(COMPLETION))

    answer = run(main())
    assert answer.status_code == 400 and "Content-Type: application/json" in answer.json()["error"]["message"]


def test_without_a_tokenizer_token_ids_are_served(llm: LLM) -> None:
    bare = LLM(llm.model)
    (expected,) = bare.generate([[5, 6, 7]], greedy(3, logprobs=1))
    text, chat, ids, stopped = (
        *post(bare, "/v1/completions", COMPLETION),
        *post(bare, "/v1/chat/completions", CHAT),
        *post(
            bare,
            "/v1/completions",
            {
                "prompt": [5, 6, 7],
                "max_tokens": 3,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
                "logprobs": 1,
            },
        ),
        *post(bare, "/v1/completions", {"prompt": [5], "stop": "w"}),
    )
    assert (text.status_code, text.json()["error"]["param"]) == (400, "prompt")
    assert (chat.status_code, chat.json()["error"]["param"]) == (400, "messages")
    assert (stopped.status_code, stopped.json()["error"]["param"]) == (400, "stop")
    choice = ids.json()["choices"][0]
    assert choice["token_ids"] == expected.token_ids
    assert choice["prompt_token_ids"] == [5, 6, 7]
    assert choice["logprobs"]["tokens"] == [f"token:{token}" for token in expected.token_ids]


# Depths


def test_depths_and_names_choose_the_next_path_of_the_table(llm: LLM, tmp_path: Path) -> None:
    expected = {
        2: LayerPath.uniform(NUM_LAYERS, 2),
        4: LayerPath.of(NUM_LAYERS, [0, 1, 3, 5]),
        6: LayerPath.full(NUM_LAYERS),
    }
    asked: list[tuple[dict[str, Any], int]] = [
        ({"depth": 1}, 2),
        ({"depth": 2}, 2),
        ({"depth": 3}, 4),
        ({"depth": 5}, 6),
        ({"depth": 6}, 6),
        ({"depth": "1%"}, 2),
        ({"depth": "33.3%"}, 2),
        ({"depth": "50%"}, 4),
        ({"depth": "100%"}, 6),
        ({"model": f"{NAME}@2"}, 2),
        ({"model": f"{NAME}@3"}, 4),
        ({"model": f"{NAME}@50%"}, 4),
        ({"model": NAME}, 6),
        ({}, 6),
    ]
    answers = post(llm, "/v1/completions", *({**COMPLETION, **change} for change, _ in asked), folder=tmp_path)
    for answer, (change, budget) in zip(answers, asked, strict=True):
        assert answer.status_code == 200, (change, answer.text)
        facts = answer.json()["dynskip"]
        assert facts["layers"] == list(expected[budget].layers), change
        assert LayerPath.parse(facts["path"], NUM_LAYERS) == expected[budget]
        assert answer.json()["model"] == change.get("model", NAME)


def test_models_list_the_depths(llm: LLM, tmp_path: Path) -> None:
    async def main() -> None:
        async with local(llm, folder=tmp_path, table=TABLE) as server:
            listed = (await server.client.get("/v1/models")).json()["data"]
            assert [each["id"] for each in listed] == [NAME, f"{NAME}@2", f"{NAME}@4", f"{NAME}@6"]
            assert [len(each["layers"]) for each in listed] == [6, 2, 4, 6]
            assert (await server.client.get(f"/v1/models/{NAME}@4")).json() == listed[2]
            for name in ("another", f"{NAME}@7", f"{NAME}@x", f"{NAME}@", f"another@{NAME}"):
                answer = await server.client.get(f"/v1/models/{name}")
                assert answer.status_code == 404, name
                answer = await server.post("/v1/completions", {**COMPLETION, "model": name})
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), name

    run(main())


def test_without_a_table_a_depth_is_refused(llm: LLM) -> None:
    names = [f"{NAME}@{depth}" for depth in ("4", "99", "50%", "x", "")]
    bodies = [{**COMPLETION, "depth": 4}, *({**COMPLETION, "model": name} for name in [*names, "another@4"])]
    depth, *by_name, another = post(llm, "/v1/completions", *bodies)
    assert depth.status_code == 400
    error = depth.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "depth", "invalid_value")
    says = "the server must have a table of paths for a depth, got none. Start it with --paths FILE, a path a line, or"
    assert error["message"].startswith(f"depth: {says}")
    for answer in by_name:
        assert answer.status_code == 404
        assert answer.json()["error"] == {
            "message": error["message"].replace("depth", "model", 1),
            "type": "not_found_error",
            "param": "model",
            "code": "model_not_found",
        }
    assert another.json()["error"]["message"] == f"model: it must be one of {NAME}, got another."


def test_requests_that_choose_nothing_run_the_servers_path_and_draft(llm: LLM) -> None:
    own, chosen = post(
        llm,
        "/v1/completions",
        COMPLETION | {"max_tokens": 12, "ignore_eos": True},
        {**COMPLETION, "path": "full", "draft": "none"},
        path="uniform:3",
        draft="exit:1",
    )
    assert own.json()["dynskip"]["layers"] == list(LayerPath.uniform(NUM_LAYERS, 3).layers)
    assert chosen.json()["dynskip"] == {**chosen.json()["dynskip"], "path": "full", "num_drafted": 0}
