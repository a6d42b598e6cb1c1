"""The tokenizer in a GGUF file: byte-level BPE, which gives the ids that llama.cpp gives.

Letters that came with Unicode 16 are letters here, and no letters yet in llama.cpp: only a vocabulary with merges of
their bytes and others' can tell.
"""

from __future__ import annotations

import re
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dynskip.arguments import shown
from dynskip.models.gguf_file import GGUFHeader, read_header

_MODEL = "gpt2"  # what the format calls byte-level BPE

# As in llama.cpp's llama-vocab.cpp and unicode.cpp. Contractions are spelled in both cases: what ignores case takes
# the long s for an s.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASED_WORDS = (
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Splits(NamedTuple):
    """How a text is cut before its bytes are merged.

    patterns: each isolates its matches in what those before left. ignore_merges: a piece that is a token is that
    token, whatever the merges make of it. add_bos: where the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


# By the file's `tokenizer.ggml.pre`.
_PRE_TOKENIZERS = {
    "default": _Splits((r"[\p{P}$+<=>^~|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _Splits((_WORDS,)),
    "smollm": _Splits((r"\p{N}", _WORDS)),
    "qwen2": _Splits((_CASED_WORDS.replace("{DIGITS}", ""),)),
    "llama-bpe": _Splits((_CASED_WORDS.replace("DIGITS", "1,3"),), ignore_merges=True, add_bos=True),
}


class _TokenType(IntEnum):
    """The types of tokens that stand for themselves in a text; all others come of merges."""

    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


def read_gguf_tokenizer(path: str | Path, function: str) -> PreTrainedTokenizerFast:
    """The tokenizer in the GGUF file at ``path``, with its chat template; the tensors are not looked at.

    Control tokens are special: `split_special_tokens` makes text of them. Tokens that the file calls user-defined stand
    for themselves in every text. Raises FileNotFoundError, and ValueError for a file without a tokenizer, with one that
    is no byte-level BPE, or an unknown way to cut texts; they begin with ``function``.
    """
    header = read_header(path, function)
    splits = _splits(header)
    tokenizer = _byte_level(header, splits)
    architecture = header.get("general.architecture", str, "")
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    control = {name: token for name, key in names.items() if (token := _control_token(header, key)) is not None}
    add_bos = header.get("tokenizer.ggml.add_bos_token", bool, splits.add_bos)
    add_eos = header.get("tokenizer.ggml.add_eos_token", bool, False)
    for name, is_added in (("bos", add_bos), ("eos", add_eos)):
        if is_added and f"{name}_token" not in control:
            raise header.error(f"name the {name} token that it adds to texts, got no tokenizer.ggml.{name}_token_id.")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        add_bos_token=add_bos,
        add_eos_token=add_eos,
        chat_template=header.get("tokenizer.chat_template", str),
        model_max_length=header.get(f"{architecture}.context_length", int),
        clean_up_tokenization_spaces=False,
        **control,
    )
    fast.name_or_path = str(path)
    return fast


def _splits(header: GGUFHeader) -> _Splits:
    model = header.get("tokenizer.ggml.model", str, "none")
    if model != _MODEL:
        raise header.error(
            f"hold a byte-level BPE tokenizer, tokenizer.ggml.model {_MODEL}, got {shown(model)}. Other tokenizers are "
            "not supported: name a folder with the model's own."
        )
    pre = header.get("tokenizer.ggml.pre", str, "none")
    if pre not in _PRE_TOKENIZERS:
        raise header.error(
            f"hold a tokenizer.ggml.pre of {', '.join(_PRE_TOKENIZERS)}, got {shown(pre)}. Others are not supported: "
            "name a folder with the model's own tokenizer."
        )
    return _PRE_TOKENIZERS[pre]


def _byte_level(header: GGUFHeader, splits: _Splits) -> Tokenizer:
    tokens = header.require("tokenizer.ggml.tokens", list)
    types = header.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens) or "" in vocabulary or len(types) != len(tokens):
        raise header.error(
            f"hold tokens that differ, none empty, and a type for each, got {len(tokens)} tokens, {len(vocabulary)} "
            f"different, and {len(types)} types."
        )
    merges = [str(merge).partition(" ")[::2] for merge in header.require("tokenizer.ggml.merges", list)]
    try:
        tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=splits.ignore_merges))
    except Exception as error:  # tokenizers raises plain exceptions: their text says which merge has no token
        raise header.error(f"hold merges of its tokens, got: {error}") from error
    isolate = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits.patterns]
    steps = [*isolate, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    unknown = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.keys())
    if unknown:
        # Bytes without a token are left out; what stood beside one does not merge across the gap.
        steps.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, unknown))), "removed"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_TokenType.UNKNOWN, _TokenType.CONTROL):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _TokenType.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    return tokenizer


def _control_token(header: GGUFHeader, name: str) -> AddedToken | None:
    """The token that the file names so, or None."""
    index = header.get(f"tokenizer.ggml.{name}_token_id", int)
    if index is None:
        return None
    tokens = header.require("tokenizer.ggml.tokens", list)
    if not 0 <= index < len(tokens):
        raise ValueError(
            f"{header.function}: the {name} token of {header.path} must be below {len(tokens)}, got {index}."
        )
    return AddedToken(tokens[index], special=True, normalized=False)
