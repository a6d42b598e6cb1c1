"""What the scheduler knows of a request."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from dynskip.paths import LayerPath


class Status(Enum):
    """Where a sequence stands: in the queue, with part of its prompt run, ready to decode, or gone."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"


@dataclass(slots=True, eq=False)
class SequenceState:
    """A request from its arrival to its end.

    owner: what the scheduler knows it by, such as the engine's `OutputSequence`; hashable.
    path: the layers that its tokens may run, which are the layers that hold its keys and values. A controller that
        decides for each token may run any: such a request has the full path.
    arrival_s: the caller's clock when the request came; for reports only.
    order: its number among all requests of the scheduler.
    replays: whether, once it was preempted, its output runs again token by token as it did before. As a part of the
        prompt, which is what runs otherwise, it may come to other bits, or run other layers.
    num_generated: tokens chosen so far. A preempted sequence keeps them, but one that replays begins at 0 again.
    num_replayed: the tokens of its output that were known when it was preempted, if it replays.
    num_cached: tokens whose keys and values are stored in each layer of the path, those reserved for its prompt
        included. The last generated token has none yet.
    num_prefilled: how many tokens the chunks of its current prefill have run, or had no need to: see `KVBudget.admit`.
    cache_id: its place in the tables of a cache while it is resident; -1 where it has none, as in a simulation.
    queued_step: the last step before it began to wait, for the first time or once more.
    admitted_step: the step in which it became resident last. last_step: the step of its own last token.
    """

    owner: Any
    path: LayerPath
    num_prompt_tokens: int
    max_tokens: int
    arrival_s: float = 0.0
    replays: bool = False
    order: int = -1
    status: Status = Status.WAITING
    num_generated: int = 0
    num_replayed: int = 0
    num_cached: int = 0
    num_prefilled: int = 0
    cache_id: int = -1
    queued_step: int = 0
    admitted_step: int = -1
    last_step: int = -1
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompt_tokens", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"SequenceState: {name} must be at least 1, got {getattr(self, name)}.")

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output: what a prefill of this sequence has to run."""
        return self.num_prompt_tokens + self.num_generated

    @property
    def max_cached(self) -> int:
        """The most tokens that it may ever have cached: the last one of its output is never run."""
        return self.num_prompt_tokens + self.max_tokens - 1

    @property
    def num_known_tokens(self) -> int:
        """Tokens of prompt and output, those that will be replayed included."""
        return self.num_prompt_tokens + max(self.num_generated, self.num_replayed)

    @property
    def is_resident(self) -> bool:
        """Whether it holds keys and values."""
        return self.status in (Status.PREFILLING, Status.RUNNING)

    def begin_again(self, num_generated: int, step: int) -> None:
        """Wait after step ``step``, holding nothing but the ``num_generated`` tokens chosen so far."""
        self.num_cached = self.num_prefilled = 0
        self.cache_id = -1
        self.queued_step = step
        self.num_generated, self.num_replayed = (0, num_generated) if self.replays else (num_generated, 0)

    def kv_entries(self) -> dict[int, int]:
        """How many key-value entries it holds in each layer that it runs."""
        return dict.fromkeys(self.path.layers, self.num_cached)
