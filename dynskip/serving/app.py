"""`make_app`: the ASGI application that serves a model."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from dynskip.serving.answers import as_json
from dynskip.serving.errors import APIError, not_json, validation_error
from dynskip.serving.gate import MAX_BODY, Gate
from dynskip.serving.page_files import PAGE_ROUTER
from dynskip.serving.routes import ROUTER
from dynskip.serving.service import Service
from dynskip.version import __version__


class API(FastAPI):
    """FastAPI whose page does not promise the 422 that bad fields get elsewhere: here it is a 400."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI page."""
        page = super().openapi()
        for operations in page["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            page["components"]["schemas"].pop(name, None)
        return page


def make_app(
    service: Service,
    *,
    api_key: str | None = None,
    max_body: int = MAX_BODY,
    log_bodies: bool = False,
    allow_origins: Sequence[str] = (),
) -> API:
    """The routes of ``service``, behind a `Gate` with these options.

    allow_origins: of pages elsewhere that browsers may let call the API; none by default.
    """
    # The pages of FastAPI's that show the API load scripts from elsewhere.
    app = API(title="dynskip", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.include_router(ROUTER)
    app.include_router(PAGE_ROUTER)
    app.add_exception_handler(APIError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_middleware(Gate, api_key=api_key, max_body=max_body, log_bodies=log_bodies)
    if allow_origins:
        # Around the gate: a browser asks without a key whether it may ask.
        app.add_middleware(CORSMiddleware, **_cors(allow_origins))
    return app


def guarded(
    app: ASGIApp, *, api_key: str | None = None, log_bodies: bool = False, allow_origins: Sequence[str] = ()
) -> ASGIApp:
    """``app`` behind what `make_app` puts before its routes."""
    gate = Gate(app, api_key=api_key, log_bodies=log_bodies)
    return CORSMiddleware(gate, **_cors(allow_origins)) if allow_origins else gate


def _cors(allow_origins: Sequence[str]) -> dict[str, Any]:
    return {
        "allow_origins": list(allow_origins),
        "allow_methods": ["GET", "POST"],
        "allow_headers": ["*"],
        "expose_headers": ["x-request-id", "retry-after"],
    }


async def _on_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError), "registered for these"
    return Response(as_json(error.body), error.status, error.headers, "application/json")


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError), "registered for these"
    return await _on_api_error(request, validation_error(error.errors()))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """No such route, or another method of it, or JSON that its parser gives up at."""
    assert isinstance(error, HTTPException), "registered for these"
    if error.status_code == HTTPStatus.BAD_REQUEST:
        return await _on_api_error(request, not_json())
    found = APIError(error.status_code, str(error.detail), code="http_error", headers=error.headers)
    return await _on_api_error(request, found)
