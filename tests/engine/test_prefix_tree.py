"""The tree of kept prefixes beside one that keeps every chunk by itself: what is found, and what goes first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from dynskip import LayerPath
from dynskip.engine import prefix_tree
from dynskip.engine.prefix_tree import Prefix, PrefixTree

PATHS = [LayerPath.of(6, [1]), LayerPath.of(6, [0, 2, 5])]
# A path, and tokens from the first on: what a token's entries depend on.
Beginning = tuple[LayerPath, tuple[int, ...]]
TOKENS = st.lists(st.integers(0, 1), max_size=12)


class ChunkTree:
    """Every chunk of ``multiple`` tokens that is kept by itself, with its users and the time of its last use.

    slots: by the path and all tokens up to the end of a chunk, those of its tokens, layer by layer.
    """

    def __init__(self, multiple: int) -> None:
        self.multiple = multiple
        self.slots: dict[Beginning, list[list[int]]] = {}
        self.users: dict[Beginning, int] = {}
        self.used_at: dict[Beginning, int] = {}
        self.time = 0
        self.num_slots = 0

    def beginnings(self, path: LayerPath, tokens: Sequence[int]) -> list[Beginning]:
        """The chunks of whole ``tokens``, the first one first."""
        return [(path, tuple(tokens[:end])) for end in range(self.multiple, len(tokens) + 1, self.multiple)]

    def find(self, path: LayerPath, tokens: Sequence[int]) -> int:
        return max((len(found) for _, found in self.beginnings(path, tokens) if (path, found) in self.slots), default=0)

    def put(self, path: LayerPath, tokens: Sequence[int], first: int) -> Tensor:
        """New slots of the tokens from ``first`` on."""
        made = []
        for beginning in self.beginnings(path, tokens)[first // self.multiple :]:
            assert beginning not in self.slots
            own = [[*range(at, at + path.budget)] for at in range(self.num_slots, 2**31, path.budget)[: self.multiple]]
            self.slots[beginning] = own
            self.users[beginning], self.used_at[beginning] = 0, -1
            self.num_slots += path.budget * self.multiple
            made += own
        return torch.tensor(made, dtype=torch.int32).T

    def touch(self, path: LayerPath, tokens: Sequence[int]) -> None:
        """The last chunk first: of two that were used together the later one goes."""
        for beginning in reversed(self.beginnings(path, tokens)):
            self.used_at[beginning] = self.time = self.time + 1

    def count(self, path: LayerPath, tokens: Sequence[int], change: int) -> None:
        for beginning in self.beginnings(path, tokens):
            self.users[beginning] += change

    def unused(self) -> list[Beginning]:
        return [beginning for beginning, users in self.users.items() if not users]

    def take_out(self, beginning: Beginning) -> set[int]:
        del self.users[beginning], self.used_at[beginning]
        return {slot for token in self.slots.pop(beginning) for slot in token}

    def evict(self, num_slots: int) -> set[int]:
        """Those that were not used for longest."""
        gone: set[int] = set()
        while len(gone) < num_slots and (unused := self.unused()):
            gone |= self.take_out(min(unused, key=self.used_at.__getitem__))
        return gone

    def is_continued(self, path: LayerPath, tokens: tuple[int, ...]) -> bool:
        return any(p == path and len(t) > len(tokens) and t[: len(tokens)] == tokens for p, t in self.slots)


def slots_of(parts: Sequence[Tensor]) -> set[int]:
    """The slots in all of them, each once."""
    slots = [slot for part in parts for slot in part.flatten().tolist()]
    assert len(slots) == len(set(slots))
    return set(slots)


class TreeMachine(RuleBasedStateMachine):
    """Everything that is done with prefixes, in any order, with prefixes and with chunks."""

    num_evicted = 0
    num_shared = 0

    @initialize(multiple=st.sampled_from([1, 1, 2, 3]))
    def begin(self, multiple: int) -> None:
        self.multiple = multiple
        self.tree, self.plain = PrefixTree(multiple), ChunkTree(multiple)
        self.held: list[tuple[LayerPath, list[int], Prefix]] = []

    def whole(self, tokens: list[int]) -> list[int]:
        return tokens[: len(tokens) - len(tokens) % self.multiple]

    @rule(path=st.sampled_from(PATHS), tokens=TOKENS)
    def admit(self, path: LayerPath, tokens: list[int]) -> None:
        """A sequence comes that uses what is there."""
        tokens = self.whole(tokens)
        num_found = self.plain.find(path, tokens)
        assert self.tree.find(path, tokens) == num_found
        prefix = self.tree.cut(path, tokens)
        assert prefix.end == num_found
        found = [slots for each in [*prefix.up()][::-1] for slots in each.slots.T.tolist()]
        chunks = self.plain.beginnings(path, tokens[:num_found])
        assert found == [slots for chunk in chunks for slots in self.plain.slots[chunk]]
        self.tree.use(prefix)
        self.plain.count(path, tokens[:num_found], 1)
        self.held.append((path, tokens[:num_found], prefix))
        type(self).num_shared += num_found

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 10**6), more=TOKENS)
    def offer(self, pick: int, more: list[int]) -> None:
        """Its prompt has run, which nobody else has continued in that way."""
        index = pick % len(self.held)
        path, tokens, prefix = self.held[index]
        longer = self.whole(tokens + more)
        if self.tree.find(path, longer) != len(tokens) or len(longer) == len(tokens):
            return
        slots = self.plain.put(path, longer, len(tokens))
        self.plain.count(path, longer, 1)
        self.plain.count(path, tokens, -1)
        last = self.tree.append(prefix, path, longer[len(tokens) :], slots)
        self.tree.use(last)
        self.tree.release(prefix)
        self.held[index] = path, longer, last

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 10**6), more=TOKENS)
    def end(self, pick: int, more: list[int]) -> None:
        """It goes, and leaves all that it has run."""
        path, tokens, prefix = self.held.pop(pick % len(self.held))
        self.tree.release(prefix)
        self.plain.count(path, tokens, -1)
        self.plain.touch(path, tokens)
        longer = self.whole(tokens + more)
        last = self.tree.cut(path, longer)
        num_found = self.plain.find(path, longer)
        assert last.end == num_found >= len(tokens)
        if num_found < len(longer):
            last = self.tree.append(last, path, longer[num_found:], self.plain.put(path, longer, num_found))
        self.tree.touch(last)
        self.plain.touch(path, longer)

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 10**6))
    def fail(self, pick: int) -> None:
        """It goes, with what nobody else uses or continues."""
        path, tokens, prefix = self.held.pop(pick % len(self.held))
        self.tree.release(prefix)
        self.plain.count(path, tokens, -1)
        self.plain.touch(path, tokens)
        gone: set[int] = set()
        for beginning in reversed(self.plain.beginnings(path, tokens)):
            if self.plain.users[beginning] or self.plain.is_continued(*beginning):
                break
            gone |= self.plain.take_out(beginning)
        assert slots_of(self.tree.drop(prefix)) == gone

    @rule(num_slots=st.integers(0, 20))
    def evict(self, num_slots: int) -> None:
        gone = self.plain.evict(num_slots)
        assert slots_of(self.tree.evict(num_slots)) == gone
        type(self).num_evicted += len(gone)

    @rule(really=st.sampled_from([False] * 9 + [True]))
    def clear(self, really: bool) -> None:
        if really:
            everything = {slot for chunk in self.plain.slots.values() for slots in chunk for slot in slots}
            assert slots_of(self.tree.clear()) == everything
            self.plain, self.held = ChunkTree(self.multiple), []

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "tree"):
            num_chunks = sum(path.budget for path, _ in self.plain.unused())
            assert self.tree.num_unused == num_chunks * self.multiple


def test_a_tree_of_prefixes_is_one_of_chunks() -> None:
    machine: Any = type("Machine", (TreeMachine,), {"num_evicted": 0, "num_shared": 0})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
    assert machine.num_evicted > 5 and machine.num_shared > 5  # what examples are drawn is not ours to say


def put(tree: PrefixTree, path: LayerPath, tokens: list[int]) -> None:
    """Keep ``tokens``, with slots that say nothing."""
    last = tree.cut(path, tokens)
    if last.end < len(tokens):
        slots = torch.zeros(path.budget, len(tokens) - last.end, dtype=torch.int32)
        last = tree.append(last, path, tokens[last.end :], slots)
    tree.touch(last)


def test_a_look_costs_the_length_of_the_prompt_however_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    common, compared = list(range(4000)), []
    num_common = prefix_tree._num_common

    def counting(ours: Sequence[int], theirs: Sequence[int], first: int) -> int:
        compared.append(len(ours))
        return num_common(ours, theirs, first)

    tree = PrefixTree()
    for index in range(10_000):
        put(tree, PATHS[0], [*common, 10_000 + index, 1, 2, 3])
        put(tree, PATHS[index % 2], [20_000 + index, 4, 5])
    monkeypatch.setattr(prefix_tree, "_num_common", counting)
    assert tree.find(PATHS[0], [*common, 17_000, 1, 2, 9]) == 4003
    assert compared == [4000, 4]
    tree.evict(1)
    assert tree.find(PATHS[0], [*common, 10_000, 1, 2, 3]) == 4003, "the first that came loses its last token"


def lengths(draw_from: int) -> Iterator[tuple[list[int], list[int], int]]:
    for count in range(draw_from):
        ours = list(range(count))
        for same in range(count + 1):
            yield ours, [7, *ours[:same], *[-1] * (count - same)], same


def test_common_tokens_are_counted() -> None:
    for ours, theirs, expected in lengths(20):
        assert prefix_tree._num_common(ours, theirs, 1) == expected
        assert prefix_tree._num_common(ours, theirs[: 1 + expected], 1) == expected
