"""Tokenized examples: the prompt, the response, and the bytes that the response stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynskip.training.corpus import Instruction
from dynskip.training.tokenizer import prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one row. ``response_ids`` end with the end token unless cut; ``num_bytes`` are the bytes of
    the response that the kept tokens stand for (the end token stands for none)."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        """Prompt and response together."""
        return len(self.prompt_ids) + len(self.response_ids)


def encode_examples(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Instruction], max_tokens: int) -> list[Example]:
    """Examples in the order of ``rows``, cut at ``max_tokens``; rows whose prompt leaves no room are left out."""
    prompts = tokenizer([prompt_text(row.instruction, row.input) for row in rows])["input_ids"]
    responses = tokenizer([row.output for row in rows], add_special_tokens=False)["input_ids"]
    examples: list[Example] = []
    for prompt_ids, text_ids in zip(prompts, responses, strict=True):
        room = max_tokens - len(prompt_ids)
        if room <= 0 or not text_ids:
            continue
        kept = text_ids[:room]
        # In a byte-level vocabulary the written form of a token has one character for each byte.
        num_bytes = sum(map(len, tokenizer.convert_ids_to_tokens(kept)))
        examples.append(Example(tuple(prompt_ids), tuple((*text_ids, tokenizer.eos_token_id)[:room]), num_bytes))
    return examples


def encode_windows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], window: int) -> list[tuple[int, ...]]:
    """All texts one after the other, each opened by the start token, cut into windows of exactly ``window`` ids."""
    stream = [token for ids in tokenizer(list(texts))["input_ids"] for token in ids]
    return [tuple(stream[start : start + window]) for start in range(0, len(stream) - window + 1, window)]
