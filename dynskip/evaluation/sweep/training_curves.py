"""`TrainingCurve`: how far a controller was trained, by what ``dynskip train`` left in its folder."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

CURVES, RUN = "curves.csv", "run.json"
_LAST_PART = 0.25  # of the steps: over it the validation loss of a finished training stands still


@dataclass(frozen=True, slots=True)
class TrainingCurve:
    """The losses of one training: nats a token, and the price of layers.

    batch_size: rows a step. training, validation: the loss by step, of the step's batch and of the validation rows.
    """

    batch_size: int
    training: tuple[tuple[int, float], ...]
    validation: tuple[tuple[int, float], ...]

    @staticmethod
    def of(directory: Path) -> TrainingCurve | None:
        """That of the training in ``directory``; None where its files are not there."""
        if not (directory / CURVES).is_file() or not (directory / RUN).is_file():
            return None
        config = json.loads((directory / RUN).read_text(encoding="utf-8"))["config"]
        with (directory / CURVES).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))

        def curve(name: str) -> tuple[tuple[int, float], ...]:
            return tuple((int(row["step"]), float(row[name])) for row in rows if row.get(name))

        return TrainingCurve(int(config["batch_size"]), curve("loss"), curve("eval_loss"))

    @property
    def num_rows(self) -> int:
        """How many rows it was trained on, repeated ones counted each time."""
        return self.batch_size * max((step for step, _ in self.training), default=0)

    @property
    def moved(self) -> float | None:
        """The last validation loss less the last one before the final quarter of the steps; None without two such."""
        last = max((step for step, _ in self.training), default=0)
        before = [loss for step, loss in self.validation if step <= (1 - _LAST_PART) * last]
        after = [loss for step, loss in self.validation if step > (1 - _LAST_PART) * last]
        return after[-1] - before[-1] if before and after else None
