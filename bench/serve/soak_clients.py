"""Clients that never rest: each sends one random request after the other, and some go away before they are answered."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from bench.serve.asks import Ask, Asks, Bad, Told, served_answer
from bench.serve.client import Answer, Broken, Client, Connection, events_in

# An answer that has not ended after so long is lost. A client that was told for so long to come again gives up.
ANSWER_S = 300.0
_LEAVES, _IS_BAD, _IS_OTHER = 0.2, 0.06, 0.06  # shares of all requests
_MOST_WAIT_S = 2.0  # before a client goes away
_REST_S = 0.5  # between two requests, at most
_MOST_RETRY_S = 60  # what Retry-After may say
_NUM_KEPT = 256
_TEXT = "Why does bread rise?"


@dataclass
class Ledger:
    """What has become of every request.

    ended: counts by how: answered, refused (as it had to be), left, other, turned away (again and again, for want of
    room). lost: what was none of these, in words.
    kept: of all that were answered a sample, each as likely; seen: how many of each kind were answered.
    """

    draw: random.Random
    num_sent: int = 0
    num_retries: int = 0
    num_tokens: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    kept: list[tuple[Ask, list[Told]]] = field(default_factory=list)

    def answered(self, ask: Ask, told: list[Told]) -> None:
        """Count an answer, and perhaps keep it."""
        self.ended["answered"] += 1
        self.seen.update(ask.kinds)
        if len(self.kept) < _NUM_KEPT:
            self.kept.append((ask, told))
        elif (place := self.draw.randrange(self.ended["answered"])) < _NUM_KEPT:
            self.kept[place] = (ask, told)


class _TurnedAway(Exception):
    """A request that was told to come again until its client gave up."""


class SoakClient:
    """One client. Each request ends in the ledger, whatever happens."""

    def __init__(self, host: str, port: int, asks: Asks, ledger: Ledger) -> None:
        self._host, self._port = host, port
        self._asks, self._ledger, self._draw = asks, ledger, asks.draw
        self._client = Client(host, port)
        self._gives_up_s = 0.0

    async def run(self, until_s: float) -> None:
        """Send requests until that time, and wait for what the last one becomes."""
        try:
            while time.monotonic() < until_s:
                await self._one()
                await asyncio.sleep(_REST_S * self._draw.random())
        finally:
            self._client.close()

    async def _one(self) -> None:
        draw, ledger = self._draw, self._ledger
        ledger.num_sent += 1
        chance = draw.random()
        if chance < _IS_BAD:
            await self._guarded(self._send_bad(self._asks.bad()))
        elif chance < _IS_BAD + _IS_OTHER:
            await self._guarded(self._send_other())
        elif chance < _IS_BAD + _IS_OTHER + _LEAVES:
            await self._guarded(self._leave(self._asks.next()))
        else:
            await self._guarded(self._send(self._asks.next()))

    async def _guarded(self, work: Any) -> None:
        """Do ``work``; where it fails, the request is lost, and the ledger says how."""
        self._gives_up_s = time.monotonic() + ANSWER_S
        try:
            await work
        except _TurnedAway:
            self._ledger.ended["turned away"] += 1
        except TimeoutError:
            self._ledger.lost.append(f"no answer after {ANSWER_S:.0f} s")
        except Broken as error:
            self._ledger.lost.append(str(error))
        except (OSError, ValueError, KeyError) as error:
            self._ledger.lost.append(f"{type(error).__name__}: {error}")

    async def _send(self, ask: Ask) -> None:
        events: list[bytes] = []
        while True:
            events.clear()
            async with asyncio.timeout(ANSWER_S):
                answer = await self._client.send(ask.request, lambda data: events.extend(events_in(data)))
            if answer.status != 429:
                break
            await self._wait_for_room(answer)
        told, num_tokens = _checked(ask, answer, events)
        self._ledger.num_tokens += num_tokens
        self._ledger.answered(ask, told)

    async def _wait_for_room(self, answer: Answer) -> None:
        """What a 429 asks for. Raises _TurnedAway for a request that has had nothing else for too long."""
        wait_s = int(answer.headers["retry-after"])
        if not 1 <= wait_s <= _MOST_RETRY_S:
            raise ValueError(f"Retry-After must be 1 to {_MOST_RETRY_S}, got {wait_s}")
        self._ledger.num_retries += 1
        if time.monotonic() + wait_s > self._gives_up_s:
            raise _TurnedAway
        await asyncio.sleep(wait_s * (1 + self._draw.random()))

    async def _send_bad(self, bad: Bad) -> None:
        while True:
            connection = await Connection.open(self._host, self._port)
            try:
                async with asyncio.timeout(ANSWER_S):
                    answer = await connection.exchange(bad.request)
            finally:
                connection.close()
            if answer.status != 429:  # what only the engine can judge waits for a place first
                break
            await self._wait_for_room(answer)
        if answer.status != bad.status:
            raise ValueError(f"{bad.name} must get {bad.status}, got {answer.status}: {answer.body[:200]!r}")
        if set(answer.json()["error"]) != {"message", "type", "param", "code"}:
            raise ValueError(f"{bad.name} must get an error's four fields, got {answer.body[:200]!r}")
        self._ledger.ended["refused"] += 1
        self._ledger.refused[bad.name] += 1

    async def _send_other(self) -> None:
        """Ask for something else than tokens."""
        async with asyncio.timeout(ANSWER_S):
            await self._ask_other()

    async def _post(self, route: str, body: dict[str, Any]) -> Answer:
        """The answer to ``body`` once there is room for it: texts count in the queue."""
        while (answer := await self._client.post(route, body)).status == 429:
            await self._wait_for_room(answer)
        return answer

    async def _ask_other(self) -> None:
        client = self._client
        routes = ["v1/models", "v1/depths", "v1/engine", "health", "metrics", "version", ""]
        match self._draw.choice(["tokenize", *routes]):
            case "tokenize":
                answer = await self._post("/tokenize", {"prompt": _TEXT, "add_special_tokens": False})
                tokens = answer.json()["tokens"]
                text = (await self._post("/detokenize", {"tokens": tokens})).json()["prompt"]
                answer = await self._post("/tokenize", {"prompt": text, "add_special_tokens": False})
                if answer.json()["tokens"] != tokens:
                    raise ValueError(f"the text of {tokens} must have these tokens, got {answer.body[:200]!r}")
            case other:
                answer = await client.get(f"/{other}")
        if answer.status != 200:
            raise ValueError(f"such a request must get 200, got {answer.status}: {answer.body[:200]!r}")
        self._ledger.ended["other"] += 1

    async def _leave(self, ask: Ask) -> None:
        """Go away: while the body is sent, behind it, or after some of the answer's bytes."""
        draw = self._draw
        connection = await Connection.open(self._host, self._port)
        try:
            if draw.random() < 0.2:
                connection.write(ask.request[: draw.randrange(1, len(ask.request))])
                await asyncio.sleep(0.2 * draw.random())
            else:
                enough = asyncio.Event()
                num_left = draw.randint(1, 30)

                def count(_data: bytes) -> None:
                    nonlocal num_left
                    num_left -= 1
                    if not num_left:
                        enough.set()

                answer = connection.exchange(ask.request, count)
                leaving = asyncio.ensure_future(enough.wait())
                wait_s = _MOST_WAIT_S * draw.random()
                await asyncio.wait((answer, leaving), timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                leaving.cancel()
                if answer.done():
                    answer.result()  # it came first; Broken would be a loss
                answer.cancel()
        finally:
            connection.close()
        self._ledger.ended["left"] += 1


def _checked(ask: Ask, answer: Answer, events: list[bytes]) -> tuple[list[Told], int]:
    """The outputs of an answer, and how many tokens they have. Raises ValueError for one that is not whole."""
    if answer.status != 200:
        raise ValueError(f"a request must get 200, got {answer.status}: {answer.body[:300]!r} for {ask.body}")
    if ask.body.get("stream"):
        if not events or events[-1] != b"[DONE]":
            raise ValueError(f"a stream must end with [DONE], got {events[-1:]}")
        answers = [json.loads(event) for event in events[:-1]]
    else:
        answers = [answer.json()]
    told = served_answer(ask, answers)
    facts = answers[-1].get("dynskip")
    if facts is None or facts["layers"] != list(ask.path.layers):
        raise ValueError(f"an answer must name layers {ask.path}, got {facts}")
    usage = answers[-1].get("usage")
    wants_usage = not ask.body.get("stream") or ask.body.get("stream_options", {}).get("include_usage")
    if wants_usage and usage is None:
        raise ValueError("an answer must have usage where it was asked for, got none")
    num_tokens = usage["completion_tokens"] if usage else 0
    if usage and ask.body.get("return_token_ids") and num_tokens != sum(len(each.token_ids or ()) for each in told):
        raise ValueError(f"usage must count the tokens of the answer, got {num_tokens}")
    return told, num_tokens
