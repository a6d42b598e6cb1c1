"""The options of ``dynskip train`` by what they belong to, and the configs that they stand for."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynskip.training.controller.config import ControllerConfig
    from dynskip.training.fine_tune.config import FineTuneConfig
    from dynskip.training.paths.config import PathsConfig
    from dynskip.training.pretrain.config import RunConfig


def _value(kind: type, metavar: str, text: str) -> dict[str, Any]:
    return {"type": kind, "metavar": metavar, "help": text}


# Each option of the preset that trains from nothing, and how it is read; all but the first are fields of RunConfig.
_MINI: dict[str, dict[str, Any]] = {
    "minutes": {"action": "append", "default": [], "metavar": "PHASE=N", "help": "training minutes of a phase"},
    "tokens_per_batch": _value(int, "N", "padded tokens of a batch"),
    "muon_lr": _value(float, "X", "learning rate of the layers' matrices"),
    "adamw_lr": _value(float, "X", "learning rate of everything else"),
}
# Each option of the presets that fine-tune: the field of FineTuneConfig that it sets, and how it is read.
_FINE_TUNE: dict[str, tuple[str, dict[str, Any]]] = {
    "model": (
        "model",
        {"metavar": "NAME", "help": "checkpoint: folder, GGUF file, hub id or name (default: the preset's)"},
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
    "template": (
        "template",
        {
            "choices": ["alpaca", "chat", "short"],
            "help": "how a prompt is written (alpaca); chat: as the tokenizer does",
        },
    ),
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
        {
            "action": "append",
            "metavar": "PATH",
            "help": "a path of one more fine-tune that draws a path each batch; preset paths: a path to tune for "
            "(full, and found:B for 5/6, 2/3 and 1/2 of the layers)",
        },
    ),
}
# Each option of the preset that tunes for paths: the field of PathsConfig that it sets, and how it is read; None
# for an option that stands among those above.
_PATHS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "model": ("model", None),
    "menu": ("menu", None),
    "lr": ("learning_rate", None),
    "batch_size": ("batch_size", None),
    "micro_batch": ("micro_batch_size", None),
    "max_length": ("max_tokens", None),
    "warmup_steps": ("warmup_steps", None),
    "eval_every": ("eval_every", None),
    "validation_rows": ("num_validation_texts", None),
    "precision": ("precision", None),
    "method": ("method", {"choices": ["lora", "full"], "help": "train an adapter, or all weights (lora)"}),
    "rank": ("rank", _value(int, "R", "of the adapter (16)")),
    "adapter": ("adapter", {"metavar": "FOLDER", "help": "an adapter to train on (default: a new one)"}),
    "loss": (
        "loss",
        {
            "choices": ["distill", "response"],
            "help": "divergence from the model's own full depth on all tokens, or the responses' (distill)",
        },
    ),
    "paths_per_step": ("paths_per_step", _value(int, "N", "paths of the menu that a step trains (default: all)")),
    "own_turns": ("num_own_turns", _value(int, "N", "conversations that begin with a turn of the model's own (4096)")),
    "data_turns": ("num_data_turns", _value(int, "N", "conversations that begin with a prompt of --data (1024)")),
    "answers": (
        "answers",
        {"choices": ["own", "data"], "help": "who answers: the model, or the data, of Alpaca its training part (own)"},
    ),
    "answer_temperature": ("answer_temperature", _value(float, "T", "that answers are sampled at (0.7)")),
}
_CONTROLLER: dict[str, dict[str, Any]] = {
    "controller": {
        "metavar": "NAME",
        "help": "train this in place of the model: fixed, hidden, mlp:WIDTH, window:W, attention-pool, "
        "or a class of your own as package.module:Class, which is imported",
    },
    "alpha": _value(float, "A", "price of the mean fraction of layers (4)"),
    "target_layers": _value(float, "B", "price the distance from B layers instead"),
    "temperature": _value(float, "T", "of the Gumbel-Softmax (1)"),
    "soft": {"action": "store_true", "default": None, "help": "train with soft gates, not straight-through"},
    "joint": {"action": "store_true", "default": None, "help": "train the model as well (default: frozen)"},
}
# Price of the layers where none is given: the middle of the paper's range.
_ALPHA = 4.0


def add_groups(parser: argparse.ArgumentParser) -> None:
    """Add the options that belong to some presets only, and those of controllers."""
    on_model = "on --model, with the data, lengths and batches of a preset (default: paper)"
    shared = ", ".join(_option(name) for name, (_, how) in _PATHS.items() if how is None)
    groups = (
        ("preset opt-mini", None, _MINI),
        ("presets paper and released-code", None, {name: how for name, (_, how) in _FINE_TUNE.items()}),
        (
            "preset paths",
            f"and {shared} as above, with defaults of its own",
            {name: how for name, (_, how) in _PATHS.items() if how is not None},
        ),
        ("controllers", on_model, _CONTROLLER),
    )
    for title, description, options in groups:
        group = parser.add_argument_group(title, description)
        for name, how in options.items():
            group.add_argument(_option(name), **how)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError where an option is given that the preset, or a training without a controller, does not have."""
    of_preset = {"opt-mini": {*_MINI}, "paths": {*_PATHS}}.get(args.preset, {*_FINE_TUNE, "controller"})
    every = {*_MINI, *_FINE_TUNE, *_PATHS, "controller"}
    _refuse(args, every - of_preset, f"with the preset {args.preset}")
    if args.controller is None:
        _refuse(args, set(_CONTROLLER) - {"controller"}, "without --controller")
    else:
        _refuse(args, ("path", "menu"), "with --controller")


def _refuse(args: argparse.Namespace, options: Iterable[str], where: str) -> None:
    for name in sorted(options):
        value = getattr(args, name)
        if value is not None and value != []:
            raise ValueError(f"train: {_option(name)} must be left out {where}, got {value}.")


def mini_config(args: argparse.Namespace) -> RunConfig:
    """The config of a training from nothing: the preset's with what ``args`` change."""
    from dynskip.training.pretrain.config import PRESETS

    config = PRESETS[args.preset]()
    names = [phase.name for phase in config.phases]
    minutes = _phase_numbers("--minutes", args.minutes, names)
    steps = _phase_numbers("--steps", args.steps, names)
    phases = []
    for phase in config.phases:
        if phase.name in steps:
            phase = dataclasses.replace(phase, max_steps=int(steps[phase.name]), max_minutes=minutes.get(phase.name))
        elif phase.name in minutes:
            phase = dataclasses.replace(phase, max_minutes=minutes[phase.name])
        phases.append(phase)
    given = {name: getattr(args, name) for name in _MINI if name != "minutes"} | {"save_every_s": args.save_every}
    changes = {name: value for name, value in given.items() if value is not None}
    for name, value in changes.items():
        if value <= 0:
            option = "--" + name.removesuffix("_s").replace("_", "-")
            raise ValueError(f"train: {option} must be positive, got {value}. Leave it out for the preset's value.")
    if args.seed is not None:
        changes["seed"] = args.seed
    return dataclasses.replace(config, phases=tuple(phases), **changes)


def _phase_numbers(option: str, pairs: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        if name not in names or number <= 0 or (option == "--steps" and number != int(number)):
            raise ValueError(
                f"train: {option} must be PHASE=N with a phase of {', '.join(names)} and N > 0, got {pair!r}."
                f" Write for example {option} {names[0]}=100."
            )
        numbers[name] = number
    return numbers


def fine_tune_config(args: argparse.Namespace) -> FineTuneConfig:
    """The config of a fine-tune: the preset's with what ``args`` change."""
    from dynskip.training.fine_tune.config import FINE_TUNE_PRESETS

    changes = _changes(args, {option: field for option, (field, _) in _FINE_TUNE.items()})
    if changes.get("patience") == 0:
        changes["patience"] = None
    names = {"full": "num_steps", "paths": "num_path_steps"}
    if args.controller is not None:
        names = {"controller": "num_steps"}
    changes |= _step_counts(args.steps, names)
    return dataclasses.replace(FINE_TUNE_PRESETS[args.preset](), **changes)


def paths_config(args: argparse.Namespace) -> PathsConfig:
    """The config of a training for paths: the defaults with what ``args`` change.

    Without data there are no turns of theirs, and where the data answer none of the model's own.
    """
    from dynskip.training.paths.config import PathsConfig

    changes = _changes(args, {option: field for option, (field, _) in _PATHS.items()})
    if "model" not in changes:
        raise ValueError("train: --model must name a checkpoint with the preset paths, got none.")
    if not args.data and changes.setdefault("num_data_turns", 0):
        raise ValueError(f"train: --data must be given for --data-turns {changes['num_data_turns']}, got none.")
    if changes.get("answers") == "data":
        changes.setdefault("num_own_turns", 0)
    changes |= _step_counts(args.steps, {"paths": "num_steps"})
    return PathsConfig(**changes)


def _changes(args: argparse.Namespace, fields: Mapping[str, str]) -> dict[str, Any]:
    """What the options set, by field."""
    changes: dict[str, Any] = {}
    for option, field in {**fields, "seed": "seed", "save_every": "save_every_s"}.items():
        value = getattr(args, option)
        if value is not None and value != []:
            changes[field] = tuple(value) if isinstance(value, list) else value
    return changes


def _step_counts(pairs: Sequence[str], names: Mapping[str, str]) -> dict[str, int]:
    """The fields that ``--steps`` sets: ``names`` has them by phase."""
    counts: dict[str, int] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in names or not text.isdecimal() or int(text) < 1:
            known = " or ".join(f"{known}=N" for known in names)
            raise ValueError(
                f"train: --steps must be {known} with N > 0, got {pair!r}. "
                f"Write for example --steps {next(iter(names))}=100."
            )
        counts[names[name]] = int(text)
    return counts


def controller_config(args: argparse.Namespace) -> ControllerConfig:
    """The config of a controller's training, with the data, lengths and batches of a fine-tune."""
    from dynskip.training.controller.config import ControllerConfig

    given = {name: getattr(args, name) for name in ("alpha", "target_layers", "temperature")}
    prices = {"alpha": _ALPHA} | {name: value for name, value in given.items() if value is not None}
    backbone = "joint" if args.joint else "frozen"
    return ControllerConfig(fine_tune_config(args), args.controller, hard=not args.soft, backbone=backbone, **prices)
