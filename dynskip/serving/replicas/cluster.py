"""Replicas on Ray Serve: a deployment of one replica for each engine, one for the front, and the cluster below them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatus, ProxyStatus
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynskip.serving.app import guarded
from dynskip.serving.depths import DepthTable
from dynskip.serving.replicas.front import Front, ReplicaLostError
from dynskip.serving.replicas.options import FrontOptions, ReplicaOptions
from dynskip.serving.replicas.replica import EngineReplica
from dynskip.serving.server import log_to_stderr
from dynskip.serving.service import Service

APP = "dynskip"
_FRONT = "front"
# Bytes of Ray's own shared memory, which only large arguments and results go through.
_OBJECT_STORE = 128 * 2**20
# Ray Serve's bound on requests at a time; ours is in `Admission`, which tells clients when to try again.
_MOST_ONGOING = 100_000
_FAILED = (DeploymentStatus.DEPLOY_FAILED, DeploymentStatus.UNHEALTHY)
# Seconds until Ray Serve's proxy listens, at most: it begins in its own process, and `serve.run` does not wait for it.
_PROXY_TIMEOUT_S = 120
# Seconds between Ray Serve's looks at an engine, for how long that may not answer, and for how long an ending replica
# may go on with what it has begun.
_HEALTH_S, _HEALTH_TIMEOUT_S, _GRACE_S = 5, 60, 3600


class HandleReplica:
    """A replica by Ray Serve's handle of its deployment."""

    def __init__(self, name: str, handle: DeploymentHandle) -> None:
        self.name = name
        self._handle = handle
        self._streamed = handle.options(stream=True)

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message]]:
        """As `EngineReplica.answer`."""
        response = self._streamed.answer.remote(scope, body)
        try:
            async for messages in response:
                yield messages
        except (RayActorError, RayServeException) as error:
            raise ReplicaLostError(self.name) from error
        finally:
            response.cancel()  # nothing where it has ended

    async def table(self) -> DepthTable:
        """As `EngineReplica.table`."""
        return await self._asked("table")

    async def alive(self) -> None:
        """As `EngineReplica.alive`."""
        await self._asked("alive")

    async def _asked(self, name: str) -> Any:
        try:
            return await getattr(self._handle, name).remote()
        except (RayError, RayServeException) as error:
            raise ReplicaLostError(self.name) from error


class FrontReplica:
    """What runs in the replica of the front. handles: of the engines' deployments, by name."""

    def __init__(self, handles: Mapping[str, DeploymentHandle], options: FrontOptions) -> None:
        replicas = [HandleReplica(name, handle) for name, handle in handles.items()]
        self._front = Front(replicas, options.batch, options.choose)
        self.application = guarded(
            self._front,
            api_key=options.api_key,
            log_bodies=options.log_bodies,
            allow_origins=options.allow_origins,
        )
        self._log = ExitStack()
        self._log.enter_context(log_to_stderr())

    async def ready(self) -> list[int]:
        """The depths on offer, once all engines are there."""
        return list((await self._front.ready()).entries)

    async def drain(self) -> None:
        """As `Front.drain`."""
        await self._front.drain()

    async def stop(self) -> None:
        """As `Front.stop`."""
        await self._front.stop()


async def enter(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer by the application of the `FrontReplica` that runs in this process."""
    if scope["type"] == "lifespan":
        kind = ""
        while kind != "lifespan.shutdown":
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
        return

    async def send_without_id(message: Message) -> None:
        if message["type"] == "http.response.start":  # Ray Serve's proxy adds the header itself
            message = {**message, "headers": [each for each in message["headers"] if each[0] != b"x-request-id"]}
        await send(message)

    await serve.get_replica_context().servable_object.application(scope, receive, send_without_id)


def build() -> ASGIApp:
    """What Ray Serve asks for its application once a replica has begun."""
    return enter


def serve_replicas(
    open_service: Callable[[int], Service],
    replicas: ReplicaOptions,
    front: FrontOptions,
    *,
    address: str | None,
    host: str,
    port: int,
    on_ready: Callable[[Sequence[int]], None],
) -> int:
    """Serve until a signal comes: 0 where all requests that had come were answered, 1 where the second cut some off.

    on_ready: called with the depths on offer once requests are answered; all else as in `deployed`.
    """
    with (
        deployed(open_service, replicas, front, address=address, host=host, port=port) as handle,
        _signals() as signals,
    ):
        on_ready(handle.ready.remote().result())
        signals.wait_for(1)
        return 0 if _drain(handle, signals) else 1


@contextmanager
def deployed(
    open_service: Callable[[int], Service],
    replicas: ReplicaOptions,
    front: FrontOptions,
    *,
    address: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> Iterator[DeploymentHandle]:
    """The front before the replicas, by its handle, until the end of the block.

    open_service: what a replica of so many threads begins with. address: of a cluster of Ray's that runs; None: one of
    this process's own, on this machine. Raises ValueError where it has no room, or the replicas or Ray Serve's proxy
    cannot start.
    """
    with _cluster(address):
        cpus = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
        num_threads = replicas.threads_on(cpus)
        application = _application(partial(open_service, num_threads), replicas, num_threads, front)
        is_serving = bool(serve.status().proxies)
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        try:
            handle = _run(application)
            _wait_for_proxy()
            yield handle
        finally:
            serve.delete(APP)
            if not is_serving and not serve.status().applications:
                serve.shutdown()  # else it would keep host and port for whatever comes next on this cluster


def _application(
    open_service: Callable[[], Service], replicas: ReplicaOptions, num_threads: int, front: FrontOptions
) -> serve.Application:
    """A deployment of one replica for each engine, so that the front can say which one it means, and the front's."""
    common = {
        "num_replicas": 1,
        "max_ongoing_requests": _MOST_ONGOING,
        "graceful_shutdown_timeout_s": _GRACE_S,
        "health_check_period_s": _HEALTH_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
    }
    resources = {"num_cpus": num_threads, "num_gpus": replicas.num_gpus}
    engines = {
        name: serve.deployment(EngineReplica)
        .options(name=name, ray_actor_options=resources, **common)
        .bind(open_service)
        for name in (f"replica-{index}" for index in range(replicas.num_replicas))
    }
    entered = serve.deployment(serve.ingress(build)(FrontReplica))
    return entered.options(name=_FRONT, ray_actor_options={"num_cpus": 0}, **common).bind(engines, front)


def _run(application: serve.Application) -> DeploymentHandle:
    try:
        return serve.run(application, name=APP, route_prefix="/")
    except RuntimeError as error:
        raise ValueError(f"serve_replicas: the replicas must start, got: {_why(error)}") from error


def _wait_for_proxy() -> None:
    """Return once it listens."""
    end_s = time.monotonic() + _PROXY_TIMEOUT_S
    while ProxyStatus.HEALTHY not in (found := list(serve.status().proxies.values())):
        if time.monotonic() > end_s:
            shown = ", ".join(status.value for status in found) or "none"
            raise ValueError(
                f"serve_replicas: Ray Serve's proxy must listen within {_PROXY_TIMEOUT_S} s, got {shown}. Its log is "
                "in logs/serve of Ray's folder on the cluster's first node."
            )
        time.sleep(0.1)


def _why(error: RuntimeError) -> str:
    """What the constructor of a replica that does not start has raised."""
    found = serve.status().applications.get(APP)
    deployments = [] if found is None else found.deployments.values()
    # Those that are still at it only say that they are slow.
    messages = [each.message for each in deployments if each.status in _FAILED]
    lines = [line for message in messages for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else str(error)


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": True, "namespace": APP, "logging_level": "WARNING"}
    if address is None:
        os.environ.setdefault("RAY_worker_niceness", "0")  # by Ray's 15 all else on the machine goes before the engines
        options |= {"object_store_memory": _OBJECT_STORE, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    ray.init("local" if address is None else address, **options)
    try:
        yield
    finally:
        ray.shutdown()


class _Signals:
    """Counts SIGINT and SIGTERM."""

    def __init__(self) -> None:
        self.count = 0
        self._arrived = threading.Event()

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        self._arrived.set()

    def wait_for(self, count: int) -> None:
        """Wait until so many have come."""
        while self.count < count:
            self._arrived.wait(0.5)


@contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    before = {number: signal.signal(number, signals) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _drain(handle: DeploymentHandle, signals: _Signals) -> bool:
    """Whether all requests that had come were answered before the second signal."""
    draining = handle.drain.remote()
    while signals.count < 2:
        with suppress(TimeoutError):
            draining.result(timeout_s=0.2)
            return True
    handle.stop.remote().result()
    return False
