"""The store of finished items: nothing is lost, repeated or damaged, wherever a writer ends."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.item_store import measure_start, write_made_up
from dynskip.evaluation.sweep.place import Place
from dynskip.evaluation.sweep.store import ItemStore, WorkItem


def item(shard: int, **changes: object) -> WorkItem:
    fields = {
        "task": "generate",
        "checkpoint": "c" * 16,
        "path": "uniform:4 full",
        "data": "d" * 16,
        "split": "test",
        "seed": 0,
        "shard": shard,
        "options": (("max_tokens", 8), ("template", "short")),
    }
    return WorkItem(**{**fields, **changes})  # type: ignore[arg-type]


def result(shard: int) -> dict[str, object]:
    by_path = {"full": {"rouge_l": [0.5], "token_ids": [[shard, 7]]}}
    return {"rows": [shard], "rouge_l": [0.1 * shard], "text": "naïve\n東京", "paths": by_path}


def test_a_key_is_the_content() -> None:
    assert item(0).key == item(0).key
    changes: list[dict[str, object]] = [
        {"task": "states"},
        {"checkpoint": "e"},
        {"path": "full"},
        {"data": "e"},
        {"split": "train"},
        {"seed": 1},
        {"options": (("max_tokens", 9), ("template", "short"))},
    ]
    keys = {item(0).key, item(1).key, *(item(0, **change).key for change in changes)}
    assert len(keys) == 2 + len(changes)
    assert WorkItem.from_dict(item(3).to_dict()) == item(3)
    assert item(0).option("max_tokens") == 8
    # The same in every version: results of old runs stay valid.
    assert item(0).key == "1349763f52db50a6951f0590082c542be1c0241e3278910304694514fd898afa"
    with pytest.raises(ValueError, match="options must be sorted"):
        item(0, options=(("b", 1), ("a", 1)))


def items_file(folder: Path) -> Path:
    """The one file of finished items in ``folder``."""
    (path,) = (path for path in folder.glob("*.jsonl") if path.name.count(".") == 1)
    return path


def write_old(path: Path, *items: WorkItem) -> None:
    """A file as older versions wrote it: the result first, token ids in it, the seconds at the end of the line."""
    with path.open("a", encoding="utf-8") as file:
        for old in items:
            entry = {"key": old.key, "item": old.to_dict(), "result": result(old.shard), "seconds": 2.5}
            file.write(json.dumps(entry, separators=(",", ":")) + "\n")


def test_results_are_there_again(tmp_path: Path) -> None:
    with ItemStore(tmp_path / "items") as store:
        for shard in range(3):
            store.add(item(shard), result(shard), seconds=1.5)
        assert store.missing([item(4), item(1), item(4)]) == [item(4)]
    assert store.result(item(1)) == {**result(1), "paths": {"full": {"rouge_l": [0.5]}}}, "closed ones are read, too"
    with ItemStore(tmp_path / "items") as store:
        assert len(store) == 3 and store.result(item(2))["text"] == "naïve\n東京"
        assert store.total_seconds == 4.5
        assert store.seconds_like(item(9).kind) == 1.5 and store.seconds_like(item(0, path="full").kind) is None
        with pytest.raises(ValueError, match="the item must be new"):
            store.add(item(0), result(0), 1.0)
    with pytest.raises(ValueError, match="the store must be open"):
        store.add(item(5), result(5), 1.0)


def test_token_ids_lie_apart(tmp_path: Path) -> None:
    with ItemStore(tmp_path / "items") as store:
        for shard in range(3):
            store.add(item(shard), result(shard), 1.0)
        store.add(item(3), {"rows": [3]}, 1.0)
    assert "token_ids" not in items_file(tmp_path / "items").read_text()
    with ItemStore(tmp_path / "items") as store:
        for shard in range(3):
            assert store.token_ids(item(shard)) == {"paths": {"full": {"token_ids": [[shard, 7]]}}}
            assert store.result(item(shard))["paths"] == {"full": {"rouge_l": [0.5]}}
        assert store.token_ids(item(3)) == {}
    # Token ids of another item in their place are damage, not a result.
    (tokens,) = (tmp_path / "items").glob("*.tokens.jsonl")
    tokens.write_bytes(tokens.read_bytes().replace(item(1).key.encode(), item(0).key.encode()))
    with ItemStore(tmp_path / "items") as store, pytest.raises(ValueError, match="got a damaged line at byte"):
        store.token_ids(item(1))


def test_runs_of_older_versions_are_read_and_finished(tmp_path: Path) -> None:
    old = tmp_path / "items.jsonl"
    write_old(old, item(0), item(1))
    with old.open("ab") as file:
        file.write(b'{"key":"' + item(2).key.encode())  # its writer was killed
    before = old.read_bytes()
    with ItemStore(tmp_path / "items") as store:
        assert store.missing(map(item, range(3))) == [item(2)]
        assert store.result(item(1)) == {**result(1), "paths": {"full": {"rouge_l": [0.5]}}}
        assert store.token_ids(item(1)) == {"paths": {"full": {"token_ids": [[1, 7]]}}}
        assert store.seconds_like(item(0).kind) == 2.5 and store.places() == {Place(): 2}
        store.add(item(2), result(2), 1.0)
    assert old.read_bytes() == before
    with ItemStore(tmp_path / "items") as store:
        assert len(store) == 3
    with pytest.raises(ValueError, match=r"folder must be a folder, got the file .*items.jsonl. Leave its suffix out"):
        ItemStore(old)


def test_files_of_several_writers_may_be_joined(tmp_path: Path) -> None:
    """What is committed of a run is one file of lines; token ids are read where their files are kept beside it."""
    folder = tmp_path / "items"
    for shard in range(3):
        with ItemStore(folder) as store:
            store.add(item(shard), result(shard), 1.0)
    joined = b"".join(path.read_bytes() for path in sorted(folder.glob("*.jsonl")) if path.name.count(".") == 1)
    (tmp_path / "items.jsonl").write_bytes(joined)
    for path in folder.glob("*.jsonl"):
        if path.name.count(".") == 1:
            path.unlink()
    with ItemStore(folder) as store:
        assert not store.missing(map(item, range(3)))
        assert store.token_ids(item(2)) == {"paths": {"full": {"token_ids": [[2, 7]]}}}


def test_a_file_cut_at_any_byte_holds_the_items_before(tmp_path: Path) -> None:
    folder = tmp_path / "items"
    with ItemStore(folder) as store:
        for shard in range(3):
            store.add(item(shard), result(shard), 1.0)
    path = items_file(folder)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with ItemStore(folder) as store:
            num_whole = whole[:size].count(b"\n")
            assert len(store) == num_whole
            missing = store.missing(map(item, range(3)))
            assert missing == [item(shard) for shard in range(num_whole, 3)]
            if size % 37 == 0:  # what finishes it goes to a file of its own, and leaves the cut one as it is
                for left in missing:
                    store.add(left, result(left.shard), 1.0)
                assert path.read_bytes() == whole[:size]
                with ItemStore(folder) as again:
                    assert all(again.result(item(shard))["rows"] == [shard] for shard in range(3))
        for other in folder.glob("*.jsonl"):
            if other.name.split(".")[0] != path.stem:
                other.unlink()


def test_several_writers_share_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "items"
    with ItemStore(folder) as one, ItemStore(folder) as other:
        one.add(item(0), {"by": "one"}, 1.0)
        assert item(0) not in other
        other.refresh()
        assert other.result(item(0)) == {"by": "one"}
        other.add(item(1), {"by": "other"}, 1.0, Place("elsewhere", "avx2"))
        one.refresh()
        assert one.result(item(1)) == {"by": "other"} and len(one) == len(other) == 2
        # A line that is being written counts when it ends.
        path = other._open_writer().path()
        line = path.read_bytes().replace(item(1).key.encode(), item(2).key.encode()).replace(b'"shard":1', b'"shard":2')
        for part in (line[:300], line[300:-1]):
            with path.open("ab") as file:
                file.write(part)
            one.refresh()
            assert item(2) not in one
        with path.open("ab") as file:
            file.write(b"\n")
        one.refresh()
        assert one.result(item(2)) == {"by": "other"}
        assert one.places() == {Place.here(): 1, Place("elsewhere", "avx2"): 2}
        assert one.places(without=["generate"]) == {}


def test_of_two_results_the_earlier_counts_whoever_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "items"
    with ItemStore(folder) as one, ItemStore(folder) as other:
        monkeypatch.setattr(time, "time", lambda: 20.0)
        one.add(item(0), {"by": "late"}, 9.0)
        assert one.result(item(0)) == {"by": "late"}
        monkeypatch.setattr(time, "time", lambda: 10.0)
        other.add(item(0), {"by": "early"}, 1.0, Place("elsewhere", "avx2"))
        for store in (one, other, ItemStore(folder)):
            store.refresh()
            assert store.result(item(0)) == {"by": "early"} and len(store) == 1
            assert store.seconds_like(item(0).kind) == store.total_seconds == 1.0
            assert store.places() == {Place("elsewhere", "avx2"): 1}


def test_a_failure_is_noted_and_is_no_result(tmp_path: Path) -> None:
    with ItemStore(tmp_path / "items") as store:
        path = store.fail(item(0), "KeyError: 'x'", "Traceback", 3, Place("elsewhere", "avx2"))
        assert item(0) not in store
    (line,) = map(json.loads, path.read_text().splitlines())
    assert path.name.endswith(".failed.jsonl") and line.pop("ended") > 0
    assert line == {
        "key": item(0).key,
        "item": item(0).to_dict(),
        "tries": 3,
        "error": "KeyError: 'x'",
        "trace": "Traceback",
        "host": "elsewhere",
        "isa": "avx2",
    }
    with ItemStore(tmp_path / "items") as store:
        assert store.missing([item(0)]) == [item(0)]


def test_a_full_disk_is_named_and_damages_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "items"
    with ItemStore(folder) as store:
        store.add(item(0), result(0), 1.0)
        path = items_file(folder)
        tokens = path.with_name(f"{path.stem}.tokens.jsonl")
        before = [each.read_bytes() for each in (path, tokens)]
        real_write = os.write

        for room in (0, 50, len(before[1]) + 100):  # for nothing, for some token ids, for these and half a line

            def full_disk(file: int, data: bytes, left: list[int] = [room]) -> int:  # noqa: B006  # counts down
                if not left[0]:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                written = real_write(file, data[: left[0]])
                left[0] -= written
                return written

            monkeypatch.setattr(os, "write", full_disk)
            with pytest.raises(OSError, match=r"\.jsonl must take \d+ bytes more, got: No space left") as caught:
                store.add(item(1), result(1), 1.0)
            assert caught.value.errno == errno.ENOSPC
            assert [each.read_bytes() for each in (path, tokens)] == before and item(1) not in store
        monkeypatch.undo()
        store.add(item(1), result(1), 1.0)
    with ItemStore(folder) as store:
        assert len(store) == 2 and store.token_ids(item(1)) == {"paths": {"full": {"token_ids": [[1, 7]]}}}


def test_a_write_in_parts_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real_write(file, data[:10]))
    with ItemStore(tmp_path / "items") as store:
        store.add(item(0), result(0), 1.0)
    monkeypatch.undo()
    with ItemStore(tmp_path / "items") as store:
        assert store.result(item(0))["text"] == "naïve\n東京"


@pytest.mark.parametrize("damage", [b"{}\n", b"not json\n", b"\x00\x00\x00\n", b'{"key":"0","item":{},"result":{}}\n'])
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes) -> None:
    folder = tmp_path / "items"
    with ItemStore(folder) as store:
        store.add(item(0), result(0), 1.0)
    path = items_file(folder)
    whole = path.read_bytes()
    path.write_bytes(whole + damage + whole.replace(b'"shard":0', b'"shard":1'))
    with pytest.raises(ValueError, match=r"\w\.jsonl must hold a finished item in each line, got a damaged line 2"):
        ItemStore(folder)


@pytest.mark.parametrize("change", [(b'"shard":0', b'"shard":1'), (b'"rows":[0]', b'"rows":[0 ')])
def test_a_line_changed_by_hand_is_named_when_it_is_read(tmp_path: Path, change: tuple[bytes, bytes]) -> None:
    folder = tmp_path / "items"
    with ItemStore(folder) as store:
        store.add(item(0), result(0), 1.0)
    path = items_file(folder)
    path.write_bytes(path.read_bytes().replace(*change))
    with ItemStore(folder) as store, pytest.raises(ValueError, match="got a damaged line at byte 0"):
        store.result(item(0))


def test_a_number_that_json_lacks_is_refused(tmp_path: Path) -> None:
    with ItemStore(tmp_path / "items") as store:
        for nan in ({"rouge_l": float("nan")}, {"token_ids": [float("nan")]}):
            with pytest.raises(ValueError, match="not JSON compliant"):
                store.add(item(0), nan, 1.0)
        assert len(store) == 0 and not (tmp_path / "items").exists()


ROOT = Path(__file__).resolve().parents[2]
# Adds items one after another, and says of each on stdout when it has been added.
WRITER = """
import sys
from pathlib import Path
from typing import Any
from dynskip.evaluation.sweep.place import Place
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
place = Place("here", "avx2")
with ItemStore(Path(sys.argv[1])) as store:
    for shard in range(int(sys.argv[2]), 10**9):
        item = WorkItem("generate", "c", "full", "d", "test", 0, shard)
        if item not in store:
            store.add(item, {"rows": list(range(shard % 97)), "token_ids": [shard] * (shard % 3000)}, 1.0, place)
            print(shard, flush=True)
"""


def test_a_writer_killed_at_any_moment_loses_nothing_that_it_has_told(tmp_path: Path) -> None:
    draw = random.Random(0)
    folder = tmp_path / "items"
    told: list[int] = []
    for _ in range(50):
        start = str(max(told, default=-1) + 1)
        command = [sys.executable, "-c", WRITER, str(folder), start]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as writer:
            assert writer.stdout is not None
            told.append(int(writer.stdout.readline()))
            time.sleep(draw.uniform(0, 0.02))
            writer.send_signal(signal.SIGKILL)
            told += [int(line) for line in writer.stdout.read().split("\n")[:-1]]
        assert writer.returncode == -signal.SIGKILL
    items = [WorkItem("generate", "c", "full", "d", "test", 0, shard) for shard in told]
    assert len(set(items)) == len(items) >= 50
    with ItemStore(folder) as store:
        assert not store.missing(items)
        for written in items:
            assert store.result(written) == {"rows": list(range(written.shard % 97))}
            assert store.token_ids(written) == {"token_ids": [written.shard] * (written.shard % 3000)}
        assert len(store) - len(items) <= 50, "a kill leaves one item at most that is there and was not told"


def test_many_items_are_found_quickly_and_in_little_memory(tmp_path: Path) -> None:
    """A twentieth of what `bench/item_store.py` measures, in a twentieth of the time and memory that it may take."""
    write_made_up(tmp_path / "items", num_items=5_000, num_prompts=2, num_tokens=3)
    found = measure_start(tmp_path / "items", num_items=5_000)
    assert found["num_items"] == 5_000 and found["num_missing"] == 0
    assert found["seconds"] < 60 / 20
    assert found["memory_mib"] < 1024 / 20


def by_path(shard: int, *paths: str, **others: Any) -> tuple[WorkItem, dict[str, Any]]:
    """An item along ``paths``, and what doing it gives: each path its own numbers and tokens."""
    found = {path: {"nats": [len(path), shard], "token_ids": [[shard]]} for path in paths}
    return item(shard, path=" ".join(paths)), {"rows": [shard], "paths": found, **others}


def test_of_more_paths_those_are_done_that_are_missing(tmp_path: Path) -> None:
    with ItemStore(tmp_path / "items") as store:
        for shard in range(2):
            store.add(*by_path(shard, "full", "uniform:4"), seconds=1.0)
        asked = [by_path(shard, "uniform:2", "full", "uniform:4")[0] for shard in range(3)]
        assert store.missing(asked) == [*(by_path(shard, "uniform:2")[0] for shard in range(2)), asked[2]]
        assert store.missing([by_path(0, "uniform:4")[0]]) == [], "some of the paths of a line"
        new = [by_path(0, *paths)[0] for paths in (["full", "a"], ["b", "a"], ["a"])]
        assert [left.path for left in store.missing(new)] == ["a", "b"], "each path once"
        with pytest.raises(KeyError):
            store.result(asked[0])
        store.add(*by_path(0, "uniform:2"), seconds=1.0)
        assert store.missing(asked) == [by_path(1, "uniform:2")[0], asked[2]]
    with ItemStore(tmp_path / "items") as store:
        _, whole = by_path(0, "uniform:2", "full", "uniform:4")
        tokens = {path: {"token_ids": found.pop("token_ids")} for path, found in whole["paths"].items()}
        found = store.result(asked[0])
        assert found == whole and [*found["paths"]] == [*whole["paths"]], "in the order that was asked for"
        assert store.token_ids(asked[0]) == {"paths": tokens}
        assert store.result(by_path(1, "uniform:4")[0])["paths"] == {"uniform:4": {"nats": [9, 1]}}
        assert len(store) == 3
        # Other options, or another task, are another item.
        assert store.missing([item(0, path="full", seed=9)]) == [item(0, path="full", seed=9)]
        assert store.missing([item(0, task="time", path="full")]) == [item(0, task="time", path="full")]


def test_lines_of_one_item_that_tell_of_other_prompts_are_damaged(tmp_path: Path) -> None:
    with ItemStore(tmp_path / "items") as store:
        store.add(*by_path(0, "full"), seconds=1.0)
        other, found = by_path(0, "uniform:4")
        store.add(other, {**found, "rows": [7]}, seconds=1.0)
        with pytest.raises(ValueError, match="got a damaged line at byte"):
            store.result(by_path(0, "full", "uniform:4")[0])
