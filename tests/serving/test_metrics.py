"""The page that Prometheus reads: names, values, and that the documentation has them all."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api import NAME, Brake, Exchange, local, run, tiny_llm
from prometheus_client.parser import text_string_to_metric_families

from dynskip import LLM, Engine, SamplingParams
from dynskip.serving import fields, protocol
from dynskip.serving.metrics import ServerMetrics

ROOT = Path(__file__).parents[2]
VLLM = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "num_preemptions",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "request_queue_time_seconds",
    "e2e_request_latency_seconds",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm()


async def families(server: Any) -> dict[str, Any]:
    """The metrics by name, as Prometheus' own parser reads them."""
    answer = await server.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def value(found: dict[str, Any], family: str, sample: str = "", **labels: str) -> float:
    """The one value of a metric with these labels."""
    wanted = {"model_name": NAME, **labels}
    (one,) = (
        each.value
        for each in found[family].samples
        if each.name == (sample or each.name) and each.labels == wanted and not each.name.endswith("_created")
    )
    return one


def test_values_are_those_of_the_requests(llm: LLM) -> None:
    async def main() -> None:
        async with local(llm) as server:
            before = await families(server)
            assert value(before, "vllm:num_requests_running") == value(before, "vllm:num_requests_waiting") == 0
            assert value(before, "vllm:kv_cache_usage_perc") == 0
            options = {"ignore_eos": True, "max_tokens": 5}
            await server.generated(**options)
            await server.generated(**options, prompt=[5, 6], n=2, path="uniform:2", temperature=1)
            await server.generated(**options, prompt=[5, 6], path="full", draft="exit:2")
            stats = await server.until_idle()
            found = await families(server)
            assert value(found, "vllm:prompt_tokens", "vllm:prompt_tokens_total") == 3 + 2 + 2
            assert value(found, "vllm:generation_tokens", "vllm:generation_tokens_total") == 20
            assert value(found, "vllm:request_success", finished_reason="length") == 4
            for name in (
                "time_to_first_token",
                "e2e_request_latency",
                "request_queue_time",
                "request_time_per_output_token",
            ):
                family = f"vllm:{name}_seconds"
                assert value(found, family, f"{family}_count") == 3, name
            assert value(found, "vllm:inter_token_latency_seconds", "vllm:inter_token_latency_seconds_count") == 16
            assert value(found, "dynskip_depth_tokens", layers="2") == 10
            assert value(found, "dynskip_depth_requests", layers="6") == 2
            assert value(found, "vllm:spec_decode_num_draft_tokens") == stats.num_drafted
            assert value(found, "vllm:prefix_cache_queries") == stats.num_prefix_queries == 3 + 2 + 2 + 2
            assert value(found, "vllm:prefix_cache_hits") == 0
            assert value(found, "dynskip_num_finished") == stats.num_finished == 4
            assert value(found, "dynskip_kv_capacity_bytes") == stats.kv_capacity_bytes
            assert value(found, "dynskip_ttft_s", percentile="50") == pytest.approx(stats.outcome.ttft_s[0])

    run(main())


def test_each_wait_for_a_token_is_counted_as_long_as_it_was(llm: LLM) -> None:
    (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(output.samples[0].token_times_s) == 4
    # A step that gave two tokens, and then another request's prompt.
    paused = replace(output.samples[0], token_times_s=[1.0, 1.5, 1.5, 4.0])
    metrics = ServerMetrics(NAME)
    metrics.finished(replace(output, samples=(paused,)))
    page = metrics.page(Engine(llm.model, policy="lockstep").stats(), 0, 0).decode()
    found = {family.name: family for family in text_string_to_metric_families(page)}
    name = "vllm:inter_token_latency_seconds"
    assert (value(found, name, f"{name}_sum"), value(found, name, f"{name}_count")) == (3.0, 3)
    below = [value(found, name, f"{name}_bucket", le=bound) for bound in ("0.001", "0.25", "0.5", "1.0", "2.5")]
    assert below == [1, 1, 2, 2, 3]


def test_prompts_that_come_again_are_hits(llm: LLM) -> None:
    async def main() -> None:
        async with local(llm, max_prefill_tokens=16) as server:
            for _ in range(3):
                await server.generated(prompt=[*range(5, 45)], max_tokens=2)
            found = await families(server)
            assert value(found, "vllm:prefix_cache_queries") == 120
            assert value(found, "vllm:prefix_cache_hits") == value(found, "dynskip_num_shared_tokens") == 64
            assert value(found, "dynskip_prefix_bytes") == 32 * llm.model.num_layers * llm.model.kv_entry_bytes
            assert value(found, "dynskip_prefix_hit_rate") == 64 / 120
            await server.served.reset_prefix_cache()
            assert value(await families(server), "dynskip_prefix_bytes") == 0

    run(main())


def test_every_figure_of_the_engine_and_every_name_of_vllm_is_there_and_documented(llm: LLM) -> None:
    async def main() -> tuple[set[str], Any]:
        async with local(llm) as server:
            await server.generated(max_tokens=2)
            return set(await families(server)), await server.served.stats()

    names, stats = run(main())
    assert {f"vllm:{name}" for name in VLLM} <= names
    assert {f"dynskip_{name}" for name in stats.line()} <= names
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    # Prometheus' client adds the time at which a counter began.
    own = {name for name in names if name.removeprefix("dynskip_") not in stats.line()}
    own = {name for name in own if not name.endswith("_created")}
    assert [name for name in sorted(own) if f"`{name}`" not in page] == []


def test_the_documentation_has_every_field_and_every_route(llm: LLM) -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    kinds = (protocol.CompletionRequest, protocol.ChatRequest, protocol.TokenizeRequest, protocol.DetokenizeRequest)
    kinds = (*kinds, protocol.StreamOptions)
    named = {name for kind in kinds for name in kind.model_fields} | fields.HARMLESS | set(fields.NEUTRAL)
    assert [name for name in sorted(named) if not re.search(rf"`(?:\w+\.)?{name}`", page)] == []

    async def main() -> list[str]:
        async with local(llm) as server:
            return list((await server.client.get("/openapi.json")).json()["paths"])

    routes = run(main())
    assert "/v1/completions" in routes
    assert [route for route in routes if f"`{route}`" not in page] == []


def test_requests_that_run_and_wait_are_counted(llm: LLM) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 40, "ignore_eos": True, "stream": True}

    async def main() -> None:
        async with local(llm, policy="lockstep", batch=1, costs=None) as server:
            brake = Brake(server.served)
            running, waiting = (Exchange(server.app, "/v1/completions", body) for _ in range(2))
            while server.service.admission.num_held < 2:
                await asyncio.sleep(0)
            brake.let(2)
            await running.until_events(1)
            asked = asyncio.ensure_future(families(server))
            while not asked.done():
                brake.let(1)  # the engine answers between steps
                await asyncio.wait([asked], timeout=0.2)
            found = await asked
            assert value(found, "vllm:num_requests_running") == 1
            assert value(found, "vllm:num_requests_waiting") == 1
            assert value(found, "dynskip_num_held") == 2
            assert 0 < value(found, "vllm:kv_cache_usage_perc") < 1
            brake.release()
            await asyncio.gather(running.task, waiting.task)

    run(main())
