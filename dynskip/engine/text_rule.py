"""`TextRule`: the text of an output as its parameters ask for it, and where stop texts end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dynskip.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What stands for bytes that are no whole character, or not yet.
REPLACEMENT = "\ufffd"
# Tokens that are decoded with those that a stop text may have.
_NUM_CONTEXT = 8


class TextRule(NamedTuple):
    """How tokens become text; the fields are those of `SamplingParams`.

    A stop text counts from the token on that comes behind the first ``min_tokens``: it ends with a character of theirs.
    end_ids: tokens that end an output and are left out of its text, as stop texts are.
    """

    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    include_stop: bool = False
    skip_special_tokens: bool = True
    end_ids: frozenset[int] = frozenset()

    @staticmethod
    def of(stop: Sequence[str] | SamplingParams, eos_token_ids: Sequence[int] = ()) -> TextRule:
        """That of parameters, for a model with these end-of-sequence tokens, or of nothing but stop texts."""
        if not isinstance(stop, SamplingParams):
            return TextRule(tuple(stop))
        includes = stop.include_stop_str_in_output
        ends = frozenset() if includes else stop.stop_ids(eos_token_ids)
        return TextRule(tuple(stop.stop), stop.min_tokens, includes, stop.skip_special_tokens, ends)

    def decode(self, tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
        """The text of ``token_ids``, wherever it ends."""
        if token_ids and token_ids[-1] in self.end_ids:
            token_ids = token_ids[:-1]
        text = tokenizer.decode(token_ids, skip_special_tokens=self.skip_special_tokens)
        assert isinstance(text, str), "one sequence decodes to one text"
        return text

    def text(self, tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
        """The text of an output, cut where a stop text ends it."""
        text = self.decode(tokenizer, token_ids)
        return text[: self.end(text, self._num_free(tokenizer, token_ids, 0))]

    def end(self, text: str, num_free: int = 0) -> int | None:
        """Where the first stop text cuts ``text``; None for nowhere.

        The first is the one that ends first, and of two that end at one place the one that was given first. One within
        the first ``num_free`` characters does not count.
        """
        found = [
            (start + len(stop), start)
            for stop in self.stop
            if (start := text.find(stop, max(num_free - len(stop) + 1, 0))) >= 0
        ]
        if not found:
            return None
        end, start = min(found, key=lambda places: places[0])
        return end if self.include_stop else start

    def has_stopped(self, tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> bool:
        """Whether the last of the tokens of an output completes a stop text; only the last ones are decoded."""
        if not self.stop or len(token_ids) <= self.min_tokens:
            return False
        # The new token ends what it completes: a text of n characters has at most 4 n bytes, and as many tokens.
        num_last = 4 * max(map(len, self.stop)) + _NUM_CONTEXT
        first = max(len(token_ids) - num_last, 0)
        text = self.decode(tokenizer, token_ids[first:])
        return self.end(text, self._num_free(tokenizer, token_ids, first)) is not None

    def _num_free(self, tokenizer: PreTrainedTokenizerBase, token_ids: list[int], first: int) -> int:
        """Characters that are whole with the first ``min_tokens`` tokens, of the text from token ``first`` on."""
        if not self.stop or first >= self.min_tokens:
            return 0
        text = self.decode(tokenizer, token_ids[first : self.min_tokens])
        # However many bytes of the last character are there, one sign stands for them.
        return len(text) - text.endswith(REPLACEMENT)
