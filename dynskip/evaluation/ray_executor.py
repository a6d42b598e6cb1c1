"""`RayExecutor`: items as tasks of a Ray cluster; imported only where `--executor ray:ADDRESS` asks for it."""

from __future__ import annotations

import importlib
import logging
import socket
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

_CONNECT_S = 10.0


class RayExecutor(Executor):
    """The tasks of one driver on the cluster at ``address``: auto, HOST:PORT, ray://HOST:PORT, or local for a new one.

    Each task has a core for itself, and with ``device`` cuda a GPU. Ray does not try one again: a worker or a node that
    is lost is an error of its future. Where this process is connected already, it stays so afterwards.

    Raises ImportError without the package, ConnectionError where no cluster answers.
    """

    def __init__(self, address: str, device: str = "cpu") -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError:
            raise ImportError(
                "RayExecutor: the package ray must be installed, got none. Install it with `pip install dynskip[ray]`."
            ) from None
        self._connects = not self._ray.is_initialized()
        if self._connects:
            _check_answers(address)
            self._ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        self._resource = "CPU" if device == "cpu" else "GPU"
        options = {"num_cpus": 1, "num_gpus": int(device != "cpu"), "max_retries": 0, "scheduling_strategy": "SPREAD"}
        self._task = self._ray.remote(**options)(_call)
        self._waiting: dict[Future[Any], Any] = {}

    @property
    def num_slots(self) -> int:
        """Twice what the cluster has room for by now, so that none of it waits for the driver."""
        return 2 * max(1, int(self._ray.cluster_resources().get(self._resource, 0)))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The future of ``fn`` somewhere in the cluster."""
        reference = self._task.remote(fn, args, kwargs)
        future: Future[Any] = reference.future()
        self._waiting[future] = reference
        future.add_done_callback(lambda done: self._waiting.pop(done, None))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster, which ends what it still does for this driver."""
        if cancel_futures:
            for reference in list(self._waiting.values()):
                self._ray.cancel(reference)
        if self._connects:
            self._ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise ConnectionError where nobody listens at HOST:PORT: Ray itself would try for ten minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
        except OSError as error:
            raise ConnectionError(f"RayExecutor: a cluster must answer at {address}, got {error}.") from error


def _call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return fn(*args, **kwargs)
