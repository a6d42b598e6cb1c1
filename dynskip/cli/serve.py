"""``dynskip serve``: a model behind the OpenAI API, with a depth per request."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import shlex
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dynskip.cli.options import UserError, add_model_options, add_number, file_path, in_range, load_llm, set_threads

if TYPE_CHECKING:
    import socket

    from dynskip.serving.service import Service

HELP = "serve the OpenAI API, with a depth per request"
DESCRIPTION = "Serve a model behind the OpenAI API, each request along its own subset of the layers."
EXAMPLES = """examples:
  dynskip serve opt-mini
      at http://127.0.0.1:8000/v1; requests choose their layers by "path": "uniform:8"
  dynskip serve smollm2-135m-instruct --threads 2
      requests choose by "depth": 27, from the paths that a search has found, or by the model's name with @27
  dynskip serve MODEL --host 0.0.0.0 --port 80 --api-key KEY --max-queue 64
      for others, who need the key; beyond 64 waiting outputs they are told to try again later
  dynskip serve MODEL --paths paths.txt --path uniform:8
      depths from a file, a path a line; 8 layers for requests that choose none
  dynskip serve MODEL --replicas 4 --threads 8
      four engines on Ray Serve, each with 8 threads; with --ray-address on a cluster that runs

It prints a line for curl and the address of its page once it is ready. SIGTERM or Ctrl-C ends it when the requests that
have come are answered, the second one at once.
"""
NEEDS = ("fastapi", "uvicorn", "prometheus_client", "starlette", "pydantic")
API_KEY = "DYNSKIP_API_KEY"
_MOST = 1_000_000
# Seconds that an address may take to answer before it is said that it does not.
_ANSWER_TIMEOUT_S = 10


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``serve``."""
    add_model_options(parser, positional=True)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", metavar="HOST", help="address (default: %(default)s)")
    add_number(group, "--port", "PORT", 0, 65535, 8000, "0 takes one that is free")
    group.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get(API_KEY),
        help=f"what clients must send as a bearer token; /health is open (default: ${API_KEY}, which no listing of "
        "processes shows)",
    )
    add_number(group, "--max-queue", "N", 0, _MOST, 1024, "outputs that may wait; requests beyond are refused with 429")
    group.add_argument("--served-model-name", metavar="NAME", help="what clients call the model (default: MODEL)")
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        dest="origins",
        help="let web pages of ORIGIN call it, such as https://example.org, or * for all; may be repeated",
    )
    group.add_argument("--log-requests", action="store_true", help="log what clients send, prompts among it")
    group = parser.add_argument_group("depth")
    group.add_argument(
        "--path", default="full", metavar="PATH", help="of requests that choose none, as in dynskip generate"
    )
    group.add_argument(
        "--paths", metavar="FILE", help="the depths on offer: a path a line, or what dynskip search has written"
    )
    group.add_argument("--draft", metavar="PATH", help="guesses tokens for requests that choose no draft; or auto")
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--max-model-len", type=in_range(2, 2**31), metavar="N", help="most tokens of a prompt and its output"
    )
    add_number(
        group,
        "--max-prefill-tokens",
        "N",
        1,
        2**20,
        2048,
        "most prompt tokens of a step; the chunks that deterministic requests share",
    )
    group.add_argument(
        "--policy", choices=("cohort", "lockstep", "by_path"), default="cohort", help="who steps together"
    )
    group.add_argument("--kv-bytes", type=in_range(1, 2**50), metavar="BYTES", help="memory for keys and values")
    add_number(group, "--batch", "N", 1, 65536, 16, "most rows of a decode step")
    group.add_argument(
        "--no-prefix-caching",
        action="store_false",
        dest="prefix_caching",
        help="run every prompt whole, even if another one began alike",
    )
    group = parser.add_argument_group("replicas")
    group.add_argument(
        "--replicas",
        type=in_range(1, 1024),
        metavar="N",
        help="engines on Ray Serve; --threads are of each (default: one engine, in this process)",
    )
    group.add_argument(
        "--ray-address", metavar="ADDRESS", help="of the cluster; auto finds it (default: starts one on this machine)"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes; exit status 0 where all requests were answered, 1 where some were cut off."""
    if args.api_key is not None and (not args.api_key or args.api_key != args.api_key.strip()):
        raise UserError("--api-key must be a text without spaces around it, got one that is empty or has some")
    if args.ray_address is not None and args.replicas is None:
        raise UserError("--ray-address must be left out without --replicas, got one")
    try:
        from dynskip.serving.server import log_to_stderr

        if args.replicas is not None:
            import dynskip.serving.replicas.cluster  # noqa: F401 - whether it is there
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in (*NEEDS, "ray"):
            raise
        extra = "serve" if args.replicas is None else "ray"
        raise UserError(
            f"serve needs {error.name}, which is not installed. Use pip install 'dynskip[{extra}]'"
        ) from error
    if args.replicas is not None:
        return _serve_replicas(args)
    set_threads(args.threads)
    with _bound(args) as bound, log_to_stderr():
        return asyncio.run(_serve(args, bound))


@contextmanager
def _bound(args: argparse.Namespace) -> Iterator[socket.socket]:
    from dynskip.serving.server import bind

    try:
        bound = bind(args.host, args.port)
    except OSError as error:
        raise UserError(
            f"--host and --port must be an address that is free, got {args.host}:{args.port} ({error})"
        ) from error
    with bound:
        yield bound


def open_service(args: argparse.Namespace) -> Service:
    """The model, its engine, and what answers requests, as the options say; the caller closes its ``served``, too."""
    from dynskip.async_llm import AsyncLLM
    from dynskip.serving.depths import DepthTable
    from dynskip.serving.service import Service

    llm = load_llm(args)
    table = DepthTable(llm.model, _name(args), _file(args.paths), args.path, args.draft)
    options = {"kv_bytes": args.kv_bytes, "batch": args.batch, "max_context_len": args.max_model_len}
    options["prefix_caching"] = args.prefix_caching
    options["max_prefill_tokens"] = args.max_prefill_tokens
    service = Service(AsyncLLM(llm, args.policy, **options), table, args.max_queue)
    # What is there now stays: a full collection that looked at all of it would hold up every request for 0.2 s.
    gc.collect()
    gc.freeze()
    return service


async def _serve(args: argparse.Namespace, bound: socket.socket) -> int:
    from dynskip.serving.app import make_app
    from dynskip.serving.server import Server, url_of

    service = open_service(args)
    async with service.served:
        app = make_app(service, api_key=args.api_key, log_bodies=args.log_requests, allow_origins=args.origins)
        hello = greeting(url_of(bound), _name(args), list(service.table.entries), args.api_key is not None)
        server = Server(app, lambda: print(hello, flush=True))
        try:
            await server.serve([bound])
        finally:
            service.close()
    return 0 if server.has_drained else 1


def open_replica(args: argparse.Namespace, num_threads: int) -> Service:
    """As `open_service`, in a process of its own with so many threads."""
    set_threads(num_threads)
    return open_service(args)


def _serve_replicas(args: argparse.Namespace) -> int:
    from dynskip.serving.replicas.cluster import serve_replicas
    from dynskip.serving.replicas.options import FrontOptions, ReplicaOptions
    from dynskip.serving.server import url_of

    if (args.device or "cpu") not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda with --replicas, got {args.device}: each has a card of its own")
    with _bound(args) as bound:  # that it is free; Ray Serve binds it once the model is loaded
        port, url = bound.getsockname()[1], url_of(bound)
    given = argparse.Namespace(**{**vars(args), **_files(args), "served_model_name": _name(args)})

    def on_ready(depths: Sequence[int]) -> None:
        is_there = _answers(url)
        print(greeting(url, _name(args), depths, args.api_key is not None), flush=True)
        if not is_there:
            print(
                f"serve: {url} does not answer from here: Ray Serve keeps the host and port that it was given first, "
                "on the cluster's first node. Name these.",
                file=sys.stderr,
            )

    return serve_replicas(
        partial(open_replica, given),
        ReplicaOptions(args.replicas, args.threads, int(args.device == "cuda")),
        FrontOptions(args.batch, args.api_key, args.log_requests, tuple(args.origins)),
        address=args.ray_address,
        host=args.host,
        port=port,
        on_ready=on_ready,
    )


def _answers(url: str) -> bool:
    """Whether the server does at ``url``; a proxy that has just begun may not know its routes yet."""
    end_s = time.monotonic() + _ANSWER_TIMEOUT_S
    while time.monotonic() < end_s:
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=max(0.1, end_s - time.monotonic())):
            return True
        time.sleep(0.1)
    return False


def _files(args: argparse.Namespace) -> dict[str, str]:
    """The options that are files or folders here, by paths that hold wherever a replica's process begins."""
    found = {name: file_path(getattr(args, name) or "") for name in ("model", "adapter", "paths")}
    return {name: str(path.absolute()) for name, path in found.items() if getattr(args, name) and path.exists()}


def _name(args: argparse.Namespace) -> str:
    name: str = args.served_model_name or args.model
    return name


def greeting(url: str, name: str, depths: Sequence[int], needs_key: bool) -> str:
    """Where the server is, a line for a shell that asks it something, the depths on offer, and its page."""
    body = json.dumps({"model": name, "prompt": "Once upon a time", "max_tokens": 16})
    key = ' -H "Authorization: Bearer $KEY"' if needs_key else ""
    command = f"curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    offer = (
        f"\nlayers on offer, by `depth` or as in {name}@{depths[0]}: {', '.join(map(str, depths))}" if depths else ""
    )
    note = "\nKEY must hold the server's key: export KEY=..." if needs_key else ""
    return f"dynskip serves {name} at {url}/v1\n{command}{offer}\na page to try it on: {url}/{note}"


def _file(text: str | None) -> Path | None:
    return None if text is None else file_path(text)
