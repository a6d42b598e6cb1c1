"""What a server does under load and when something goes wrong: clients that leave, keys, sizes, bugs, logs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from typing import Any

import api
import httpx2
import pytest
from api import JSON, LONG, NAME, ROUTE, STREAM, Brake, Exchange, greedy, local, on_loopback, run, tiny_llm
from models import NUM_LAYERS
from prometheus_client.parser import text_string_to_metric_families

from dynskip import LLM, LayerPath, RequestError
from dynskip.engine.step import StepExecution
from dynskip.serving import gate
from dynskip.serving import server as server_module
from dynskip.serving.limits import Admission
from dynskip.serving.prompts import PromptReader


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm()


# Clients that go away


@pytest.mark.parametrize("change", [{}, {"n": 3}, {"prompt": [[5, 6], [7, 8, 9]]}])
def test_a_client_that_leaves_in_mid_stream_aborts_its_request(
    llm: LLM, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with local(llm) as server:
            brake = Brake(server.served)
            exchange = Exchange(server.app, ROUTE, {**STREAM, **change})
            brake.let(3)
            await exchange.until_events(2)
            await exchange.go_away()
            brake.release()
            stats = await server.until_idle()
            assert (stats.num_finished, stats.num_aborted) == (
                0,
                max(change.get("n", 1), len(change.get("prompt", [0]))),
            )
            assert "[DONE]" not in exchange.events
            text = (await server.client.get("/metrics")).text
            assert f'vllm:request_success_total{{finished_reason="abort",model_name="{NAME}"}}' in text
            # Who comes next is served as ever.
            (expected,) = llm.generate([[5, 6, 7]], greedy(4))
            assert (await server.generated(max_tokens=4, ignore_eos=True))["choices"][0]["text"] == expected.text

    with caplog.at_level(logging.INFO, "dynskip.serving"):
        run(main())
    statuses = [record.getMessage().split(" ")[3] for record in caplog.records if f" POST {ROUTE} " in record.message]
    assert statuses == ["499", "200"]


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="needs TCP_USER_TIMEOUT, which Linux has")
def test_a_client_that_reads_no_more_is_gone_after_a_while(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(host: str, port: int) -> socket.socket:
        bound = server_module.bind(host, port)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        return bound

    monkeypatch.setattr(server_module, "STALLED_S", 1)
    monkeypatch.setattr(api, "bind", narrow)
    body = {"prompt": [5, 6, 7], "max_tokens": 50, "n": 64, "logprobs": 5, "ignore_eos": True, "stream": True}
    request = httpx2.Request("POST", "http://localhost/v1/completions", json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with on_loopback(llm, policy="lockstep") as url, socket.socket() as client:

        def state() -> tuple[float, float]:
            text = httpx2.get(f"{url}/metrics", timeout=120).text
            found = {each.name: each.samples[0].value for each in text_string_to_metric_families(text) if each.samples}
            return found["dynskip_num_running"], found["dynskip_num_held"]

        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = url.removeprefix("http://").split(":")
        client.connect((host, int(port)))
        client.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + request.content)
        assert client.recv(12) == b"HTTP/1.1 200"
        seen = []
        while not seen or seen[-1] != (0, 0):
            seen.append(state())
        assert seen[0][1] == 64
        rest = b""
        with contextlib.suppress(ConnectionResetError):  # behind what had come before
            while piece := client.recv(4096):
                rest += piece
        assert b"[DONE]" not in rest


@pytest.mark.parametrize("body", [LONG, STREAM, {**LONG, "prompt": [[5, 6], [7, 8, 9]]}])
def test_a_client_that_leaves_before_its_answer_aborts_its_request(llm: LLM, body: dict[str, Any]) -> None:
    async def main() -> None:
        async with local(llm) as server:
            brake = Brake(server.served)
            exchange = Exchange(server.app, ROUTE, body)
            while not server.service.admission.num_held:
                await asyncio.sleep(0)
            await exchange.go_away()
            assert exchange.status is None
            brake.release()
            assert (await server.until_idle()).num_finished == 0

    run(main())


def test_a_client_that_leaves_while_it_sends_its_body_is_forgotten(llm: LLM) -> None:
    async def main() -> None:
        async with local(llm) as server:
            messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

            async def receive() -> dict[str, Any]:
                return next(messages)

            async def send(message: dict[str, Any]) -> None:
                raise AssertionError(message)

            scope = Exchange(server.app, ROUTE, {})  # for the shape of its scope
            await scope.go_away()
            await server.app(
                {"type": "http", "method": "POST", "path": ROUTE, "headers": [], "query_string": b""}, receive, send
            )

    run(main())


# The queue


def test_a_full_queue_is_a_429_that_says_when_to_try_again(llm: LLM) -> None:
    async def main() -> None:
        async with local(llm, policy="lockstep", batch=1, costs=None, max_queue=1) as server:
            brake = Brake(server.served)
            held = [Exchange(server.app, ROUTE, LONG), Exchange(server.app, ROUTE, STREAM)]
            while server.service.admission.num_held < 2:
                await asyncio.sleep(0)
            for body in (LONG, STREAM, {**LONG, "n": 2}):
                answer = await server.post(ROUTE, body)
                assert answer.status_code == 429
                assert int(answer.headers["retry-after"]) >= 1
                error = answer.json()["error"]
                assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "queue_full", None)
            brake.release()
            await asyncio.gather(*(exchange.task for exchange in held))
            assert [exchange.status for exchange in held] == [200, 200]
            too_many = await server.post(ROUTE, {**LONG, "n": 3})
            assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "n")
            assert (await server.post(ROUTE, LONG)).status_code == 200
            page = (await server.client.get("/metrics")).text
            assert f'dynskip_num_refused_total{{model_name="{NAME}"}} 3.0' in page

    run(main())


def test_requests_that_are_read_have_a_place_in_the_queue_until_their_clients_leave(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    completions, may_read = PromptReader.completions, asyncio.Event()

    async def slow(self: PromptReader, prompt: Any) -> Any:
        await may_read.wait()
        return await completions(self, prompt)

    monkeypatch.setattr(PromptReader, "completions", slow)

    async def main() -> None:
        async with local(llm, policy="lockstep", batch=1, costs=None, max_queue=1) as server:
            reading = [Exchange(server.app, ROUTE, LONG), Exchange(server.app, ROUTE, STREAM)]
            while server.service.admission._num_read < 2:
                await asyncio.sleep(0)
            assert (await server.post(ROUTE, LONG)).status_code == 429
            await reading[0].go_away()
            assert server.service.admission._num_read == 1
            may_read.set()
            assert (await server.post(ROUTE, LONG)).status_code == 200
            await reading[1].task
            assert reading[1].events[-1] == "[DONE]"
            assert (server.service.admission._num_read, server.service.admission.num_held) == (0, 0)

    run(main())


@pytest.mark.parametrize("route", ["/tokenize", "/detokenize"])
def test_what_only_tokenizes_has_a_place_until_its_client_leaves(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(PromptReader, "_run", never)

    async def main() -> None:
        async with local(llm, policy="lockstep", batch=1, costs=None, max_queue=0) as server:
            waiting = Exchange(server.app, route, {"prompt": "w005"} if route == "/tokenize" else {"tokens": [5]})
            while server.service.admission._num_read < 1:
                await asyncio.sleep(0)
            assert (await server.post(ROUTE, LONG)).status_code == 429
            await waiting.go_away()
            assert server.service.admission._num_read == 0

    run(main())


def test_a_prompt_whose_reader_ends_early_is_a_bug_and_no_endless_wait(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LLM, "chat_prompt", lambda *_, **__: next(iter(())))

    async def main() -> None:
        async with local(llm) as server:
            answer = await server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "w005"}]})
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")

    run(main())


def test_retry_after_is_the_mean_time_of_a_request_within_bounds() -> None:
    admission = Admission(1, 0)
    with admission.hold(1):
        for seconds, expected in ((0.0, "1"), (7.2, "8"), (1e6, "60")):
            admission.ended(seconds)
            with pytest.raises(Exception, match="no room for 1 more") as refused, admission.hold(1):
                pass
            assert refused.value.headers["Retry-After"] == expected
    assert (admission.num_held, admission.num_refused) == (0, 3)
    with pytest.raises(ValueError, match="max_queue must be at least 0, got -1"):
        Admission(1, -1)


# Many at once


def test_many_depths_at_once_are_the_librarys_own_answers(llm: LLM) -> None:
    names = ["full", "uniform:2", "exit:3", "layers:0,2,5", "uniform:4"]
    bodies, expected = [], []
    for index in range(30):
        name, prompt = names[index % 5], [5 + index, 6, 7 + index % 3]
        options = {"temperature": 0.9 * (index % 2), "seed": index}
        bodies.append(
            {"prompt": prompt, "max_tokens": 4 + index % 9, "ignore_eos": True, "path": name, "logprobs": 2, **options}
            | {"return_token_ids": True, "stream": index % 3 == 0}
        )
        params = greedy(4 + index % 9, logprobs=2, **options)
        expected += llm.generate([prompt], params, LayerPath.parse(name, NUM_LAYERS))

    async def ask(server: Any, body: dict[str, Any]) -> tuple[list[int], list[float]]:
        exchange = Exchange(server.app, ROUTE, body)
        await exchange.task
        answers = exchange.events[:-1] if body["stream"] else [json.loads(exchange.sent)]
        choices = [choice for answer in answers for choice in answer["choices"]]
        logprobs = [value for choice in choices if choice["logprobs"] for value in choice["logprobs"]["token_logprobs"]]
        return [token for choice in choices for token in choice["token_ids"]], logprobs

    async def main() -> list[tuple[list[int], list[float]]]:
        async with local(llm) as server:
            found = await asyncio.gather(*(ask(server, body) for body in bodies))
            await server.until_idle()
            return found

    for (token_ids, logprobs), output in zip(run(main()), expected, strict=True):
        assert token_ids == output.token_ids
        assert logprobs == [known[token] for token, known in zip(token_ids, output.logprobs, strict=True)]


# Requests that fail


def fail_at(monkeypatch: pytest.MonkeyPatch, position: int, first: int) -> None:
    """Requests whose prompts begin with token ``first`` break at that token of their output."""
    finish_reason = StepExecution.finish_reason

    def break_at(self: StepExecution, sequence: Any) -> str | None:
        if len(sequence.token_ids) > position and sequence.prompt_ids[0] == first:
            raise ArithmeticError("secret")
        return finish_reason(self, sequence)

    monkeypatch.setattr(StepExecution, "finish_reason", break_at)


def test_a_failed_request_ends_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (expected,) = llm.generate([[5, 6, 7]], greedy(40))
    fail_at(monkeypatch, 3, 9)

    async def main() -> None:
        async with local(llm) as server:
            answers = await asyncio.gather(
                server.post(ROUTE, {**LONG, "prompt": [9, 9]}), server.post(ROUTE, LONG), server.post(ROUTE, LONG)
            )
            assert [answer.status_code for answer in answers] == [500, 200, 200]
            assert answers[0].json()["error"]["code"] == "request_failed"
            assert [answer.json()["choices"][0]["text"] for answer in answers[1:]] == [expected.text] * 2
            await server.until_idle()

    run(main())


def test_an_error_in_mid_stream_is_data_before_the_end(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, 3, 9)

    async def main() -> None:
        async with local(llm) as server:
            brake = Brake(server.served)
            exchange = Exchange(server.app, ROUTE, {**STREAM, "prompt": [9, 9]})
            brake.let(1)
            await exchange.until_events(1)
            brake.release()
            await exchange.task
            assert exchange.status == 200
            *chunks, error, end = exchange.events
            assert chunks
            assert end == "[DONE]"
            assert error["error"]["type"] == "server_error"
            assert error["error"]["code"] == "request_failed"
            await server.until_idle()
            page = (await server.client.get("/metrics")).text
            assert f'vllm:request_success_total{{finished_reason="error",model_name="{NAME}"}} 1.0' in page

    run(main())


def test_a_server_that_stops_says_so(llm: LLM) -> None:
    async def main() -> None:
        async with local(llm) as server:
            brake = Brake(server.served)
            streamed, waiting = Exchange(server.app, ROUTE, STREAM), Exchange(server.app, ROUTE, LONG)
            while server.service.admission.num_held < 2:
                await asyncio.sleep(0)
            brake.let(2)
            await streamed.until_events(1)
            closing = asyncio.ensure_future(server.served.close())
            brake.let(1)
            await asyncio.gather(closing, streamed.task, waiting.task)
            assert streamed.events[-2]["error"]["code"] == "stopping"
            assert streamed.events[-1] == "[DONE]"
            assert waiting.status == 503
            for route in ("/health", "/metrics"):
                assert (await server.client.get(route)).status_code == 503
            for body in (LONG, STREAM):
                late = await server.post(ROUTE, body)
                assert (late.status_code, late.json()["error"]["code"]) == (503, "stopped")

    run(main())


def test_a_bug_is_a_500_that_tells_clients_and_log_nothing_of_the_prompt(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_self: PromptReader, prompt: Any) -> Any:
        raise KeyError(f"bug at {prompt}")

    monkeypatch.setattr(PromptReader, "completions", broken)

    async def main() -> None:
        async with local(llm) as server:
            answer = await server.post(ROUTE, {**LONG, "prompt": "secret"})
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "internal_error"
            assert "secret" not in answer.text
            assert answer.headers["x-request-id"]

    with caplog.at_level(logging.INFO, "dynskip.serving"):
        run(main())
    assert "KeyError" in caplog.text
    assert "in broken" in caplog.text
    assert "secret" not in caplog.text


def test_a_path_writes_no_line_of_its_own_into_the_log(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with local(llm) as server:
            assert (await server.client.get("/v1/models/%0d%0aforged")).status_code == 404

    with caplog.at_level(logging.INFO, "dynskip.serving"):
        run(main())
    assert "/v1/models/%0D%0Aforged 404" in caplog.text and "\nforged" not in caplog.text


# The gate


@pytest.mark.parametrize(("route", "length"), [(f"/{'a' * 5000}", 199), (f"{ROUTE}/", None)])
def test_a_path_that_is_none_is_a_404_and_a_short_line(
    llm: LLM, caplog: pytest.LogCaptureFixture, route: str, length: int | None
) -> None:
    """A slash too many is no redirect, which would lose the body behind some proxies."""

    async def main() -> None:
        async with local(llm) as server:
            assert (await server.client.post(route, content=b"{}", headers=JSON)).status_code == 404

    with caplog.at_level(logging.INFO, "dynskip.serving"):
        run(main())
    shown = route if length is None else f"/{'a' * length}"
    assert f" POST {shown} 404 " in caplog.text


def test_the_log_has_a_line_a_request_and_nothing_of_a_prompt(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    bodies = [{**LONG, "prompt": "w042 secret"}, {**LONG, "prompt": "w042", "top_p": "secret"}, {"secret": 1}]

    async def main(log_bodies: bool) -> None:
        async with local(llm, gate={"log_bodies": log_bodies}) as server:
            for index, body in enumerate(bodies):
                await server.post(ROUTE, body, headers={"x-request-id": f"id-{index}"})

    with caplog.at_level(logging.DEBUG):
        run(main(False))
    assert "secret" not in caplog.text
    assert "w042" not in caplog.text
    lines = [record.getMessage() for record in caplog.records if record.name == "dynskip.serving"]
    assert [line.rsplit(" ", 2)[0] for line in lines] == [
        f"id-{i} POST {ROUTE} {s}" for i, s in enumerate((200, 400, 400))
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, "dynskip.serving"):
        run(main(True))
    assert "w042 secret" in caplog.text


def test_only_those_with_the_key_are_served(llm: LLM) -> None:
    async def main() -> None:
        async with local(llm, gate={"api_key": "sk-schlüssel"}) as server:
            client = server.client
            for headers in (
                {},
                {"authorization": "Bearer other"},
                {"authorization": "Bearer "},
                {"authorization": "sk"},
            ):
                for method, route in (
                    ("GET", "/v1/models"),
                    ("POST", "/v1/completions"),
                    ("POST", "/v1/chat/completions"),
                    ("POST", "/tokenize"),
                    ("POST", "/detokenize"),
                    ("GET", "/nowhere"),
                ):
                    answer = await client.request(method, route, headers=headers)
                    assert answer.status_code == 401, (route, headers)
                    assert answer.json()["error"]["code"] == "invalid_api_key"
                    assert answer.headers["www-authenticate"] == "Bearer"
            for scheme in (b"Bearer ", b"bearer "):
                key = {b"authorization": scheme + "sk-schlüssel".encode()}
                assert (await client.get("/v1/models", headers=key)).status_code == 200
            for route in ("/health", "/version", "/metrics", "/openapi.json"):
                assert (await client.get(route)).status_code == 200, route
            assert (await client.get("/")).status_code != 401

    run(main())


def test_a_body_beyond_the_limit_is_a_413(llm: LLM) -> None:
    async def main() -> None:
        async with local(llm, gate={"max_body": 200}) as server:
            fits = json.dumps({**LONG, "user": ""}).encode()
            assert len(fits) < 200
            assert (await server.client.post(ROUTE, content=fits.ljust(200), headers=JSON)).status_code == 200

            async def parts() -> Any:
                yield fits
                yield b" " * (201 - len(fits))

            for content in (fits.ljust(201), parts()):
                answer = await server.client.post(ROUTE, content=content, headers=JSON)
                assert answer.status_code == 413
                assert answer.json()["error"]["code"] == "body_too_large"
                assert "at most 200 bytes" in answer.json()["error"]["message"]

    run(main())


def test_a_body_that_does_not_end_is_a_408(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_TIMEOUT_S", 0.1)

    async def main() -> None:
        async with local(llm, gate={"max_body": 200}) as server:

            async def parts() -> Any:
                while True:  # never a long break, and too large in the end
                    yield b" "
                    await asyncio.sleep(0.01)

            answer = await server.client.post(ROUTE, content=parts(), headers=JSON)
            assert answer.status_code == 408
            assert answer.json()["error"]["type"] == "invalid_request_error"
            assert answer.headers["connection"] == "close"

    run(main())


def test_every_answer_has_an_id_the_clients_where_it_is_fit_for_a_header(llm: LLM) -> None:
    async def main() -> None:
        async with local(llm) as server:
            seen = set()
            for route in ("/health", "/nowhere", "/v1/models", "/v1/completions"):
                assert (await server.client.get(route, headers={"x-request-id": "my:id/1.2"})).headers[
                    "x-request-id"
                ] == "my:id/1.2"
                for given in ({}, {"x-request-id": "a b"}, {"x-request-id": "x" * 129}):
                    seen.add((await server.client.get(route, headers=given)).headers["x-request-id"])
            assert len(seen) == 12
            assert all(len(each) == 32 for each in seen)

    run(main())


@pytest.mark.parametrize(
    ("method", "route", "status"), [("GET", "/nowhere", 404), ("GET", ROUTE, 405), ("POST", "/health", 405)]
)
def test_unknown_routes_and_methods_have_the_same_envelope(llm: LLM, method: str, route: str, status: int) -> None:
    async def main() -> None:
        async with local(llm) as server:
            answer = await server.client.request(method, route)
            assert answer.status_code == status
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    run(main())


def test_pages_elsewhere_may_call_only_where_it_was_allowed(llm: LLM) -> None:
    asking = {"origin": "https://a.example", "access-control-request-method": "POST"}

    async def main() -> None:
        async with local(llm) as server:
            answer = await server.client.options(ROUTE, headers=asking)
            assert answer.status_code == 405
            assert not [name for name in answer.headers if name.startswith("access-control")]
        async with local(llm, gate={"api_key": "k", "allow_origins": ["https://a.example"]}) as server:
            answer = await server.client.options(ROUTE, headers=asking)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == "https://a.example"
            refused = await server.client.post(ROUTE, headers={"origin": "https://a.example"})
            assert refused.status_code == 401
            assert refused.headers["access-control-allow-origin"] == "https://a.example"
            other = await server.client.options(ROUTE, headers={**asking, "origin": "https://b.example"})
            assert "access-control-allow-origin" not in other.headers

    run(main())


def test_health_waits_for_no_step(llm: LLM) -> None:
    async def main() -> None:
        async with local(llm) as server:
            brake = Brake(server.served)
            exchange = Exchange(server.app, ROUTE, STREAM)
            while not server.service.admission.num_held:
                await asyncio.sleep(0)
            assert (await server.client.get("/health")).status_code == 200, "though the first step stands"
            brake.release()
            await exchange.task
            await server.until_idle()
            await server.served.close()
            assert (await server.client.get("/health")).status_code == 503

    run(main())


def test_health_and_version_answer(llm: LLM) -> None:
    from dynskip import __version__

    async def main() -> None:
        async with local(llm) as server:
            assert (await server.client.get("/health")).status_code == 200
            looked = await server.client.head("/health")
            assert (looked.status_code, looked.content) == (200, b"")
            assert (await server.client.get("/version")).json() == {"version": __version__}

    run(main())
    assert issubclass(RequestError, RuntimeError)
