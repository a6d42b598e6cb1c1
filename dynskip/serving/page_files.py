"""The page at ``/``: its files, and the headers that keep it to itself. It needs no key: it asks for one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

_FOLDER = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Nothing from elsewhere, nothing inline, no frame around it; forms are sent by the script alone.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Kept, but asked for again each time: a server that was updated is never shown with parts of its old page.
    "cache-control": "no-cache",
}
PAGE_ROUTER = APIRouter(include_in_schema=False)


class _File:
    """A file of the page as it is sent, and its tag."""

    def __init__(self, path: Path) -> None:
        self._body = path.read_bytes()
        self._tag = f'"{hashlib.sha256(self._body).hexdigest()[:32]}"'
        self._type = f"{_TYPES[path.suffix]}; charset=utf-8"

    def answer(self, request: Request) -> Response:
        """The file, or 304 where the browser has it."""
        headers = {**_HEADERS, "etag": self._tag}
        tags = request.headers.get("if-none-match", "")
        if self._tag in (tag.strip().removeprefix("W/") for tag in tags.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(self._body, headers={**headers, "content-type": self._type})


def _serve(route: str, path: Path) -> None:
    file = _File(path)

    async def answer(request: Request) -> Response:
        return file.answer(request)

    PAGE_ROUTER.add_api_route(route, answer, methods=["GET", "HEAD"])


_ROUTES = {f"/page/{path.name}": path for path in sorted(_FOLDER.iterdir()) if path.suffix != ".html"}
_ROUTES["/"] = _FOLDER / "index.html"
for _route, _path in _ROUTES.items():
    _serve(_route, _path)
# What needs no key.
PAGE_ROUTES = frozenset(_ROUTES)
