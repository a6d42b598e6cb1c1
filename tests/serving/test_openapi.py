"""The OpenAPI page, and requests made at random by it: whatever is sent, the server neither fails nor stops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import schemathesis
from api import on_loopback, tiny_llm
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
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


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "w5 w6 w7"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "w5 w6 w7"}]}),
    ],
)
def test_some_fields_of_a_request_that_is_answered(url: str, path: str, asked: dict[str, Any]) -> None:
    """Requests that reach the engine: of what is drawn some fields stay, beside a model and a prompt that there are."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    name = httpx2.get(f"{url}/v1/models").json()["data"][0]["id"]
    statuses = []

    @settings(
        max_examples=60, deadline=None, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(case=schema[path]["POST"].as_strategy(GenerationMode.POSITIVE), data=st.data())
    def check(case: schemathesis.Case, data: st.DataObject) -> None:
        fields = sorted(case.body.keys() - {"model", "max_tokens", "max_completion_tokens", *asked})
        kept = data.draw(st.sets(st.sampled_from(fields), max_size=2)) if fields else set()
        case.body = {field: case.body[field] for field in kept} | {"model": name, "max_tokens": 3} | asked
        response = case.call()
        case.validate_response(response, checks=[not_a_server_error])
        statuses.append(response.status_code)

    check()
    assert statuses.count(200) >= 10 and {*statuses} <= {200, 400, 404}
