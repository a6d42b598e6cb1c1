"""How controllers were trained: their losses by step, and a table of how far they came."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dynskip.evaluation.report.document import Block, Figure, Table
from dynskip.evaluation.report.drawing import STYLES, drawing_of
from dynskip.evaluation.report.numbers import MISSING, number, signed
from dynskip.evaluation.report.rows import Row, distinct

_IN_A_LINE = 4  # panels
_SMOOTHED = 10  # steps that a point of the training loss is the mean of


def training_curves(section: Row) -> list[Block]:
    """The figure and the table of the trainings of a section; nothing where it does not hold them."""
    trained = [each for each in section.get("trained", ()) if each["training"]]
    if not trained:
        return []
    cells = [
        [
            str(each["controller"]),
            f"{each['num_rows']:,}",
            number(each["validation"][-1][1]) if each["validation"] else MISSING,
            MISSING if each["moved"] is None else signed({"value": each["moved"]}),
        ]
        for each in trained
    ]
    header = ["controller", "rows seen", "validation loss", "moved over the last quarter"]
    return [
        Figure(
            drawing_of(
                "controller-training",
                "Charts of the training and validation losses by step, one for each recipe of controllers.",
                lambda figure: _draw(figure, trained),
                9.0,
                0.6 + 2.6 * _num_lines(trained),
            ),
            "The loss of each training by step: nats a token and the price of layers. Lines are means of the training "
            f"loss over {_SMOOTHED} steps, markers the validation loss, a style for each training.",
        ),
        Table("How far controllers were trained", header, cells),
    ]


def _draw(figure: Any, trained: list[Row]) -> None:
    """A panel for each recipe."""
    recipes = distinct(trained, "recipe")
    panels = figure.subplots(_num_lines(trained), min(_IN_A_LINE, len(recipes)), sharey=True, squeeze=False)
    every = [axes for line in panels for axes in line]
    for axes in every[len(recipes) :]:
        axes.remove()
    for axes, recipe in zip(every, recipes, strict=False):
        for style, each in enumerate(each for each in trained if each["recipe"] == recipe):
            look = STYLES[style % len(STYLES)]
            steps, losses = np.array(each["training"], dtype=np.float64).T
            width = min(_SMOOTHED, len(losses))
            smoothed = np.convolve(losses, np.full(width, 1 / width), mode="valid")
            axes.plot(steps[width - 1 :], smoothed, color=look["color"], linestyle=look["linestyle"], linewidth=1.0)
            if each["validation"]:
                label = f"seed {each['training_seed']}"
                axes.plot(*zip(*each["validation"], strict=True), **{**look, "linestyle": "none"}, label=label)
        kind, _, aim = str(recipe).partition(", ")
        axes.set(title=f"{kind}, {aim.partition(', ')[0]}", xlabel="step")
    for axes, *_ in panels:
        axes.set_ylabel("loss (nats a token, and the price)")
    every[0].legend(loc="upper right")


def _num_lines(trained: list[Row]) -> int:
    return math.ceil(len(distinct(trained, "recipe")) / _IN_A_LINE)
