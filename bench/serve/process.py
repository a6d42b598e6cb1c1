"""A server in a process group of its own: started and waited for, stopped for a while, measured, ended."""

from __future__ import annotations

import ctypes
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_PR_SET_PDEATHSIG = 1
_LOG_LINES = 5
_END_S = 60.0  # after SIGTERM, before SIGKILL


class ServerError(RuntimeError):
    """What a server could not do, with the end of its log."""


class ServerProcess:
    """A server on loopback and the processes that it starts.

    command: of the port to listen on, what to start. log: the file that takes all that it prints. env: added to the
    environment. It is killed where this process ends first.
    """

    def __init__(
        self, name: str, command: Callable[[int], Sequence[str]], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.log, self.host, self.port = name, log, "127.0.0.1", free_port()
        log.parent.mkdir(parents=True, exist_ok=True)
        libc = ctypes.CDLL(None, use_errno=True)
        with log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                command(self.port),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
            )

    @property
    def url(self) -> str:
        """The address."""
        return f"http://{self.host}:{self.port}"

    def wait_until_ready(self, timeout_s: float = 900.0) -> None:
        """Return once ``/health`` answers. Raises ServerError where the process ends first, or needs longer."""
        deadline_s = time.monotonic() + timeout_s
        while not self._is_healthy():
            if self._process.poll() is not None:
                raise ServerError(
                    f"{self.name}: it must serve, got exit status {self._process.returncode}: {self._tail()}"
                )
            if time.monotonic() > deadline_s:
                raise ServerError(f"{self.name}: it must be ready within {timeout_s:.0f} s, got none: {self._tail()}")
            time.sleep(0.2)

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=10)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    @property
    def processes(self) -> list[psutil.Process]:
        """The server's process and its descendants."""
        leader = psutil.Process(self._process.pid)
        return [leader, *leader.children(recursive=True)]

    def rss_bytes(self) -> int:
        """Memory that is resident now, summed over the processes."""
        return sum(process.memory_info().rss for process in self.processes)

    def cpu_s(self) -> float:
        """Processor time that the processes have used."""
        times = [process.cpu_times() for process in self.processes]
        return sum(each.user + each.system for each in times)

    def pause(self) -> None:
        """Stop the processes where they stand (SIGSTOP)."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def end(self) -> int:
        """Send SIGTERM; the exit status. What does not end within a minute is killed, and its status says so."""
        if self._process.poll() is None:
            self.resume()
            self._process.terminate()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self.kill()
        return self._process.wait()

    def kill(self) -> None:
        """End all processes at once."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _tail(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return " / ".join(lines[-_LOG_LINES:]) or "it printed nothing"


def free_port() -> int:
    """A port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
