"""`TextStream`: the text of one output while its tokens come, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dynskip.engine.text_rule import REPLACEMENT, TextRule
from dynskip.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens that are decoded together at most, and how many of them stay as context for those to come.
_MAX_WINDOW = 48
_NUM_CONTEXT = 8


class TextStream:
    """Turns new tokens into new text. Its pieces together are the text of all tokens, cut where a stop text ends it.

    A piece never ends within a character, and holds nothing that could become the beginning of a stop text.
    stop, eos_token_ids: texts, or the parameters of the request, which say more of how text is made, and the tokens
        that end a sequence of the model; see `TextRule`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] | SamplingParams = (),
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._rule = TextRule.of(stop, eos_token_ids)
        self._window: list[int] = []
        self._num_taken = 0  # characters of the window's text that are known already
        self._held = ""  # known, and not given out
        self._num_left = self._rule.min_tokens  # tokens to come before a stop text counts
        self._num_free = 0  # characters of what is held in which a stop text does not count
        self._has_stopped = False

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that ``token_ids`` make certain."""
        if self._num_left and token_ids:
            first, token_ids = token_ids[: self._num_left], token_ids[self._num_left :]
            self._num_left -= len(first)
            self._decode(first)
            self._num_free = len(self._held)
        self._decode(token_ids)
        return self._release(self._first_stop_prefix())

    def finish(self) -> str:
        """The rest: no token will come."""
        self._decode((), is_last=True)
        return self._release(len(self._held))

    def _decode(self, token_ids: Sequence[int], is_last: bool = False) -> None:
        self._window += token_ids
        text = self._rule.decode(self._tokenizer, self._window)
        # However many bytes of the last character are there, one sign stands for them.
        is_open = text.endswith(REPLACEMENT) and not is_last
        end = max(len(text) - is_open, self._num_taken)
        self._held += text[self._num_taken : end]
        self._num_taken = end
        if len(self._window) > _MAX_WINDOW and not is_open:
            self._window = self._window[-_NUM_CONTEXT:]
            self._num_taken = len(self._rule.decode(self._tokenizer, self._window))

    def _first_stop_prefix(self) -> int:
        """Where in the held text something begins that could become a stop text; its length if nothing does."""
        held = self._held
        longest = max(map(len, self._rule.stop), default=0)
        for start in range(max(0, len(held) - longest + 1), len(held)):
            if any(stop.startswith(held[start:]) for stop in self._rule.stop):
                return start
        return len(held)

    def _release(self, end: int) -> str:
        """The held text before ``end``, or up to where a stop text cuts it, after which nothing comes."""
        if self._has_stopped:
            return ""
        cut = self._rule.end(self._held, self._num_free)
        if cut is not None:
            self._has_stopped = True
            return self._held[:cut]
        piece, self._held = self._held[:end], self._held[end:]
        self._num_free = max(self._num_free - end, 0)
        return piece
