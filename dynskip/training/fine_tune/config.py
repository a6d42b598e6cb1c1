"""What a fine-tune is made of, as data, and the two presets of the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial

from dynskip.data.templates import TEMPLATE_NAMES
from dynskip.training.stage import check_same_config

# What may differ between two starts of one run: it changes how fast a run is, or how often it is saved, not its result.
_FREE = frozenset({"micro_batch_size", "save_every_s", "gradient_checkpointing"})


@dataclass(frozen=True, slots=True)
class FineTuneConfig:
    """A fine-tune on Alpaca: first at full depth, then from there once for each path, and once over a menu of paths.

    num_steps, num_path_steps: bounds of the full-depth stage and of each later one, in place of ``num_epochs``.
    eval_every: steps between two evaluations; None: once an epoch. patience: evaluations without a new best before a
    stage ends; None: never. max_prompt_tokens: training rows with a longer prompt are left out. paths, menu: texts
    that ``LayerPath.parse`` knows; each batch of the menu's stage draws one.
    """

    model: str
    learning_rate: float
    num_epochs: float
    batch_size: int = 64
    micro_batch_size: int = 8
    max_tokens: int = 512
    max_prompt_tokens: int | None = None
    weight_decay: float = 0.0
    warmup_steps: int = 0
    num_steps: int | None = None
    num_path_steps: int | None = None
    eval_every: int | None = None
    patience: int | None = 1
    num_validation_rows: int | None = None
    template: str = "alpaca"
    precision: str = "float32"
    gradient_checkpointing: bool = False
    paths: tuple[str, ...] = ("uniform:12", "uniform:8", "uniform:4")
    menu: tuple[str, ...] = ()
    seed: int = 0
    split_seed: int = 42
    save_every_s: float = 600.0

    def __post_init__(self) -> None:
        for name, allowed in (("template", TEMPLATE_NAMES), ("precision", ("bfloat16", "float32"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"FineTuneConfig: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}."
                )
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("weight_decay", "warmup_steps", "seed", "split_seed", "save_every_s") else None
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not math.isfinite(value) or value < 0 or (value == 0 and least is None):
                wanted = "at least 0" if least == 0 else "positive"
                raise ValueError(f"FineTuneConfig: {field.name} must be {wanted}, got {value}.")

    def steps(self, num_rows: int, full: bool) -> int:
        """How many steps a stage over ``num_rows`` training rows takes at most."""
        given = self.num_steps if full else self.num_path_steps
        return given if given is not None else math.ceil(self.num_epochs * num_rows / self.batch_size)


check_same_run = partial(check_same_config, free=_FREE)


def paper() -> FineTuneConfig:
    """The protocol of arXiv 2410.20022, section 4."""
    return FineTuneConfig("facebook/opt-1.3b", learning_rate=5e-5, num_epochs=6)


def released_code() -> FineTuneConfig:
    """The protocol of the authors' public code, where it differs from the paper: batches of 8 on each of 8 GPUs."""
    return FineTuneConfig(
        "facebook/opt-iml-1.3b",
        learning_rate=2e-5,
        num_epochs=2,
        max_prompt_tokens=128,
        patience=None,
        gradient_checkpointing=True,
    )


FINE_TUNE_PRESETS = {"paper": paper, "released-code": released_code}
