"""`TokenCounts`: which tokens a sequence has, and how often, kept while its output grows."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TokenCounts:
    """The different tokens of prompt and output, and how often the output has each.

    prompt_ids: empty where tokens of the prompt do not count. An output token costs a look into a dict, once.
    """

    def __init__(self, prompt_ids: Iterable[int] = ()) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt_ids))}
        self._tokens = array("q", self._places)
        self._counts = array("q", bytes(8 * len(self._places)))
        self._num_counted = 0

    def behind(self, token_ids: list[int], guesses: Sequence[int] = ()) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tokens and their counts, [K] each, behind the output ``token_ids`` and ``guesses``.

        token_ids: the output, which has at most grown since the last call. Guesses are not remembered.
        """
        assert len(token_ids) >= self._num_counted, "an output grows"
        for token in token_ids[self._num_counted :]:
            place = self._places.setdefault(token, len(self._tokens))
            if place == len(self._tokens):
                self._tokens.append(token)
                self._counts.append(0)
            self._counts[place] += 1
        self._num_counted = len(token_ids)
        tokens, counts = np.array(self._tokens), np.array(self._counts)
        if not guesses:
            return tokens, counts
        others: dict[int, int] = {}
        for token in guesses:
            if (known := self._places.get(token)) is not None:
                counts[known] += 1
            else:
                others[token] = others.get(token, 0) + 1
        own = np.fromiter(others.keys(), np.int64, len(others)), np.fromiter(others.values(), np.int64, len(others))
        return np.concatenate([tokens, own[0]]), np.concatenate([counts, own[1]])
