"""`ServerMetrics`: what Prometheus reads of a server, by our own names and by those of vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dynskip.engine.request import RequestOutput
from dynskip.engine.stats import EngineStats
from dynskip.scheduler.outcome import PERCENTILES

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCY_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
# Fields of `EngineStats.line` that only grow; those of tuples are percentiles; all others are gauges.
_COUNTED = frozenset(
    (
        "num_requests",
        "num_finished",
        "num_aborted",
        "num_shared_tokens",
        "num_drafted",
        "num_accepted",
        "num_verifications",
        "num_prefix_queries",
        "num_prefix_hits",
        "num_prefix_evictions",
        "num_decode_steps",
        "num_prefills",
        "num_preempted",
        "num_refused",
        "decode_s",
        "prefill_s",
    )
)
# By vLLM's names: what of the stats they are.
_VLLM_GAUGES = {"num_requests_running": "num_running", "num_requests_waiting": "num_waiting"}
_VLLM_COUNTERS = {
    "num_preemptions": "num_preempted",
    "prefix_cache_queries": "num_prefix_queries",
    "prefix_cache_hits": "num_prefix_hits",
    "spec_decode_num_drafts": "num_verifications",
    "spec_decode_num_draft_tokens": "num_drafted",
    "spec_decode_num_accepted_tokens": "num_accepted",
}


class _EngineCollector(Collector):
    """The stats of the engine at one moment, as Prometheus takes them."""

    def __init__(self, model: str) -> None:
        self._labels = {"model_name": model}
        self.line: dict[str, Any] = {}

    def collect(self) -> Iterator[Metric]:
        """Every field as ``dynskip_<field>``, and some by vLLM's names, too."""
        line = self.line
        if not line:  # asked for its names when it is registered
            return
        for name, value in line.items():
            yield from self._own(name, value)
        running = line["num_running"] + line["num_prefilling"]
        share = line["kv_bytes"] / line["kv_capacity_bytes"]
        gauges = {name: line[field] for name, field in _VLLM_GAUGES.items()}
        for name, value in {**gauges, "num_requests_running": running, "kv_cache_usage_perc": share}.items():
            yield self._family(GaugeMetricFamily, f"vllm:{name}", value)
        for name, field in _VLLM_COUNTERS.items():
            yield self._family(CounterMetricFamily, f"vllm:{name}", line[field])

    def _own(self, name: str, value: Any) -> Iterator[Metric]:
        text = f"The engine's {name}."
        if isinstance(value, tuple | list):
            family = GaugeMetricFamily(f"dynskip_{name}", text, labels=[*self._labels, "percentile"])
            for percentile, each in zip(PERCENTILES, value, strict=True):
                family.add_metric([*self._labels.values(), str(percentile)], each)
            yield family
        else:
            kind = CounterMetricFamily if name in _COUNTED else GaugeMetricFamily
            yield self._family(kind, f"dynskip_{name}", value, text)

    def _family(self, kind: Any, name: str, value: float, text: str = "As vLLM has it.") -> Metric:
        family = kind(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family


class ServerMetrics:
    """Counts what requests become. model: the label ``model_name`` of every value."""

    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineCollector(model)
        self._registry.register(self._engine)
        self._model = model
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts.").labels(model)
        self._tokens = self._counter("vllm:generation_tokens", "Tokens generated.").labels(model)
        self._ended = self._counter("vllm:request_success", "Outputs by how they ended.", "finished_reason")
        self._depth_requests = self._counter("dynskip_depth_requests", "Requests by layers of their paths.", "layers")
        self._depth_tokens = self._counter("dynskip_depth_tokens", "Tokens by layers of their paths.", "layers")
        self._ttft_s = self._histogram("vllm:time_to_first_token_seconds", _LATENCY_BUCKETS)
        self._queue_s = self._histogram("vllm:request_queue_time_seconds", _LATENCY_BUCKETS)
        self._latency_s = self._histogram("vllm:e2e_request_latency_seconds", _LATENCY_BUCKETS)
        self._token_s = self._histogram("vllm:inter_token_latency_seconds", _TOKEN_BUCKETS)
        self._tpot_s = self._histogram("vllm:request_time_per_output_token_seconds", _TOKEN_BUCKETS)

    def finished(self, output: RequestOutput) -> None:
        """A request has ended by itself."""
        num_tokens = sum(len(sample.token_ids) for sample in output.samples)
        self._prompt_tokens.inc(len(output.prompt_ids))
        self._tokens.inc(num_tokens)
        for sample in output.samples:
            self._ended.labels(self._model, sample.finish_reason).inc()
        if output.path is not None:
            layers = str(output.path.budget)
            self._depth_requests.labels(self._model, layers).inc()
            self._depth_tokens.labels(self._model, layers).inc(num_tokens)
        waits = ((self._ttft_s, output.ttft_s), (self._queue_s, output.queue_s), (self._latency_s, output.latency_s))
        for histogram, seconds in (*waits, (self._tpot_s, output.tpot_s)):
            if seconds is not None:
                histogram.observe(seconds)
        for sample in output.samples:
            for before_s, time_s in pairwise(sample.token_times_s):
                self._token_s.observe(time_s - before_s)

    def ended(self, reason: str, num_outputs: int) -> None:
        """Outputs have ended of which no more is known: "abort" where the client went away, or "error"."""
        self._ended.labels(self._model, reason).inc(num_outputs)

    def page(self, stats: EngineStats, num_held: int, num_refused: int) -> bytes:
        """All of it in Prometheus' text format.

        num_held: outputs that have not ended. num_refused: requests that the queue had no room for.
        """
        self._engine.line = {**stats.line(), "num_held": num_held, "num_refused": num_refused}
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ["model_name", *labels], registry=self._registry)

    def _histogram(self, name: str, buckets: Iterable[float]) -> Histogram:
        family = Histogram(name, "Seconds.", ["model_name"], registry=self._registry, buckets=tuple(buckets))
        return family.labels(self._model)
