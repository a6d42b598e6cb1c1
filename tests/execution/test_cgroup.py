"""The memory that control groups leave, read from folders made like the kernel's."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from dynskip.cli import main
from dynskip.execution import kv_cache
from dynskip.execution.cgroup import CgroupMemory, cgroup_memory

GIB = 2**30
MACHINE = 64 * GIB


def process(folder: Path, *lines: str) -> Path:
    """A process's folder in /proc that says to which groups it belongs."""
    folder.mkdir(parents=True)
    (folder / "cgroup").write_text("".join(f"{line}\n" for line in lines))
    return folder


def group_v2(folder: Path, limit: int | str, used: int, inactive: int = 0) -> None:
    """A group of the second version; its own page cache is part of what it uses."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 4096\nactive_file 512\ninactive_file {inactive}\nslab 77\n")


def group_v1(folder: Path, limit: int, used: int, inactive: int = 0) -> None:
    """A group of the first version, whose own inactive pages are fewer than those of all below it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 9\ninactive_file 5\ntotal_inactive_file {inactive}\n")


def test_a_group_of_the_second_version(tmp_path: Path) -> None:
    self = process(tmp_path / "proc", "0::/user/app")
    group_v2(tmp_path / "fs/user/app", 4 * GIB, 3 * GIB, inactive=GIB)
    assert cgroup_memory(self, tmp_path / "fs", MACHINE) == CgroupMemory(4 * GIB, 2 * GIB)


def test_a_group_of_the_first_version(tmp_path: Path) -> None:
    self = process(tmp_path / "proc", "11:cpu,cpuacct:/box", "4:memory:/box", "1:name=systemd:/box")
    group_v1(tmp_path / "fs/memory/box", 4 * GIB, 3 * GIB, inactive=GIB)
    group_v1(tmp_path / "fs/memory", 9223372036854771712, 30 * GIB)
    assert cgroup_memory(self, tmp_path / "fs", MACHINE) == CgroupMemory(4 * GIB, 2 * GIB)


def test_memory_may_be_accounted_for_by_the_first_version_beside_the_second(tmp_path: Path) -> None:
    self = process(tmp_path / "proc", "3:memory:/box", "0::/box")
    group_v1(tmp_path / "fs/memory/box", 2 * GIB, GIB)
    (tmp_path / "fs/box").mkdir()
    assert cgroup_memory(self, tmp_path / "fs", MACHINE) == CgroupMemory(2 * GIB, GIB)


@pytest.mark.parametrize(("outer", "expected"), [((8, 7), (8, 1)), ((8, 2), (4, 3)), (("max", 60), (4, 3))])
def test_the_group_that_leaves_the_least_counts(
    outer: tuple[int | str, int], expected: tuple[int, int], tmp_path: Path
) -> None:
    self = process(tmp_path / "proc", "0::/outer/inner/leaf")
    limit, used = outer
    group_v2(tmp_path / "fs/outer", limit if isinstance(limit, str) else limit * GIB, used * GIB)
    group_v2(tmp_path / "fs/outer/inner", 4 * GIB, GIB)
    group_v2(tmp_path / "fs/outer/inner/leaf", "max", GIB)
    found = cgroup_memory(self, tmp_path / "fs", MACHINE)
    assert found == CgroupMemory(expected[0] * GIB, expected[1] * GIB)


@pytest.mark.parametrize("path", ["/docker/0123abc", "/../../other", "/"])
def test_a_container_sees_its_own_group_as_the_root(path: str, tmp_path: Path) -> None:
    self = process(tmp_path / "proc", f"0::{path}")
    group_v2(tmp_path / "fs", 3 * GIB, GIB)
    group_v2(tmp_path, GIB, 0)  # not a group: it lies outside
    assert cgroup_memory(self, tmp_path / "fs", MACHINE) == CgroupMemory(3 * GIB, 2 * GIB)


def test_a_group_beyond_its_limit_leaves_nothing(tmp_path: Path) -> None:
    self = process(tmp_path / "proc", "0::/app")
    group_v2(tmp_path / "fs/app", GIB, 2 * GIB)
    assert cgroup_memory(self, tmp_path / "fs", MACHINE) == CgroupMemory(GIB, 0)


def test_no_limit_is_none(tmp_path: Path) -> None:
    assert cgroup_memory(tmp_path / "none", tmp_path / "fs", MACHINE) is None
    self = process(tmp_path / "proc", "0::/app", "2:memory:/app")
    assert cgroup_memory(self, tmp_path / "fs", MACHINE) is None
    group_v2(tmp_path / "fs/app", "max", GIB)
    group_v1(tmp_path / "fs/memory/app", 9223372036854771712, GIB)
    assert cgroup_memory(self, tmp_path / "fs", MACHINE) is None


def test_the_cache_and_info_count_what_the_group_leaves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = CgroupMemory(GIB // 2, GIB // 4)
    monkeypatch.setattr("dynskip.execution.cgroup.cgroup_memory", lambda **_: found)
    monkeypatch.setattr(kv_cache, "cgroup_memory", lambda **_: found)
    assert kv_cache.available_bytes(torch.device("cpu")) == min(GIB // 4, psutil.virtual_memory().available)
    assert main(["info"]) == 0
    assert "GiB, of which a cgroup allows 0.5 GiB, 0.2 GiB available" in capsys.readouterr().out
