"""The store of finished items: nothing is lost, repeated or damaged, wherever a writer ends."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

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
    return {"rows": [shard], "rouge_l": [0.1 * shard], "text": "naïve\n東京"}


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


def test_results_are_there_again(tmp_path: Path) -> None:
    with ItemStore(tmp_path / "items.jsonl") as store:
        for shard in range(3):
            store.add(item(shard), result(shard), seconds=1.5)
        assert store.missing([item(4), item(1), item(4)]) == [item(4)]
    with ItemStore(tmp_path / "items.jsonl") as store:
        assert len(store) == 3 and store.result(item(2)) == result(2)
        assert store.total_seconds == 4.5
        assert store.seconds_like(item(9)) == 1.5 and store.seconds_like(item(0, path="full")) is None
        with pytest.raises(ValueError, match="the item must be new"):
            store.add(item(0), result(0), 1.0)
    with pytest.raises(ValueError, match="the store must be open"):
        store.add(item(5), result(5), 1.0)


def test_a_file_cut_at_any_byte_holds_the_items_before(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    with ItemStore(path) as store:
        for shard in range(3):
            store.add(item(shard), result(shard), 1.0)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with ItemStore(path) as store:
            num_whole = whole[:size].count(b"\n")
            assert len(store) == num_whole
            missing = store.missing([item(shard) for shard in range(3)])
            assert missing == [item(shard) for shard in range(num_whole, 3)]
            if size % 7 == 0:  # finishing it gives the file of an uninterrupted run
                for left in missing:
                    store.add(left, result(left.shard), 1.0)
                assert path.read_bytes() == whole


def test_a_full_disk_is_named_and_damages_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "items.jsonl"
    with ItemStore(path) as store:
        store.add(item(0), result(0), 1.0)
        before = path.read_bytes()
        real_write = os.write

        def full_disk(file: int, data: bytes) -> int:
            if len(data) < 100:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real_write(file, data[: len(data) // 2])

        monkeypatch.setattr(os, "write", full_disk)
        with pytest.raises(OSError, match=r"items.jsonl must take \d+ bytes more, got: No space left") as caught:
            store.add(item(1), result(1), 1.0)
        assert caught.value.errno == errno.ENOSPC
        assert path.read_bytes() == before and item(1) not in store
        monkeypatch.undo()
        store.add(item(1), result(1), 1.0)
    with ItemStore(path) as store:
        assert len(store) == 2


def test_a_write_in_parts_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real_write(file, data[:10]))
    with ItemStore(tmp_path / "items.jsonl") as store:
        store.add(item(0), result(0), 1.0)
    monkeypatch.undo()
    with ItemStore(tmp_path / "items.jsonl") as store:
        assert store.result(item(0)) == result(0)


@pytest.mark.parametrize("damage", [b"{}\n", b"not json\n", b"\x00\x00\x00\n"])
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "items.jsonl"
    with ItemStore(path) as store:
        store.add(item(0), result(0), 1.0)
    path.write_bytes(path.read_bytes() + damage + path.read_bytes().replace(b'"shard":0', b'"shard":1'))
    with pytest.raises(ValueError, match="got a damaged line 2"):
        ItemStore(path)
    # An item changed by hand no longer has its key.
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0].replace(b'"shard":0', b'"shard":1'))
    with pytest.raises(ValueError, match="got a damaged line 1"):
        ItemStore(path)


def test_a_store_has_one_owner(tmp_path: Path) -> None:
    with ItemStore(tmp_path / "items.jsonl"), pytest.raises(RuntimeError, match="must belong to one process"):
        ItemStore(tmp_path / "items.jsonl")
    ItemStore(tmp_path / "items.jsonl").close()


def test_a_number_that_json_lacks_is_refused(tmp_path: Path) -> None:
    with ItemStore(tmp_path / "items.jsonl") as store:
        with pytest.raises(ValueError, match="not JSON compliant"):
            store.add(item(0), {"rouge_l": float("nan")}, 1.0)
        assert len(store) == 0 and not (tmp_path / "items.jsonl").read_bytes()
