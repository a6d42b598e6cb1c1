"""Controllers by name: those of the package, and any class by its import path."""

from __future__ import annotations

import importlib
from typing import cast

from dynskip.controllers.learned import LearnedController, LearnedSequenceController, LearnedTokenController, ModelSizes
from dynskip.controllers.prompt_controllers import AttentionPoolController, WindowController
from dynskip.controllers.token_controllers import FixedController, HiddenController, MLPController

CONTROLLERS: dict[str, type[LearnedController]] = {
    "fixed": FixedController,
    "hidden": HiddenController,
    "mlp": MLPController,
    "window": WindowController,
    "attention-pool": AttentionPoolController,
}


def controller_class(name: str) -> tuple[type[LearnedController], str]:
    """The class that ``name`` stands for, and the argument behind it ("" without one).

    name: ``fixed``, ``hidden``, ``mlp:WIDTH``, ``window:W``, ``attention-pool``, or ``package.module:Class``, which
    may take an argument too, ``package.module:Class:ARGUMENT``. Naming a class imports its module, that is runs it.
    """
    kind, _, argument = name.partition(":")
    if kind in CONTROLLERS:
        return CONTROLLERS[kind], argument
    class_name, _, argument = argument.partition(":")
    try:
        found = getattr(importlib.import_module(kind), class_name) if kind and class_name else None
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"controller_class: name must be an importable package.module:Class, got {name!r}: {error}."
        ) from error
    if found is None:
        raise ValueError(
            f"controller_class: name must be one of {', '.join(CONTROLLERS)} or package.module:Class, got {name!r}."
        )
    kinds = (LearnedTokenController, LearnedSequenceController)
    if not (isinstance(found, type) and issubclass(found, kinds)):
        raise ValueError(
            f"controller_class: {name} must be a subclass of LearnedTokenController or LearnedSequenceController, "
            f"got {found!r}."
        )
    return cast("type[LearnedController]", found), argument


def make_controller(name: str, sizes: ModelSizes) -> LearnedController:
    """A fresh controller called ``name`` for a model of these sizes."""
    found, argument = controller_class(name)
    return found(sizes, argument) if argument else found(sizes)
