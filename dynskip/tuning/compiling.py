"""Which candidates compile, and what they take of a GPU: found out by processes that need no GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Protocol

from dynskip.tuning.space import Constants
from dynskip.tuning.tasks import Task
from dynskip.validation.offline.resources import complaint


@dataclass(frozen=True)
class Usage:
    """What a launch's largest kernel takes: registers and spilled bytes a thread, shared bytes a program.

    error: why it does not compile; then the figures are 0.
    """

    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    error: str | None = None

    def complaint(self, max_shared_bytes: int) -> str | None:
        """Why a GPU should not run it; None if it should."""
        return complaint(self.error, self.spilled_bytes, self.shared_bytes, max_shared_bytes)


class Compiler(Protocol):
    """Compiles candidates, in the order in which they are submitted."""

    def submit(self, task: Task, constants: Constants) -> Future[Usage]:
        """What a launch of ``task`` with ``constants`` takes, once it is compiled."""
        ...


class CompilerPool:
    """Processes that compile for GPUs of a capability; they leave what they compiled in Triton's cache."""

    def __init__(self, capability: int, num_processes: int) -> None:
        self._workers = [_Worker(capability) for _ in range(num_processes)]
        self._idle = deque(self._workers)  # as many as threads, so that a thread always finds one
        self._threads = ThreadPoolExecutor(num_processes)
        self._usages: dict[str, Future[Usage]] = {}

    def __enter__(self) -> CompilerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def submit(self, task: Task, constants: Constants) -> Future[Usage]:
        """See `Compiler.submit`. What was asked before is not compiled again."""
        request = json.dumps({"task": dataclasses.asdict(task), "constants": constants})
        if request not in self._usages:
            self._usages[request] = self._threads.submit(self._compile, request)
        return self._usages[request]

    def _compile(self, request: str) -> Usage:
        worker = self._idle.pop()
        try:
            return worker.compile(request)
        finally:
            self._idle.append(worker)


class _Worker:
    """A process of `compile_worker`, started when it is first needed, and again after the compiler crashed it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.process: subprocess.Popen[str] | None = None
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # `close` closes it

    def compile(self, request: str) -> Usage:
        if self.process is None:
            self.process = self._start()
        requests, answers = self.process.stdin, self.process.stdout
        assert requests is not None and answers is not None, "both were asked for"
        requests.write(request + "\n")
        requests.flush()
        if answer := answers.readline():
            return Usage(**json.loads(answer))
        status = self._end()
        if status < 0:
            return Usage(error=f"the compiler crashes with signal {-status}")
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace")[-2000:]
        raise AssertionError(f"the process that compiles ended with status {status} at {request}: {said}")

    def close(self) -> None:
        if self.process is not None:
            self._end()
        self.errors.close()

    def _end(self) -> int:
        """The status with which the process ends, now that it gets no more requests."""
        assert self.process is not None, "it was started"
        with self.process as process:
            process.communicate()
        self.process = None
        return process.returncode

    def _start(self) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "dynskip.tuning.compile_worker", str(self.capability)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=self.errors, text=True)
