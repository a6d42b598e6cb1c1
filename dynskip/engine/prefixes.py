"""Which resident sequences begin with the same tokens along the same path: their entries are shared."""

from __future__ import annotations

from dynskip.engine.request import OutputSequence
from dynskip.paths import LayerPath

# Shorter prefixes are not looked for: a prefill of so few tokens takes as long without them.
_MIN_TOKENS = 16


class PrefixIndex:
    """The resident sequences whose prompts have run, by path and first tokens.

    multiple: only that many tokens, or a multiple of it, are shared.
    """

    def __init__(self, multiple: int = 1) -> None:
        self.multiple = multiple
        self._sequences: dict[tuple[LayerPath, tuple[int, ...]], dict[OutputSequence, None]] = {}

    def add(self, sequence: OutputSequence) -> None:
        """Offer the prompt of ``sequence``, all of which has run."""
        if (key := _key(sequence)) is not None:
            self._sequences.setdefault(key, {})[sequence] = None

    def discard(self, sequence: OutputSequence) -> None:
        """Offer it no more, if it was offered."""
        key = _key(sequence)
        if key is None or (known := self._sequences.get(key)) is None:
            return
        known.pop(sequence, None)
        if not known:
            del self._sequences[key]

    def clear(self) -> None:
        """Offer nothing any more."""
        self._sequences.clear()

    def find(self, sequence: OutputSequence) -> tuple[OutputSequence, int] | None:
        """The one that shares most tokens with the prompt of ``sequence``, and how many; its last is not shared.

        The last token has to run, because its logits are wanted.
        """
        key, ours = _key(sequence), sequence.prompt_ids[:-1]
        best: OutputSequence | None = None
        most = 0
        for other in self._sequences.get(key, ()) if key is not None else ():
            if most == len(ours):
                break
            theirs = other.prompt_ids
            # A longer common prefix has the best one's next token in common, too: one look tells most apart.
            if most < len(theirs) and theirs[most] == ours[most] and (count := _num_common(ours, theirs)) > most:
                best, most = other, count
        most -= most % self.multiple
        return None if best is None or most < _MIN_TOKENS else (best, most)


def _key(sequence: OutputSequence) -> tuple[LayerPath, tuple[int, ...]] | None:
    path = sequence.path
    if path is None or not path.budget or len(sequence.prompt_ids) < _MIN_TOKENS:
        return None
    return path, tuple(sequence.prompt_ids[:_MIN_TOKENS])


def _num_common(ours: list[int], theirs: list[int]) -> int:
    least, most = 0, min(len(ours), len(theirs))
    while least < most:  # slices are compared much faster than tokens one by one
        middle = (least + most + 1) // 2
        if ours[least:middle] == theirs[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least
