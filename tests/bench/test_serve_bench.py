"""Soak, load and tables of the server: what they send, what they notice, what they say."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from api import Local, local, on_loopback, run, tiny_llm
from models import NUM_LAYERS, VOCAB_SIZE

from bench.peers.results import Results, read
from bench.serve.asks import ROUTES, Ask, Asks, library_answer, served_answer
from bench.serve.client import Broken, Client, post_of
from bench.serve.folders import REHEARSAL
from bench.serve.load import Call, arrive, burst, waits
from bench.serve.page import page, short, tables
from bench.serve.soak_clients import Ledger, SoakClient
from bench.serve.soak_report import Sample, Soaked, slope
from bench.serve.soak_report import page as soak_page
from bench.serve_overhead import Measurement, estimate_s, mix_of
from bench.soak_serve import errors_in
from dynskip import LLM, Engine, LayerPath
from dynskip.assets import find_adapter

BUDGETS = (2, 4)
RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm()


def draw_asks(count: int) -> list[Ask]:
    asks = Asks("tiny", NUM_LAYERS, VOCAB_SIZE, BUDGETS, "0")
    return [asks.next() for _ in range(count)]


# A client


@contextlib.asynccontextmanager
async def answering(*parts: bytes, closes: bool = False) -> AsyncIterator[Client]:
    """A client of somebody who answers every request with ``parts``, a write each."""

    tasks = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        while await reader.read(65536):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.001)
            if closes:
                break
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    client = Client(*server.sockets[0].getsockname()[:2])
    try:
        yield client
    finally:
        client.close()
        server.close()
        await asyncio.gather(*tasks, return_exceptions=True)  # a client that has gone may have reset its connection


def in_loop(make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(make(), 60))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_answers_are_read_however_they_are_cut(size: int) -> None:
    plain = b'HTTP/1.1 400 Bad Request\r\ncontent-length: 7\r\n\r\n{"a":1}'
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n"

    async def main() -> None:
        for whole, status, body in ((plain, 400, b'{"a":1}'), (chunked, 200, b"hello!")):
            parts = [whole[begin : begin + size] for begin in range(0, len(whole), size)]
            async with answering(*parts) as client:
                for _ in range(2):  # the second on the kept connection
                    answer = await client.post("/", {})
                    assert (answer.status, answer.body) == (status, body)
                pieces: list[bytes] = []
                answer = await client.send(post_of("/", b"{}"), pieces.append)
                assert answer.body + b"".join(pieces) == body
                assert pieces == ([b"hello", b"!"] if status == 200 else [])

    in_loop(main)


def test_an_answer_that_is_cut_off_is_broken() -> None:
    async def main() -> None:
        async with answering(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello", closes=True) as client:
            with pytest.raises(Broken, match="the connection ended before the answer"):
                await client.post("/", {})

    in_loop(main)


# What is asked for


def test_all_kinds_are_drawn_and_the_same_again() -> None:
    asks = draw_asks(400)
    kinds = {kind for ask in asks for kind in ask.kinds}
    wanted = (
        "chat completion stream n logprobs prompt_logprobs echo stop path depth model draft logit_bias min_p sampled"
    )
    assert kinds >= {*wanted.split(), "depth in percent", "token ids", "texts", "repetition_penalty", "messages"}
    assert [ask.body for ask in draw_asks(400)] == [ask.body for ask in asks]
    bad = Asks("tiny", NUM_LAYERS, VOCAB_SIZE, BUDGETS, "0")
    assert {bad.bad().status for _ in range(200)} == {400, 404, 413}


def test_random_requests_get_the_librarys_answers(llm: LLM, tmp_path: Any) -> None:
    asks = [ask for ask in draw_asks(60) if len(str(ask.body)) < 700][:30]
    wide = tiny_llm_with(320)

    async def main() -> list[list[dict[str, Any]]]:
        async with local(wide, table="uniform:2\nuniform:4\n", folder=tmp_path) as server:
            return [await ask_of(server, ask) for ask in asks]

    engine = Engine(wide.model, policy="lockstep", tokenizer=wide.tokenizer)
    for ask, answers in zip(asks, run(main()), strict=True):
        assert served_answer(ask, answers) == library_answer(wide, engine, ask), ask.body


def tiny_llm_with(max_len: int) -> LLM:
    """As `tiny_llm`, with more positions."""
    from api import CHAT_TEMPLATE
    from models import tiny_hf, word_tokenizer

    from dynskip import OPTForCausalLM

    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    hf_model = tiny_hf(max_position_embeddings=max_len)
    return LLM(OPTForCausalLM.from_hf(hf_model, backend="torch", deterministic=True), tokenizer)


async def ask_of(server: Local, ask: Ask) -> list[dict[str, Any]]:
    answer = await server.post(ROUTES[ask.route], ask.body)
    assert answer.status_code == 200, answer.text
    if not ask.body.get("stream"):
        return [answer.json()]
    *events, end = [block.removeprefix("data: ") for block in answer.text.split("\n\n") if block]
    assert end == "[DONE]"
    return [json.loads(event) for event in events]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"error": {"message": "x"}}], "an error in mid-stream"),
        ([{"choices": []}], r"outputs 0\.\.0, got \[\]"),
        ([{"choices": [{"index": 0, "text": "a", "finish_reason": None, "logprobs": None}]}], "one reason at the end"),
        ([{"choices": [{"index": 3, "text": "a", "finish_reason": "stop", "logprobs": None}]}], r"got \[3\]"),
    ],
)
def test_an_answer_that_is_none_is_noticed(answers: list[dict[str, Any]], message: str) -> None:
    ask = next(ask for ask in draw_asks(50) if ask.params.n == 1 and len(ask.prompts) == 1)
    with pytest.raises(ValueError, match=message):
        served_answer(ask, answers)


def test_clients_lose_nothing_of_a_server_and_all_of_none() -> None:
    ledger = Ledger(random.Random(0))
    with on_loopback(tiny_llm_with(320), name="tiny", policy="lockstep", batch=4) as url:
        host, port = url.removeprefix("http://").split(":")
        asks = [Asks("tiny", NUM_LAYERS, VOCAB_SIZE, (), str(seed)) for seed in range(4)]
        clients = [SoakClient(host, int(port), each, ledger) for each in asks]

        async def main() -> None:
            for _ in range(12):
                await asyncio.gather(*(client._one() for client in clients))
            for client in clients:
                client._client.close()

        in_loop(main)
    assert not ledger.lost
    assert ledger.num_sent == sum(ledger.ended.values()) == 48
    assert {"answered", "left"} <= set(ledger.ended) <= {"answered", "refused", "left", "other"}
    gone = SoakClient(host, int(port), Asks("tiny", NUM_LAYERS, VOCAB_SIZE, (), "0"), ledger)
    in_loop(gone._one)
    assert len(ledger.lost) == 1


# What a soak says


def sample(seconds: float, rss_bytes: float = 4e8) -> Sample:
    return Sample(seconds, seconds / 2, int(rss_bytes), 3, 2, 0.5, 100 * seconds, seconds, seconds, seconds)


def soaked(**changes: Any) -> Soaked:
    machine = {"cpu": "Test", "num_cores": 2, "versions": {"torch": "2.13"}, "commit": "abc", "date": "now"}
    options = {"minutes": 20, "model": "tiny", "threads": 1, "batch": 8, "max_queue": 8, "clients": 4, "seed": 0}
    fine = Soaked(
        conditions={**machine, **options, "kv_mib": 12.0},
        samples=[sample(float(second)) for second in range(100)],
        outcomes={"answered": 80, "refused": 9, "left": 10, "other": 1},
        num_sent=100,
        num_retries=7,
        num_tokens=900,
        refused={"no JSON": 9},
        answered_kinds={"chat": 50, "n": 2},
        checked_kinds={"chat": 5},
        num_checked=8,
        lost=[],
        unequal=[],
        left={"waiting": 0.0},
        paused_s=8.0,
        exit_status=0,
        log_errors=[],
    )
    return dataclasses.replace(fine, **changes)


def test_a_soak_without_a_fault_says_so() -> None:
    run = soaked()
    assert run.verdict() == []
    assert f"Verdict: resident memory {run.rss_growth:+.2%} of 2% allowed, no request lost" in soak_page(run)
    line = json.loads(json.dumps(run.line()))
    assert line["found"]["verdict"] == []
    assert Soaked.of_line(line) == run


def test_the_pages_show_the_committed_results() -> None:
    for path in (RESULTS / "soak").glob("serve.json"):
        soak = Soaked.of_line(json.loads(path.read_text(encoding="utf-8")))
        assert path.with_suffix(".md").read_text(encoding="utf-8") == soak_page(soak)
    for path in (RESULTS / "serve").glob("*.jsonl"):
        assert path.with_suffix(".md").read_text(encoding="utf-8") == page(*read(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": [sample(float(s), 4e8 + 2e5 * s) for s in range(100)]}, "resident memory grew by 3"),
        ({"lost": ["no answer after 300 s"], "num_sent": 101}, "1 requests were lost, the first: no answer"),
        ({"num_sent": 101}, "101 requests were sent, 100 ended"),
        ({"left": {"waiting": 0.0, "kv": 0.25}}, "still held: kv 0.25"),
        ({"unequal": ["chat: {}"]}, "1 answers were not the library's: chat"),
        ({"exit_status": -9}, "the server ended with status -9"),
        ({"log_errors": ["Traceback"]}, "the server's log has errors: Traceback"),
        ({"num_retries": 0}, "the run says little: num_retries must not be 0"),
        ({"outcomes": {"answered": 100}}, "refused, left, other must not be 0"),
        (
            {"samples": [dataclasses.replace(sample(float(s)), num_preempted=0) for s in range(100)]},
            "num_preempted must",
        ),
    ],
)
def test_a_soak_names_each_fault(changes: dict[str, Any], message: str) -> None:
    run = soaked(**changes)
    assert any(message in wrong for wrong in run.verdict()), run.verdict()
    assert message in soak_page(run)


def test_a_slope_has_an_interval_that_noise_widens() -> None:
    xs = [float(x) for x in range(200)]
    exact = slope(xs, [3 * x + 1 for x in xs])
    assert exact.value == pytest.approx(3) and exact.low == pytest.approx(3) and exact.high == pytest.approx(3)
    draw = random.Random(0)
    noisy = slope(xs, [draw.gauss(0, 10) for _ in xs])
    assert noisy.low < 0 < noisy.high


def test_faults_in_the_log_are_found() -> None:
    log = "2026 INFO a POST /v1 200 1 ms\n2026 ERROR b KeyError\nTraceback (most recent call last):\n"
    assert errors_in(log) == log.splitlines()[1:]


# Load


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Any]:
    with on_loopback(llm, policy="lockstep", batch=4) as url:
        host, port = url.removeprefix("http://").split(":")
        yield SimpleNamespace(host=host, port=int(port), cpu_s=lambda: 0.0)


def calls(count: int, **options: Any) -> list[Call]:
    body = {"prompt": [5, 6, 7], "temperature": 0, "ignore_eos": True, **options}
    return [Call({**body, "max_tokens": 2 + index % 5}, 0.01 * index) for index in range(count)]


def test_a_burst_and_arrivals_get_every_token_and_its_time(server: Any) -> None:
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    assert burst(server, calls(8)).seconds > 0
    for send in (burst, arrive):
        sent = calls(8, **streamed)
        spent = send(server, sent)
        assert spent.line()["client_cpu"] > 0
        for call in sent:
            assert call.sent_s < call.times[0] <= call.times[-1]
            assert len(call.times) <= call.num_tokens
        assert waits(sent)["ttft_ms"] == sorted(waits(sent)["ttft_ms"])


def test_an_output_that_is_short_ends_the_measurement(server: Any) -> None:
    (wrong,) = calls(1, stop_token_ids=[VOCAB_SIZE])
    with pytest.raises(RuntimeError, match=r"an answer must have 2 tokens, got .*stop_token_ids"):
        burst(server, [wrong])


def test_a_server_is_asked_for_its_own_shares_and_for_what_slower_ones_can(tmp_path: Any) -> None:
    args = argparse.Namespace(models=tmp_path, requests=1)
    results = Results(tmp_path / "rows.jsonl", {"shape": REHEARSAL})
    measured = Measurement(REHEARSAL, args, (), results)
    assert measured._rates("cohort") == {"latency, 25%": 0.0, "latency, 50%": 0.0, "latency, 80%": 0.0}
    for peer, rate in (("vLLM", 5.0), ("lockstep", 10.0), ("cohort", 20.0)):
        results.add({"peer": peer, "what": "capacity", "requests_per_s": rate})
    own = {"latency, 25%": 5.0, "latency, 50%": 10.0, "latency, 80%": 16.0}
    assert measured._rates("cohort") == {**own, "latency, 80% of vLLM": 4.0, "latency, 80% of lockstep": 8.0}
    assert len(measured._rates("vLLM")) == 3
    assert estimate_s("opt-1.3b", argparse.Namespace(part=["latency"], server="", seconds=60.0, requests=1)) > 12 * 60


# Its table


def test_the_table_says_what_was_met_missed_and_failed(tmp_path: Any) -> None:
    machine = {"cpu": "Test", "num_cores": 2, "num_threads": 2, "versions": {"torch": "2.13"}, "load": [0.1]}
    options = {"rounds": 6, "budget_s": 60.0, "requests": 256, "prompt_len": 32, "mean_output": 16}
    conditions = {"shape": "opt-1.3b", "commit": "abc", "date": "now", **machine, **options}
    shares = {"client_cpu": 0.03, "server_cpu": 1.8}
    waits_ms = {"ttft_ms": [1.0, 2.0, 300.0], "tpot_ms": [5.0, 6.0, 7.0], "gap_ms": [5.0, 6.0, 7.0]}
    rows = [
        {"peer": "Engine", "what": "load", "version": "0.1", "settings": "costs calibrated"},
        *(
            {"peer": "server", "what": f"overhead, full depth, {mode}", "ours": 80.0, "theirs": 82.0, **shares}
            | {"value": value, "low": value - 0.01, "high": value + 0.01}
            for mode, value in (("whole answers", 0.97), ("streams", 0.94))
        ),
        {"peer": "cohort", "what": "capacity", "requests_per_s": 20.0},
        {"peer": "cohort", "what": "latency, 25%", "rate": 5.0, **waits_ms, **shares},
        {"peer": "vLLM", "what": "capacity", "error": "not installed"},
    ]
    text = page(conditions, rows)
    assert ">= 0.95x, met" in text and ">= 0.95x, missed" in text
    assert "1.0 / 2.0 / 300" in text
    mix = "4/8/12/24 of 24 layers in 74/18/6/2% of the requests, a mean of 5.6, uniform paths"
    said = " ".join(text.split())
    assert f"the paper's depths ({mix})" in said
    assert "cohort 20.00" in said and "Failed, vLLM, capacity: not installed" in said
    assert tables(tmp_path) == "Not measured yet.\n"
    (tmp_path / "opt.jsonl").write_text("\n".join(map(json.dumps, [conditions, *rows])), encoding="utf-8")
    assert tables(tmp_path) == text and "the named server" not in text
    shared = {**rows[4], "what": "latency, 80% of vLLM"}
    text = page(conditions, [*rows, shared])
    assert "| cohort   | 80% of vLLM |" in text and "or of what the named server has, streamed" in " ".join(
        text.split()
    )
    rows[3]["tokens_per_s"] = 321.0
    rows[4]["what"] = "latency, 80%"
    (tmp_path / "opt.jsonl").write_text("\n".join(map(json.dumps, [conditions, *rows])), encoding="utf-8")
    told = " ".join(short(tmp_path).split())
    who = "| opt-1.3b, 4/8/12/24 of 24 layers | Test | cohort"
    assert f"{who} | paper's depths | 321 | 1.0 / 2.0 / 300 | 5.0 / 6.0 / 7.0 | |" in told
    assert "vLLM" not in told
    figures = "0.970 / 0.940\\*"
    assert f"{who} | full depth | 80 | | | {figures} |" in told, "beside one that knows no other"
    assert "no prefix caching; measured from" in told and "0.95 of the tokens/s that `Engine` gives" in told


def test_the_papers_depths_are_a_models_own_paths_and_the_table_names_them(tmp_path: Any) -> None:
    name, paths = mix_of("smollm2-135m-paths", 30, None)
    folder = find_adapter("smollm2-135m-paths")
    assert folder is not None
    own = [LayerPath.found(folder, budget) for budget in (15, 20, 25)]
    assert paths == tuple(zip([*own, LayerPath.full(30)], (74.0, 18.0, 6.0, 2.0), strict=True))
    assert [path.budget for path, _ in mix_of("opt-1.3b", 24, None)[1]] == [4, 8, 12, 24]
    assert mix_of("opt-1.3b", 24, "exit:3=1") == ("exit:3=1", ((LayerPath.early_exit(24, budget=3), 1.0),))

    machine = {"cpu": "Test", "num_cores": 2, "num_threads": 2, "versions": {"torch": "2.13"}, "load": [0.1]}
    options = {"rounds": 6, "budget_s": 60.0, "requests": 8, "prompt_len": 32, "mean_output": 16, "machine": "test"}
    conditions = {"shape": "smollm2-135m-paths", "commit": "abc", "date": "now", **machine, **options}
    conditions |= {"mix": name, "num_layers": 30, "depths": [(path.budget, share) for path, share in paths]}
    said = " ".join(page(conditions, []).split())
    assert "Real weights" in said
    assert f"(15/20/25/30 of 30 layers in 74/18/6/2% of the requests, a mean of 16.8, {name})" in said
    Results(tmp_path / "rows.jsonl", conditions)
    with pytest.raises(ValueError, match="must be of this state to go on with it"):
        Results(tmp_path / "rows.jsonl", conditions | {"mix": "uniform paths"})
