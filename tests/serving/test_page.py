"""The page at ``/``: its files, their headers, what it reads, and who may read it."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from api import NAME, TABLE, Exchange, local, run, tiny_llm
from models import NUM_LAYERS
from streams import guess_three

from dynskip import LLM
from dynskip.serving.page_files import PAGE_ROUTES

FOLDER = Path(__file__).parents[2] / "dynskip" / "serving" / "page"
FILES = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}
HTML = FILES["index.html"]
SECRET = "secret of the prompt"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm()


# Its files


def test_every_file_is_served_without_a_key_and_kept_to_itself(llm: LLM) -> None:
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}

    async def main() -> None:
        async with local(llm, gate={"api_key": "key"}) as server:
            for name, text in FILES.items():
                route = "/" if name == "index.html" else f"/page/{name}"
                answer = await server.client.get(route)
                assert answer.status_code == 200
                assert answer.text == text
                headers = answer.headers
                assert headers["content-type"] == f"{kinds[name.rpartition('.')[2]]}; charset=utf-8"
                policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
                assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
                assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
                assert headers["x-content-type-options"] == "nosniff"
                assert headers["referrer-policy"] == "no-referrer"
                assert headers["cache-control"] == "no-cache"
                for tag in (headers["etag"], f'"other", W/{headers["etag"]}'):
                    again = await server.client.get(route, headers={"if-none-match": tag})
                    assert (again.status_code, again.content) == (304, b"")
                other = await server.client.get(route, headers={"if-none-match": '"other"'})
                assert other.status_code == 200
                head = await server.client.head(route)
                assert (head.status_code, head.headers["etag"]) == (200, headers["etag"])
            for route in ("/page/", "/page/other.js", "/page/../gate.py", "/page/index.html"):
                assert (await server.client.get(route)).status_code == 401
        async with local(llm) as server:
            assert (await server.client.get("/page/other.js")).status_code == 404

    run(main())
    assert len(PAGE_ROUTES) == len(FILES)


def test_nothing_comes_from_elsewhere_and_nothing_is_inline() -> None:
    for name, text in FILES.items():
        text = text.replace("http://www.w3.org/2000/svg", "")  # a name, which nothing fetches
        assert not re.search(r"\w+://|url\(|@import|data:(?!\s)", text), name
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)|javascript:", HTML)
    for name, text in SCRIPTS.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text), (
            name
        )


def test_what_the_scripts_ask_for_is_in_the_page() -> None:
    script = "\n".join(SCRIPTS.values())
    ids = set(re.findall(r'(?:\$|getElementById)\("([\w-]+)"\)', script))
    assert len(ids) > 20
    assert ids <= set(re.findall(r'\sid="([\w-]+)"', HTML))
    parts = {
        name
        for found in re.findall(r"\{ ([\w, ]+) \} = this\.parts", SCRIPTS["column.js"])
        for name in found.split(", ")
    }
    assert len(parts) > 8
    assert parts <= set(re.findall(r'\sdata-part="(\w+)"', HTML))
    files = set(re.findall(r'from "\./([\w.]+)"', script)) | set(re.findall(r'(?:src|href)="page/([\w.]+)"', HTML))
    assert files == set(FILES) - {"index.html"}
    variables = set(re.findall(r"var\((--[\w-]+)\)", FILES["page.css"])) | {
        "--prompt",
        "--draft",
        "--ramp-0",
        "--ramp-1",
    }
    light, dark = FILES["page.css"].split("@media (prefers-color-scheme: dark)")
    defined = set(re.findall(r"(--[\w-]+):", light))
    assert variables <= defined
    assert set(re.findall(r"(--[\w-]+):", dark)) == defined - {"--mono"}


def test_every_field_has_a_label() -> None:
    controls = re.findall(r"<(?:input|select|textarea)[^>]*>", HTML)
    labelled = re.sub(r"<label.*?</label>", "", HTML, flags=re.DOTALL)
    left = re.findall(r'<(?:input|select|textarea)[^>]*\sid="([\w-]+)"', labelled)
    assert len(controls) > 7
    assert all(f'<label for="{name}">' in HTML for name in left)


# What it reads


def test_the_paths_and_drafts_on_offer(llm: LLM, tmp_path: Path) -> None:
    async def offer(**options: Any) -> Any:
        async with local(llm, **options) as server:
            return (await server.client.get("/v1/depths")).json()

    async def main() -> tuple[Any, Any]:
        table = await offer(table=TABLE, folder=tmp_path, path="uniform:2", draft="exit:1", max_context_len=32)
        return table, await offer()

    table, plain = run(main())
    full = {"path": "full", "layers": list(range(NUM_LAYERS))}
    assert table == {
        "model": NAME,
        "num_layers": NUM_LAYERS,
        "max_model_len": 32,
        "has_tokenizer": True,
        "has_chat_template": True,
        "has_table": True,
        "paths": [{"path": "uniform:2", "layers": [0, 3]}, {"path": "layers:0,1,3,5", "layers": [0, 1, 3, 5]}, full],
        "default_path": {"path": "uniform:2", "layers": [0, 3]},
        "drafts": ["none", "exit:1", "uniform:2", "layers:0,1,3,5"],
        "default_draft": "exit:1",
        "pool": 16,
    }
    assert plain["has_table"] is False
    assert [each["path"] for each in plain["paths"]] == [*(f"uniform:{n}" for n in range(1, NUM_LAYERS)), "full"]
    assert plain["drafts"] == ["none", "uniform:1", "uniform:2", "uniform:3"]
    assert (plain["default_path"], plain["default_draft"]) == (full, "none")


def test_every_path_and_draft_on_offer_is_taken(llm: LLM, tmp_path: Path) -> None:
    async def main() -> None:
        for options in ({}, {"table": TABLE, "folder": tmp_path}):
            async with local(llm, **options) as server:
                offer = (await server.client.get("/v1/depths")).json()
                for each in offer["paths"]:
                    assert (await server.generated(path=each["path"], max_tokens=1))["dynskip"]["layers"] == each[
                        "layers"
                    ]
                for draft in offer["drafts"]:
                    await server.generated(draft=draft, max_tokens=2)

    run(main())


def test_the_engine_says_who_stepped_and_nothing_of_what_they_said(llm: LLM) -> None:
    body = {"prompt": f"w005 {SECRET}", "max_tokens": 8, "ignore_eos": True, "temperature": 0}

    async def main() -> None:
        async with local(llm) as server:
            client = server.client
            begun = (await client.get("/v1/engine")).json()
            assert begun["steps"] == [] and begun["num_steps"] == 0
            names = {"x-request-id": "secret-id"}
            paths = ("full", "uniform:2")
            await asyncio.gather(
                *(server.post("/v1/completions", {**body, "path": path}, headers=names) for path in paths)
            )
            await server.until_idle()
            answer = await client.get("/v1/engine")
            assert answer.headers["cache-control"] == "no-store"
            assert "secret" not in answer.text and "w0" not in answer.text
            live = answer.json()
            assert set(live) == {
                "time_ms", "num_waiting", "num_prefilling", "num_running", "num_tokens", "kv_bytes",
                "kv_capacity_bytes", "num_steps", "paths", "steps",
            }  # fmt: skip
            assert live["num_tokens"] == 16
            assert sorted(live["paths"]) == [[0, 1, 2, 3, 4, 5], [0, 3]]
            by_path = [0, 0]
            for step in live["steps"]:
                assert set(step) == {"number", "begin_ms", "prefill_ms", "decode_ms", "prompts", "rows"}
                for place, path, num_tokens, num_guesses, draft in step["rows"]:
                    assert place in (0, 1) and (num_guesses, draft) == (0, None)
                    by_path[path] += num_tokens
            assert by_path == [7, 7]
            last = live["num_steps"]
            assert (await client.get(f"/v1/engine?since={last}")).json()["steps"] == []
            assert len((await client.get(f"/v1/engine?since={last - 3}")).json()["steps"]) == 3
            for since in ("-1", "x", "1.5"):
                refused = await client.get(f"/v1/engine?since={since}")
                assert (refused.status_code, refused.json()["error"]["param"]) == (400, "since")
            await server.served.close()
            stopped = await client.get("/v1/engine")
            assert (stopped.status_code, stopped.json()["error"]["code"]) == (503, "stopped")

    run(main())


def test_what_it_reads_needs_the_key(llm: LLM) -> None:
    async def main() -> None:
        async with local(llm, gate={"api_key": "key"}) as server:
            for route in ("/v1/depths", "/v1/engine"):
                assert (await server.client.get(route)).status_code == 401
                headers = {"authorization": "Bearer key"}
                assert (await server.client.get(route, headers=headers)).status_code == 200

    run(main())


def test_asking_again_and_again_does_not_fill_the_log(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with local(llm, gate={"api_key": "key"}) as server:
            for _ in range(3):
                await server.client.get("/v1/engine", headers={"authorization": "Bearer key"})
            await server.client.get("/v1/engine")

    with caplog.at_level(logging.INFO, "dynskip.serving"):
        run(main())
    (line,) = (record.getMessage() for record in caplog.records if record.name == "dynskip.serving")
    assert "GET /v1/engine 401" in line


# Which tokens were guessed


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_a_stream_says_which_tokens_a_draft_had_guessed(llm: LLM, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guess_three(monkeypatch)
    route = {"completion": "/v1/completions", "chat": "/v1/chat/completions"}[kind]
    asked = {"prompt": [5, 6, 7]} if kind == "completion" else {"messages": [{"role": "user", "content": "w005 w006"}]}
    body = {**asked, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "draft": "layers:0,1,2,3,4"}

    async def main() -> None:
        async with local(llm) as server:
            whole = (await server.post(route, {**body, "return_token_ids": True})).json()
            choice = whole["choices"][0]
            assert len(choice["was_guessed"]) == len(choice["token_ids"]) == 40
            assert 0 < sum(choice["was_guessed"]) <= whole["dynskip"]["num_accepted"]
            exchange = Exchange(server.app, route, {**body, "return_token_ids": True, "stream": True})
            await exchange.task
            *chunks, _ = exchange.events
            parts = [chunk["choices"][0] for chunk in chunks]
            flags = [part["was_guessed"] for part in parts if part.get("token_ids")]
            assert all(len(set(own)) == 1 for own in flags), "a chunk's text is all guessed, or not"
            assert 0 < sum(map(sum, flags)) <= chunks[-1]["dynskip"]["num_accepted"]
            assert [token for part in parts for token in part.get("token_ids", [])] == choice["token_ids"]
            texts = [part["text"] if kind == "completion" else part["delta"]["content"] for part in parts]
            assert "".join(texts) == (choice["text"] if kind == "completion" else choice["message"]["content"])
            for others in ({"return_token_ids": True, "draft": "none"}, {}):
                plain = (await server.post(route, {**body, **others})).json()
                assert "was_guessed" not in plain["choices"][0]
                exchange = Exchange(server.app, route, {**body, **others, "stream": True})
                await exchange.task
                assert not any("was_guessed" in chunk["choices"][0] for chunk in exchange.events[:-1])

    run(main())
