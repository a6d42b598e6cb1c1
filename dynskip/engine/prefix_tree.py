"""`PrefixTree`: which entries are kept, by the tokens that lead to them, and which of them goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from torch import Tensor

from dynskip.paths import LayerPath


class Prefix:
    """Tokens behind those of another prefix, and the slots of their entries.

    key: the path and its first tokens, by which ``parent`` knows it. end: how many tokens there are up to its last one.
    slots: [layers of the path, len(tokens)], int32. num_users: resident sequences that own these slots, too.
    """

    __slots__ = ("children", "end", "key", "num_users", "parent", "slots", "tokens")

    def __init__(self, key: tuple[object, ...], parent: Prefix, tokens: list[int], slots: Tensor) -> None:
        self.key = key
        self.parent = parent
        self.tokens = tokens
        self.slots = slots
        self.end: int = parent.end + len(tokens)
        self.children: dict[tuple[object, ...], Prefix] = {}
        self.num_users = 0

    def up(self) -> Iterator[Prefix]:
        """It and those before it, the last one first; the root, which has no tokens, is not among them."""
        prefix = self
        while prefix.end:
            yield prefix
            prefix = prefix.parent


class _Root(Prefix):
    """The prefix of no tokens, of all paths."""

    __slots__ = ()

    def __init__(self) -> None:
        self.tokens, self.end, self.children = [], 0, {}


class PrefixTree:
    """The tokens of all sequences whose entries are kept, along their paths; what begins alike is there once.

    A prefix that resident sequences use stays, and so do those before it. The others are in the order of their last
    use, each behind all that continue it: the first is one that nothing continues, and the next to be evicted.

    multiple: prefixes begin and end at multiples of so many tokens. num_unused: the slots that no sequence uses.
    """

    def __init__(self, multiple: int = 1) -> None:
        self.multiple = multiple
        self.root: Prefix = _Root()
        self.num_unused = 0
        self._unused: OrderedDict[Prefix, None] = OrderedDict()

    def find(self, path: LayerPath, tokens: list[int]) -> int:
        """How many of the first ``tokens`` are there along ``path``."""
        return self._match(path, tokens)[2]

    def cut(self, path: LayerPath, tokens: list[int]) -> Prefix:
        """The prefix that ends where what is there of ``tokens`` along ``path`` does; use it or touch it next."""
        prefix, num_common, _ = self._match(path, tokens)
        return prefix if num_common == len(prefix.tokens) else self._split(prefix, num_common)

    def use(self, prefix: Prefix) -> None:
        """Count a sequence that owns the slots of ``prefix`` and of all before it."""
        for each in prefix.up():
            if not each.num_users:
                self._unused.pop(each, None)
                self.num_unused -= each.slots.numel()
            each.num_users += 1

    def release(self, prefix: Prefix) -> None:
        """Count one sequence less."""
        for each in prefix.up():
            each.num_users -= 1
            if not each.num_users:
                self._unused[each] = None
                self.num_unused += each.slots.numel()

    def touch(self, prefix: Prefix) -> None:
        """``prefix`` was used last of all."""
        for each in prefix.up():
            if not each.num_users:
                self._unused[each] = None
                self._unused.move_to_end(each)

    def append(self, parent: Prefix, path: LayerPath, tokens: list[int], slots: Tensor) -> Prefix:
        """Put ``tokens`` behind ``parent``, which nothing continues that begins like them; use it or touch it next."""
        prefix = Prefix((path, *tokens[: self.multiple]), parent, tokens, slots)
        assert prefix.key not in parent.children, "tokens that are there are not put twice"
        parent.children[prefix.key] = prefix
        self.num_unused += slots.numel()
        return prefix

    def drop(self, prefix: Prefix) -> list[Tensor]:
        """Take out ``prefix`` and those before it, up to one that is used or continued otherwise; their slots."""
        slots = []
        for each in prefix.up():
            if each.num_users or each.children:
                break
            slots.append(self._trim(each, len(each.tokens)))
        return slots

    def evict(self, num_slots: int) -> list[Tensor]:
        """Take out ``num_slots`` unused slots or a few more, if there are any; a prefix loses its last tokens first."""
        slots: list[Tensor] = []
        while num_slots > 0 and self._unused:
            prefix = next(iter(self._unused))
            num_tokens = -(-num_slots // len(prefix.slots))
            num_tokens += -num_tokens % self.multiple
            slots.append(self._trim(prefix, min(num_tokens, len(prefix.tokens))))
            num_slots -= slots[-1].numel()
        return slots

    def clear(self) -> list[Tensor]:
        """Take out all, used or not; their slots."""
        left, slots = [*self.root.children.values()], []
        while left:
            prefix = left.pop()
            slots.append(prefix.slots)
            left += prefix.children.values()
        self.root.children.clear()
        self._unused.clear()
        self.num_unused = 0
        return slots

    def _match(self, path: LayerPath, tokens: list[int]) -> tuple[Prefix, int, int]:
        """The last prefix on the way of ``tokens``, how many of its own tokens are theirs, and how many of all."""
        prefix, num_common, num_found = self.root, 0, 0
        while num_common == len(prefix.tokens):
            child = prefix.children.get((path, *tokens[num_found : num_found + self.multiple]))
            if child is None:
                break
            num_common = _num_common(child.tokens, tokens, num_found)
            num_common -= num_common % self.multiple
            num_found += num_common
            prefix = child
        return prefix, num_common, num_found

    def _split(self, prefix: Prefix, num_tokens: int) -> Prefix:
        """Make the first ``num_tokens`` of ``prefix`` one of their own, before the rest; it is not in the order yet."""
        first = Prefix(prefix.key, prefix.parent, prefix.tokens[:num_tokens], prefix.slots[:, :num_tokens].clone())
        first.num_users = prefix.num_users
        first.parent.children[first.key] = first
        prefix.tokens, prefix.slots = prefix.tokens[num_tokens:], prefix.slots[:, num_tokens:].clone()
        prefix.key, prefix.parent = (prefix.key[0], *prefix.tokens[: self.multiple]), first
        first.children[prefix.key] = prefix
        return first

    def _trim(self, prefix: Prefix, num_tokens: int) -> Tensor:
        """Take the last ``num_tokens`` tokens from ``prefix``, which is unused and has no children; their slots."""
        assert not prefix.num_users and not prefix.children, "what is used or continued stays"
        num_left = len(prefix.tokens) - num_tokens
        slots = prefix.slots[:, num_left:]
        self.num_unused -= slots.numel()
        if num_left:
            prefix.tokens, prefix.slots = prefix.tokens[:num_left], prefix.slots[:, :num_left]
            prefix.end -= num_tokens
        else:
            self._unused.pop(prefix, None)
            del prefix.parent.children[prefix.key]
        return slots


def _num_common(ours: Sequence[int], theirs: Sequence[int], first: int) -> int:
    """How many of the first tokens of ``ours`` are those of ``theirs`` from token ``first`` on."""
    least, most = 0, min(len(ours), len(theirs) - first)
    if ours[:most] == theirs[first : first + most]:
        return most
    while least < most:  # slices are compared much faster than tokens one by one
        middle = (least + most + 1) // 2
        if ours[least:middle] == theirs[first + least : first + middle]:
            least = middle
        else:
            most = middle - 1
    return least
