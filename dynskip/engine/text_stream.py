"""`TextStream`: the text of one output while its tokens come, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What stands for bytes that are no whole character, or not yet.
_REPLACEMENT = "\ufffd"
# Tokens that are decoded together at most, and how many of them stay as context for those to come.
_MAX_WINDOW = 48
_NUM_CONTEXT = 8


class TextStream:
    """Turns new tokens into new text. Its pieces together are the text of all tokens, cut before a stop text.

    A piece never ends within a character, and holds nothing that could become the beginning of a stop text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._window: list[int] = []
        self._num_taken = 0  # characters of the window's text that are known already
        self._held = ""  # known, and not given out
        self._has_stopped = False

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that ``token_ids`` make certain."""
        self._decode(token_ids)
        return self._release(self._first_stop_prefix())

    def finish(self) -> str:
        """The rest: no token will come."""
        self._decode((), is_last=True)
        return self._release(len(self._held))

    def _decode(self, token_ids: Sequence[int], is_last: bool = False) -> None:
        self._window += token_ids
        text = self._tokenizer.decode(self._window, skip_special_tokens=True)
        assert isinstance(text, str), "one sequence decodes to one text"
        # However many bytes of the last character are there, one sign stands for them.
        is_open = text.endswith(_REPLACEMENT) and not is_last
        end = max(len(text) - is_open, self._num_taken)
        self._held += text[self._num_taken : end]
        self._num_taken = end
        if len(self._window) > _MAX_WINDOW and not is_open:
            self._window = self._window[-_NUM_CONTEXT:]
            self._num_taken = len(self._tokenizer.decode(self._window, skip_special_tokens=True))

    def _first_stop_prefix(self) -> int:
        """Where in the held text something begins that could become a stop text; its length if nothing does."""
        held = self._held
        longest = max(map(len, self._stop), default=0)
        for start in range(max(0, len(held) - longest + 1), len(held)):
            if any(stop.startswith(held[start:]) for stop in self._stop):
                return start
        return len(held)

    def _release(self, end: int) -> str:
        """The held text before ``end``, or before a stop text, after which nothing comes."""
        if self._has_stopped:
            return ""
        found = [start for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if found:
            self._has_stopped = True
            return self._held[: min(found)]
        piece, self._held = self._held[:end], self._held[end:]
        return piece
