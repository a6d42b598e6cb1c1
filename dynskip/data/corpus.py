"""The two public data sets: Alpaca rows with the paper's split, and T0 passages without their repetitions."""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
END_MARK = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One Alpaca row: what is asked, an input that may be empty, and the response."""

    instruction: str
    input: str
    output: str

    @property
    def user_turn(self) -> str:
        """What a user of a chat says: what is asked, and behind an empty line its input."""
        return "\n\n".join(part for part in (self.instruction, self.input) if part)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Everything a run reads: the three Alpaca parts and the passages of the T0 file."""

    train: list[Instruction]
    validation: list[Instruction]
    test: list[Instruction]
    passages: list[str]


def open_text(path: Path) -> Iterable[str]:
    """The lines of a text file, plain or packed with xz."""
    encoding = "utf-8-sig"  # a byte order mark is no text
    with lzma.open(path, "rt", encoding=encoding) if path.suffix == ".xz" else path.open(encoding=encoding) as file:
        yield from file


def read_instructions(path: Path) -> list[Instruction]:
    """Alpaca rows in file order, from JSON (a list of objects), plain or packed with xz."""
    rows = json.loads("".join(open_text(path)))
    wanted = f"read_instructions: {path.name} must hold a list of objects with instruction, input and output"
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{wanted}, got {'an empty ' * (not rows)}{type(rows).__name__}. Give Alpaca as published.")
    instructions = []
    for number, row in enumerate(rows):
        try:
            texts = (row["instruction"], row.get("input", ""), row["output"])
        except (AttributeError, KeyError, TypeError):
            texts = (None, None, None)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{wanted}, all texts, got {str(row)[:80]} for row {number}. Mend the row or drop it.")
        instructions.append(Instruction(*texts))
    return instructions


def split_instructions(
    rows: list[Instruction], seed: int = 42
) -> tuple[list[Instruction], list[Instruction], list[Instruction]]:
    """Training, validation and test rows: 70 / 15 / 15, as ``datasets`` draws them in arXiv 2410.20022."""
    from datasets import Dataset

    numbered = Dataset.from_dict({"index": list(range(len(rows)))})
    first = numbered.train_test_split(test_size=0.3, seed=seed)
    second = first["test"].train_test_split(test_size=0.5, seed=seed)
    train, validation, test = (
        [rows[index] for index in part["index"]] for part in (first["train"], second["train"], second["test"])
    )
    return train, validation, test


def unique_passages(texts: Iterable[str], min_chars: int = 80, min_fresh: float = 0.5) -> list[str]:
    """One text for each input that says something new, in order: its lines of ``min_chars`` and more whose
    sentences, by characters, are new to at least ``min_fresh``.

    T0 shows one passage under many templates; counted by sentences nothing is trained on ten times by accident.
    """
    seen: set[str] = set()
    passages: list[str] = []
    for text in texts:
        kept: list[str] = []
        for line in text.replace(END_MARK, "").split("\n"):
            sentences = [sentence for sentence in _SENTENCE_END.split(line.strip()) if sentence]
            fresh = [sentence for sentence in sentences if sentence not in seen]
            seen.update(fresh)
            num_chars = sum(map(len, sentences))
            if num_chars >= min_chars and sum(map(len, fresh)) >= min_fresh * num_chars:
                kept.append(line.strip())
        if kept:
            passages.append("\n".join(kept))
    return passages


def read_completions(path: Path) -> list[Instruction]:
    """Prompts and completions of a JSON-lines file that holds both in each line, plain or packed with xz."""
    return [Instruction(row["prompt"], "", row["completion"]) for row in _t0_rows(path, ("prompt", "completion"))]


def read_templates(path: Path) -> dict[str, list[Instruction]]:
    """The same of the T0 file by the names of their templates, completions without the mark of their end."""
    rows: dict[str, list[Instruction]] = {}
    for row in _t0_rows(path, ("task", "prompt", "completion")):
        completion = row["completion"].removesuffix(END_MARK)
        rows.setdefault(row["task"], []).append(Instruction(row["prompt"], "", completion))
    return rows


def _t0_rows(path: Path, names: Sequence[str]) -> Iterator[dict[str, str]]:
    for number, line in enumerate(open_text(path), start=1):
        row = json.loads(line)
        if not set(names) <= set(row):
            raise ValueError(
                f"read_completions: {path.name} line {number} must hold {' and '.join(names)}, got {sorted(row)}. "
                "Give the T0 file as published."
            )
        yield row


def read_passages(path: Path) -> list[str]:
    """Deduplicated passages of a file that `read_completions` reads."""
    return unique_passages(text for row in read_completions(path) for text in (row.instruction, row.output))


def read_corpus(paths: Iterable[Path], split_seed: int = 42) -> Corpus:
    """The corpus in ``paths``: ``*.json[.xz]`` is read as Alpaca and split, ``*.jsonl[.xz]`` as T0."""
    rows: list[Instruction] = []
    passages: list[str] = []
    for path in paths:
        if ".jsonl" in path.suffixes:
            passages += read_passages(path)
        else:
            rows += read_instructions(path)
    if not rows:
        raise ValueError("read_corpus: paths must name an Alpaca file, got none. Add --data .../alpaca_data.json.xz.")
    train, validation, test = split_instructions(rows, split_seed)
    return Corpus(train, validation, test, passages)
