"""Questions and answers as a chat model knows them: rows drawn from a data file, in the model's chat template."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynskip.data.corpus import END_MARK, Instruction, read_completions, read_instructions, split_instructions
from dynskip.data.examples import Example
from dynskip.data.templates import alpaca_prompt
from dynskip.prompts import chat_ids, text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Answers of about a sentence to a paragraph: what a path is worth shows in them, and many fit into a batch.
ANSWER_CHARS = range(41, 300)
MAX_ANSWER_TOKENS = 96
MAX_PROMPT_TOKENS = 256


def read_rows(path: Path) -> list[Instruction]:
    """The rows of a data file: ``*.json[.xz]`` is read as Alpaca, ``*.jsonl[.xz]`` as T0."""
    return read_completions(path) if ".jsonl" in path.suffixes else read_instructions(path)


def read_training_rows(path: Path) -> list[Instruction]:
    """The rows to train on: of Alpaca the training part by the seed of `dynskip eval`, on which it judges nothing.

    Of other files all rows, judged ones too, without the mark that T0 ends its completions with.
    """
    rows = read_rows(path)
    if ".jsonl" not in path.suffixes:
        return split_instructions(rows)[0]
    return [Instruction(row.instruction, row.input, row.output.removesuffix(END_MARK)) for row in rows]


def draw_conversations(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Instruction],
    counts: Sequence[int],
    end_token: int,
    seed: int,
    max_positions: int,
) -> list[list[Example]]:
    """As many examples as each of ``counts`` says, of rows without input in shuffled order; no question comes twice.

    Answers have as many characters as `ANSWER_CHARS` allows, are cut at `MAX_ANSWER_TOKENS`, and end with
    ``end_token``. Prompts stand in the tokenizer's chat template, in Alpaca's where it has none; those of more tokens
    than `MAX_PROMPT_TOKENS` are left out. Of a model of few ``max_positions`` both are shorter. Raises ValueError where
    there are too few rows.
    """
    max_answer_tokens = min(MAX_ANSWER_TOKENS, max_positions // 2)
    max_prompt_tokens = min(MAX_PROMPT_TOKENS, max_positions - max_answer_tokens - 1)
    order = list(rows)
    random.Random(seed).shuffle(order)
    examples: list[Example] = []
    seen: set[str] = set()
    for row in order:
        if len(examples) == sum(counts):
            break
        if row.input or len(row.output) not in ANSWER_CHARS or not row.instruction or row.instruction in seen:
            continue
        seen.add(row.instruction)
        prompt_ids = encode_prompt(tokenizer, row.instruction)
        if len(prompt_ids) <= max_prompt_tokens:
            text = tokenizer(row.output, add_special_tokens=False, split_special_tokens=True, verbose=False)
            kept = text["input_ids"][:max_answer_tokens]
            num_bytes = sum(map(len, tokenizer.convert_ids_to_tokens(kept)))
            examples.append(Example(tuple(prompt_ids), (*kept, end_token), num_bytes))
    if len(examples) < sum(counts):
        raise ValueError(
            f"draw_conversations: rows must hold {sum(counts)} without input, with answers of {ANSWER_CHARS.start} to "
            f"{ANSWER_CHARS.stop - 1} characters and prompts of at most {max_prompt_tokens} tokens, got "
            f"{len(examples)}. Ask for fewer rows, or give a larger file."
        )
    parts = iter(examples)
    return [[next(parts) for _ in range(count)] for count in counts]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, instruction: str) -> list[int]:
    """The token ids of ``instruction`` as a user's turn in the chat template; in Alpaca's where there is none."""
    if tokenizer.chat_template is None:
        return text_ids(tokenizer, alpaca_prompt(instruction), special_tokens=False, what="encode_prompt: instruction")
    return chat_ids(tokenizer, [{"role": "user", "content": instruction}], special_tokens=False)
