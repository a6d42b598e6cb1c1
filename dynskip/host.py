"""The machine: what results say of it, of versions and of the checkout; and huge pages, which it is asked for."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

# What the CPU code of torch, oneDNN and dynskip looks for, in the words of /proc/cpuinfo (x86, then Arm).
_CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")


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
    """The CPU's name as the system gives it, and where that names no model, as in many virtual machines, family and
    model numbers: two generations of one make are two machines.
    """
    fields = cpu_fields()
    name = fields.get("model name") or platform.processor() or platform.machine()
    if any(map(str.isdigit, name)) or not {"cpu family", "model"} <= fields.keys():
        return name
    return f"{name} (family {fields['cpu family']}, model {fields['model']})"


def cpu_features() -> list[str]:
    """The instruction sets of the CPU that torch, oneDNN and dynskip choose by; only Linux lists them."""
    fields = cpu_fields()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return [name for name in _CPU_FEATURES if name in flags]


def package_version(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# What measures and is measured, as git names it; not what benchmarks have written.
_CODE = ("dynskip", "kernels", "csrc", ":(glob)bench/**/*.py")


def commit() -> str | None:
    """The commit of the checkout that runs, with ``+`` where its code differs from it; None outside of one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *_CODE)
    except (OSError, subprocess.CalledProcessError):
        return None  # no git here, or a .git that git refuses: the result is without a commit, and shows it
    return head + ("+" if changed else "")


_HUGE_PAGE = 2**21
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # of Linux; the second from 6.1 on


def ask_for_huge_pages(address: int, num_bytes: int, is_written: bool) -> bool:
    """Ask Linux to hold the whole 2 MiB of some memory in huge pages; whether it agreed. Elsewhere nothing is asked.

    Keys and values lie apart by slots, often a 4 KiB page each, and each page is looked up on its own.
    is_written: the memory holds something: it is moved at once, about 3 s a GB; else it comes so when it is written.
    """
    begin, end = -(-address // _HUGE_PAGE) * _HUGE_PAGE, (address + num_bytes) // _HUGE_PAGE * _HUGE_PAGE
    if begin >= end or platform.system() != "Linux":
        return False
    advice = _MADV_COLLAPSE if is_written else _MADV_HUGEPAGE
    return _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice) == 0


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _git(root: Path, *args: str) -> str:
    return subprocess.run(["git", *args], cwd=root, check=True, capture_output=True, text=True).stdout.strip()
