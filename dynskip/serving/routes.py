"""The routes of the API. Bodies are read by `protocol`, answered by `Service`."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from dynskip.engine.request import RequestError
from dynskip.serving.errors import bad_request, engine_stopped
from dynskip.serving.fields import check_others
from dynskip.serving.metrics import CONTENT_TYPE
from dynskip.serving.page_data import live, offer
from dynskip.serving.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, ErrorBody, TokenizeRequest
from dynskip.serving.service import Service
from dynskip.version import __version__

_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "A field is wrong; `param` names it.",
        401: "The key is missing or wrong.",
        404: "No such model.",
        408: "The body did not come to its end.",
        413: "The body is too large.",
    }.items()
}
_FAILURES: dict[int | str, dict[str, Any]] = {
    429: {"model": ErrorBody, "description": "The queue is full; see Retry-After."},
    500: {"model": ErrorBody, "description": "The request, or the server, has failed."},
    503: {"model": ErrorBody, "description": "The server is stopping."},
}
ROUTER = APIRouter()
T = TypeVar("T")


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@ROUTER.post("/v1/completions", responses={**_REFUSALS, **_FAILURES})
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue prompts."""
    planner = _service(request).planner
    return await _service(request).answer(body, lambda: planner.completion(body, request.state.request_id), request)


@ROUTER.post("/v1/chat/completions", responses={**_REFUSALS, **_FAILURES})
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    planner = _service(request).planner
    return await _service(request).answer(body, lambda: planner.chat(body, request.state.request_id), request)


@ROUTER.get("/v1/models", responses={401: _REFUSALS[401]})
async def models(request: Request) -> JSONResponse:
    """The model, and its name with each depth on offer."""
    service = _service(request)
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.table.names]})


@ROUTER.get("/v1/models/{name:path}", responses={401: _REFUSALS[401], 404: _REFUSALS[404]})
async def model(name: str, request: Request) -> JSONResponse:
    """One of them."""
    return JSONResponse(_model(_service(request), name))


@ROUTER.get("/v1/depths", responses={401: _REFUSALS[401]})
async def depths(request: Request) -> JSONResponse:
    """The paths and drafts on offer, and what bounds a request."""
    return JSONResponse(offer(_service(request)))


@ROUTER.get("/v1/engine", responses={400: _REFUSALS[400], 401: _REFUSALS[401], 503: _FAILURES[503]})
async def engine(request: Request, since: Annotated[int, Query(ge=0)] = 0) -> JSONResponse:
    """What the engine holds now, and its last steps, those behind step number ``since``, in numbers."""
    watched = await _unless_stopped(_service(request).served.watch(since))
    return JSONResponse(live(watched), headers={"cache-control": "no-store"})


@ROUTER.post("/tokenize", responses={**_REFUSALS, 429: _FAILURES[429]})
async def tokenize(body: TokenizeRequest, request: Request) -> JSONResponse:
    """The token ids of a text or of a conversation."""
    service = _service(request)
    check_others(body)
    service.table.of(body.model, None, None, None)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("prompt: either it or messages must be given, got both or none.", "prompt")
    if body.messages is not None and body.add_special_tokens:
        raise bad_request("add_special_tokens: it must be left out beside messages, got a value.", "add_special_tokens")
    return JSONResponse(await service.read(lambda: _tokenized(body, service), request))


async def _tokenized(body: TokenizeRequest, service: Service) -> dict[str, Any]:
    reader = service.reader
    if body.prompt is not None:
        tokens = await reader.tokens(body.prompt, body.add_special_tokens is not False)
    else:
        tokens = await reader.chat(body.messages or [])
    texts = await reader.token_texts(tokens) if body.return_token_strs else None
    longest = service.served.max_context_len
    return {"count": len(tokens), "max_model_len": longest, "tokens": tokens, "token_strs": texts}


@ROUTER.post("/detokenize", responses={**_REFUSALS, 429: _FAILURES[429]})
async def detokenize(body: DetokenizeRequest, request: Request) -> JSONResponse:
    """The text of token ids."""
    service = _service(request)
    check_others(body)
    service.table.of(body.model, None, None, None)
    return JSONResponse({"prompt": await service.read(lambda: service.reader.text(body.tokens), request)})


@ROUTER.head("/health", include_in_schema=False)
@ROUTER.get("/health", responses={503: _FAILURES[503]})
async def health(request: Request) -> Response:
    """Whether requests can be served: 200, with an empty body, or 503. It waits for no step."""
    try:
        _service(request).served.check()
    except RequestError as error:
        raise engine_stopped() from error
    return Response()


@ROUTER.get("/version")
async def version() -> JSONResponse:
    """The version of dynskip."""
    return JSONResponse({"version": __version__})


@ROUTER.get("/metrics", responses={503: _FAILURES[503]})
async def metrics(request: Request) -> Response:
    """What Prometheus reads."""
    service = _service(request)
    stats = await _unless_stopped(service.served.stats())
    admission = service.admission
    page = service.metrics.page(stats, admission.num_held, admission.num_refused)
    return Response(page, media_type=CONTENT_TYPE)


async def _unless_stopped(asked: Awaitable[T]) -> T:
    """What the engine says; an APIError where it has stopped."""
    try:
        return await asked
    except RequestError as error:
        raise engine_stopped() from error


def _model(service: Service, name: str) -> dict[str, Any]:
    named = service.table.of(name, None, None, "none").named
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "dynskip",
        "root": service.table.name,
        "max_model_len": service.served.max_context_len,
        "path": named.name,
        "layers": list(named.path.layers),
    }
