"""What a run of the engine came to: throughput, waits at percentiles, and what its steps were like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class CallTimes:
    """Seconds that native calls took: in products, in attention, and in the rest of them."""

    products_s: float = 0.0
    attention_s: float = 0.0
    rest_s: float = 0.0

    def __add__(self, other: CallTimes) -> CallTimes:
        return CallTimes(
            self.products_s + other.products_s, self.attention_s + other.attention_s, self.rest_s + other.rest_s
        )

    def __sub__(self, other: CallTimes) -> CallTimes:
        return CallTimes(
            self.products_s - other.products_s, self.attention_s - other.attention_s, self.rest_s - other.rest_s
        )


NO_CALLS = CallTimes()


@dataclass
class Tally:
    """Sums over the steps of one engine, and a line per request. Times in seconds.

    ttft_s: from arrival to first token. queue_s: from arrival to admission. tpot_s: from the first token to the last,
    by the tokens after the first; requests of one token have none. An engine keeps the last thousands of each.
    num_drafted, num_accepted: tokens that drafts guessed, and that were right. num_verifications: of one sequence each.
    first_s, last_s: when the first request arrived, and the last step ended.
    bookkeeping_s: what of the time of all steps scheduling took.
    prefill_calls, decode_calls: what of both times was in native calls, where `NativeSteps.is_timed`; else zeros.
    num_shared_tokens: prompt tokens that another sequence ran.
    """

    num_requests: int = 0
    num_tokens: int = 0
    num_shared_tokens: int = 0
    num_steps: int = 0
    num_decode_steps: int = 0
    num_rows: int = 0
    num_row_layers: int = 0
    num_union_layers: int = 0
    num_paths: int = 0
    num_prefills: int = 0
    decode_s: float = 0.0
    prefill_s: float = 0.0
    bookkeeping_s: float = 0.0
    prefill_calls: CallTimes = NO_CALLS
    decode_calls: CallTimes = NO_CALLS
    first_s: float | None = None
    last_s: float = 0.0
    peak_kv_slots: int = 0
    num_preempted: int = 0
    longest_wait: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_verifications: int = 0
    ttft_s: list[float] = field(default_factory=list)
    queue_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)

    @staticmethod
    def merge(tallies: Sequence[Tally]) -> Tally:
        """The sums over several engines; of times the first and the last, of waits the longest."""
        merged = Tally(first_s=min((tally.first_s for tally in tallies if tally.first_s is not None), default=None))
        for tally in tallies:
            for name, value in vars(tally).items():
                if name == "first_s":
                    continue
                ours = getattr(merged, name)
                at_most = name in ("last_s", "longest_wait", "peak_kv_slots")
                setattr(merged, name, max(ours, value) if at_most else ours + value)
        return merged


@dataclass(frozen=True)
class Outcome:
    """A run in figures. Throughput counts generated tokens from the first arrival to the last token.

    rows, paths, layers, union: means over decode steps; layers: that a row runs, union: that a step reads.
    *_s and *_ms: percentiles as in ``PERCENTILES``.
    """

    num_requests: int
    num_engines: int
    tokens_per_s: float
    seconds: float
    decode_s: float
    prefill_s: float
    ttft_s: tuple[float, ...]
    queue_s: tuple[float, ...]
    tpot_ms: tuple[float, ...]
    mean_tpot_ms: float
    rows: float
    paths: float
    layers: float
    union: float
    num_decode_steps: int
    num_prefills: int
    num_preempted: int
    longest_wait: int
    peak_kv_slots: int

    @staticmethod
    def of(tallies: Sequence[Tally]) -> Outcome:
        """What one or several engines came to."""
        tally = Tally.merge(tallies)
        seconds = max(tally.last_s - (tally.first_s or 0.0), 0.0)
        steps = max(tally.num_decode_steps, 1)
        return Outcome(
            num_requests=tally.num_requests,
            num_engines=len(tallies),
            tokens_per_s=tally.num_tokens / seconds if seconds else 0.0,
            seconds=seconds,
            decode_s=tally.decode_s,
            prefill_s=tally.prefill_s,
            ttft_s=percentiles(tally.ttft_s),
            queue_s=percentiles(tally.queue_s),
            tpot_ms=tuple(1e3 * value for value in percentiles(tally.tpot_s)),
            mean_tpot_ms=1e3 * sum(tally.tpot_s) / len(tally.tpot_s) if tally.tpot_s else 0.0,
            rows=tally.num_rows / steps,
            paths=tally.num_paths / steps,
            layers=tally.num_row_layers / max(tally.num_rows, 1),
            union=tally.num_union_layers / steps,
            num_decode_steps=tally.num_decode_steps,
            num_prefills=tally.num_prefills,
            num_preempted=tally.num_preempted,
            longest_wait=tally.longest_wait,
            peak_kv_slots=tally.peak_kv_slots,
        )

    def line(self) -> dict[str, Any]:
        """What a JSON line holds of it."""
        return asdict(self)


def percentiles(values: Sequence[float]) -> tuple[float, ...]:
    """The values at or below which the given shares of all lie; zeros where there are none."""
    if not values:
        return (0.0,) * len(PERCENTILES)
    ordered = sorted(values)
    return tuple(ordered[min(len(ordered) - 1, -(-len(ordered) * share // 100) - 1)] for share in PERCENTILES)
