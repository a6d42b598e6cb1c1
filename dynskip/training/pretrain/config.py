"""What a run is made of, as data: the model's shape, its phases and their schedules."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynskip.paths import LayerPath
from dynskip.training.schedule import LearningRate, PathMenu


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The shape of an OPT model: pre-LayerNorm, tied head."""

    num_layers: int = 24
    hidden_size: int = 192
    ffn_size: int = 768
    num_heads: int = 3
    vocab_size: int = 4096
    max_positions: int = 512


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of training. It ends after ``max_steps`` or ``max_minutes``, whichever comes first."""

    name: str
    response_only: bool
    passage_share: float
    budget_weights_start: dict[int, float]
    budget_weights_end: dict[int, float]
    learning_rate: LearningRate
    max_steps: int | None = None
    max_minutes: float | None = None

    def menu(self, num_layers: int) -> PathMenu:
        """The menu of uniform paths with the phase's budgets; the budget ``num_layers`` is the full path."""
        if set(self.budget_weights_start) != set(self.budget_weights_end):
            raise ValueError(
                f"Phase: budget_weights_end must name the budgets of budget_weights_start, got "
                f"{sorted(self.budget_weights_end)} and {sorted(self.budget_weights_start)}. Use a weight of 0."
            )
        budgets = sorted(self.budget_weights_start, reverse=True)
        return PathMenu(
            tuple(LayerPath.uniform(num_layers, budget=budget) for budget in budgets),
            tuple(self.budget_weights_start[budget] for budget in budgets),
            tuple(self.budget_weights_end[budget] for budget in budgets),
        )


@dataclass(frozen=True, slots=True)
class RunConfig:
    """A whole run: tokenizer, phases one after the other, export.

    ``num_watched_rows`` validation rows are scored now and then while it trains, ``num_scored_rows`` at the end.
    """

    shape: ModelShape
    phases: tuple[Phase, ...]
    tokens_per_batch: int = 4096
    window: int = 512
    muon_lr: float = 0.01
    adamw_lr: float = 2e-3
    weight_decay: float = 0.1
    seed: int = 0
    split_seed: int = 42
    save_every_s: float = 300.0
    num_watched_rows: int = 128
    num_scored_rows: int = 2000
    preset: str = field(default="", compare=False)


def check_same_run(old: dict[str, Any], new: dict[str, Any], directory: Path) -> None:
    """Raise ValueError, naming the difference, where a run of the record ``new`` cannot go on with one of ``old``.

    Length and rates of a phase may change between two starts.
    """
    for name in ("shape", "seed", "split_seed", "tokens_per_batch", "window"):
        if old["config"][name] != new["config"][name]:
            raise ValueError(
                f"TrainingRun: {name} must equal the run's {old['config'][name]!r}, got {new['config'][name]!r}. "
                f"Give the run's own options or another folder than {directory}."
            )
    if old["data"] != new["data"]:
        raise ValueError(
            f"TrainingRun: data must be the run's files {old['data']}, got {new['data']}. "
            f"Give the same files or another folder than {directory}."
        )


def opt_mini() -> RunConfig:
    """The recipe of the model that the package ships.

    Shallow paths come first and deeper ones later: a ULS-4 step costs a sixth of a full one and trains layers that
    every deeper path of the menu shares.
    """
    return RunConfig(
        shape=ModelShape(),
        phases=(
            Phase(
                "pretrain",
                response_only=False,
                passage_share=0.25,
                budget_weights_start={24: 0.04, 12: 0.10, 8: 0.30, 4: 0.56},
                budget_weights_end={24: 0.24, 12: 0.28, 8: 0.24, 4: 0.24},
                learning_rate=LearningRate(1.0, 0.6, warmup_steps=100),
                max_minutes=70,
            ),
            Phase(
                "finetune",
                response_only=True,
                passage_share=0.0,
                budget_weights_start={24: 0.32, 12: 0.26, 8: 0.20, 4: 0.22},
                budget_weights_end={24: 0.32, 12: 0.26, 8: 0.20, 4: 0.22},
                learning_rate=LearningRate(0.6, 0.0, warmup_steps=20),
                max_minutes=25,
            ),
        ),
        preset="opt-mini",
    )


PRESETS = {"opt-mini": opt_mini}
