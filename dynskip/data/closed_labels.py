"""Rows of T0 whose answer is one of a few labels of their template, split by passage."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynskip.data.corpus import END_MARK, open_text

MOST_LABELS = 8  # of a template; its answers are texts of their own where there are more
LEAST_ROWS = 20  # of a template, so that labels which were never drawn are few
_TEST_SHARE = 0.15  # of the passages, as of Alpaca's rows


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A prompt whose answer is ``label``, one of the ``labels`` of its ``template``."""

    template: str
    prompt: str
    label: str
    labels: tuple[str, ...]


def read_labelled(path: Path) -> list[LabelledRow]:
    """The rows of T0's templates with closed labels, in the order of the file.

    A template is closed where at most `MOST_LABELS` texts answer at least `LEAST_ROWS` rows, each twice or more.
    """
    rows: list[tuple[str, str, str]] = []
    for number, line in enumerate(open_text(path), start=1):
        row = json.loads(line)
        missing = {"task", "prompt", "completion"} - set(row)
        if missing:
            raise ValueError(
                f"read_labelled: {path.name} line {number} must hold task, prompt and completion, got no "
                f"{' and no '.join(sorted(missing))}. Give the T0 file as published."
            )
        rows.append((row["task"], row["prompt"], row["completion"].replace(END_MARK, "").strip()))
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for template, _, answer in rows:
        answers[template][answer] += 1
    closed = {
        template: tuple(sorted(counts))
        for template, counts in answers.items()
        if 2 <= len(counts) <= MOST_LABELS
        and counts.total() >= LEAST_ROWS
        and min(counts.values()) >= 2
        and all(counts)
    }
    return [LabelledRow(name, prompt, label, closed[name]) for name, prompt, label in rows if name in closed]


def passage_of(prompt: str) -> str:
    """What templates write around: the longest line of the prompt."""
    return max((line.strip() for line in prompt.split("\n")), key=len)


def judged_part(rows: Sequence[LabelledRow]) -> list[LabelledRow]:
    """The rows to judge on: those of 15 % of the passages, which passages being a function of their text alone."""

    def place(row: LabelledRow) -> float:
        return int.from_bytes(hashlib.sha256(passage_of(row.prompt).encode()).digest()[:7], "big") / 2**56

    return [row for row in rows if place(row) < _TEST_SHARE]
