"""`Executor`: what runs steps through a decoder, and keeps keys and values in caches of its own kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from dynskip.execution.kv_cache import KVCache
from dynskip.execution.reference import ReferenceCache
from dynskip.execution.step import RowCounts, Step

Cache: TypeAlias = KVCache | ReferenceCache


class Executor(Protocol):
    """Runs steps and counts the rows of each layer that it computes. ``cache``: one that this executor made."""

    row_counts: RowCounts

    def new_cache(self, num_seqs: int, max_context_len: int, num_slots: int) -> Cache:
        """A cache for ``num_seqs`` sequences of at most ``max_context_len`` tokens and ``num_slots`` entries in all."""
        ...

    def run(self, step: Step, cache: Any, on_layer: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """[N, C]: the last layer's output for every row of ``step``.

        cache: takes the new entries; None where nothing will be decoded from them.
        on_layer: called with each layer's index and input, [N, C], which the layer may then change in place.
        """
        ...

    def head(self, hidden_states: Tensor) -> Tensor:
        """[R, V]: the logits of the last layer's output ``hidden_states``, [R, C]."""
        ...

    def logits(self, step: Step, cache: Any) -> Tensor:
        """[N, V]: the logits of the rows of a decode step; the next step may overwrite them."""
        ...

    def warm_up(self, cache: Any, max_rows: int) -> None:
        """Compile and load what decode steps of at most ``max_rows`` rows launch: no step waits for it later."""
        ...

    def retire(self, cache: Any) -> None:
        """Keep ``cache``, which is used no more, where the next batch gains by it."""
        ...

    def release(self) -> None:
        """Give back the memory of retired caches, static buffers and graphs."""
        ...
