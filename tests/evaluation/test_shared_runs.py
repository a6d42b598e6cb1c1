"""Runs that several processes, machines and executors share: one summary, whoever did the items."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from evaluation_models import arguments, item_lines, tiny_setup
from processes import command_of

from dynskip.cli import main
from dynskip.evaluation import run as run_module
from dynskip.evaluation.registry import TASKS, Task
from dynskip.evaluation.run import EvalRun
from dynskip.evaluation.sweep.context import Context
from dynskip.evaluation.sweep.place import Place
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import WorkItem
from dynskip.evaluation.tasks.generations import run_generate
from dynskip.evaluation.tasks.timing import machine_name

pytest.importorskip("datasets", reason="datasets is not installed")
pytest.importorskip("rouge_score", reason="rouge-score is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and data, and in ``whole`` what one process finds about depth, which times nothing."""
    directory = tmp_path_factory.mktemp("sweep")
    tiny_setup(directory)
    assert main(arguments(directory, directory / "whole", experiment="depth")) == 0
    return directory


def summary_of(out: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def failed_lines(out: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for path in (out / "items").glob("*.failed.jsonl") for line in path.read_text().splitlines()
    ]


def at(monkeypatch: pytest.MonkeyPatch, host: str, isa: str) -> None:
    """From now on this process is on another machine."""
    monkeypatch.setattr(Place, "here", staticmethod(lambda device="cpu": Place(host, isa)))


def generating(monkeypatch: pytest.MonkeyPatch, run: Callable[[WorkItem, Context], dict[str, Any]]) -> None:
    monkeypatch.setitem(TASKS, "generate", Task(run))


@pytest.mark.parametrize("name", ["threads", "Losing", "Breaking"])
def test_any_executor_gives_what_one_process_gives(folder: Path, tmp_path: Path, name: str) -> None:
    more = ("--executor", f"item_executors:{name}", "--workers", "3")
    assert main(arguments(folder, tmp_path / "run", *more, experiment="depth")) == 0
    assert summary_of(tmp_path / "run")["depth"] == summary_of(folder / "whole")["depth"]
    assert len(item_lines(tmp_path / "run" / "items")) == len(item_lines(folder / "whole" / "items"))
    log = (tmp_path / "run" / "log.txt").read_text()
    assert ("worker lost: ConnectionError: the node is gone" in log) == (name == "Losing")
    assert ("another executor for one that broke" in log) == (name == "Breaking")


def test_an_executor_that_loses_everything_ends_the_run_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(folder, tmp_path / "run"), "--executor", "item_executors:Nowhere"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "items must give results, got none from the first 3, each tried 3 times: worker lost: Connection" in error
    failed = failed_lines(tmp_path / "run")
    assert [line["tries"] for line in failed] == [3, 3, 3] and len({line["key"] for line in failed}) == 3
    assert all(line["error"] == "worker lost: ConnectionError: the node is gone" for line in failed)


def test_an_item_that_fails_three_times_is_noted_and_others_are_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries: dict[int, int] = {}

    def fail(item: WorkItem, context: Context) -> dict[str, Any]:
        tries[item.shard] = tries.get(item.shard, 0) + 1
        if item.shard == 1 or (item.shard == 2 and tries[2] < 3):
            raise ArithmeticError(f"shard {item.shard}\nis bad")
        return run_generate(item, context)

    generating(monkeypatch, fail)
    command = arguments(folder, tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "items must give results, got 1 that failed 3 times, the first with ArithmeticError: shard 1 is bad" in error
    assert "the same command tries again" in error and len(error.splitlines()) == 1
    assert tries == {0: 1, 1: 3, 2: 3, 3: 1, 4: 1, 5: 1}
    (line,) = failed_lines(tmp_path)
    assert (line["item"]["shard"], line["tries"], line["error"]) == (1, 3, "ArithmeticError: shard 1\nis bad")
    assert (line["host"], line["isa"]) == (Place.here().host, Place.here().isa) and "in fail" in line["trace"]
    # All others are there, the times among them; there is no summary without the one.
    num_done = len(item_lines(tmp_path / "items"))
    assert num_done >= 7 and not (tmp_path / "summary.json").exists()
    monkeypatch.undo()
    assert main(command) == 0
    assert len(item_lines(tmp_path / "items")) == num_done + 1 and summary_of(tmp_path)["static"]["n"] == 12


def test_experiments_without_failed_items_are_summarised(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(item: WorkItem, context: Context) -> dict[str, Any]:
        if item.shard == 1:
            raise ArithmeticError("bad")
        return run_generate(item, context)

    generating(monkeypatch, fail)
    told = "got 1 that failed 3 times, the first with ArithmeticError: bad"
    with EvalRun(tiny_setup(folder), tmp_path, progress=False) as evaluation, pytest.raises(RuntimeError, match=told):
        evaluation.run(["static", "hidden-states"])
    assert "hidden_states" in summary_of(tmp_path) and "static" not in summary_of(tmp_path)


def test_two_runs_in_one_folder_share_the_items(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup, begun = tiny_setup(folder), []

    def generate(item: WorkItem, context: Context) -> dict[str, Any]:
        begun.append(item)
        if len(begun) == 1:  # while the first run does its first item, another one does the rest
            with EvalRun(setup, tmp_path, progress=False) as other:
                other.run(["static"])
        return run_generate(item, context)

    generating(monkeypatch, generate)
    monkeypatch.setattr(run_module, "REFRESH_S", 0.0)
    with EvalRun(setup, tmp_path, progress=False) as evaluation:
        summary = evaluation.run(["static", "hidden-states"])
    assert len(begun) == 4, "three items, one of them twice"
    written = item_lines(tmp_path / "items")
    assert len({line["key"] for line in written}) == len(written) - 1
    assert summary["static"]["n"] == summary["hidden_states"]["n"] == 12
    assert len(list((tmp_path / "starts").iterdir())) == 2
    assert summary["conditions"]["items"] == len(written) - 1


def test_another_section_written_meanwhile_stays(folder: Path, tmp_path: Path) -> None:
    with EvalRun(tiny_setup(folder), tmp_path, progress=False) as evaluation:
        evaluation.run(["static"])
        with EvalRun(tiny_setup(folder), tmp_path, progress=False) as other:
            other.run(["hidden-states"])
        evaluation.folder.write_section("static", {"n": 0}, {})
    assert summary_of(tmp_path)["static"] == {"n": 0} and summary_of(tmp_path)["hidden_states"]["n"] == 12


def test_instruction_sets_are_mixed_only_where_that_is_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(folder, tmp_path / "run", experiment="depth")
    at(monkeypatch, "old", "avx2")
    assert main(command) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "finished")
    finished = summary_of(tmp_path / "run")["depth"]
    items = tmp_path / "run" / "items"
    path = next(path for path in items.glob("*.jsonl") if path.name.count(".") == 1)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    before = item_lines(items)
    at(monkeypatch, "new", "avx2 amx_bf16")
    # Where nothing is left to do, nothing is mixed.
    assert main(arguments(folder, tmp_path / "finished", experiment="depth")) == 0
    capsys.readouterr()
    for more in ((), ("--executor", "item_executors:threads")):
        assert main([*command, *more]) == 2
        error = capsys.readouterr().err
        assert "done with one instruction set, got 'avx2' for 2 and 'avx2 amx_bf16' of new" in error
        assert "allow it with --mix-instruction-sets" in error and len(error.splitlines()) == 1
        assert item_lines(items) == before
    assert main([*command, "--mix-instruction-sets"]) == 0
    assert summary_of(tmp_path / "run")["depth"] == finished
    places = summary_of(tmp_path / "run")["conditions"]["done_on"]
    num_new = len(item_lines(items)) - 2
    assert {(place["host"], place["isa"], place["items"]) for place in places} == {
        ("old", "avx2", 2),
        ("new", "avx2 amx_bf16", num_new),
    }
    assert main(command) == 2
    assert f"got 'avx2' for 2 and 'avx2 amx_bf16' for {num_new}" in capsys.readouterr().err


def test_times_are_of_one_machine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(folder, tmp_path)
    at(monkeypatch, "timed", "avx2")
    setup = tiny_setup(folder, shard_size=2)
    with EvalRun(setup, tmp_path, progress=False) as evaluation:
        assert evaluation.folder.times_here
    capsys.readouterr()
    at(monkeypatch, "other", "avx2")
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out == (
        f"static: 2 items are left for timed ({machine_name('cpu')}), the machine that is timed: run the same command "
        "there, or here with --time-here\n"
    )
    assert "time" not in {line["item"]["task"] for line in item_lines(tmp_path / "items")}
    assert not (tmp_path / "summary.json").exists()
    at(monkeypatch, "timed", "avx2 amx_bf16")  # another CPU under the same host's name
    assert main(command) == 0
    assert "2 items are left for timed" in capsys.readouterr().out
    # Times are no items that must not be mixed.
    assert main([*command, "--time-here"]) == 0
    timed = [line for line in item_lines(tmp_path / "items") if line["item"]["task"] == "time"]
    assert [line["host"] for line in timed] == ["timed", "timed"]
    assert summary_of(tmp_path)["conditions"]["timed_on"]["host"] == "timed"
    # Another machine of the same name of CPU finds these times; a start with --time-here moves what is not timed yet.
    at(monkeypatch, "other", "avx2")
    assert main(command) == 0
    assert main([*arguments(folder, tmp_path, experiment="oracle"), "--time-here"]) == 0
    assert json.loads((tmp_path / "config.json").read_text())["timed_on"]["host"] == "other"
    timed = [line for line in item_lines(tmp_path / "items") if line["item"]["task"] == "time"]
    assert sorted(line["host"] for line in timed) == ["other", "timed", "timed"]


def test_two_cpus_under_one_hosts_name_are_two_machines(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def on(cpu: str, isa: str) -> None:
        at(monkeypatch, "vm", isa)
        monkeypatch.setattr("dynskip.evaluation.tasks.timing.cpu_model", lambda: cpu)

    def times() -> set[str]:
        lines = [line["item"] for line in item_lines(tmp_path / "items") if line["item"]["task"] == "time"]
        return {line["options"]["machine"] for line in lines}

    on("Xeon", "avx2 amx_bf16")
    with EvalRun(tiny_setup(folder, shard_size=2), tmp_path, progress=False) as evaluation:
        assert evaluation.folder.times_here
        assert evaluation.folder.timed_on == {"host": "vm", "machine": "Xeon", "isa": "avx2 amx_bf16"}
    for cpu, isa in (("EPYC", "avx2 amx_bf16"), ("Xeon", "avx2"), ("EPYC", "avx2")):
        on(cpu, isa)
        with EvalRun(tiny_setup(folder, shard_size=2), tmp_path, progress=False) as evaluation:
            assert not evaluation.folder.times_here
    command = arguments(folder, tmp_path)
    assert main(command) == 0
    assert "2 items are left for vm (Xeon)" in capsys.readouterr().out and not times()
    # What older versions have left names no instruction set: host and CPU tell the machine.
    config = json.loads((tmp_path / "config.json").read_text())
    del config["timed_on"]["isa"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(command) == 0
    assert "2 items are left for vm (Xeon)" in capsys.readouterr().out and not times()
    on("Xeon", "avx2")
    assert main(command) == 0
    assert times() == {"Xeon"} and summary_of(tmp_path)["conditions"]["timed_on"] == config["timed_on"]


def old_folder(new: Path, old: Path) -> None:
    """The run in ``new`` as older versions left it: one file of items with their token ids, starts in config.json."""

    def whole(lean: dict[str, Any], apart: dict[str, Any]) -> dict[str, Any]:
        names = [*lean, *(name for name in apart if name not in lean)]
        return {
            name: whole(lean[name], apart[name]) if name in lean and name in apart else (lean | apart)[name]
            for name in names
        }

    tokens = {}
    for path in (new / "items").glob("*.tokens.jsonl"):
        tokens |= {line["key"]: line["result"] for line in map(json.loads, path.read_text().splitlines())}
    old.mkdir()
    with (old / "items.jsonl").open("w") as file:
        for line in item_lines(new / "items"):
            result = whole(line["result"], tokens.get(line["key"], {}))
            entry = {"key": line["key"], "item": line["item"], "result": result, "seconds": line["seconds"]}
            file.write(json.dumps(entry, separators=(",", ":")) + "\n")
    config = json.loads((new / "config.json").read_text())
    del config["timed_on"]
    (old / "config.json").write_text(json.dumps({**config, "starts": [{"started": "2026-01-01T00:00:00Z"}]}))
    (old / "log.txt").write_text("")


def test_runs_of_older_versions_are_summarised_and_finished(folder: Path, tmp_path: Path) -> None:
    assert main(arguments(folder, tmp_path / "new")) == 0
    old_folder(tmp_path / "new", tmp_path / "old")
    before = (tmp_path / "old" / "items.jsonl").read_bytes()
    assert b'"token_ids"' in before
    assert main(arguments(folder, tmp_path / "old")) == 0
    assert not (tmp_path / "old" / "items").exists(), "nothing was done again"
    assert summary_of(tmp_path / "old")["static"] == summary_of(tmp_path / "new")["static"]
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    assert config["starts"] and config["timed_on"]["host"] == Place.here().host
    # What it lacks is added beside it.
    assert main(arguments(folder, tmp_path / "old", experiment="hidden-states")) == 0
    assert (tmp_path / "old" / "items.jsonl").read_bytes() == before
    assert {line["item"]["task"] for line in item_lines(tmp_path / "old" / "items")} == {"states"}


@pytest.mark.skipif(sys.platform != "linux", reason="finds its processes the way Linux names them")
def test_a_killed_worker_does_not_end_a_run(folder: Path, tmp_path: Path) -> None:
    command = arguments(folder, tmp_path / "run", "--workers", "2", experiment="depth")
    with subprocess.Popen([sys.executable, "-m", "dynskip", *command], stderr=subprocess.PIPE, text=True) as parent:
        process = psutil.Process(parent.pid)
        deadline = time.monotonic() + 120
        workers: list[psutil.Process] = []
        while not workers and parent.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            workers = [child for child in process.children() if "spawn_main" in command_of(child)]
        assert workers, "the run had no worker"
        workers[0].kill()
        _, error = parent.communicate(timeout=180)
    assert parent.returncode == 0, error
    assert "worker lost: BrokenProcessPool" in (tmp_path / "run" / "log.txt").read_text()
    assert summary_of(tmp_path / "run")["depth"] == summary_of(folder / "whole")["depth"]


def test_setups_differ_by_what_is_timed_and_keep_their_items(folder: Path, tmp_path: Path) -> None:
    setup: Setup = tiny_setup(folder)
    with EvalRun(setup, tmp_path, progress=False) as evaluation:
        assert evaluation.setup.guarded() == setup.guarded()
        assert evaluation.setup.timed_on and not setup.timed_on
        items = [run_module.EXPERIMENTS["static"].plan(each, evaluation.store) for each in (setup, evaluation.setup)]
    assert items[0] == items[1], "a run on the machine that is timed has the items that it always had"
