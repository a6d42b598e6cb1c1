"""Loss curves of a stage as CSV, JSON, and a picture where matplotlib is installed."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dynskip.files import write_json


def write_curves(directory: Path, history: Sequence[dict[str, Any]]) -> list[Path]:
    """The files written: ``curves.json``, ``curves.csv``, ``curves.png``.

    history: a Trainer's log, one entry a step with ``loss``, one an evaluation with ``eval_loss``.
    """
    paths = [directory / "curves.json", directory / "curves.csv"]
    write_json(paths[0], list(history))
    names = ["step", *sorted({name for entry in history for name in entry} - {"step"})]
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(history)
    if find_spec("matplotlib") is not None:
        paths.append(directory / "curves.png")
        _draw(paths[2], history)
    return paths


def _draw(path: Path, history: Sequence[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, marker, label in (("loss", "", "training batch"), ("eval_loss", "o", "validation")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per response token")
    axes.legend()
    figure.savefig(path, dpi=120)
