"""Tokens and their counts while an output grows, with guesses behind it and without."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dynskip.engine.token_counts import TokenCounts

TOKENS = st.lists(st.integers(0, 8), max_size=12)


@given(TOKENS, st.lists(st.tuples(TOKENS, TOKENS), max_size=6))
def test_counts_are_those_of_the_output_and_its_guesses(
    prompt_ids: list[int], steps: list[tuple[list[int], list[int]]]
) -> None:
    counts = TokenCounts(prompt_ids)
    output: list[int] = []
    for new, guesses in steps:
        output += new
        for rank in range(len(guesses) + 1):
            tokens, numbers = counts.behind(output, guesses[:rank])
            assert tokens.dtype == numbers.dtype == "int64"
            found = dict(zip(tokens.tolist(), numbers.tolist(), strict=True))
            assert len(found) == len(tokens), "each token once"
            expected = Counter(output + guesses[:rank])
            assert found == {token: expected[token] for token in {*prompt_ids, *expected}}


def test_an_output_token_is_counted_once() -> None:
    counts = TokenCounts([1, 2, 1])
    output = [2, 3]
    counts.behind(output)
    output[0] = 7  # what was counted is not looked at again
    output.append(3)
    tokens, numbers = counts.behind(output)
    assert dict(zip(tokens.tolist(), numbers.tolist(), strict=True)) == {1: 0, 2: 1, 3: 2}
