"""The options of ``dynskip train`` that train a controller, and what they stand for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynskip.training.controller.config import ControllerConfig
    from dynskip.training.fine_tune.config import FineTuneConfig

OPTIONS = frozenset({"alpha", "target_layers", "temperature", "soft", "joint"})
# Price of the layers where none is given: the middle of the paper's range.
_ALPHA = 4.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--controller`` and what belongs to it."""
    group = parser.add_argument_group(
        "controllers", "on --model, with the data, lengths and batches of a preset (default: paper)"
    )
    group.add_argument(
        "--controller",
        metavar="NAME",
        help="train this in place of the model: fixed, hidden, mlp:WIDTH, window:W, attention-pool, "
        "or a class of your own as package.module:Class, which is imported",
    )
    group.add_argument("--alpha", type=float, metavar="A", help="price of the mean fraction of layers (4)")
    group.add_argument("--target-layers", type=float, metavar="B", help="price the distance from B layers instead")
    group.add_argument("--temperature", type=float, metavar="T", help="of the Gumbel-Softmax (1)")
    group.add_argument("--soft", action="store_true", default=None, help="train with soft gates, not straight-through")
    group.add_argument("--joint", action="store_true", default=None, help="train the model as well (default: frozen)")


def controller_config(args: argparse.Namespace, training: FineTuneConfig) -> ControllerConfig:
    """What ``args`` ask for, trained as ``training`` says."""
    from dynskip.training.controller.config import ControllerConfig

    return ControllerConfig(
        training,
        args.controller,
        alpha=_ALPHA if args.alpha is None else args.alpha,
        target_layers=args.target_layers,
        temperature=1.0 if args.temperature is None else args.temperature,
        hard=not args.soft,
        backbone="joint" if args.joint else "frozen",
    )
