"""`EngineStats`: what an engine did and holds, as an object, a JSON line, and a line for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from dynskip.engine.kv_pool import KVPool
from dynskip.scheduler.outcome import Outcome, Tally
from dynskip.scheduler.scheduler import Scheduler


@dataclass(frozen=True)
class EngineStats:
    """Counts and means since the engine was made, and what it holds now.

    outcome: throughput, waits at percentiles, means over decode steps (`rows`: the cohort's size, `layers`: that a row
        ran, `union`: that a step read), preemptions.
    num_waiting, num_prefilling, num_running: requests' sequences now. kv_bytes: in use now, of kv_capacity_bytes.
    num_finished, num_aborted: sequences that ended by themselves, or were aborted or failed.
    num_shared_tokens: prompt tokens whose entries were another sequence's.
    prefix_bytes: keys and values kept for requests to come, which count as free. num_prefix_queries, num_prefix_hits:
        tokens of sequences that were admitted, and those of them that had entries. num_prefix_evictions: entries that
        went where memory was wanted.
    bookkeeping_share: of all step time, what scheduling took.
    num_drafted, num_accepted: tokens that drafts guessed, and those of them that were right. num_verifications: steps
        of one sequence that verified guesses.
    """

    outcome: Outcome
    num_waiting: int
    num_prefilling: int
    num_running: int
    num_finished: int
    num_aborted: int
    kv_bytes: int
    kv_capacity_bytes: int
    peak_kv_bytes: int
    num_shared_tokens: int
    bookkeeping_share: float
    num_drafted: int
    num_accepted: int
    num_verifications: int
    prefix_bytes: int
    num_prefix_queries: int
    num_prefix_hits: int
    num_prefix_evictions: int

    @property
    def prefix_hit_rate(self) -> float:
        """The share of prompt tokens that had entries; 0 where none were looked for."""
        return self.num_prefix_hits / self.num_prefix_queries if self.num_prefix_queries else 0.0

    @property
    def acceptance(self) -> float:
        """The share of guessed tokens that were right; 0 where none were guessed."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    @property
    def drafts_per_verification(self) -> float:
        """Tokens guessed for a verification, on average."""
        return self.num_drafted / self.num_verifications if self.num_verifications else 0.0

    @property
    def tokens_per_verification(self) -> float:
        """Tokens that a verification gives, its own among them, on average."""
        return 1 + self.num_accepted / self.num_verifications if self.num_verifications else 0.0

    @staticmethod
    def of(tally: Tally, scheduler: Scheduler, kv: KVPool, entry_bytes: int) -> EngineStats:
        """The stats of an engine, from its sums, its scheduler and its pool of entries of ``entry_bytes`` each."""
        counters, groups, prefixes = scheduler.counters, scheduler.groups, kv.prefixes
        tally = replace(
            tally,
            num_preempted=counters.num_preempted,
            longest_wait=counters.longest_wait,
            peak_kv_slots=kv.peak_used,
        )
        busy_s = tally.prefill_s + tally.decode_s
        return EngineStats(
            outcome=Outcome.of([tally]),
            num_waiting=groups.num_waiting,
            num_prefilling=groups.num_resident - groups.num_running,
            num_running=groups.num_running,
            num_finished=counters.num_finished,
            num_aborted=counters.num_aborted,
            kv_bytes=kv.num_used * entry_bytes,
            kv_capacity_bytes=kv.num_slots * entry_bytes,
            peak_kv_bytes=tally.peak_kv_slots * entry_bytes,
            num_shared_tokens=tally.num_shared_tokens,
            bookkeeping_share=tally.bookkeeping_s / busy_s if busy_s else 0.0,
            num_drafted=tally.num_drafted,
            num_accepted=tally.num_accepted,
            num_verifications=tally.num_verifications,
            prefix_bytes=kv.num_kept * entry_bytes,
            num_prefix_queries=0 if prefixes is None else prefixes.num_queried,
            num_prefix_hits=0 if prefixes is None else prefixes.num_found,
            num_prefix_evictions=0 if prefixes is None else prefixes.num_evicted,
        )

    def line(self) -> dict[str, Any]:
        """What a JSON line holds of it, flat."""
        values = asdict(self)
        rates = ("acceptance", "drafts_per_verification", "tokens_per_verification", "prefix_hit_rate")
        return {**values.pop("outcome"), **values, **{name: getattr(self, name) for name in rates}}

    def __str__(self) -> str:
        """One line for a terminal."""
        outcome = self.outcome
        return (
            f"{outcome.num_requests} done, {self.num_running} running, {self.num_waiting} waiting | "
            f"{outcome.tokens_per_s:.0f} tokens/s | rows {outcome.rows:.1f} | layers {outcome.layers:.1f} of union "
            f"{outcome.union:.1f} | KV {self.kv_bytes / 2**20:.0f} of {self.kv_capacity_bytes / 2**20:.0f} MiB | "
            f"preempted {outcome.num_preempted}"
            + (f" | accepted {self.acceptance:.0%} of drafts" if self.num_drafted else "")
            + (f" | prefix hits {self.prefix_hit_rate:.0%}" if self.num_prefix_hits else "")
        )
