"""Bodies that are too long, too slow or wrong in many places: each is refused at once, and nobody waits for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from api import ROUTE, local, on_loopback, run, tiny_llm

from dynskip import LLM
from dynskip.serving import app, gate
from dynskip.serving.errors import validation_error
from dynskip.serving.prompts import PromptReader


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm()


async def flooded(url: str, head: bytes, part: bytes) -> tuple[bytes, int]:
    """The answer to a request whose body has ``part`` without end, and how much was sent until the connection ended."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n" + head + b"\r\n\r\n")
    num_sent = 0

    async def send() -> None:
        nonlocal num_sent
        while True:
            writer.write(part)
            await writer.drain()
            num_sent += len(part)
            await asyncio.sleep(0.001)

    sending = asyncio.ensure_future(send())
    answer = b""
    try:
        while more := await asyncio.wait_for(reader.read(4096), 30):
            answer += more
    except ConnectionResetError:
        pass  # behind the answer, while more is on its way
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    writer.close()
    return answer, num_sent


@pytest.mark.parametrize("key", [None, "k"])
def test_a_body_that_is_refused_unread_ends_its_connection(
    llm: LLM, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could go on for ever, without a key, too; what comes of it meanwhile is taken, or the answer would be lost."""
    monkeypatch.setattr(gate, "LINGER_S", 0.5)

    with on_loopback(llm, api_key=key, max_body=200, policy="lockstep") as url:
        for head in (b"content-length: 99999999999", b"transfer-encoding: chunked"):
            part = b" " * 1000 if b"length" in head else b"3e8\r\n" + b" " * 1000 + b"\r\n"
            answer, num_sent = run(flooded(url, head, part))
            assert answer.startswith(b"HTTP/1.1 401" if key else b"HTTP/1.1 413")
            assert b"connection: close" in answer.lower() and b'"error"' in answer
            assert num_sent > 0


def test_a_refusal_without_a_body_leaves_the_connection_open(llm: LLM) -> None:
    async def main() -> None:
        async with local(llm, gate={"api_key": "k"}) as server:
            answer = await server.client.get("/v1/models")
            assert answer.status_code == 401 and "connection" not in answer.headers

    run(main())


MANY = 2**16
LONG_AND_WRONG: list[tuple[str, Any, str]] = [
    (ROUTE, {"prompt": [1] * MANY + ["x"]}, "prompt.65536"),
    (ROUTE, {"prompt": [1.5] * MANY}, "prompt.0"),
    (ROUTE, {"prompt": [[1]] * MANY + [["x"]]}, "prompt.65536.0"),
    (ROUTE, {"prompt": "w005", "stop": [1] * MANY}, "stop.0"),
    (ROUTE, {"prompt": "w005", "stop_token_ids": ["x"] * MANY}, "stop_token_ids.0"),
    (ROUTE, {"prompt": "w005", "logit_bias": {str(token): "x" for token in range(MANY)}}, "logit_bias.0"),
    ("/v1/chat/completions", {"messages": [{}] * MANY}, "messages.0.role"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [1] * MANY}]}, "messages.0.content.0"),
    ("/detokenize", {"tokens": ["x"] * MANY}, "tokens.0"),
]


@pytest.mark.parametrize(("route", "body", "place"), LONG_AND_WRONG, ids=[f"{place}" for *_, place in LONG_AND_WRONG])
def test_a_long_body_is_read_up_to_its_first_mistake(
    llm: LLM, route: str, body: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error an element took 7 seconds a megabyte, in which nobody else was answered, and gigabytes."""
    nums = []

    def counted(errors: Any) -> Any:
        nums.append(len(errors))
        return validation_error(errors)

    monkeypatch.setattr(app, "validation_error", counted)

    async def main() -> None:
        async with local(llm) as server:
            answer = await server.post(route, body)
            assert answer.status_code == 400
            assert answer.json()["error"]["message"].startswith(f"{place}: ")

    run(main())
    assert nums[0] <= 6


def test_more_messages_than_the_context_has_tokens_are_refused_unread(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokenize(*_: object) -> None:
        raise AssertionError("nothing is tokenized")

    monkeypatch.setattr(PromptReader, "_run", tokenize)

    async def main() -> None:
        async with local(llm) as server:
            most = server.served.max_context_len
            body = {"messages": [{"role": "user", "content": ""}] * most}
            answer = await server.post("/v1/chat/completions", body)
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "context_length_exceeded"
            assert f"{most} messages" in answer.json()["error"]["message"]

    run(main())
