"""``dynskip serve --replicas`` on a cluster of two nodes of one CPU each, all of them on this machine."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest
from api import events_of
from processes import command_of
from prometheus_client.parser import text_string_to_metric_families

from dynskip import LLM, LayerPath, SamplingParams

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
TIMEOUT_S = 600  # never waited for, as in the tests of one server
OBJECT_STORE = 100 * 2**20
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # a token of earlier clusters lies in the home folder, and only a head looks for it
    "RAY_worker_niceness": "0",  # by Ray's 15 a busy machine starves them, and Ray Serve takes them for dead
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
SERVE = [sys.executable, "-m", "dynskip", "serve", "opt-mini", "--port", "0", "--threads", "1", "--deterministic"]
SERVE += ["--policy", "lockstep", "--served-model-name", "mini"]
FOLDER = Path("/tmp") / f"dynskip-ray-{os.getpid()}"  # of the cluster; sockets in it must have short names
LONG = {"prompt": "The lighthouse keeper", "temperature": 0, "ignore_eos": True, "stream": True}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port: int = bound.getsockname()[1]
    return port


def ray(*arguments: str) -> None:
    """Run Ray's own command."""
    done = subprocess.run([RAY, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of two nodes of one CPU each."""
    address = f"127.0.0.1:{free_port()}"
    common = ["--num-cpus=1", "--num-gpus=0", f"--object-store-memory={OBJECT_STORE}", "--node-ip-address=127.0.0.1"]
    before = {process.pid for process in psutil.process_iter()}
    try:
        port = address.rpartition(":")[2]
        ray("start", "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={FOLDER}", *common)
        ray("start", f"--address={address}", *common)
        yield address
    finally:
        for process in psutil.process_iter():
            if process.pid not in before and str(FOLDER) in command_of(process):
                process.kill()
        shutil.rmtree(FOLDER, ignore_errors=True)


@dataclass
class Running:
    """A server of two replicas. log: what it has said so far."""

    process: subprocess.Popen[str]
    url: str
    log: list[str]

    def post(self, route: str = "/v1/completions", **body: Any) -> httpx2.Response:
        """The answer to ``body``."""
        return httpx2.post(f"{self.url}{route}", json=body, timeout=TIMEOUT_S)

    def values(self, name: str, **labels: str) -> dict[str, float]:
        """A metric by replica; only values with these labels."""
        page = httpx2.get(f"{self.url}/metrics", timeout=TIMEOUT_S).text
        samples = [sample for each in text_string_to_metric_families(page) for sample in each.samples]
        found = [each for each in samples if each.name == name and labels.items() <= each.labels.items()]
        return {each.labels["replica"]: each.value for each in found}

    def process_of(self, replica: str) -> psutil.Process:
        """The process of a replica."""
        names = {each.pid: command_of(each) for each in psutil.process_iter()}
        (pid,) = [pid for pid, name in names.items() if name.startswith(f"ray::ServeReplica:dynskip:{replica}")]
        return psutil.Process(pid)

    def holder(self) -> str:
        """The replica that holds the only request."""
        (found,) = [name for name, held in self.values("dynskip_replica_held").items() if held]
        return found


@contextmanager
def serving(*options: str) -> Iterator[Running]:
    """A server of two replicas that is ready."""
    with subprocess.Popen(
        [*SERVE, "--replicas", "2", *options],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        log: list[str] = []
        ready = threading.Event()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                log.append(line)
                if line.startswith("dynskip serves "):
                    ready.set()
            ready.set()

        reader = threading.Thread(target=read)
        reader.start()
        try:
            assert ready.wait(TIMEOUT_S)
            (line,) = [line for line in log if line.startswith("dynskip serves ")] or pytest.fail("".join(log))
            yield Running(process, line.split()[-1].removesuffix("/v1"), log)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(120)
            finally:
                process.kill()
                reader.join()


@pytest.fixture(scope="module")
def server(cluster: str) -> Iterator[Running]:
    with serving("--ray-address", cluster) as running:
        yield running


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("opt-mini", deterministic=True)


def until(is_true: Callable[[], bool]) -> None:
    """Wait for it."""
    end_s = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < end_s
        time.sleep(0.1)


class Reading(threading.Thread):
    """A client that reads a stream in a thread of its own."""

    def __init__(self, url: str, **body: Any) -> None:
        super().__init__()
        self.url, self.body, self.text = url, body, ""
        self.begun = threading.Event()
        self.start()

    def run(self) -> None:
        """Read it."""
        with httpx2.stream("POST", f"{self.url}/v1/completions", json=self.body, timeout=TIMEOUT_S) as answer:
            for part in answer.iter_text():
                self.text += part
                self.begun.set()
        self.begun.set()

    @property
    def events(self) -> list[Any]:
        """What has come, once it has ended."""
        self.join(TIMEOUT_S)
        assert not self.is_alive()
        return events_of(self.text)


def text_of(events: list[Any]) -> str:
    return "".join(choice["text"] for each in events if each != "[DONE]" for choice in each["choices"])


def test_answers_are_the_librarys_own(server: Running, llm: LLM) -> None:
    bodies, expected = [], []
    for index in range(24):
        path, prompt = ("full", "uniform:8", "exit:6", "uniform:4")[index % 4], f"Lighthouse number {index} is"
        options = {"max_tokens": 6 + index % 7, "seed": index, "temperature": 0.8 * (index % 2), "ignore_eos": True}
        bodies.append({"prompt": prompt, "path": path, "logprobs": 1, "stream": index % 3 == 0, **options})
        params = SamplingParams(logprobs=1, **options)
        expected += llm.generate([prompt], params, LayerPath.parse(path, llm.model.num_layers))

    async def main() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(timeout=TIMEOUT_S) as client:
            return await asyncio.gather(*(client.post(f"{server.url}/v1/completions", json=body) for body in bodies))

    for body, answer, output in zip(bodies, asyncio.run(main()), expected, strict=True):
        assert answer.status_code == 200, answer.text
        parts = events_of(answer.text)[:-1] if body["stream"] else [answer.json()]
        choices = [choice for part in parts for choice in part["choices"]]
        assert "".join(choice["text"] for choice in choices) == output.text
        logprobs = [value for each in choices if each["logprobs"] for value in each["logprobs"]["token_logprobs"]]
        assert output.logprobs is not None
        own = [each[token] for each, token in zip(output.logprobs, output.token_ids, strict=True)]
        assert logprobs == own, "bit for bit, whatever ran beside it"


def test_the_openai_client_reads_streams_and_errors(server: Running, llm: LLM) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=TIMEOUT_S, max_retries=0)
    messages = [{"role": "user", "content": "Name a cheese."}]
    chunks = list(
        client.chat.completions.create(
            model="mini",
            messages=messages,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"path": "uniform:8"},
        )
    )
    params = SamplingParams(max_tokens=12)
    (expected,) = llm.generate([llm.chat_prompt("Name a cheese.")], params, LayerPath.uniform(24, 8))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected.text
    assert chunks[-1].usage.completion_tokens == len(expected.token_ids)
    with pytest.raises(openai.BadRequestError, match="path: it must be full"):
        client.completions.create(model="mini", prompt="x", extra_body={"path": "sideways"})
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="x")
    assert [each.id for each in client.models.list()] == ["mini"]


def test_an_answer_has_one_id(server: Running) -> None:
    headers = {"x-request-id": "mine"}
    answer = httpx2.get(f"{server.url}/v1/models", headers=headers, timeout=TIMEOUT_S)
    assert answer.headers.get_list("x-request-id") == ["mine"]
    assert httpx2.get(f"{server.url}/health", timeout=TIMEOUT_S).status_code == 200


def test_requests_of_one_path_land_on_one_replica_while_it_is_not_the_busier_one(server: Running) -> None:
    streams = []
    for index in range(10):  # of other work, so that a path has a share
        streams.append(
            Reading(server.url, **{**LONG, "prompt": f"{index} keepers", "path": "exit:9", "max_tokens": 300})
        )
        assert streams[-1].begun.wait(TIMEOUT_S)
    streams += [
        Reading(server.url, **{**LONG, "prompt": f"{index} ships", "path": "exit:2", "max_tokens": 8})
        for index in range(6)
    ]
    assert all(stream.events[-1] == "[DONE]" for stream in streams)
    found = server.values("dynskip_depth_requests_total", layers="2")
    assert sum(found.values()) == 6 and max(found.values()) > 3, f"turns would give each three, got {found}"
    assert len(server.values("dynskip_depth_requests_total", layers="9")) == 2


def test_a_client_that_goes_away_aborts_its_request(server: Running) -> None:
    before = server.values("dynskip_num_aborted_total")
    body = {**LONG, "max_tokens": 450}
    with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S) as answer:
        next(answer.iter_text())
    until(lambda: sum(server.values("dynskip_num_aborted_total").values()) == sum(before.values()) + 1)
    assert sum(server.values("dynskip_num_held").values()) == 0


def test_no_log_of_a_cluster_holds_anything_of_a_prompt(server: Running) -> None:
    word = "Zwetschgendatschi"
    for body, status in (
        ({"prompt": word, "max_tokens": 3}, 200),
        ({"prompt": [word, word], "max_tokens": 3, "path": "uniform:4"}, 200),
        ({"prompt": word, "max_tokens": 100_000}, 400),
        ({"prompt": word, "stop": word, "tools": [word]}, 400),
    ):
        answer = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S)
        assert answer.status_code == status, answer.text
    files = [path for path in (FOLDER / "session_latest" / "logs").rglob("*") if path.is_file()]
    written = b"".join(path.read_bytes() for path in files)
    assert b"Running" in written or b"replica" in written.lower(), "Ray Serve has written logs"
    assert word.encode() not in written and word not in "".join(server.log)


def test_a_replica_killed_in_mid_stream_costs_its_own_streams_only(server: Running, llm: LLM) -> None:
    doomed = Reading(server.url, **LONG, max_tokens=450, n=8)
    assert doomed.begun.wait(TIMEOUT_S)
    killed = server.holder()
    others: list[Reading] = []
    while len([held for held in server.values("dynskip_replica_held").values() if held]) < 2:
        prompt = f"Ship number {len(others)}"
        others.append(Reading(server.url, **{**LONG, "prompt": prompt, "max_tokens": 100}))
        assert others[-1].begun.wait(TIMEOUT_S)
    num_lost = server.values("dynskip_replica_held")[killed] - 8  # beside the outputs of the doomed one
    server.process_of(killed).kill()
    *_, error, end = doomed.events
    assert (error["error"]["code"], end) == ("replica_lost", "[DONE]")
    # Not yet known to every client of the dead replica, a new request is answered at once.
    answer = server.post(**{**LONG, "stream": False}, max_tokens=5)
    assert answer.status_code == 200
    (expected,) = llm.generate([LONG["prompt"]], SamplingParams(max_tokens=5, ignore_eos=True))
    assert answer.json()["choices"][0]["text"] == expected.text
    num_whole = 0
    for index, other in enumerate(others):
        events = other.events
        assert events[-1] == "[DONE]"
        if "error" in events[-2]:
            assert events[-2]["error"]["code"] == "replica_lost"
        else:
            (expected,) = llm.generate([f"Ship number {index}"], SamplingParams(max_tokens=100, ignore_eos=True))
            assert text_of(events) == expected.text
            num_whole += 1
    assert num_whole >= max(1, len(others) - num_lost), "no more than those of the replica that was killed"
    until(lambda: set(server.values("dynskip_replica_up").values()) == {1.0})


def test_requests_that_wait_for_a_killed_replica_are_answered_by_another(server: Running, llm: LLM) -> None:
    answers: list[httpx2.Response] = []
    body = {**LONG, "stream": False, "n": 4}

    def ask() -> None:
        answers.append(server.post(**body, max_tokens=300))

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: any(server.values("dynskip_replica_held").values()))
    server.process_of(server.holder()).kill()
    asking.join(TIMEOUT_S)
    (answer,) = answers
    assert answer.status_code == 200, answer.text
    params = SamplingParams(max_tokens=300, n=4, ignore_eos=True)
    (expected,) = llm.generate([LONG["prompt"]], params)
    assert [choice["text"] for choice in answer.json()["choices"]] == [each.text for each in expected.samples]
    until(lambda: set(server.values("dynskip_replica_up").values()) == {1.0})


def test_a_signal_lets_streams_end_and_answers_nothing_new(cluster: str, server: Running) -> None:
    reading = Reading(server.url, **LONG, max_tokens=450, n=8)
    assert reading.begun.wait(TIMEOUT_S)
    server.process.send_signal(signal.SIGTERM)

    def is_stopping() -> bool:
        answer = server.post(**{**LONG, "stream": False}, max_tokens=1)
        return (answer.status_code, answer.json().get("error", {}).get("code")) == (503, "stopping")

    until(is_stopping)
    events = reading.events
    assert events[-1] == "[DONE]"
    assert sum(len(each["choices"]) for each in events[:-1]) >= 8
    assert "error" not in events[-2]
    assert server.process.wait(TIMEOUT_S) == 0, "".join(server.log)


def test_a_second_signal_cuts_off_what_still_runs_and_the_key_is_looked_at(cluster: str) -> None:
    with serving("--ray-address", cluster, "--api-key", "key") as running:
        assert httpx2.get(f"{running.url}/v1/models", timeout=TIMEOUT_S).status_code == 401
        headers = {"authorization": "Bearer key"}
        body = {**LONG, "max_tokens": 450, "n": 32}
        url = f"{running.url}/v1/completions"
        with httpx2.stream("POST", url, json=body, headers=headers, timeout=TIMEOUT_S) as answer:
            parts = answer.iter_text()
            next(parts)
            running.process.send_signal(signal.SIGINT)
            until(lambda: httpx2.get(f"{running.url}/health", timeout=TIMEOUT_S).status_code == 503)
            running.process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx2.TransportError):
                list(parts)
        assert running.process.wait(TIMEOUT_S) == 1, "".join(running.log)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replicas", "3"], "must have room for 3 replicas of 1 threads each, got room for 2"),
        (["--path", "sideways"], "path must be full"),
        (["--device", "cuda:1"], "must be cpu or cuda with --replicas"),
    ],
)
def test_a_mistake_is_told_in_one_line(cluster: str, options: list[str], message: str) -> None:
    command = [*SERVE, "--replicas", "2", "--ray-address", cluster, *options]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("dynskip serve: error: ")]
    assert message in line


def test_without_an_address_it_starts_a_cluster_of_its_own_answers_on_loopback_and_ends_it() -> None:
    with serving() as running:
        assert running.post(prompt="Bread", max_tokens=2).status_code == 200
        own = psutil.Process(running.process.pid).children(recursive=True)
        port = int(running.url.rpartition(":")[2])
        listening = {
            connection.laddr.ip
            for process in own
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        }
        assert listening == {"127.0.0.1"}, "Ray's own ports are open to all, the API's is not"
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(TIMEOUT_S) == 0, "".join(running.log)
    until(lambda: not any(process.is_running() for process in own))


@pytest.mark.parametrize("program", ["serving_ray", "scheduling_ray"])
def test_programs_that_need_ray_say_how_they_are_called(program: str) -> None:
    command = [sys.executable, "-m", f"bench.{program}", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert told.returncode == 0 and told.stdout.startswith("usage: "), told.stderr
