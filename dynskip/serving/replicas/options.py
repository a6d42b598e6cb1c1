"""`ReplicaOptions` and `FrontOptions`: what a server of several engines is asked for. Pure data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynskip.scheduler.placement import Choose, place


@dataclass(frozen=True)
class FrontOptions:
    """What stands before the replicas. batch, choose: of `Front`; the others: of `guarded`."""

    batch: int
    api_key: str | None = None
    log_bodies: bool = False
    allow_origins: Sequence[str] = ()
    choose: Choose = place


@dataclass(frozen=True)
class ReplicaOptions:
    """How many replicas there are, and what each has of its node. num_threads: None for an equal share of all CPUs."""

    num_replicas: int
    num_threads: int | None = None
    num_gpus: int = 0

    def threads_on(self, cpus: Sequence[float]) -> int:
        """The threads of each replica where the nodes have so many CPUs; ValueError where there is no room for all."""
        num_threads = self.num_threads or max(1, int(sum(cpus)) // self.num_replicas)
        room = sum(int(each // num_threads) for each in cpus)
        if room < self.num_replicas:
            raise ValueError(
                f"threads_on: the cluster must have room for {self.num_replicas} replicas of {num_threads} threads "
                f"each, got room for {room}. Ask for fewer --replicas or --threads."
            )
        return num_threads
