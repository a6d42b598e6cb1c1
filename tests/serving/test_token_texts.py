"""Single tokens as text, as bytes, and where each begins in an answer."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from tokenizers.decoders import ByteFallback, Fuse
from tokenizers.decoders import Sequence as Decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dynskip import LLM
from dynskip.serving.answers import Characters, TokenTexts

TEXTS = ["plain words, and 12", "é ü ß", "🙂 and 你好!", "\u2028\x00\x7f\xad", "🙂" * 5]


def byte_fallback() -> Any:
    """A tokenizer that names the bytes of what it has no token for, as SentencePiece does."""
    words = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "b": 257}
    tokenizer = tokenizers.Tokenizer(BPE(words, [], byte_fallback=True))
    tokenizer.decoder = Decoders([ByteFallback(), Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module", params=["bytes as signs", "bytes by name"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return LLM("opt-mini").tokenizer if request.param == "bytes as signs" else byte_fallback()


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_are_those_of_their_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = TokenTexts(tokenizer)
    assert b"".join(map(texts.bytes_of, ids)).decode() == text
    told = texts.chat_logprobs(ids, [{token: -1.0} for token in ids], 1)["content"]
    assert bytes(byte for each in told for byte in each["bytes"]).decode() == text
    offsets = Characters(texts).add(ids, hides_special=True)
    assert texts.completion_logprobs(ids, [None] * len(ids), offsets)["text_offset"] == offsets
    assert offsets[0] == 0 and offsets == sorted(offsets) and offsets[-1] <= len(text)
    for token, offset, after in zip(ids, offsets, [*offsets[1:], len(text)], strict=True):
        if "\ufffd" not in texts.of(token):
            assert text[offset:after] == texts.of(token)


@pytest.mark.parametrize("hides_special", [True, False])
def test_characters_are_those_of_the_text_as_it_is_shown(tokenizer: Any, hides_special: bool) -> None:
    """Special tokens that are left out, and bytes that are no character: the first byte here continues none."""
    special = tokenizer.all_special_ids[:1]
    ids = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    ids = [*special, *ids[-1:], *special, *tokenizer("ab", add_special_tokens=False)["input_ids"], *special, *ids]
    characters = Characters(TokenTexts(tokenizer))
    offsets = characters.add(ids, hides_special)
    shown = tokenizer.decode(ids, skip_special_tokens=hides_special)
    assert offsets[0] == 0 and offsets[-1] <= len(shown) and "\ufffd" in shown
    assert characters.add(ids[:1], hides_special) == [len(shown)]


def test_without_a_tokenizer_a_token_is_its_number() -> None:
    texts = TokenTexts(None)
    assert (texts.of(7), texts.bytes_of(7)) == ("token:7", b"token:7")
