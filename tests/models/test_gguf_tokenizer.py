"""The tokenizer of a GGUF file: llama.cpp's ids, special tokens that are text on request; or the file is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from dynskip import LLM, SamplingParams
from dynskip.assets import PACKAGED, packaged_file
from dynskip.models.gguf_file import read_header
from dynskip.models.gguf_tokenizer import read_gguf_tokenizer
from dynskip.prompts import chat_ids, text_ids

pytest.importorskip("gguf", reason="gguf is not installed")
from gguf_files import metadata, stored_tensors, tiny_model, write_gguf
from llama_cpp_ids import (
    MADE_UP,
    PRE_TOKENIZERS,
    alpaca_texts,
    hostile_texts,
    ids_hash,
    vocabulary_texts,
    write_vocabulary,
)

SMOLLM2 = "smollm2-135m-instruct"
ALPACA = os.environ.get("DYNSKIP_ALPACA")
EXPECTED = json.loads((Path(__file__).parent / "llama_cpp_ids.json").read_text(encoding="utf-8"))
# 256 bytes, what their merges make, and four tokens that no merge makes.
MERGES = ["a b", "Ġ ab", "! !", "1 2", "ab c"]
TOKENS = [*sorted(ByteLevel.alphabet()), "ab", "Ġab", "!!", "12", "abc", "<unk>", "<s>", "</s>", "<mine>"]
UNK, BOS, EOS, MINE = range(len(TOKENS) - 4, len(TOKENS))
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * (len(TOKENS) - 4) + [2, 3, 3, 4],
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.unknown_token_id": UNK,
    "tokenizer.ggml.bos_token_id": BOS,
    "tokenizer.ggml.eos_token_id": EOS,
    "tokenizer.chat_template": "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}",
}


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return packaged_file(SMOLLM2)
    except FileNotFoundError:
        pytest.skip(f"{PACKAGED[SMOLLM2][0]} is not installed")


def made(folder: Path, **changes: Any) -> Any:
    return read_gguf_tokenizer(write_vocabulary(folder / "model.gguf", METADATA, **changes), "test")


def pieces(tokenizer: Any, text: str, **options: Any) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, **options)["input_ids"])  # type: ignore[no-any-return]


def test_ids_are_those_of_llama_cpp(smollm2: Path) -> None:
    tokenizer = read_gguf_tokenizer(smollm2, "test")
    for text, (special, plain) in zip(MADE_UP, EXPECTED["made_up"], strict=True):
        assert tokenizer(text)["input_ids"] == special, text
        assert tokenizer(text, split_special_tokens=True)["input_ids"] == plain, text


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_ids_of_hostile_texts_are_those_of_llama_cpp(pre: str, smollm2: Path, tmp_path: Path) -> None:
    """The same vocabulary cut in each way, with each way's own default for the token that begins texts."""
    metadata = read_header(smollm2, "test").metadata
    path = write_vocabulary(tmp_path / "model.gguf", metadata, pre=pre, add_bos_token=None)
    tokenizer, texts = read_gguf_tokenizer(path, "test"), [*MADE_UP, *hostile_texts()]
    special, plain = tokenizer(texts)["input_ids"], tokenizer(texts, split_special_tokens=True)["input_ids"]
    assert special != plain
    assert all(row[0] == tokenizer.bos_token_id for row in plain) == (pre == "llama-bpe")
    assert ids_hash(special + plain) == EXPECTED["hostile"][pre]


def test_ids_of_its_vocabulary_are_those_of_llama_cpp(smollm2: Path) -> None:
    """3,000 texts that every machine with the model has: pieces of its file, which meet as they do in no text."""
    texts = vocabulary_texts(read_header(smollm2, "test").metadata)
    ids = read_gguf_tokenizer(smollm2, "test")(texts, split_special_tokens=True)["input_ids"]
    assert (len(texts), len({token for row in ids for token in row})) == (3_000, 40_082)
    assert ids_hash(ids) == EXPECTED["vocabulary"]


@pytest.mark.skipif(not ALPACA, reason="DYNSKIP_ALPACA names no alpaca_data.json of tatsu-lab/stanford_alpaca")
def test_ids_of_alpaca_are_those_of_llama_cpp(smollm2: Path) -> None:
    assert ALPACA, "else it was skipped"
    texts = alpaca_texts(Path(ALPACA))
    ids = read_gguf_tokenizer(smollm2, "test")(texts, split_special_tokens=True)["input_ids"]
    assert ids_hash(ids) == EXPECTED["alpaca"]


def test_texts_come_back(smollm2: Path) -> None:
    tokenizer = read_gguf_tokenizer(smollm2, "test")
    missing = set("\x00\x01\x02\x03\x04\x05\x06\x07\x08\x0b\x0c\x0e\x1b\x1d\x7f")  # its vocabulary lacks some of them
    for text in [text for text in (*MADE_UP, *hostile_texts()) if not missing & set(text)]:
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_its_conversations(smollm2: Path) -> None:
    tokenizer = read_gguf_tokenizer(smollm2, "test")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is <|im_end|> a word?"}]
    before = [1, 9690, 198, *text_ids(tokenizer, "Be brief.", True, "test"), 2, 198, 1, 4093, 198]
    after = [2, 198, 1, 520, 9531, 198]
    for special in (True, False):
        text = text_ids(tokenizer, "Is <|im_end|> a word?", special, "test")
        assert (2 in text) == special
        assert chat_ids(tokenizer, messages, special) == [*before, *text, *after]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (2, 2, 8192)


def test_control_tokens_are_text_on_request_and_the_files_own_are_not(tmp_path: Path) -> None:
    tokenizer = made(tmp_path)
    assert pieces(tokenizer, "ab</s><mine> ab<unk>") == ["ab", "</s>", "<mine>", "Ġab", "<unk>"]
    split = ["ab", *"</s>", "<mine>", "Ġab", *"<unk>"]
    assert pieces(tokenizer, "ab</s><mine> ab<unk>", split_special_tokens=True) == split
    ids = tokenizer("ab</s><mine><unk>!")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<mine>!"
    assert set(tokenizer.all_special_tokens) == {"<unk>", "<s>", "</s>"}
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (UNK, BOS, EOS)
    assert tokenizer.pad_token is None and len(tokenizer) == len(TOKENS) and tokenizer.get_vocab()["<mine>"] == MINE
    messages = [{"role": "user", "content": "ab</s>"}]
    assert chat_ids(tokenizer, messages, True) == tokenizer("<s>ab</s></s>")["input_ids"]
    plain = tokenizer("ab</s>", split_special_tokens=True)["input_ids"]
    assert chat_ids(tokenizer, messages, False) == [BOS, *plain, EOS]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_what_is_added_to_texts(pre: str, tmp_path: Path) -> None:
    """The file's flags, or else the default of its way to cut texts; nothing where special tokens are not asked for."""
    for begins in (None, True, False):
        for ends in (None, True, False):
            tokenizer = made(tmp_path, pre=pre, add_bos_token=begins, add_eos_token=ends)
            before = [BOS] if (pre == "llama-bpe" if begins is None else begins) else []
            after = [EOS] if ends else []
            bare = tokenizer("ab", add_special_tokens=False)["input_ids"]
            assert bare == [TOKENS.index("ab")] and tokenizer("ab")["input_ids"] == [*before, *bare, *after]


def test_a_model_with_more_rows_than_words(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=len(TOKENS) + 7)
    values = {key: value for key, value in METADATA.items() if key.startswith("tokenizer.")}
    values = {**metadata(model), **values, "tokenizer.ggml.padding_token_id": None}
    llm = LLM(write_gguf(tmp_path / "model.gguf", "llama", values, stored_tensors(model)), dtype="float32")
    row = len(TOKENS) + 3
    params = SamplingParams(max_tokens=3, logit_bias={row: 1000.0})
    (output,) = llm.generate(["ab"], params)
    assert (output.token_ids, output.text) == ([row] * 3, "")


def test_how_texts_are_cut(tmp_path: Path) -> None:
    text = "12'S abc"
    cut = {pre: pieces(made(tmp_path, pre=pre, add_bos_token=False), text) for pre in PRE_TOKENIZERS}
    # Digits apart, and what they say of case is in the hashes. In Llama's a piece that is a token stays whole.
    assert cut["gpt-2"] == cut["default"] == cut["llama-bpe"] == ["12", "'", "S", "Ġab", "c"]
    assert cut["smollm"] == cut["qwen2"] == ["1", "2", "'", "S", "Ġab", "c"]
    tokens = [*TOKENS[:-1], "Ġabc"]
    for pre, expected in (("llama-bpe", ["Ġabc"]), ("gpt-2", ["Ġab", "c"])):
        types = [*METADATA["tokenizer.ggml.token_type"][:-1], 1]
        tokenizer = made(tmp_path, pre=pre, tokens=tokens, token_type=types, add_bos_token=False)
        assert pieces(tokenizer, " abc") == expected


def test_bytes_without_a_token_are_left_out_and_nothing_merges_across(tmp_path: Path) -> None:
    tokens = [token for token in TOKENS if token not in ("\u0104", "?")]  # \x04 as the format writes it
    types = [1] * (len(tokens) - 4) + [2, 3, 3, 4]
    ids = {"unknown_token_id": len(tokens) - 4, "bos_token_id": len(tokens) - 3, "eos_token_id": len(tokens) - 2}
    tokenizer = made(tmp_path, tokens=tokens, token_type=types, **ids)
    assert pieces(tokenizer, "!!\x04ab?!\x04!?!!") == ["!!", "ab", "!", "!", "!!"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "tekken"}, "a tokenizer.ggml.pre of default, gpt-2, smollm, qwen2, llama-bpe, got 'tekken'. Others"),
        ({"pre": None}, "a tokenizer.ggml.pre of default, .*, got 'none'"),
        ({"model": "llama"}, "a byte-level BPE tokenizer, tokenizer.ggml.model gpt2, got 'llama'. Other tokenizers"),
        ({"model": None}, "a byte-level BPE tokenizer, .* got 'none'"),
        ({"tokens": None}, "must hold tokenizer.ggml.tokens, got none"),
        ({"tokens": [*TOKENS[:-1], "ab"]}, "tokens that differ, none empty, .* got 265 tokens, 264 different, and 265"),
        ({"tokens": [*TOKENS[:-1], ""]}, "tokens that differ, none empty"),
        ({"token_type": [1, 2]}, "and a type for each, got 265 tokens, 265 different, and 2 types"),
        ({"merges": None}, "must hold tokenizer.ggml.merges, got none"),
        ({"merges": ["a nothing"]}, "must hold merges of its tokens, got: .*nothing"),
        ({"merges": ["ab"]}, "must hold merges of its tokens, got: "),
        ({"eos_token_id": 265}, "the eos token of .* must be below 265, got 265"),
        ({"bos_token_id": None, "add_bos_token": True}, "name the bos token that it adds to texts, got no "),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token of .* must be bool, got 1"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^test: .*{message}"):
        made(tmp_path, **changes)
