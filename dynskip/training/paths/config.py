"""What a training for paths is made of, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial

from dynskip.training.stage import check_same_config

# What may differ between two starts of one run: how fast it is, how often it is saved, and how far it is still to go.
_FREE = frozenset({"micro_batch_size", "save_every_s", "num_steps"})
_CHOICES = {
    "method": ("lora", "full"),
    "loss": ("distill", "response"),
    "answers": ("own", "data"),
    "precision": ("bfloat16", "float32"),
}
_MAY_BE_ZERO = ("answer_temperature", "warmup_steps", "seed", "save_every_s", "num_own_turns", "num_data_turns")


@dataclass(frozen=True, slots=True)
class PathsConfig:
    """A training of ``model`` for the paths of ``menu``.

    num_steps: may be another one when a run goes on: the learning rate then runs to zero at the new end.
    menu: texts that ``LayerPath.parse`` knows, ``found:B`` of a searched model included; none: see `default_menu`.
    paths_per_step: how many of
        them each step trains, drawn anew, deeper ones likelier at the beginning and shallower ones at the end; None:
        all.
    method: "lora" trains an adapter of ``rank`` on all matrices of the layers; "full" trains all weights.
    adapter: the folder of an adapter of that rank, which is trained on; None: one that changes nothing yet.
    loss: "distill" is the divergence from the model's own full depth, as it came, on all tokens; "response" the loss of
        the response's tokens.
    num_own_turns, num_data_turns: conversations that begin with a turn the model has written itself, and with a
        prompt of the data; their answers are the model's own, of full depth, sampled at ``answer_temperature``. See
        `Writing`.
    answers: "data" takes those of the data instead: ``num_data_turns`` rows, of Alpaca its training part.
    batch_size, micro_batch_size: conversations of a step, and those that a process computes at once.
    max_tokens: of a conversation, which is cut there. num_validation_texts: conversations that are held back.
    eval_every: steps between two evaluations. precision: of the frozen weights and of the products.
    """

    model: str
    menu: tuple[str, ...] = ()
    num_steps: int = 2000
    paths_per_step: int | None = None
    method: str = "lora"
    loss: str = "distill"
    rank: int = 16
    adapter: str | None = None
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    batch_size: int = 4
    micro_batch_size: int = 4
    max_tokens: int = 384
    num_own_turns: int = 4096
    num_data_turns: int = 1024
    answers: str = "own"
    answer_temperature: float = 0.7
    num_validation_texts: int = 32
    eval_every: int = 200
    precision: str = "bfloat16"
    seed: int = 0
    save_every_s: float = 300.0

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"PathsConfig: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}."
                )
        if self.adapter is not None and self.method != "lora":
            raise ValueError(
                f"PathsConfig: adapter must be left out with the method {self.method}, got {self.adapter}."
            )
        if self.answers == "data" and self.num_own_turns:
            raise ValueError(
                f"PathsConfig: own turns must be 0 with answers of the data, which know none, got {self.num_own_turns}."
            )
        if len(set(self.menu)) < len(self.menu):
            raise ValueError(f"PathsConfig: menu must name each path once, got {', '.join(self.menu)}.")
        num_paths = len(self.menu or default_menu(2))
        if self.paths_per_step is not None and self.paths_per_step > num_paths:
            raise ValueError(
                f"PathsConfig: paths_per_step must be at most {num_paths}, the paths of the menu, "
                f"got {self.paths_per_step}."
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            may_be_zero = field.name in _MAY_BE_ZERO
            if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
                wanted = "at least 0" if may_be_zero else "positive"
                raise ValueError(f"PathsConfig: {field.name} must be {wanted}, got {value}.")
        if self.num_own_turns + self.num_data_turns <= self.num_validation_texts:
            raise ValueError(
                f"PathsConfig: own and data turns must be more than the {self.num_validation_texts} held back, "
                f"got {self.num_own_turns} and {self.num_data_turns}."
            )


def default_menu(num_layers: int) -> tuple[str, ...]:
    """Full depth, and the paths that a search has found for five sixths, two thirds and half of the layers."""
    return ("full", *(f"found:{round(num_layers * share)}" for share in (5 / 6, 2 / 3, 1 / 2)))


check_same_run = partial(check_same_config, free=_FREE, defaults={"answers": "own"})
