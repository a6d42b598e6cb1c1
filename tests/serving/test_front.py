"""The front before several replicas, here engines of this process: what it answers, and where requests go."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import httpx2
import pytest
from api import LONG, NAME, ROUTE, STREAM, TABLE, Brake, Exchange, greedy, local, run, tiny_llm
from fronts import fronted, text_of
from models import NUM_LAYERS
from prometheus_client.parser import text_string_to_metric_families

from dynskip import LLM, LayerPath, RequestError
from dynskip.serving.replicas.options import ReplicaOptions
from dynskip.serving.replicas.pages import family, merged
from dynskip.serving.replicas.replica import EngineReplica


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm()


# The same answers


def test_answers_are_those_of_one_server(llm: LLM, tmp_path: Path) -> None:
    bodies: list[tuple[str, str, Any]] = [
        ("POST", ROUTE, {**LONG, "path": "uniform:2", "logprobs": 2, "n": 2}),
        ("POST", ROUTE, {**STREAM, "model": f"{NAME}@3", "stream_options": {"include_usage": True}}),
        ("POST", ROUTE, {**LONG, "prompt": [[5, 6], [7, 8]], "echo": True, "seed": 1, "temperature": 1}),
        (
            "POST",
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "w005 w006"}], "max_tokens": 4, "seed": 0},
        ),
        ("POST", ROUTE, {**LONG, "depth": 99}),
        ("POST", ROUTE, {**LONG, "max_tokens": 10**6}),
        ("POST", ROUTE, {**LONG, "tools": [1]}),
        ("POST", ROUTE, [1]),
        ("POST", "/tokenize", {"prompt": "w005 w006"}),
        ("GET", "/v1/models/nobody", None),
        ("GET", ROUTE, None),
        ("GET", "/nowhere", None),
        ("GET", "/version", None),
        ("GET", "/openapi.json", None),
    ]
    own = {"id", "created", "dynskip"}

    def without_times(answer: httpx2.Response) -> Any:
        if answer.headers.get("content-type", "").startswith("text/event-stream"):
            *blocks, end = [block.removeprefix("data: ") for block in answer.text.split("\n\n") if block]
            parts = [json.loads(block) for block in blocks]
            choices = [choice for part in parts for choice in part["choices"]]
            return {
                "end": end,
                "text": "".join(choice["text"] for choice in choices),  # how many tokens are in a part, the clock says
                "reasons": [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
                "usage": [part["usage"] for part in parts if part.get("usage")],
                "names": {(*sorted(part), part["object"], part["model"]) for part in parts},
            }
        found = answer.json()
        return {key: value for key, value in found.items() if key not in own}

    async def main() -> None:
        async with (
            local(llm, table=TABLE, folder=tmp_path) as alone,
            fronted(llm, table=TABLE, folder=tmp_path) as before,
        ):
            for method, route, body in bodies:
                answers = [
                    await client.request(method, route, json=body, headers={"x-request-id": "same"})
                    for client in (alone.client, before.client)
                ]
                assert answers[0].status_code == answers[1].status_code
                assert without_times(answers[0]) == without_times(answers[1]), route
                headers = [
                    sorted((name, value) for name, value in answer.headers.multi_items() if name != "content-length")
                    for answer in answers
                ]
                assert headers[0] == headers[1]

    run(main())


def test_keys_bodies_and_ids_are_looked_at_before_any_replica_is_asked(
    llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with fronted(llm, gate={"api_key": "k"}) as before:
            assert (await before.post(LONG)).status_code == 401
            assert (await before.client.get("/v1/models")).status_code == 401
            assert [each.num_asked for each in before.replicas] == [0, 0]
            headers = {"authorization": "Bearer k", "x-request-id": "mine"}
            answer = await before.post(LONG, headers=headers)
            assert answer.status_code == 200
            assert answer.headers.get_list("x-request-id") == ["mine"]
            assert answer.json()["id"] == "cmpl-mine"
            assert (await before.client.get("/health")).status_code == 200

    run(main())


def test_a_stream_that_ends_well_is_logged_as_a_200(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """By the gate before the replicas, too, although servers say behind an answer that its client has gone."""

    async def main() -> None:
        async with fronted(llm, count=1) as before:
            answer = await before.post(STREAM, headers={"x-request-id": "mine"})
            assert answer.text.endswith("data: [DONE]\n\n")

    with caplog.at_level(logging.INFO, "dynskip.serving"):
        run(main())
    lines = [record.getMessage() for record in caplog.records]
    assert [line.rsplit(" ", 2)[0] for line in lines if line.startswith("mine ")] == [f"mine POST {ROUTE} 200"] * 2


def test_nothing_of_a_prompt_is_logged_before_or_behind_the_front_unless_asked_for(
    llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    bodies = [{**LONG, "prompt": "w042 secret"}, {**LONG, "prompt": "w042", "top_p": "secret"}, {"secret": 1}]

    async def main(log_bodies: bool) -> None:
        async with fronted(llm, gate={"log_bodies": log_bodies}) as before:
            assert [(await before.post(body)).status_code for body in bodies] == [200, 400, 400]
            brakes = [Brake(each.server.served) for each in before.replicas]
            doomed = Exchange(before.app, ROUTE, {**STREAM, "prompt": "w042 secret"})
            await before.until_held(1)
            lost = before.holder()
            brakes[before.replicas.index(lost)].let(1)
            await doomed.until_events(1)
            lost.lose()
            await doomed.task
            for brake in brakes:
                brake.release()

    with caplog.at_level(logging.DEBUG):
        run(main(False))
    assert "is lost in the middle of" in caplog.text
    assert caplog.text.count(f" POST {ROUTE} 400 ") == 4, "the front and a replica log each request"
    assert "secret" not in caplog.text and "w042" not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "dynskip.serving"):
        run(main(True))
    assert caplog.text.count("w042 secret") == 2, "the front logs it, and no replica"


def test_a_replica_answers_by_message_and_says_whether_its_engine_runs(llm: LLM) -> None:
    headers = [(b"content-type", b"application/json"), (b"x-request-id", b"a")]
    scope = {"type": "http", "method": "POST", "path": ROUTE, "query_string": b"", "headers": headers}

    async def main() -> None:
        async with local(llm) as server:
            replica = EngineReplica(lambda: server.service)
            await replica.alive()
            await replica.check_health()
            assert (await replica.table()).names == [NAME]
            body = json.dumps({**STREAM, "max_tokens": 2}).encode()
            start, *rest = [message async for each in replica.answer(scope, body) for message in each]
            assert (start["status"], rest[-1]["more_body"]) == (200, False)
            assert b"".join(message["body"] for message in rest).endswith(b"data: [DONE]\n\n")
            brake = Brake(server.served)
            brake.let(1)
            answers = replica.answer(scope, json.dumps(STREAM).encode())
            await anext(answers)
            await answers.aclose()
            assert server.service.admission.num_held == 0, "closing it is to the API as if the client had gone away"
            brake.release()
            await server.served.close()
            with pytest.raises(RequestError):
                await replica.check_health()

    run(main())


# Where requests go


def test_requests_of_one_path_meet_on_one_replica(llm: LLM) -> None:
    async def main() -> None:
        async with fronted(llm) as before:
            brakes = [Brake(each.server.served) for each in before.replicas]
            paths = ["uniform:1"] * 12 + ["full"] * 2
            bodies = [{**LONG, "prompt": [5 + index, 6, 7], "path": path} for index, path in enumerate(paths)]
            tasks = []
            for index, body in enumerate(bodies):
                tasks.append(asyncio.ensure_future(before.post(body)))
                await before.until_held(index + 1)
            held = [dict(known.held) for known in before.front._known.values()]
            full = LayerPath.full(NUM_LAYERS)
            assert sorted(each.get(full, 0) for each in held) == [0, 2]
            assert all(each.get(LayerPath.uniform(NUM_LAYERS, 1)) for each in held)
            for brake in brakes:
                brake.release()
            assert {answer.status_code for answer in await asyncio.gather(*tasks)} == {200}
            assert await before.values("dynskip_replica_held") == {"replica-0": 0, "replica-1": 0}
            assert all(not known.held for known in before.front._known.values())
            by_depth = await before.values("dynskip_depth_requests_total")
            assert set(by_depth) == {"replica-0", "replica-1"}

    run(main())


# Queues


def test_a_full_replica_is_passed_over_and_all_full_is_a_429(llm: LLM) -> None:
    options = {"policy": "lockstep", "batch": 1, "costs": None, "max_queue": 1}

    async def main() -> None:
        async with fronted(llm, **options) as before:
            brakes = [Brake(each.server.served) for each in before.replicas]
            tasks = []
            for index in range(4):  # all of one prefix, which would stay on one replica
                tasks.append(asyncio.ensure_future(before.post(LONG)))
                await before.until_held(index + 1)
            assert [each.server.service.admission.num_held for each in before.replicas] == [2, 2]
            for body in (LONG, STREAM):
                answer = await before.post(body)
                assert answer.status_code == 429
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "queue_full"
            for brake in brakes:
                brake.release()
            assert {answer.status_code for answer in await asyncio.gather(*tasks)} == {200}

    run(main())


def test_a_replica_whose_engine_has_stopped_is_passed_over(llm: LLM) -> None:
    async def main() -> None:
        async with fronted(llm) as before:
            await before.replicas[0].server.served.close()
            for number in range(6):
                for body in (LONG, STREAM):
                    answer = await before.post({**body, "prompt": [5, 6, 7 + number]})
                    assert answer.status_code == 200, answer.text
            assert before.replicas[0].num_asked > 0, "it was asked, and passed over"

    run(main())


def test_a_client_that_leaves_aborts_its_request_in_the_replica(llm: LLM) -> None:
    async def main() -> None:
        async with fronted(llm) as before:
            brakes = [Brake(each.server.served) for each in before.replicas]
            for body in (LONG, STREAM):
                exchange = Exchange(before.app, ROUTE, body)
                await before.until_held(1)
                holder = before.holder()
                while not holder.server.served._worker._tickets:  # it is held before the engine's thread has it
                    await asyncio.sleep(0)
                if "stream" in body:
                    brakes[before.replicas.index(holder)].let(2)
                    await exchange.until_events(1)
                await exchange.go_away()
                await before.until_held(0)
                assert all(not known.held for known in before.front._known.values())
            for brake in brakes:
                brake.release()
            stats = [await each.server.until_idle() for each in before.replicas]
            assert (sum(each.num_finished for each in stats), sum(each.num_aborted for each in stats)) == (0, 2)

    run(main())


def test_draining_answers_what_has_come_and_nothing_else(llm: LLM) -> None:
    async def main() -> None:
        async with fronted(llm) as before:
            brakes = [Brake(each.server.served) for each in before.replicas]
            exchange = Exchange(before.app, ROUTE, STREAM)
            await before.until_held(1)
            draining = asyncio.ensure_future(before.front.drain())
            await asyncio.sleep(0)
            for answer in (await before.post(LONG), await before.client.get("/health")):
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopping")
            assert not draining.done()
            for brake in brakes:
                brake.release()
            await draining
            await exchange.task
            assert exchange.events[-1] == "[DONE]"
            (expected,) = llm.generate([[5, 6, 7]], greedy(40))
            assert text_of(exchange.events) == expected.text

    run(main())


# Room


def test_replicas_have_an_equal_share_of_all_cpus_or_what_they_ask_for() -> None:
    assert ReplicaOptions(2).threads_on([4.0]) == 2
    assert ReplicaOptions(3).threads_on([1.0, 1.0, 1.0]) == 1
    assert ReplicaOptions(2, 3).threads_on([3.0, 4.0]) == 3
    for options, cpus, text in (
        (ReplicaOptions(2, 3), [4.0, 2.0], "2 replicas of 3 threads each, got room for 1"),
        (ReplicaOptions(3), [1.0, 1.0], "3 replicas of 1 threads each, got room for 2"),
        (ReplicaOptions(1), [], "1 replicas of 1 threads each, got room for 0"),
    ):
        with pytest.raises(ValueError, match=f"threads_on: the cluster must have room for {text}"):
            options.threads_on(cpus)


# Metrics


def test_pages_are_merged_with_a_label_and_stay_readable() -> None:
    page = (
        '# HELP a_total A count.\n# TYPE a_total counter\na_total{model_name="m"} 1.0\n'
        '# HELP b Seconds.\n# TYPE b histogram\nb_bucket{le="1",model_name="m"} 2.0\nb_sum 3.0\n'
    )
    found = merged({"replica-0": page, "replica-1": page}) + family("c", "gauge", "One.", {"replica-0": True})
    assert found.count("# TYPE a_total counter") == found.count("# HELP b Seconds.") == 1
    samples = [sample for each in text_string_to_metric_families(found) for sample in each.samples]
    assert [(each.name, each.labels["replica"], each.value) for each in samples] == [
        ("a_total", "replica-0", 1.0),
        ("a_total", "replica-1", 1.0),
        ("b_bucket", "replica-0", 2.0),
        ("b_sum", "replica-0", 3.0),
        ("b_bucket", "replica-1", 2.0),
        ("b_sum", "replica-1", 3.0),
        ("c", "replica-0", 1.0),
    ]
    assert all(each.labels["model_name"] == "m" for each in samples[:2])
