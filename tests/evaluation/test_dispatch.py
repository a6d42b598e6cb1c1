"""Items handed to executors: a few at a time, three tries each, and no dead worker ends what others do."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from evaluation_models import tiny_setup
from item_executors import Breaking, Broken, Losing, Nowhere, threads

from dynskip.evaluation.dispatch import Dispatch
from dynskip.evaluation.ray_executor import RayExecutor
from dynskip.evaluation.sweep.context import Context
from dynskip.evaluation.sweep.place import Place
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import WorkItem
from dynskip.evaluation.workers import (
    Crew,
    Outcome,
    ThisProcess,
    WorkerProcesses,
    attempt,
    attempt_for,
    crew_here,
    crew_named,
)

HERE = Place("here", "avx2")


def items(count: int) -> list[WorkItem]:
    return [WorkItem("generate", "c", "full", "d", "test", 0, shard) for shard in range(count)]


def double(item: WorkItem) -> Outcome:
    return Outcome(item, {"twice": 2 * item.shard}, 0.1, HERE)


def crew(make: Callable[[], Executor], num_at_once: int | None = 2, work: Any = double) -> Crew:
    return Crew(make, work, num_at_once, is_here=False)


def outcomes(who: Crew, count: int, told: list[str] | None = None) -> dict[int, Outcome]:
    """By shard what came of as many items, each of which ends once."""
    notes: list[str] = [] if told is None else told
    with Dispatch(who, notes.append) as dispatch:
        ended = list(dispatch.outcomes(items(count)))
    assert len(ended) == count
    return {outcome.item.shard: outcome for outcome in ended}


@pytest.mark.parametrize("make", [ThisProcess, threads])
def test_every_item_ends_once(make: Callable[[], Executor]) -> None:
    found = outcomes(crew(make), 7)
    assert {shard: outcome.result for shard, outcome in found.items()} == {n: {"twice": 2 * n} for n in range(7)}
    assert outcomes(crew(make), 0) == {}


class Counting(ThisProcess):
    """Counts futures whose results were not taken yet; they are done when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.most = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, partial(fn, *args, **kwargs)))
        self.most = max(self.most, len(self.waiting))
        if len(self.waiting) == self.num_slots:
            done, work = self.waiting.pop(0)
            done.set_result(work())
        return future

    num_slots = 3

    def finish(self) -> None:
        """Do the rest."""
        for future, work in self.waiting:
            future.set_result(work())


@pytest.mark.parametrize("num_at_once", [3, None])
def test_items_are_read_as_they_are_due_and_a_few_are_in_flight(num_at_once: int | None) -> None:
    executor, read = Counting(), 0

    def source() -> Iterator[WorkItem]:
        nonlocal read
        for item in items(50):
            read += 1
            yield item

    with Dispatch(crew(lambda: executor, num_at_once), print) as dispatch:
        assert dispatch.num_at_once == 3, "without a number it is that of the executor"
        num_ended = 0
        for _ in dispatch.outcomes(source()):
            num_ended += 1
            assert read <= num_ended + 3
            if read == 50 and executor.waiting:
                executor.finish()
                executor.waiting.clear()
    assert num_ended == 50 and executor.most == 3


def test_what_a_node_has_lost_is_tried_again() -> None:
    told: list[str] = []
    found = outcomes(crew(Losing), 12, told)
    assert all(outcome.result == {"twice": 2 * shard} for shard, outcome in found.items())
    lost = "failed on a host that is not known: worker lost: ConnectionError: the node is gone"
    assert {f"try 1 of item {item.key} {lost}" for item in items(2)} <= {*told}


def test_an_executor_that_breaks_is_replaced() -> None:
    Breaking.num_made, told = 0, []
    found = outcomes(crew(Breaking), 9, told)
    assert all(outcome.result == {"twice": 2 * shard} for shard, outcome in found.items())
    assert Breaking.num_made >= 4 and any("another executor for one that broke" in line for line in told)


def test_executors_that_only_break_end_the_run() -> None:
    with pytest.raises(RuntimeError, match="executors must do items, got 4 that broke before: no process can be"):
        outcomes(crew(Broken), 1)


def test_three_tries_are_all() -> None:
    told: list[str] = []
    found = outcomes(crew(Nowhere), 4, told)
    for outcome in found.values():
        assert outcome.result is None and outcome.error == "worker lost: ConnectionError: the node is gone"
        assert outcome.place == Place()
    assert len(told) == 4 * 2


def kill_once(marker: Path, item: WorkItem) -> Outcome:
    """Kills the process that does item 2, the first time."""
    if item.shard == 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return double(item)


def kill_always(item: WorkItem) -> Outcome:
    """Kills the process that does item 2."""
    if item.shard == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return double(item)


def test_a_dead_process_is_replaced_and_its_item_tried_again(tmp_path: Path) -> None:
    told: list[str] = []
    found = outcomes(crew(partial(WorkerProcesses, 2), work=partial(kill_once, tmp_path / "marker")), 6, told)
    assert all(outcome.result == {"twice": 2 * shard} for shard, outcome in found.items())
    assert len(told) == 1 and items(3)[2].key in told[0] and "BrokenProcessPool" in told[0]


def test_an_item_that_kills_each_of_its_workers_fails_alone() -> None:
    told: list[str] = []
    found = outcomes(crew(partial(WorkerProcesses, 2), work=kill_always), 6, told)
    assert [shard for shard, outcome in found.items() if outcome.result is None] == [2]
    assert "BrokenProcessPool" in found[2].error and len(told) == 2


def test_a_process_that_dies_idle_costs_no_item() -> None:
    executor = WorkerProcesses(1)
    try:
        pid = executor.submit(os.getpid).result()
        os.kill(pid, signal.SIGKILL)
        (pool,) = executor._pools
        while not pool._broken:  # its thread sees it a moment later
            time.sleep(0.01)
        assert executor.submit(os.getpid).result() != pid
        with pytest.raises(BrokenProcessPool):
            executor.submit(os._exit, 1).result()
    finally:
        executor.shutdown()


def test_an_error_of_an_item_is_an_outcome(tmp_path: Path) -> None:
    setup = tiny_setup(tmp_path)
    outcome = attempt(items(1)[0], Context(setup))
    assert outcome.result is None and outcome.place == Place.here()
    assert outcome.error.startswith("KeyError") and "run_generate" in outcome.trace
    again = attempt_for(setup, items(1)[0])
    assert (again.error, again.place) == (outcome.error, outcome.place)
    # Results that JSON lacks are no results.
    unknown = attempt(WorkItem("think", "c", "full", "d", "test", 0, 0), Context(setup))
    assert "the task must be one of generate, " in unknown.error


def test_a_result_that_json_lacks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dynskip.evaluation import workers

    monkeypatch.setattr(workers, "run_item", lambda item, context: {"rouge_l": float("nan")})
    outcome = attempt(items(1)[0], Context(tiny_setup(tmp_path)))
    assert outcome.result is None and "not JSON compliant" in outcome.error


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return tiny_setup(tmp_path_factory.mktemp("sweep"))


def test_executors_are_found_by_name(setup: Setup) -> None:
    named = crew_named("item_executors:threads", setup, None)
    assert named.num_at_once == 1 and not named.is_here
    with named.make() as executor:
        assert executor.submit(int, "3").result() == 3
    assert crew_named("item_executors:threads", setup, 5).num_at_once == 5
    assert crew_named("concurrent.futures:ThreadPoolExecutor", setup, 2).make().submit(int, "3").result() == 3
    assert crew_here(Context(setup), 3).num_at_once == 3


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("threads", "executor must be ray:ADDRESS or MODULE:FACTORY, got 'threads'"),
        ("ray:", "executor must be ray:ADDRESS or MODULE:FACTORY, got 'ray:'"),
        ("no_such_module:make", "FACTORY that Python finds, got 'no_such_module:make': No module named"),
        ("item_executors:make", "FACTORY that Python finds, got 'item_executors:make': module 'item_executors' has no"),
    ],
)
def test_other_names_are_refused(setup: Setup, name: str, complaint: str) -> None:
    with pytest.raises(ValueError, match="eval: ") as caught:
        crew_named(name, setup, None)
    assert complaint in str(caught.value)


def test_what_is_no_executor_is_refused(setup: Setup) -> None:
    with pytest.raises(ValueError, match=r"executor builtins:dict must make a concurrent.futures.Executor, got \{\}"):
        crew_named("builtins:dict", setup, None).make()


def test_ray_is_asked_for_only_by_name(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    named = crew_named("ray:auto", setup, None)
    told = r"the package ray must be installed, got none. Install it with `pip install dynskip\[ray\]`"
    with pytest.raises(ImportError, match=told):
        named.make()


class FakeRay(ModuleType):
    """As much of the package as the adapter uses: tasks are done at once, where they are submitted."""

    def __init__(self, is_connected: bool) -> None:
        super().__init__("ray")
        self.is_connected = is_connected
        self.calls: list[tuple[str, Any]] = []

    def is_initialized(self) -> bool:
        return self.is_connected

    def init(self, **options: Any) -> None:
        self.calls.append(("init", options["address"]))

    def shutdown(self) -> None:
        self.calls.append(("shutdown", None))

    def cancel(self, reference: Any) -> None:
        self.calls.append(("cancel", reference.name))

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 3.0, "GPU": 2.0}

    def remote(self, **options: Any) -> Any:
        self.calls.append(("remote", (options["num_cpus"], options["num_gpus"], options["max_retries"])))

        def submit(fn: Callable[..., Any], args: Any, kwargs: Any) -> SimpleNamespace:
            future: Future[Any] = Future()
            if fn is not never:
                future.set_result(fn(*args, **kwargs))
            return SimpleNamespace(future=lambda: future, name=fn.__name__)

        return lambda call: SimpleNamespace(remote=submit)


def never(item: WorkItem) -> Outcome:
    raise AssertionError("is not done")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_adapter_of_ray(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(is_connected=False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        found = outcomes(crew(lambda: RayExecutor(address, device), None), 9)
        with Dispatch(crew(lambda: RayExecutor(address, device), None), print) as dispatch:
            assert dispatch.num_at_once == (4 if device == "cuda" else 6)
    assert all(outcome.result == {"twice": 2 * shard} for shard, outcome in found.items())
    gpus = int(device == "cuda")
    assert ray.calls[:3] == [("init", address), ("remote", (1, gpus, 0)), ("shutdown", None)]


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_an_address_where_no_cluster_answers_is_an_error_at_once(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay(is_connected=False))
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = f"{prefix}127.0.0.1:{gone.getsockname()[1]}"
    with pytest.raises(ConnectionError, match=f"a cluster must answer at {address}"):
        RayExecutor(address)


def test_a_connection_to_ray_that_was_there_stays_and_what_waits_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(is_connected=True)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with Dispatch(crew(lambda: RayExecutor("auto"), None, work=never), print) as dispatch:
        dispatch._submit(items(1)[0])
    assert ray.calls == [("remote", (1, 0, 0)), ("cancel", "never")]
