"""``dynskip serve``: a model behind the OpenAI API, with a depth per request."""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynskip.cli.options import UserError, add_model_options, add_number, file_path, in_range, load_llm, set_threads

if TYPE_CHECKING:
    import socket

    from dynskip.llm import LLM

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

It prints a line for curl and the address of its page once it is ready. SIGTERM or Ctrl-C ends it when the requests that
have come are answered, the second one at once.
"""
NEEDS = ("fastapi", "uvicorn", "prometheus_client", "starlette", "pydantic")
_MOST = 1_000_000


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``serve``."""
    add_model_options(parser, positional=True)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", metavar="HOST", help="address (default: %(default)s)")
    add_number(group, "--port", "PORT", 0, 65535, 8000, "0 takes one that is free")
    group.add_argument("--api-key", metavar="KEY", help="what clients must send as a bearer token; /health is open")
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


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes; exit status 0 where all requests were answered, 1 where some were cut off."""
    try:
        from dynskip.serving.server import bind, log_to_stderr
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in NEEDS:
            raise
        raise UserError(
            f"serve needs {error.name}, which is not installed. Use pip install 'dynskip[serve]'"
        ) from error
    name = args.served_model_name or args.model
    set_threads(args.threads)
    try:
        bound = bind(args.host, args.port)
    except OSError as error:
        raise UserError(
            f"--host and --port must be an address that is free, got {args.host}:{args.port} ({error})"
        ) from error
    with bound, log_to_stderr():
        return asyncio.run(_serve(args, load_llm(args), name, bound))


async def _serve(args: argparse.Namespace, llm: LLM, name: str, bound: socket.socket) -> int:
    from dynskip.async_llm import AsyncLLM
    from dynskip.serving.app import make_app
    from dynskip.serving.depths import DepthTable
    from dynskip.serving.server import Server, url_of
    from dynskip.serving.service import Service

    table = DepthTable(llm.model, name, _file(args.paths), args.path, args.draft)
    options = {"kv_bytes": args.kv_bytes, "batch": args.batch, "max_context_len": args.max_model_len}
    options["prefix_caching"] = args.prefix_caching
    options["max_prefill_tokens"] = args.max_prefill_tokens
    async with AsyncLLM(llm, args.policy, **options) as served:
        service = Service(served, table, args.max_queue)
        app = make_app(service, api_key=args.api_key, log_bodies=args.log_requests, allow_origins=args.origins)
        hello = greeting(url_of(bound), name, list(table.entries), args.api_key is not None)
        server = Server(app, lambda: print(hello, flush=True))
        try:
            await server.serve([bound])
        finally:
            service.close()
    return 0 if server.has_drained else 1


def greeting(url: str, name: str, depths: Sequence[int], needs_key: bool) -> str:
    """Where the server is, a line for a shell that asks it something, the depths on offer, and its page."""
    body = json.dumps({"model": name, "prompt": "Once upon a time", "max_tokens": 16})
    key = ' -H "Authorization: Bearer $KEY"' if needs_key else ""
    command = f"curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    offer = (
        f"\nlayers on offer, by `depth` or as in {name}@{depths[0]}: {', '.join(map(str, depths))}" if depths else ""
    )
    return f"dynskip serves {name} at {url}/v1\n{command}{offer}\na page to try it on: {url}/"


def _file(text: str | None) -> Path | None:
    return None if text is None else file_path(text)
