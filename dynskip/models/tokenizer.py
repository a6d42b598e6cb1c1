"""The tokenizer beside a model, or of a folder of its own; no code of either is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynskip.assets import find_model
from dynskip.models.gguf_tokenizer import read_gguf_tokenizer


def read_tokenizer(source: str | Path, function: str, advice: str = "") -> Any:
    """The tokenizer in a directory, in a GGUF file or at a hub id, with a vocabulary.

    Raises ValueError, from ``function`` to ``advice``, where there is none, or one that is damaged or brings code.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    name = str(find_model(source))
    if name.endswith(".gguf"):
        return read_gguf_tokenizer(name, function)
    try:
        code = get_tokenizer_config(name).get("auto_map")
        tokenizer: Any = None if code else AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise types of their own: all say why in their text
        reason = " ".join(str(error).split())
        raise ValueError(f"{function}: {source} must hold a tokenizer, got: {reason}{advice}") from error
    if code:
        raise ValueError(
            f"{function}: {source} must hold a tokenizer that transformers knows, got one of its own code, auto_map "
            f"{str(code)[:100]}. Code of a folder is never run.{advice}"
        )
    # Without its vocabulary transformers builds a tokenizer that knows special tokens only.
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError(
            f"{function}: {source} must hold a tokenizer with a vocabulary, got special tokens only.{advice}"
        )
    return tokenizer


def check_vocabulary(tokenizer: Any, vocab_size: int, source: str | Path, function: str) -> None:
    """Raise ValueError, from ``function``, where the tokenizer of ``source`` knows ids that the model does not have."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ValueError(
            f"{function}: tokenizer of {source} must know token ids below the model's {vocab_size}, got {largest}. "
            "Checkpoint and tokenizer do not belong together."
        )
