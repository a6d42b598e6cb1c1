"""The options of ``dynskip train`` for the presets that fine-tune a checkpoint, and what they stand for."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynskip.training.fine_tune.config import FineTuneConfig

# Each option with the field of FineTuneConfig that it sets.
_FIELDS = {
    "model": "model",
    "lr": "learning_rate",
    "epochs": "num_epochs",
    "batch_size": "batch_size",
    "micro_batch": "micro_batch_size",
    "max_length": "max_tokens",
    "weight_decay": "weight_decay",
    "warmup_steps": "warmup_steps",
    "eval_every": "eval_every",
    "patience": "patience",
    "validation_rows": "num_validation_rows",
    "template": "template",
    "precision": "precision",
    "path": "paths",
    "menu": "menu",
    "seed": "seed",
    "save_every": "save_every_s",
}
OPTIONS = frozenset(_FIELDS) - {"seed", "save_every"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the presets ``paper`` and ``released-code``."""
    group = parser.add_argument_group("presets paper and released-code")
    group.add_argument(
        "--model", metavar="NAME", help="OPT checkpoint: folder, hub id or opt-mini (default: the preset's)"
    )
    group.add_argument("--lr", type=float, metavar="X", help="learning rate of AdamW")
    group.add_argument("--epochs", type=float, metavar="N", help="passes over the training rows, each stage")
    group.add_argument("--batch-size", type=int, metavar="N", help="rows of a step, over all processes (64)")
    group.add_argument("--micro-batch", type=int, metavar="N", help="rows that a process computes at once (8)")
    group.add_argument("--max-length", type=int, metavar="N", help="tokens at which a row is cut (512)")
    group.add_argument("--weight-decay", type=float, metavar="X", help="weight decay of AdamW (0)")
    group.add_argument("--warmup-steps", type=int, metavar="N", help="steps over which the learning rate rises (0)")
    group.add_argument("--eval-every", type=int, metavar="N", help="steps between evaluations (default: an epoch)")
    group.add_argument(
        "--patience", type=int, metavar="N", help="evaluations without a new best before a stage ends; 0: never"
    )
    group.add_argument("--validation-rows", type=int, metavar="N", help="score the first N only (default: all)")
    group.add_argument("--template", choices=["alpaca", "short"], help="how a prompt is written (alpaca)")
    group.add_argument("--precision", choices=["float32", "bfloat16"], help="bfloat16: autocast over fp32 weights")
    group.add_argument(
        "--path",
        action="append",
        metavar="PATH",
        help="a path that gets its own fine-tune from the full-depth one, `full` included; give it once a path "
        "(default: uniform:12, uniform:8, uniform:4)",
    )
    group.add_argument(
        "--menu", action="append", metavar="PATH", help="a path of one more fine-tune that draws a path each batch"
    )


def fine_tune_config(args: argparse.Namespace, preset: str) -> FineTuneConfig:
    """The preset's config with what ``args`` change."""
    from dynskip.training.fine_tune.config import FINE_TUNE_PRESETS

    changes: dict[str, Any] = {}
    for option, field in _FIELDS.items():
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


def run_fine_tune(args: argparse.Namespace, config: FineTuneConfig, data: Path) -> int:
    """Exit status 0 after a finished fine-tune."""
    from dynskip.training.fine_tune.run import FineTuneRun, end_processes

    models = FineTuneRun(config, data, args.out, progress=not args.quiet).train()
    if is_first_process():
        for stage, folder in models.items():
            print(f"{stage}: {folder}")
    end_processes()
    return 0
