"""A peer in a process of its own, driven over pipes: it runs while it answers, and is stopped (SIGSTOP) otherwise."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

TIMEOUT_S = 900.0
_STOP_S = 10.0  # a process group that got SIGSTOP is stopped long before
_LOG_LINES = 3
_AT_REST = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)


class PeerError(RuntimeError):
    """What a peer could not do, in its own words."""


class PeerProcess:
    """A process that answers one JSON request a line on stdin with one JSON answer a line on stdout.

    It and its children are one process group, which only runs during `ask`.
    command: what to start. env: added to the environment. log: the file that takes what it prints elsewhere.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        self._signal(signal.SIGSTOP)

    def ask(self, do: str, timeout_s: float = TIMEOUT_S, **arguments: Any) -> Any:
        """What the peer answers to ``do``. Raises PeerError where it cannot, has ended, or needs longer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], timeout_s)[0]:
                self.close()
                raise PeerError(f"{self.name}: {do} must end within {timeout_s:.0f} s, got no answer. See {self._log}.")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(
                f"{self.name}: the process must answer {do!r}, got exit status {self._process.wait()}: {self._tail()}"
            )
        self._signal(signal.SIGSTOP)
        self._wait_until_stopped()
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer["ok"]

    @property
    def processes(self) -> list[psutil.Process]:
        """The process and its descendants."""
        leader = psutil.Process(self._process.pid)
        return [leader, *leader.children(recursive=True)]

    @property
    def is_stopped(self) -> bool:
        """True where no process of the group can run."""
        return not any(process.is_running() and process.status() not in _AT_REST for process in self.processes)

    def peak_bytes(self) -> int:
        """The most memory that was resident, summed over the group's processes. Raises PeerError where it has ended."""
        if self._process.poll() is not None:
            raise PeerError(f"{self.name}: the process must be there, got exit status {self._process.returncode}.")
        total = 0
        for process in self.processes:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            fields = dict(line.split(":", 1) for line in status.splitlines())
            total += int(fields["VmHWM"].split()[0]) * 1024
        return total

    def close(self) -> None:
        """End the process group; a stopped one, too."""
        self._signal(signal.SIGKILL)
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _wait_until_stopped(self) -> None:
        deadline_s = time.monotonic() + _STOP_S
        while self._process.poll() is None and not self.is_stopped:
            assert time.monotonic() < deadline_s, f"{self.name}: SIGSTOP stops a process group"
            time.sleep(1e-3)

    def _tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return " / ".join(lines[-_LOG_LINES:]) or "it printed nothing"
