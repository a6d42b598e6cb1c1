"""What becomes of requests whose replica is lost, does not answer, or comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from api import LONG, ROUTE, STREAM, Brake, Exchange, greedy, run, tiny_llm
from fronts import Near, fronted, text_of

from dynskip import LLM
from dynskip.serving.replicas import front as front_module
from dynskip.serving.replicas.front import ReplicaLostError


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm()


def test_a_replica_lost_in_mid_stream_ends_its_own_streams_with_an_error(llm: LLM) -> None:
    async def main() -> None:
        async with fronted(llm) as before:
            brakes = [Brake(each.server.served) for each in before.replicas]
            doomed = Exchange(before.app, ROUTE, STREAM)
            await before.until_held(1)
            lost = before.holder()
            (kept,) = [each for each in before.replicas if each is not lost]
            brakes[before.replicas.index(lost)].let(1)
            await doomed.until_events(1)
            others = []
            while not kept.server.service.admission.num_held:  # one of any prefix that goes to the other replica
                others.append(Exchange(before.app, ROUTE, {**STREAM, "prompt": [5 + len(others), 6]}))
                await before.until_held(1 + len(others))
            brakes[before.replicas.index(kept)].let(1)
            await others[-1].until_events(1)
            lost.lose()
            await doomed.task
            *_, error, end = doomed.events
            assert (error["error"]["code"], error["error"]["type"], end) == ("replica_lost", "server_error", "[DONE]")
            assert doomed.status == 200
            for brake in brakes:
                brake.release()
            await asyncio.gather(*(other.task for other in others))
            for index, other in enumerate(others):  # those that the lost replica had not begun, too
                (expected,) = llm.generate([[5 + index, 6]], greedy(40))
                assert other.status == 200
                assert text_of(other.events) == expected.text
            assert await before.values("dynskip_replica_up") == {
                each.name: float(each is kept) for each in before.replicas
            }

    run(main())


@pytest.mark.parametrize("body", [LONG, STREAM])
def test_a_request_that_has_not_begun_goes_to_another_replica(llm: LLM, body: dict[str, Any]) -> None:
    async def main() -> None:
        async with fronted(llm) as before:
            brakes = [Brake(each.server.served) for each in before.replicas]
            exchange = Exchange(before.app, ROUTE, body)
            await before.until_held(1)
            lost = before.holder()
            lost.lose()
            while before.front._known[lost.name].is_up:
                await asyncio.sleep(0)
            for brake in brakes:
                brake.release()
            await exchange.task
            (expected,) = llm.generate([[5, 6, 7]], greedy(40))
            assert exchange.status == 200
            text = text_of(exchange.events) if "stream" in body else json.loads(exchange.sent)["choices"][0]["text"]
            assert text == expected.text
            assert [each.num_asked for each in before.replicas] == [1, 1]
            moved = await before.values("dynskip_replica_moved_total")
            assert moved == {each.name: float(each is lost) for each in before.replicas}
            assert (await lost.server.until_idle()).num_finished == 0, "it was aborted there"

    run(main())


def test_a_replica_that_does_not_answer_loses_what_it_has_not_begun(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "PING_TIMEOUT_S", 0.05)

    async def main() -> None:
        async with fronted(llm) as before:
            brakes = [Brake(each.server.served) for each in before.replicas]
            exchange = Exchange(before.app, ROUTE, LONG)
            await before.until_held(1)
            hung = before.holder()
            hung.hangs = True
            while before.front._known[hung.name].is_up:
                await asyncio.sleep(0.001)
            for brake in brakes:
                brake.release()
            await exchange.task
            assert exchange.status == 200
            hung.hangs = False
            while not before.front._known[hung.name].is_up:
                await asyncio.sleep(0.001)
            await before.front.ready()

    run(main())


def test_a_replica_that_does_not_answer_ends_what_it_has_begun(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "PING_TIMEOUT_S", 0.05)

    async def main() -> None:
        async with fronted(llm) as before:
            brakes = [Brake(each.server.served) for each in before.replicas]
            exchange = Exchange(before.app, ROUTE, STREAM)
            await before.until_held(1)
            hung = before.holder()
            brakes[before.replicas.index(hung)].let(1)
            await exchange.until_events(1)
            hung.hangs = True  # it breaks off nothing: from here on nothing comes
            await exchange.task
            *_, error, end = exchange.events
            assert (error["error"]["code"], end, exchange.num_ends) == ("replica_lost", "[DONE]", 1)
            for brake in brakes:
                brake.release()
            assert (await hung.server.until_idle()).num_aborted == 1, "it was told that the client has gone"

    run(main())


def test_a_request_ends_no_more_than_two_replicas(llm: LLM) -> None:
    async def main() -> None:
        async with fronted(llm, count=3) as before:
            brakes = [Brake(each.server.served) for each in before.replicas]
            exchange = Exchange(before.app, ROUTE, LONG)
            lost: list[Near] = []
            while len(lost) < 2:
                # One that was lost may hold the request for a while when the next one has it.
                holding = [each for each in before.replicas if each.server.service.admission.num_held]
                for each in holding:
                    if each not in lost:
                        lost.append(each)
                        each.lose()
                await asyncio.sleep(0)
            await exchange.task
            assert exchange.status == 503
            assert json.loads(exchange.sent)["error"]["code"] == "replica_lost"
            assert sorted(each.num_asked for each in before.replicas) == [0, 1, 1]
            for brake in brakes:
                brake.release()

    run(main())


def test_no_replica_is_a_503_until_one_is_back(llm: LLM) -> None:
    async def main() -> None:
        async with fronted(llm) as before:
            for each in before.replicas:
                each.lose()
            while any(known.is_up for known in before.front._known.values()):
                await asyncio.sleep(0)
            for answer in (await before.post(LONG), *[await before.client.get(r) for r in ("/health", "/metrics")]):
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == "stopped"
            before.replicas[1].come_back()
            while not before.front._known["replica-1"].is_up:
                await asyncio.sleep(0)
            assert (await before.client.get("/health")).status_code == 200
            assert (await before.post(LONG)).status_code == 200

    run(main())


def test_a_replica_lost_behind_the_last_message_of_a_stream_takes_nothing_from_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Near.answer

    async def answer(self: Near, scope: Any, body: bytes) -> AsyncGenerator[list[Any]]:
        async for found in whole(self, scope, body):
            yield found
        if scope["path"] == ROUTE:
            raise ReplicaLostError(self.name)

    monkeypatch.setattr(Near, "answer", answer)

    async def main() -> None:
        async with fronted(llm, count=1) as before:
            exchange = Exchange(before.app, ROUTE, STREAM)
            await exchange.task
            (expected,) = llm.generate([[5, 6, 7]], greedy(40))
            assert exchange.status == 200
            assert (text_of(exchange.events), exchange.events[-1]) == (expected.text, "[DONE]")
            assert exchange.num_ends == 1

    run(main())
