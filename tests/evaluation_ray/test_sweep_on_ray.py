"""A sweep on a cluster of two nodes of Ray, one of which is killed meanwhile: the summary is that of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from evaluation_models import arguments, item_lines, save_data, tiny_setup
from processes import command_of

from dynskip.cli import main
from dynskip.evaluation.dispatch import Dispatch
from dynskip.evaluation.ray_executor import RayExecutor
from dynskip.evaluation.sweep.place import Place
from dynskip.evaluation.sweep.store import WorkItem
from dynskip.evaluation.workers import Crew, Outcome

ray = pytest.importorskip("ray", reason="ray is not installed: pip install dynskip[ray]")
pytest.importorskip("datasets", reason="datasets is not installed: pip install dynskip[eval]")
pytest.importorskip("rouge_score", reason="rouge-score is not installed: pip install dynskip[eval]")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install dynskip[eval]")

ROOT = Path(__file__).resolve().parents[2]
MEMORY_BYTES = 100 * 2**20
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore:::ray")]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head, which does no items, and a node that does one at a time."""
    from ray.cluster_utils import Cluster

    # Workers of Ray import the checkout that is tested.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers"), *sys.path]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": MEMORY_BYTES})
    nodes.add_node(num_cpus=1, object_store_memory=MEMORY_BYTES)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def workers_of(node: Any) -> list[psutil.Process]:
    """The processes of ``node`` that do items, or wait for some."""
    (raylet,) = [each.process.pid for each in node.all_processes["raylet"]]
    found = psutil.Process(raylet).children(recursive=True)
    return [process for process in found if command_of(process).startswith("ray::")]


def test_a_killed_node_changes_nothing(cluster: Any, tmp_path: Path) -> None:
    save_data(tmp_path / "data.json", num_rows=480)
    tiny_setup(tmp_path)
    killed = cluster.add_node(num_cpus=1, object_store_memory=MEMORY_BYTES)
    cluster.wait_for_nodes()
    shards = ("--prompts", "60", "--shard-size", "1")
    command = arguments(tmp_path, tmp_path / "run", *shards, "--executor", f"ray:{cluster.address}", experiment="depth")
    with subprocess.Popen(
        [sys.executable, "-m", "dynskip", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        deadline = time.monotonic() + 300
        while not (item_lines(tmp_path / "run" / "items") and (held := workers_of(killed))) and run.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert run.poll() is None, run.communicate()[1]
        for worker in held:
            worker.suspend()  # it has an item, or is handed one that it never does
        time.sleep(1)
        num_before = len(item_lines(tmp_path / "run" / "items"))
        cluster.remove_node(killed, allow_graceful=False)
        for worker in held:
            worker.kill()  # its node has ended, and does not end it any more
        _, error = run.communicate(timeout=300)
        assert run.returncode == 0, error
    assert main(arguments(tmp_path, tmp_path / "one", *shards, experiment="depth")) == 0
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "one")]
    assert summaries[0]["depth"] == summaries[1]["depth"]
    num_items = len(item_lines(tmp_path / "one" / "items"))
    assert 1 <= num_before < num_items == len(item_lines(tmp_path / "run" / "items"))
    assert "worker lost" in (tmp_path / "run" / "log.txt").read_text(), "the node was killed with an item"


def double(item: WorkItem) -> Outcome:
    return Outcome(item, {"twice": 2 * item.shard}, 0.1, Place.here())


def end(item: WorkItem) -> Outcome:
    if item.shard == 2:
        os._exit(1)
    return double(item)


def test_a_worker_that_ends_fails_its_item_alone(cluster: Any) -> None:
    items = [WorkItem("generate", "c", "full", "d", "test", 0, shard) for shard in range(6)]
    told: list[str] = []
    crew = Crew(lambda: RayExecutor(cluster.address), end, None, is_here=False)
    with Dispatch(crew, told.append) as dispatch:
        assert dispatch.num_at_once == 2, "twice the one core that the cluster has for items"
        found = {outcome.item.shard: outcome for outcome in dispatch.outcomes(items)}
    assert [shard for shard, outcome in found.items() if outcome.result is None] == [2]
    assert "WorkerCrashedError" in found[2].error and len(told) == 2
    assert found[3].result == {"twice": 6} and found[3].place == Place.here()


def test_a_connection_that_is_there_stays(cluster: Any) -> None:
    ray.init(address=cluster.address, log_to_driver=False)
    with RayExecutor("auto") as executor:
        assert executor.submit(int, "3").result() == 3
    assert ray.is_initialized()


def test_no_cluster_is_an_error() -> None:
    with pytest.raises(ConnectionError):
        RayExecutor("127.0.0.1:1")
