"""The OpenAPI page, and requests made at random by it: whatever is sent, the server neither fails nor stops."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest
import schemathesis
from api import on_loopback, tiny_llm
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

ROUTES = [
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{name}", "GET"),
    ("/v1/depths", "GET"),
    ("/v1/engine", "GET"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/health", "GET"),
    ("/version", "GET"),
    ("/metrics", "GET"),
]
# Of which something can be wrong.
WITH_FIELDS = [(path, method) for path, method in ROUTES if method == "POST" or path == "/v1/engine"]
DRAWN = [(*route, GenerationMode.POSITIVE) for route in ROUTES]
DRAWN += [(*route, GenerationMode.NEGATIVE) for route in WITH_FIELDS]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with on_loopback(tiny_llm(), policy="lockstep", batch=16) as found:
        yield found


def test_the_page_has_the_routes(url: str) -> None:
    page = httpx2.get(f"{url}/openapi.json").json()
    found = [(path, method.upper()) for path, methods in page["paths"].items() for method in methods]
    assert sorted(found) == sorted(ROUTES)
    for path, method in ROUTES:
        operation = page["paths"][path][method.lower()]
        assert "422" not in operation["responses"], "bad fields are 400"


@pytest.mark.parametrize(("path", "method", "mode"), DRAWN)
def test_no_request_makes_it_fail(url: str, path: str, method: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    statuses = set()

    @settings(
        max_examples=30, deadline=None, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(case=schema[path][method].as_strategy(mode))
    def check(case: schemathesis.Case) -> None:
        response = case.call()
        case.validate_response(response, checks=[not_a_server_error])
        statuses.add(response.status_code)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    check()
    assert mode.is_positive or max(statuses) >= 400, "what does not fit the page is refused"
    assert httpx2.get(f"{url}/health").status_code == 200
