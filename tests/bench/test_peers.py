"""The comparison with other engines: its driver against a process without a model, its rows, and its tables."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from bench.peers import plan, run, table
from bench.peers.plan import CELLS, DYNSKIP, PEERS, Peer, estimate_s, prefill_rounds
from bench.peers.process import PeerError, PeerProcess
from bench.peers.results import Results, read
from bench.peers.streams import ClosedBatches
from bench.peers.workload import draw_prompts, draw_requests, paper_text

ROOT = Path(__file__).resolve().parents[2]
FAKE = "fake_peer:FakePeer"
CONDITIONS = {
    "shape": "opt-1.3b",
    "machine": "test-2-cores",
    "cpu": "Test",
    "num_cores": 2,
    "versions": {"torch": "2.13"},
    "commit": "abc",
    "date": "2026-01-01 00:00 UTC",
    "load": [0.1, 0.2, 0.3],
    "rounds": 4,
    "budget_s": 1.0,
    "requests": 8,
}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes find bench and the helpers."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests" / "helpers"))))


def fake(tmp_path: Path, name: str = "fake") -> PeerProcess:
    """A peer without a model."""
    return PeerProcess(name, [sys.executable, "-m", "bench.peers.worker", FAKE], tmp_path / f"{name}.log")


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[PeerProcess]:
    """A loaded one."""
    with fake(tmp_path) as process:
        process.ask("load", folder="somewhere")
        yield process


def test_a_peer_runs_only_while_it_answers(peer: PeerProcess) -> None:
    peer.ask("spawn")
    before = peer.ask("ticks")
    assert peer.is_stopped and len(peer.processes) == 2
    time.sleep(0.5)
    assert peer.is_stopped
    # The time between two questions did not exist for its threads.
    assert peer.ask("ticks") - before < 100


def test_what_it_prints_is_in_the_log_and_no_answer(peer: PeerProcess, tmp_path: Path) -> None:
    assert (tmp_path / "fake.log").read_text(encoding="utf-8") == "loading somewhere\n"
    assert peer.peak_bytes() > 2**20


def test_an_exception_is_an_error_and_the_peer_goes_on(peer: PeerProcess) -> None:
    with pytest.raises(PeerError, match="fake: ValueError: nothing to give"):
        peer.ask("fail")
    assert peer.is_stopped
    assert peer.ask("prefill", batch=2, prompt_len=4, num_new=1) == 2.0


def test_a_peer_that_ends_says_how(peer: PeerProcess) -> None:
    with pytest.raises(PeerError, match=r"must answer 'die', got exit status 3: .*out of luck"):
        peer.ask("die")
    with pytest.raises(PeerError, match="must answer 'ticks', got exit status 3"):
        peer.ask("ticks")


def test_a_peer_that_takes_too_long_is_ended(peer: PeerProcess) -> None:
    leader = peer.processes[0]
    with pytest.raises(PeerError, match="sleep must end within 0 s, got no answer"):
        peer.ask("sleep", timeout_s=0.2)
    assert not leader.is_running()


def test_a_stopped_peer_and_its_children_end_with_it(tmp_path: Path) -> None:
    with fake(tmp_path) as process:
        child = psutil.Process(process.ask("spawn"))
        leader = process.processes[0]
    assert not leader.is_running()
    # What has lost its parent is a zombie until init has looked.
    deadline_s = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s, "killed with its group"
        time.sleep(0.01)


def test_a_package_that_is_missing_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.peers.worker", "no_such_engine:Peer"]
    with (
        PeerProcess("gone", command, tmp_path / "gone.log") as process,
        pytest.raises(PeerError, match="gone: ModuleNotFoundError: No module named 'no_such_engine'"),
    ):
        process.ask("load", folder="")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> argparse.Namespace:
    """A shape with a peer that needs twice dynskip's time and one that is not installed, and the arguments of a run."""
    twice = Peer("vLLM", FAKE, {"ms": 2.0}, streams=3, cells=((1, 64), (8, 512)))
    gone = Peer("transformers", "no_such_engine:Peer", cells=((1, 64),))
    monkeypatch.setitem(PEERS, "opt-1.3b", (twice, gone))
    monkeypatch.setattr(run, "DYNSKIP", Peer(DYNSKIP.name, FAKE))
    monkeypatch.setattr(run, "describe", lambda: CONDITIONS)
    models = tmp_path / "models"
    (models / "opt-1.3b").mkdir(parents=True)
    return argparse.Namespace(
        peer="", rounds=4, budget=1.0, requests=8, fresh=False, out=tmp_path / "out", models=models
    )


def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the run has left."""
    (path,) = args.out.glob("*.jsonl")
    return read(path)[1]


def test_a_run_leaves_a_row_for_everything(fakes: argparse.Namespace) -> None:
    run.measure_shape("opt-1.3b", fakes)
    rows = {(row["peer"], row["what"], row.get("prompt_len")): row for row in rows_of(fakes)}
    # The first step of a turn does not count, however slow it is.
    assert rows["vLLM", "decode", 64]["ours"] == 1.0 and rows["vLLM", "decode", 64]["theirs"] == 2.0
    assert rows["vLLM", "prefill", 512]["theirs"] == 16.0
    for what in (("decode", 64), ("prefill", 64), ("prefill", 512), ("stream", None)):
        row = rows[("vLLM", *what)]
        assert row["value"] == row["low"] == row["high"] == 2.0, what
    paper = rows["vLLM", "stream, paper's depths", None]
    assert paper["value"] == 4.0 and paper["samples"] == [[0.004, 0.016]] * 3, "eighths add up, streams stand alone"
    assert (paper["ours"], paper["theirs"]) == (8 / 0.004, 8 / 0.016)
    assert rows["vLLM", "memory", None]["theirs"] > 0
    assert ("vLLM", "decode", 512) not in rows
    assert "No module named 'no_such_engine'" in rows["transformers", "load", None]["error"]


def test_a_run_goes_on_where_it_stopped(fakes: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.peer = "vllm"
    run.measure_shape("opt-1.3b", fakes)
    (path,) = fakes.out.glob("*.jsonl")
    whole = path.read_text(encoding="utf-8")
    run.measure_shape("opt-1.3b", fakes)
    assert path.read_text(encoding="utf-8") == whole
    # Broken off behind the first prefill: that one stays, and what was not measured is.
    lines = whole.splitlines()
    kept = lines[: next(i for i, line in enumerate(lines) if '"prefill"' in line) + 1]
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    run.measure_shape("opt-1.3b", fakes)
    assert {row["what"] for row in rows_of(fakes)} == {json.loads(line)["what"] for line in lines[1:]}
    # Rows of another state do not stand beside these.
    monkeypatch.setattr(run, "describe", lambda: CONDITIONS | {"commit": "def"})
    with pytest.raises(ValueError, match=r"must be of this state to go on with it, got \{'commit': 'abc'\}"):
        run.measure_shape("opt-1.3b", fakes)
    fakes.fresh = True
    run.measure_shape("opt-1.3b", fakes)


def test_a_row_that_failed_is_tried_again(tmp_path: Path) -> None:
    results = Results(tmp_path / "x.jsonl", CONDITIONS)
    results.add({"peer": "vLLM", "what": "load", "error": "gone"})
    assert not results.has(peer="vLLM", what="load")
    results.add({"peer": "vLLM", "what": "load", "version": "1"})
    assert results.has(peer="vLLM", what="load")
    assert read(results.path)[1] == [{"peer": "vLLM", "what": "load", "version": "1"}]


def test_a_peer_that_dies_leaves_rows_that_say_so(fakes: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        PeerProcess, "ask", lambda self, do, original=PeerProcess.ask, **more: original(self, deadly(self, do), **more)
    )
    run.measure_shape("opt-1.3b", fakes)
    failed = {(row["peer"], row["what"]) for row in rows_of(fakes) if "error" in row}
    dead = {("vLLM", what) for what in ("decode", "prefill", "memory", "stream", "stream, paper's depths")}
    assert failed == dead | {("transformers", "load")}
    assert not any(row["what"] == "done" for row in rows_of(fakes))


def deadly(process: PeerProcess, do: str) -> str:
    """The question, but of vLLM's decode steps its end."""
    if process.name == "vLLM" and do == "decode":
        os.kill(process.processes[0].pid, 9)
    return do


def test_the_table_shows_figures_intervals_targets_and_failures(tmp_path: Path) -> None:
    results = Results(tmp_path / "opt-1.3b-test.jsonl", CONDITIONS)
    settings = {
        "version": "1",
        "settings": "bf16",
        "env": {"CORES": "2", "LD_PRELOAD": "/a/b/libx.so:/c/liby.so"},
        "tried": "",
    }
    ratio = {"ours": 50.0, "theirs": 75.0, "value": 1.5, "low": 1.4, "high": 1.6}
    results.add({"peer": "vLLM", "what": "load", **settings})
    results.add({"peer": "vLLM", "what": "decode", "batch": 1, "prompt_len": 64, **ratio})
    results.add({"peer": "vLLM", "what": "decode", "batch": 8, "prompt_len": 64, **ratio, "value": 1.49})
    results.add({"peer": "vLLM", "what": "decode", "batch": 32, "prompt_len": 64, "error": "vLLM: out of memory"})
    results.add({"peer": "vLLM", "what": "prefill", "batch": 8, "prompt_len": 512, **ratio, "ours": 9000.0})
    results.add({"peer": "vLLM", "what": "prefill", "batch": 1, "prompt_len": 512, **ratio, "value": 0.9671})
    results.add({"peer": "vLLM", "what": "memory", "ours": 3.0, "theirs": 5.25})
    results.add({"peer": "transformers", "what": "load", "error": "No module named 'transformers'"})
    results.add({"peer": "CTranslate2 float32", "what": "load", **settings})
    results.add({"peer": DYNSKIP.name, "what": "tokens", "same": 256, "near": 256, "of": 256})
    results.add({"peer": "vLLM", "what": "tokens", "same": 200, "near": 255, "of": 256})
    text = table.render(tmp_path)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert lines[0] == ["opt-1.3b", "dynskip", "vLLM", "transformers", "CTranslate2 float32", "target over vLLM"]
    others = ["not timed"] * 2
    assert ["decode, ms a step, batch 1", "50", "75 (1.50x, 1.40-1.60)", *others, ">= 1.45x, met"] in lines
    assert ["decode, ms a step, batch 8", "50", "75 (1.49x, 1.40-1.60)", *others, ">= 1.5x, missed"] in lines
    assert ["decode, ms a step, batch 32", "failed", "failed", *others, ">= 1.43x, missed"] in lines
    assert ["prefill of 512, s, batch 8", "9", "0.075 (1.50x, 1.40-1.60)", *others, ">= 0.97x, met"] in lines
    rounded = "0.075 (0.97x, 1.40-1.60)"
    assert ["prefill of 512, s, batch 1", "0.05", rounded, *others, ">= 0.97x, missed by 0.003"] in lines
    assert ["memory, GB at most", "3", "5.25", *others, ""] in lines
    assert lines[-1][1:] == ["256 / 256 of 256", "200 / 255 of 256", "not checked", "not checked", ""]
    flat = " ".join(text.split())
    assert "vLLM 1: bf16, CORES=2, LD_PRELOAD=libx.so:liby.so." in flat
    assert "Failed, vLLM, decode at batch 32: vLLM: out of memory" in flat
    assert "Not timed, for the length of the run: CTranslate2 float32 at 1 x 512 and 8 x 512." in flat
    assert "the peer's full depth: no stream was timed. " in flat
    assert "Failed, transformers, load: No module named 'transformers'" in flat


def test_a_page_shows_the_committed_results(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    assert table.render(ROOT / "bench" / "results" / "peers").strip() in page, "run python -m bench.table"
    assert table.render(tmp_path) == "Not measured yet.\n"


class Counting(ClosedBatches):
    """A model of 24 layers whose prefills take 100 ms and whose steps take one; it keeps what it is asked."""

    num_layers = 24

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def prefill(self, batch: int, prompt_len: int, num_new: int) -> float:
        """A batch begins."""
        self.asked.append((batch, prompt_len, num_new))
        return 100.0

    def decode(self, num_steps: int) -> list[float]:
        """Steps of the last one."""
        self.asked.append((num_steps,))
        return [1.0] * num_steps


def test_closed_batches_run_until_their_longest_output() -> None:
    peer = Counting()
    begun = peer.begin_stream("full", 40)
    lengths = [request.num_output for request in draw_requests(24, False, 40)]
    assert begun == {"tokens": sum(lengths), "layers": 24.0}
    elapsed_s = [peer.stream("full", share) for share in (0.5, 1.0)]
    longest = [max(lengths[:32]), max(lengths[32:])]
    steps = [[(1,)] * (each - 1) for each in longest]
    assert peer.asked == [(32, 32, longest[0]), *steps[0], (8, 32, longest[1]), *steps[1]]
    assert sum(elapsed_s) == pytest.approx((200 + sum(longest) - 2) / 1e3) and min(elapsed_s) > 0
    assert peer.stream_done == begun["tokens"]


def test_a_prompt_takes_the_place_of_a_sequence_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[int] = []
    library = SimpleNamespace(
        llama_get_memory=lambda context: context,
        llama_memory_seq_rm=lambda memory, sequence, *_: removed.append(sequence),
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    llama_cpp_peer = importlib.import_module("bench.peers.llama_cpp_peer")
    del sys.modules[llama_cpp_peer.__name__]  # whoever imports it next has the real library
    steps: list[list[tuple[int, int, int]]] = []

    class Recording(llama_cpp_peer.LlamaCppPeer):  # type: ignore[misc, name-defined]
        """Chooses the place of each step's last row of a sequence, and counts positions as the real one does."""

        vocab_size, num_layers, context = 100, 24, None

        def _new_context(self, prompts: list[list[int]], num_new: int, unified: bool = False) -> None:
            self.num_tokens = 0

        def _run(self, rows: list[tuple[int, int, int]]) -> None:
            steps.append(rows)
            self.num_tokens = rows[-1][1] + 1
            last = {sequence: at for _, at, sequence in rows}
            self.token_ids = [at + 1000 for at in last.values()]

    peer = Recording()
    begun = peer.begin_stream("full", 40)
    assert peer.stream("full", 0.5) > 0 and peer.stream_done < begun["tokens"]
    peer.stream("full", 1.0)
    lengths = [request.num_output for request in draw_requests(24, False, 40)]
    assert peer.stream_done == begun["tokens"] == sum(lengths)
    assert len(removed) == 40 and len({sequence for rows in steps for _, _, sequence in rows}) == 32
    # Row by row of each sequence: whole prompts in their order, then each token that was chosen, at the next place.
    waiting = iter(zip(draw_prompts(40, 32, 100), lengths, strict=True))
    to_go: dict[int, tuple[int, int]] = {}
    for rows in steps:
        for sequence in dict.fromkeys(sequence for _, _, sequence in rows):
            own = [(token, at) for token, at, each in rows if each == sequence]
            if sequence not in to_go:
                prompt, length = next(waiting)
                assert own == [(token, at) for at, token in enumerate(prompt)]
                to_go[sequence] = (32, length - 1)
            else:
                at, left = to_go[sequence]
                assert own == [(at - 1 + 1000, at)]
                to_go[sequence] = (at + 1, left - 1)
            if to_go[sequence][1] == 0:
                del to_go[sequence]
    assert not to_go and next(waiting, None) is None


def test_every_peer_is_given_the_same_work() -> None:
    assert draw_prompts(2, 3, 100) == draw_prompts(2, 3, 100) != draw_prompts(2, 3, 101)
    deep, mixed = draw_requests(24, False, 64), draw_requests(24, True, 64)
    assert [request.num_output for request in deep] == [request.num_output for request in mixed]
    assert {request.path.budget for request in deep} == {24}
    assert {request.path.budget for request in draw_requests(24, True, 512)} == {4, 8, 12, 24}
    assert {request.path.budget for request in draw_requests(16, True, 512)} == {3, 5, 8, 16}
    assert paper_text(16) == "3/5/8/16 of 16 layers in 74/18/6/2% of the requests, a mean of 3.9, uniform paths"


def test_a_run_says_how_long_it_will_take() -> None:
    peer = PEERS["opt-1.3b"][0]
    assert prefill_rounds(100.0, 6, 20.0) == 6 and prefill_rounds(5e3, 6, 20.0) == 4 and prefill_rounds(1e6, 6, 1) == 2
    short, long = estimate_s("opt-1.3b", peer, 2, 5.0, 8), estimate_s("opt-1.3b", peer, 6, 20.0, 256)
    assert 0 < short < long < 1200
    assert all(set(peer.cells) <= set(CELLS) for peers in PEERS.values() for peer in peers)
    assert set(plan.PEERS) == set(table.TARGETS)
