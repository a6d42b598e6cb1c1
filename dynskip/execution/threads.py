"""CPU threads: how many make sense, and what becomes of them in a process that was forked.

OpenMP keeps its threads between two pieces of work. A fork copies the calling thread alone, so that the child's next
piece of work would wait for threads that are not there, without an end. A forked child therefore computes with one
thread, and says so once.
"""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path

import torch

# More threads than CPUs only wait for each other; a few times as many are harmless.
_MOST_THREADS_PER_CPU = 4
_REMEDY = 'Start processes by "spawn" or "forkserver" to compute with more threads.'


class ForkWarning(UserWarning):
    """A forked process computes with one thread."""


class _Fork:
    """What a fork left of this process: the thread that lost its OpenMP threads, and whether a warning is due."""

    had_threads = False
    thread_id: int | None = None
    must_warn = False


def most_threads() -> int:
    """The most CPU threads that it makes sense to ask for."""
    return _MOST_THREADS_PER_CPU * (os.cpu_count() or 1)


def check_fork() -> None:
    """Warn once in a forked process that it computes with one thread. Cost: a comparison in any other process.

    Raises: RuntimeError where more threads were asked for since the fork, with which the next operation would hang.
    """
    if _Fork.thread_id is None or _Fork.thread_id != threading.get_ident():
        return
    if torch.get_num_threads() > 1:
        raise RuntimeError(
            f"check_fork: torch must use 1 thread in a forked process, got {torch.get_num_threads()}: they would wait "
            f"for threads that a fork does not copy. Leave torch.set_num_threads(1) as it is. {_REMEDY}"
        )
    if _Fork.must_warn:
        _Fork.must_warn = False
        warnings.warn(f"This process was forked, so it computes with one CPU thread. {_REMEDY}", ForkWarning, 2)


def _before_fork() -> None:
    tasks = Path("/proc/self/task")
    # A process of a single thread has no OpenMP threads. Where the number is unknown, there may be some.
    _Fork.had_threads = len(list(tasks.iterdir())) > 1 if tasks.is_dir() else True


def _after_fork_in_child() -> None:
    if not _Fork.had_threads and _Fork.thread_id is None:
        return
    _Fork.thread_id, _Fork.must_warn = threading.get_ident(), torch.get_num_threads() > 1
    torch.set_num_threads(1)


os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
