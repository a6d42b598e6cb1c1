"""The memory that Linux control groups leave a process: a container's limit is below what its machine has."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class CgroupMemory(NamedTuple):
    """The memory of one control group: its limit, and what can still be allocated below it."""

    limit_bytes: int
    available_bytes: int


class _Files(NamedTuple):
    """Where a version of cgroups keeps limit and usage, and under which name what it can reclaim of the latter."""

    limit: str
    usage: str
    inactive: str


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def cgroup_memory(
    proc: Path = Path("/proc/self"), cgroups: Path = Path("/sys/fs/cgroup"), machine_bytes: int = 2**62
) -> CgroupMemory | None:
    """The group that leaves this process the least memory, of its own and all above; None where none has a limit.

    proc: the process's folder. cgroups: where the groups are mounted. machine_bytes: limits from there on are none.
    """
    groups = [_group_memory(folder, files) for folder, files in _groups(proc, cgroups)]
    limited = [group for group in groups if group is not None and group.limit_bytes < machine_bytes]
    return min(limited, key=lambda group: group.available_bytes, default=None)


def _groups(proc: Path, cgroups: Path) -> list[tuple[Path, _Files]]:
    """The folders of the process's groups that account for memory, each from its own up to the root."""
    text = _read(proc / "cgroup")
    found: list[tuple[Path, _Files]] = []
    for line in (text or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = cgroups, _V2
        elif "memory" in controllers.split(","):
            root, files = cgroups / "memory", _V1
        else:
            continue
        # A container sees its own group as the root: folders of the path that it cannot see are passed over.
        folder = root if ".." in Path(path).parts else root / path.lstrip("/")
        found += [(each, files) for each in (folder, *folder.parents) if each.is_relative_to(root)]
    return found


def _group_memory(folder: Path, files: _Files) -> CgroupMemory | None:
    limit, usage = _read(folder / files.limit), _read(folder / files.usage)
    if limit is None or usage is None or limit.strip() == "max":
        return None
    reclaimable = 0
    for line in (_read(folder / "memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name == files.inactive:
            reclaimable = int(value)
    used = max(int(usage) - reclaimable, 0)
    return CgroupMemory(int(limit), max(int(limit) - used, 0))


def _read(path: Path) -> str | None:
    """The text of a file of the kernel's; None where this version, or this user, has none."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return None
