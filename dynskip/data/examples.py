"""Tokenized examples: the prompt, the response, and the bytes that the response stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynskip.data.corpus import Instruction
from dynskip.data.templates import CHAT, TEMPLATE_NAMES, TEMPLATES
from dynskip.prompts import chat_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Instruction],
    max_tokens: int,
    template: str = "short",
    max_prompt_tokens: int | None = None,
) -> list[Example]:
    """Examples in the order of ``rows``, cut at ``max_tokens``.

    Left out are rows with an empty response and rows whose prompt leaves no room or is longer than
    ``max_prompt_tokens``.
    """
    if template not in TEMPLATE_NAMES:
        raise ValueError(
            f"encode_examples: template must be one of {', '.join(TEMPLATE_NAMES)}, got {template!r}. "
            "Take the one that the checkpoint was trained with."
        )
    prompts: Sequence[Sequence[int]]
    if template == CHAT:
        prompts = [templated(tokenizer, CHAT, row) for row in rows]
    else:
        write = TEMPLATES[template]
        prompts = tokenizer([write(row.instruction, row.input) for row in rows], verbose=False)["input_ids"]
    responses = tokenizer([row.output for row in rows], add_special_tokens=False, verbose=False)["input_ids"]
    longest = max_tokens - 1 if max_prompt_tokens is None else min(max_tokens - 1, max_prompt_tokens)
    examples: list[Example] = []
    for prompt_ids, text_ids in zip(prompts, responses, strict=True):
        room = max_tokens - len(prompt_ids)
        if len(prompt_ids) > longest or not text_ids:
            continue
        kept = text_ids[:room]
        # In a byte-level vocabulary the written form of a token has one character for each byte.
        num_bytes = sum(map(len, tokenizer.convert_ids_to_tokens(kept)))
        examples.append(Example(tuple(prompt_ids), tuple((*text_ids, tokenizer.eos_token_id)[:room]), num_bytes))
    return examples


def templated(tokenizer: PreTrainedTokenizerBase, template: str, row: Instruction) -> list[int]:
    """The token ids of a row's prompt; ValueError for the chat template of a tokenizer that has none."""
    if template != CHAT:
        token_ids: list[int] = tokenizer(TEMPLATES[template](row.instruction, row.input))["input_ids"]
        return token_ids
    if tokenizer.chat_template is None:
        raise ValueError(
            "templated: template must be alpaca or short with a tokenizer that has no chat template, got chat."
        )
    return chat_ids(tokenizer, [{"role": "user", "content": row.user_turn}], special_tokens=False)


def encode_windows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], window: int) -> list[tuple[int, ...]]:
    """All texts one after the other, each opened by the start token, cut into windows of exactly ``window`` ids."""
    stream = [token for ids in tokenizer(list(texts))["input_ids"] for token in ids]
    return [tuple(stream[start : start + window]) for start in range(0, len(stream) - window + 1, window)]
