"""The options of ``dynskip train`` for the presets that fine-tune a checkpoint, and what they stand for."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynskip.training.fine_tune.config import FineTuneConfig


def _value(kind: type, metavar: str, text: str) -> dict[str, Any]:
    return {"type": kind, "metavar": metavar, "help": text}


# Each option of the presets that fine-tune: the field of FineTuneConfig that it sets, and how it is read.
_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "model": (
        "model",
        {"metavar": "NAME", "help": "OPT checkpoint: folder, hub id or opt-mini (default: the preset's)"},
    ),
    "lr": ("learning_rate", _value(float, "X", "learning rate of AdamW")),
    "epochs": ("num_epochs", _value(float, "N", "passes over the training rows, each stage")),
    "batch_size": ("batch_size", _value(int, "N", "rows of a step, over all processes (64)")),
    "micro_batch": ("micro_batch_size", _value(int, "N", "rows that a process computes at once (8)")),
    "max_length": ("max_tokens", _value(int, "N", "tokens at which a row is cut (512)")),
    "weight_decay": ("weight_decay", _value(float, "X", "weight decay of AdamW (0)")),
    "warmup_steps": ("warmup_steps", _value(int, "N", "steps over which the learning rate rises (0)")),
    "eval_every": ("eval_every", _value(int, "N", "steps between evaluations (default: an epoch)")),
    "patience": ("patience", _value(int, "N", "evaluations without a new best before a stage ends; 0: never")),
    "validation_rows": ("num_validation_rows", _value(int, "N", "score the first N only (default: all)")),
    "template": ("template", {"choices": ["alpaca", "short"], "help": "how a prompt is written (alpaca)"}),
    "precision": ("precision", {"choices": ["float32", "bfloat16"], "help": "bfloat16: autocast over fp32 weights"}),
    "path": (
        "paths",
        {
            "action": "append",
            "metavar": "PATH",
            "help": "a path that gets its own fine-tune from the full-depth one, `full` included; give it once a path "
            "(default: uniform:12, uniform:8, uniform:4)",
        },
    ),
    "menu": (
        "menu",
        {"action": "append", "metavar": "PATH", "help": "a path of one more fine-tune that draws a path each batch"},
    ),
}
OPTIONS = frozenset(_OPTIONS)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the presets ``paper`` and ``released-code``."""
    group = parser.add_argument_group("presets paper and released-code")
    for name, (_, how) in _OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", **how)


def fine_tune_config(args: argparse.Namespace, preset: str) -> FineTuneConfig:
    """The preset's config with what ``args`` change."""
    from dynskip.training.fine_tune.config import FINE_TUNE_PRESETS

    changes: dict[str, Any] = {}
    fields = {option: field for option, (field, _) in _OPTIONS.items()}
    for option, field in {**fields, "seed": "seed", "save_every": "save_every_s"}.items():
        value = getattr(args, option)
        if value is not None:
            changes[field] = tuple(value) if isinstance(value, list) else value
    if changes.get("patience") == 0:
        changes["patience"] = None
    for pair in args.steps:
        name, _, text = pair.partition("=")
        names = {"full": "num_steps", "paths": "num_path_steps"}
        if args.controller is not None:
            names = {"controller": "num_steps"}
        if name not in names or not text.isdecimal() or int(text) < 1:
            known = " or ".join(f"{known}=N" for known in names)
            raise ValueError(
                f"train: --steps must be {known} with N > 0, got {pair!r}. "
                f"Write for example --steps {next(iter(names))}=100."
            )
        changes[names[name]] = int(text)
    return dataclasses.replace(FINE_TUNE_PRESETS[preset](), **changes)


def is_first_process() -> bool:
    """Whether this is the process that speaks, of those that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"
