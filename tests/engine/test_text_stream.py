"""The text of a stream: whole characters, nothing of a stop text, and together what the tokens decode to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import word_tokenizer

from dynskip import SamplingParams
from dynskip.assets import opt_mini_directory
from dynskip.engine.text_rule import TextRule
from dynskip.engine.text_stream import TextStream


@pytest.fixture(scope="module")
def byte_tokenizer() -> Any:
    """A tokenizer whose tokens may be parts of a character."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(opt_mini_directory()))


def pieces_of(stream: TextStream, tokens: list[int], sizes: list[int]) -> list[str]:
    """The pieces that come of ``tokens``, handed over as many at a time as ``sizes`` say, again and again."""
    pieces = []
    first = turn = 0
    while first < len(tokens):
        size = sizes[turn % len(sizes)]
        pieces.append(stream.add(tokens[first : first + size]))
        first, turn = first + size, turn + 1
    return [*pieces, stream.finish()]


def test_a_piece_ends_with_a_whole_character(byte_tokenizer: Any) -> None:
    text = "naïve 🙂 日本語, 🏳️‍🌈 and a plain end" * 8  # more tokens than are decoded together
    tokens = byte_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) > 200
    pieces = pieces_of(TextStream(byte_tokenizer), tokens, [1])
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces, "a part of a character was to be held back"


# Half of the tokens are bytes beyond ASCII, which seldom make a character.
@given(
    st.lists(st.one_of(st.integers(0, 4095), st.integers(100, 260)), max_size=150),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_pieces_together_are_the_text_of_all_tokens(byte_tokenizer: Any, tokens: list[int], sizes: list[int]) -> None:
    expected = byte_tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(pieces_of(TextStream(byte_tokenizer), tokens, sizes)) == expected


@given(
    st.lists(st.sampled_from("ab "), max_size=120).map("".join),
    st.lists(st.text("ab ", min_size=1, max_size=5), min_size=1, max_size=3),
    st.integers(1, 4),
)
def test_nothing_of_a_stop_text_is_given_out(byte_tokenizer: Any, text: str, stop: list[str], size: int) -> None:
    """Text ends where a stop text begins, and no piece had held what turned out to be the beginning of one."""
    tokens = [token for letter in text for token in byte_tokenizer(letter, add_special_tokens=False)["input_ids"]]
    assert byte_tokenizer.decode(tokens) == text
    stream = TextStream(byte_tokenizer, stop)
    given_out = ""
    # The engine ends a request with the token that completes a stop text.
    for first in range(0, len(tokens), size):
        end = next((i for i in range(first, first + size) if any(s in text[: i + 1] for s in stop)), None)
        given_out += stream.add(tokens[first : first + size if end is None else end + 1])
        if end is not None:
            text = text[: end + 1]
            break
    given_out += stream.finish()
    assert given_out == text[: next((text.find(s) for s in stop if s in text), len(text))], "all of them end there"


@given(
    st.lists(st.one_of(st.sampled_from("ab "), st.just("日")), max_size=60).map("".join),
    st.lists(st.text("ab 日", min_size=1, max_size=4), max_size=3),
    st.integers(0, 20),
    st.booleans(),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_pieces_are_the_text_that_the_parameters_ask_for(
    byte_tokenizer: Any, text: str, stop: list[str], min_tokens: int, includes: bool, sizes: list[int]
) -> None:
    """A stop text ends the output with its first token that is no more one of the first ``min_tokens``."""
    tokens = [token for letter in text for token in byte_tokenizer(letter, add_special_tokens=False)["input_ids"]]
    params = SamplingParams(max_tokens=None, stop=stop, min_tokens=min_tokens, include_stop_str_in_output=includes)
    rule = TextRule.of(params)
    num_tokens = next((n for n in range(len(tokens) + 1) if rule.has_stopped(byte_tokenizer, tokens[:n])), len(tokens))
    tokens = tokens[:num_tokens]
    whole = rule.text(byte_tokenizer, tokens)
    assert "".join(pieces_of(TextStream(byte_tokenizer, params), tokens, sizes)) == whole
    everything = byte_tokenizer.decode(tokens)
    free = byte_tokenizer.decode(tokens[:min_tokens]).removesuffix("\ufffd")
    found = [
        (start, start + len(each))
        for each in stop
        for start in range(len(everything))
        if everything.startswith(each, start) and start + len(each) > len(free)
    ]
    first = min(found, key=lambda places: places[1], default=(len(everything),) * 2)
    assert whole == everything[: first[includes]]


def test_special_tokens_are_shown_where_they_are_asked_for() -> None:
    stream = TextStream(word_tokenizer(), SamplingParams(skip_special_tokens=False))
    assert [stream.add([7]), stream.add([2]), stream.finish()] == ["w007", " </s>", ""]


def test_text_that_could_begin_a_stop_text_waits() -> None:
    tokenizer = word_tokenizer()
    stream = TextStream(tokenizer, ["w008 w009"])
    assert stream.add([7]) == "w007"
    assert stream.add([8]) == " "
    assert stream.add([10]) == "w008 w010"
    assert stream.add([8]) == " "
    assert stream.add([9]) == ""
    assert stream.finish() == ""


@pytest.mark.parametrize("includes", [False, True])
@pytest.mark.parametrize("skips", [False, True])
def test_a_token_that_ends_an_output_has_text_where_a_stop_text_would(includes: bool, skips: bool) -> None:
    tokenizer, options = word_tokenizer(), {"include_stop_str_in_output": includes, "skip_special_tokens": skips}
    for last, params in (
        (8, SamplingParams(stop_token_ids=[8], **options)),
        (2, SamplingParams(**options)),
        (2, SamplingParams(ignore_eos=True, stop_token_ids=[2], **options)),
    ):
        stream = TextStream(tokenizer, params, [2])
        shown = includes and (last == 8 or not skips)
        text = "".join([stream.add([7]), stream.add([last]), stream.finish()])
        assert text == ("w007 " + {8: "w008", 2: "</s>"}[last] if shown else "w007")
        assert TextRule.of(params, [2]).text(tokenizer, [7, last]) == text
    # A token that would end another request is one like others.
    shown = TextStream(tokenizer, SamplingParams(ignore_eos=True, **options), [2])
    assert "".join([shown.add([7, 2, 8]), shown.finish()]) == ("w007 w008" if skips else "w007 </s> w008")


def test_of_two_stop_texts_the_one_that_ends_first_counts() -> None:
    for stop, whole in ((["abcdef", "cd"], "ab"), (["bcd", "cd"], "a"), (["cd", "bcd"], "ab")):
        assert "abcdef"[: TextRule(tuple(stop)).end("abcdef")] == whole
        assert "abcdef"[: TextRule(tuple(stop), include_stop=True).end("abcdef")] == "abcd"


def test_special_tokens_have_no_text() -> None:
    stream = TextStream(word_tokenizer())
    assert [stream.add([7]), stream.add([2]), stream.finish()] == ["w007", "", ""]
