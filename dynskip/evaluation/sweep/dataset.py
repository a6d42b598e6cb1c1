"""The prompts of a split for one tokenizer, and a report on what is wrong with the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dynskip.data.corpus import Instruction, read_instructions, split_instructions
from dynskip.data.examples import templated
from dynskip.data.templates import TEMPLATE_NAMES

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a split that can be scored.

    index: its place in the split. prompt_ids, response_ids: as the model reads them, the response with its end token
    and cut where positions end. reference: the whole response.
    """

    index: int
    instruction: Instruction
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def reference(self) -> str:
        """The response that generated texts are compared with."""
        return self.instruction.output


@dataclass(frozen=True, slots=True)
class Prompts:
    """The first rows of a split that can be scored, in its order, and how many before the last one cannot.

    empty: rows without a response. too_long: rows whose prompt and new tokens do not fit the model.
    """

    rows: tuple[Row, ...]
    empty: int
    too_long: int


def encode_prompts(
    instructions: Sequence[Instruction],
    tokenizer: Any,
    max_positions: int,
    max_tokens: int,
    template: str,
    num_prompts: int,
) -> Prompts:
    """The first ``num_prompts`` of ``instructions`` that have a response and, with new tokens, fit the model.

    Raises ValueError where there are fewer.
    """
    if template not in TEMPLATE_NAMES:
        raise ValueError(f"eval: template must be one of {', '.join(TEMPLATE_NAMES)}, got {template!r}.")
    rows: list[Row] = []
    empty = too_long = 0
    for index, instruction in enumerate(instructions):
        if len(rows) == num_prompts:
            break
        if not instruction.output.strip():
            empty += 1
            continue
        prompt_ids = templated(tokenizer, template, instruction)
        if len(prompt_ids) + max_tokens > max_positions:
            too_long += 1
            continue
        response = tokenizer(instruction.output, add_special_tokens=False)["input_ids"]
        response_ids = (*response, tokenizer.eos_token_id)[: max_positions - len(prompt_ids)]
        rows.append(Row(index, instruction, tuple(prompt_ids), response_ids))
    if len(rows) < num_prompts:
        raise ValueError(
            f"eval: prompts must be at most the {len(rows)} rows of the split that can be scored, got {num_prompts} "
            f"({empty} rows have no response, {too_long} prompts do not fit {max_positions} positions with "
            f"{max_tokens} new tokens)."
        )
    return Prompts(tuple(rows), empty, too_long)


@lru_cache(maxsize=1)
def read_splits(path: Path, split_seed: int = 42) -> dict[str, list[Instruction]]:
    """The three splits of an Alpaca file; ValueError, naming the row, where a field is missing or is no text."""
    return dict(zip(SPLITS, split_instructions(read_instructions(path), split_seed), strict=True))


def duplicates(splits: dict[str, list[Instruction]]) -> dict[str, int]:
    """How many rows of one split stand in another too: the whole row, and its prompt alone, by pair of splits."""
    counts: dict[str, int] = {}
    names = list(splits)
    for first, name in enumerate(names):
        for other in names[first + 1 :]:
            whole = set(splits[name])
            prompts = {(row.instruction, row.input) for row in whole}
            counts[f"rows of {other} in {name}"] = sum(row in whole for row in splits[other])
            counts[f"prompts of {other} in {name}"] = sum(
                (row.instruction, row.input) in prompts for row in splits[other]
            )
    return counts
