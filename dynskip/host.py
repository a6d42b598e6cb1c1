"""What results say of where they are from: the CPU, the versions of packages, the commit of the checkout."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path


def cpu_fields() -> dict[str, str]:
    """What ``/proc/cpuinfo`` says of the first CPU; only Linux has it."""
    path = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    return fields


def cpu_model() -> str:
    """The CPU's name as the system gives it."""
    return cpu_fields().get("model name") or platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout that runs, with ``+`` where files differ from it; None outside of one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "dynskip", "kernels", "csrc")
    except (OSError, subprocess.CalledProcessError):
        return None  # no git here, or a .git that git refuses: the result is without a commit, and shows it
    return head + ("+" if changed else "")


def _git(root: Path, *args: str) -> str:
    return subprocess.run(["git", *args], cwd=root, check=True, capture_output=True, text=True).stdout.strip()
