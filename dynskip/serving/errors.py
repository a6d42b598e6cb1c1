"""`APIError`: what a client is told when a request fails, and what else is turned into one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from dynskip.arguments import is_own_error
from dynskip.engine.diagnosis import NoTokenError
from dynskip.engine.request import EngineStoppedError, RequestError

# Of the library's own errors those that name a field of a request.
_NAMED = re.compile(r"(?:SamplingParams|add_request): (?!token_ids)(\w+) must ")
# The code of prompts that are too long, as OpenAI has it.
CONTEXT_LENGTH = "context_length_exceeded"
# What pydantic calls a type of several that a value may have.
_TYPE = re.compile(r"str|int|float|bool|list\[.*\]")
# By status: the ``type`` that OpenAI's clients know, and a ``code``.
_KINDS = {
    HTTPStatus.UNAUTHORIZED: ("authentication_error", "invalid_api_key"),
    HTTPStatus.NOT_FOUND: ("not_found_error", "not_found"),
    HTTPStatus.TOO_MANY_REQUESTS: ("rate_limit_error", "queue_full"),
}


class APIError(Exception):
    """Ends one request: over HTTP with ``status``, in the middle of a stream as data.

    param: the field of the request that is to blame, if one is. code: for programs; None: that of the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, dict(headers or {})
        default = ("server_error", "internal_error") if status >= 500 else ("invalid_request_error", "invalid_value")
        self.type, default_code = _KINDS.get(HTTPStatus(status), default)
        self.code = code or default_code

    @property
    def body(self) -> dict[str, Any]:
        """``{"error": {...}}``, as OpenAI's clients read it."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None, code: str | None = None) -> APIError:
    """What a client can mend: status 400."""
    return APIError(HTTPStatus.BAD_REQUEST, message, param, code)


def too_long(field: str, max_context_len: int, found: int | str) -> APIError:
    """Of a prompt of ``found`` tokens, or of what else cannot fit in a context of so many."""
    most = max_context_len - 1
    message = f"{field}: it must be at most {most} tokens long, one less than the context, got {found}."
    return bad_request(message, field, CONTEXT_LENGTH)


def unsupported(name: str, advice: str) -> APIError:
    """Of a field that asks for what is not there."""
    return bad_request(f"{name}: it must be left out, got a value. {advice}", name, "unsupported_value")


def as_api_error(error: Exception, param: str | None = None) -> APIError | None:
    """What a client is told of ``error``; None for a bug, of which it learns no more than that.

    param: the field to blame for bad input whose message names none.
    """
    if isinstance(error, APIError):
        return error
    if isinstance(error, EngineStoppedError):
        return engine_stopped()
    if isinstance(error, RequestError) and isinstance(error.__cause__, NoTokenError):
        field = error.__cause__.parameter
        return bad_request(f"{field}: it must leave a token that may come, got none, or infinity, behind it.", field)
    if isinstance(error, RequestError):
        return APIError(HTTPStatus.INTERNAL_SERVER_ERROR, str(error), code="request_failed")
    if isinstance(error, ValueError | TypeError) and is_own_error(error):
        named = _NAMED.match(str(error))
        return bad_request(_of_field(str(error), named[1] if named else param), named[1] if named else param)
    return None


def _of_field(message: str, field: str | None) -> str:
    """An error of the library's as one of a field: what a client has not called is not named."""
    says = message.partition(": ")[2]
    return says if field is None else f"{field}: {re.sub(rf'^(?:{re.escape(field)}|token_ids)(?= must )', 'it', says)}"


def told(error: Exception, param: str | None = None) -> APIError:
    """As `as_api_error`; a bug is raised as it is."""
    found = as_api_error(error, param)
    if found is None:
        raise error
    return found


def engine_stopped() -> APIError:
    """Where nothing can be served any more: another server may."""
    return APIError(HTTPStatus.SERVICE_UNAVAILABLE, "The engine has stopped.", code="stopped")


def internal_error() -> APIError:
    """All that a client learns of a bug."""
    return APIError(HTTPStatus.INTERNAL_SERVER_ERROR, "The server has failed at this request; its log says where.")


def not_json() -> APIError:
    """Of a body that is no JSON, or none that can be read."""
    message = "body: it must be JSON, without numbers of thousands of digits or as many levels, got something else."
    return bad_request(message, None, "invalid_json")


def validation_error(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """The first of pydantic's ``errors``, with the name of its field. What the client sent is not repeated.

    Of a value that may be of several types the one is told that it is of the longest, or all that it could have been.
    """
    if errors[0]["type"] == "json_invalid":
        return not_json()
    first = _place(errors[0]["loc"])
    of_field = [place for error in errors if (place := _place(error["loc"]))[:1] == first[:1]]
    place = max(of_field, key=lambda place: [part for part in place if isinstance(part, int)])
    if not place:
        message = "body: it must be an object with names in Unicode, as Content-Type: application/json, got another."
        return bad_request(message, None)
    param = str(place[0]) if place and isinstance(place[0], str) else None
    said = dict.fromkeys(error["msg"] for error in errors if _place(error["loc"]) == place)
    return bad_request(f"{'.'.join(map(str, place))}: {', or: '.join(said)}.", param)


def _place(loc: Sequence[int | str]) -> tuple[int | str, ...]:
    """Where in a body something is wrong: ("messages", 0, "role") of pydantic's ("body", "messages", 0, "role").

    Behind the name of a field it has the types that were tried, too.
    """
    names = [part for part in loc[2:] if isinstance(part, int) or not _TYPE.fullmatch(part)]
    return (*loc[1:2], *names)
