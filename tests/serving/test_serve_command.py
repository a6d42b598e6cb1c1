"""``dynskip serve`` in a process of its own: readiness, signals, mistakes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from adapters import adapted
from api import events_of
from checkpoints import PEFT_WARNS
from transformers import OPTForCausalLM

from dynskip import LLM, SamplingParams
from dynskip.assets import ADAPTED, opt_mini_directory, packaged_file
from dynskip.cli import main
from dynskip.cli.serve import greeting

ROOT = Path(__file__).parents[2]
SERVE = [sys.executable, "-m", "dynskip", "serve", "--port", "0", "--policy", "lockstep", "--threads", "1"]
LONG = {"prompt": "The lighthouse keeper", "ignore_eos": True, "stream": True}
TIMEOUT_S = 600  # never waited for: a loaded machine is slow to start and to end a process


@contextmanager
def serving(*options: str, model: str = "opt-mini") -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A server that is ready: its process, its address, and the command that it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    process = subprocess.Popen(
        [*SERVE, model, *options], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            pytest.fail(process.communicate(timeout=TIMEOUT_S)[1])
        assert line.startswith("dynskip serves "), line
        yield process, line.split()[-1].removesuffix("/v1"), process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status and what was logged."""
    _, log = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, log


def until_closed(process: subprocess.Popen[str], url: str) -> str:
    """What the server logs until it says that it listens no more, which is true."""
    assert process.stderr is not None
    log = ""
    while "listening no more, 1 requests to answer" not in log:
        line = process.stderr.readline()
        assert line, log
        log += line
    host, port = url.removeprefix("http://").split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
    return log


def test_the_line_that_it_prints_works_and_a_signal_lets_streams_end() -> None:
    with serving("--served-model-name", "mini") as (process, url, command):
        assert httpx2.get(f"{url}/health", timeout=TIMEOUT_S).status_code == 200
        words = shlex.split(command)
        assert words[:2] == ["curl", f"{url}/v1/completions"]
        name, _, text = words[3].partition(": ")
        assert words[2::2] == ["-H", "-d"]
        answer = httpx2.post(words[1], content=words[5], headers={name: text}, timeout=TIMEOUT_S)
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["text"]
        assert answer.json()["model"] == "mini"
        body = {**LONG, "max_tokens": 450, "n": 8, "stream_options": {"include_usage": True}}
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=TIMEOUT_S) as streamed:
            parts = streamed.iter_text()
            text = next(parts)
            process.send_signal(signal.SIGTERM)
            log = until_closed(process, url)
            text += "".join(parts)
        *_, usage, end = events_of(text)
        assert end == "[DONE]"
        assert usage["usage"]["completion_tokens"] == 3600
        status, rest = ended(process)
        assert status == 0, rest
        log += rest
        assert "lighthouse" not in log
        assert "POST /v1/completions 200" in log


def test_what_make_serve_starts_has_depths_and_its_line_works_in_a_shell() -> None:
    (model,) = re.findall(r"^MODEL \?= (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    try:
        packaged_file(ADAPTED[model])
    except FileNotFoundError as error:
        pytest.skip(str(error))
    with serving(model=model) as (_, url, command):
        listed = httpx2.get(f"{url}/v1/models", timeout=TIMEOUT_S).json()["data"]
        assert [each["id"] for each in listed] == [model, *(f"{model}@{depth}" for depth in (15, 20, 25, 30))]
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["choices"][0]["text"].strip()
        assert (answer["model"], len(answer["dynskip"]["layers"])) == (model, 30)


def test_a_second_signal_cuts_off_what_still_runs() -> None:
    with serving() as (process, url, _):
        body = {**LONG, "max_tokens": 400, "n": 64}
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=TIMEOUT_S) as streamed:
            assert streamed.status_code == 200
            parts = streamed.iter_text()
            next(parts)
            process.send_signal(signal.SIGINT)
            until_closed(process, url)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx2.TransportError):
                list(parts)
        status, log = ended(process)
        assert status == 1, log
        assert "1 requests unanswered" in log
        assert "Traceback" not in log
        assert "exception" not in log.lower()


def test_options_reach_the_server(tmp_path: Path) -> None:
    paths = tmp_path / "paths.txt"
    paths.write_text("uniform:4\nuniform:8\n", encoding="utf-8")
    options = ["--paths", str(paths), "--path", "uniform:8", "--draft", "exit:1", "--max-model-len", "64"]
    options.append("--no-prefix-caching")
    options += ["--max-prefill-tokens", "16"]
    with serving(*options, "--api-key", "key", "--log-requests", "--kv-bytes", "50000000", "--batch", "2") as running:
        process, url, command = running
        assert "Authorization: Bearer $KEY" in command
        headers = {"authorization": "Bearer key"}

        def post(**body: Any) -> httpx2.Response:
            body = {"prompt": "Bread", "max_tokens": 4, **body}
            return httpx2.post(f"{url}/v1/completions", json=body, headers=headers, timeout=TIMEOUT_S)

        assert httpx2.get(f"{url}/v1/models", timeout=TIMEOUT_S).status_code == 401
        listed = httpx2.get(f"{url}/v1/models", headers=headers, timeout=TIMEOUT_S).json()["data"]
        assert [each["id"] for each in listed] == ["opt-mini", "opt-mini@4", "opt-mini@8", "opt-mini@24"]
        assert {each["max_model_len"] for each in listed} == {64}
        assert post().json()["dynskip"]["path"] == "uniform:8"
        assert post(model="opt-mini@3").json()["dynskip"]["path"] == "uniform:4"
        assert post(max_tokens=64).json()["error"]["code"] == "context_length_exceeded"
        metrics = httpx2.get(f"{url}/metrics", timeout=TIMEOUT_S).text
        assert 'vllm:prefix_cache_queries_total{model_name="opt-mini"} 0.0' in metrics, "nothing is looked for"

        def num_prefills() -> float:
            page = httpx2.get(f"{url}/metrics", timeout=TIMEOUT_S).text
            (line,) = (line for line in page.splitlines() if line.startswith("dynskip_num_prefills_total"))
            return float(line.rsplit(" ", 1)[1])

        before = num_prefills()
        post(prompt=list(range(5, 45)))
        assert num_prefills() - before == 3, "40 tokens, 16 in a step"
        process.send_signal(signal.SIGTERM)
        status, log = ended(process)
        assert status == 0, log
        assert "Bread" in log


@PEFT_WARNS
def test_an_adapter_is_merged_into_the_model_that_is_served(tmp_path: Path) -> None:
    adapted(OPTForCausalLM.from_pretrained(opt_mini_directory()), tmp_path)
    body = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with serving("--adapter", str(tmp_path), "--deterministic") as (_, url, _):
        answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S).json()
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    plain, merged = (
        LLM("opt-mini", adapter=adapter, deterministic=True).generate([[5, 6, 7]], params)[0].token_ids
        for adapter in (None, tmp_path)
    )
    assert plain != merged
    assert answer["choices"][0]["token_ids"] == merged


def test_a_request_on_a_kept_connection_survives_a_server_that_stands_still() -> None:
    with serving() as (process, url, _), httpx2.Client(base_url=url, timeout=TIMEOUT_S) as client:
        assert client.get("/health").status_code == 200
        process.send_signal(signal.SIGSTOP)
        resumed = threading.Timer(6.0, lambda: process.send_signal(signal.SIGCONT))  # uvicorn would close it after 5
        resumed.start()
        assert client.get("/health").status_code == 200
        resumed.join()


def test_the_key_may_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYNSKIP_API_KEY", " sk-7")
    assert main(["serve", "opt-mini", "--port", "0"]) == 2
    assert "--api-key must be a text without spaces around it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--path", "sideways"], "path must be full"),
        (["--paths", "/nowhere/at/all"], "No such file"),
        (["--max-model-len", "1000000"], "max_context_len must lie in"),
        (["--kv-bytes", "1"], "kv_bytes must hold an entry"),
        (["--api-key", ""], "--api-key must be a text without spaces around it"),
        (["--api-key", " sk-7"], "--api-key must be a text without spaces around it"),
    ],
)
def test_a_mistake_ends_it_before_it_listens(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "opt-mini", "--port", "0", "--policy", "lockstep", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--port", "70000"], "0..65535"), (["--batch", "0"], "1..65536"), (["--policy", "best"], "invalid choice")],
)
def test_a_wrong_option_is_named(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "opt-mini", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "/nowhere/at/all", "--port", str(port)]) == 2
    assert f"got 127.0.0.1:{port}" in capsys.readouterr().err


def test_what_is_not_installed_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("dynskip.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "opt-mini"]) == 2
    assert "serve needs uvicorn, which is not installed. Use pip install 'dynskip[serve]'" in capsys.readouterr().err


def test_what_replicas_need_is_named_and_nothing_else_needs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("dynskip.serving.replicas")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", "opt-mini", "--replicas", "2"]) == 2
    assert "serve needs ray, which is not installed. Use pip install 'dynskip[ray]'" in capsys.readouterr().err
    assert main(["serve", "opt-mini", "--ray-address", "auto"]) == 2
    assert "--ray-address must be left out without --replicas" in capsys.readouterr().err


@pytest.mark.parametrize("needs_key", [False, True])
def test_the_command_survives_any_name(needs_key: bool) -> None:
    name = 'it\'s a "model" of $HOME'
    first, command, offer, page, *notes = greeting("http://127.0.0.1:1", name, [4, 8], needs_key).splitlines()
    assert ["KEY" in note for note in notes] == [True] * needs_key
    assert first.endswith("at http://127.0.0.1:1/v1")
    assert offer.endswith("@4: 4, 8")
    assert page.endswith(": http://127.0.0.1:1/")
    words = shlex.split(command)
    assert httpx2.Response(200, content=words[-1]).json()["model"] == name
    assert any("Bearer" in word for word in words) == needs_key
