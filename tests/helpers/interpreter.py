"""Triton's interpreter without work whose result is not used: what a kernel computes stays the same."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter


def speed_up() -> None:
    """Quarters what a kernel costs under the interpreter.

    The interpreter searches `triton.language` for what to replace anew at each call of a function in a kernel, makes
    shapes, names of types and a table of dtypes anew for each result, and computes sums and products of integers again
    in int64 for an assertion that only its option `debug` makes.
    """
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    interpreter._patch_lang = patch_once_a_launch(interpreter._patch_lang)
    interpreter._get_np_dtype = look_up_once(interpreter._get_np_dtype)
    core.block_type.__init__ = init_block_type
    core.block_type.name = property(name_of_block)
    core.tensor.__init__ = init_tensor
    core._unwrap_if_constexpr = unwrap_first(core._unwrap_if_constexpr)
    interpreter._patch_attr = patch_attr
    semantic = interpreter.TritonSemantic
    semantic.broadcast_impl_value = leave_equal_shapes(semantic.broadcast_impl_value)


class Scope:
    """What stands in `triton.language` while a launch runs. changes: objects, names, and the old and new values."""

    def __init__(self, changes: list[tuple[Any, str, Any, Any]]) -> None:
        self.changes = changes
        self.is_open = False

    def open(self) -> None:
        self.is_open = True
        for place, name, _, new in self.changes:
            setattr(place, name, new)

    def restore(self) -> None:
        self.is_open = False
        for place, name, old, _ in reversed(self.changes):
            if old is interpreter._MISSING:
                delattr(place, name)
            else:
                setattr(place, name, old)


def patch_once_a_launch(patch_lang: Callable[[Any], Any]) -> Callable[[Any], Scope]:
    """The replacements are searched for at the first launch, in `triton.language` and in its `core`."""
    nothing = Scope([])
    # A function that sees both: a kernel sees the one, Triton's own functions see the other.
    sees_both = types.FunctionType(patch_lang.__code__, {"tl": tl, "core": core})

    @functools.cache
    def scope_of_launches() -> Scope:
        patched = patch_lang(sees_both)
        changes = [(place, name, old, vars(place)[name]) for place, name, old in patched._changes]
        patched.restore()
        return Scope(changes)

    def patch(fn: Any) -> Scope:
        scope = scope_of_launches()
        if scope.is_open:
            return nothing
        scope.open()
        return scope

    return patch


def look_up_once(get_np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    found: dict[str, Any] = {}

    def get(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.name not in found:
            found[scalar.name] = get_np_dtype(scalar)
        return found[scalar.name]

    return get


@functools.cache
def shape_of_block(shape: tuple[int, ...]) -> tuple[core.tuple, int]:
    """The one shape of all blocks that have it, and the number of their elements."""
    if not shape:
        raise TypeError("0d block_type is forbidden")
    return core.tuple(shape), core.validate_block_shape(shape)


@functools.cache
def shape_of_tensor(shape: tuple[int, ...]) -> tuple[core.tuple, core.constexpr]:
    return core.tuple([core.constexpr(size) for size in shape]), core.constexpr(math.prod(shape))


def init_block_type(self: core.block_type, element_ty: core.dtype, shape: Any) -> None:
    self.element_ty = element_ty
    sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
    self.shape, self.numel = shape_of_block(sizes)


def name_of_block(self: core.block_type) -> str:
    return f"<{self.shape}, {self.element_ty}>"


def init_tensor(self: core.tensor, handle: Any, type: core.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = shape_of_tensor(tuple(type.shape.values) if type.is_block() else ())


def leave_equal_shapes(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    def broadcast_impl_value(self: Any, left: core.tensor, right: core.tensor) -> tuple[core.tensor, core.tensor]:
        if left.shape is right.shape:
            return left, right
        return broadcast(self, left, right)

    return broadcast_impl_value


def patch_attr(place: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """A function of Triton's that is called with the semantic of the interpreter, without the check that it is."""
    function = getattr(member, "__wrapped__", member)

    def interpreted(*arguments: Any, **named: Any) -> Any:
        named["_semantic"] = interpreter.interpreter_semantic
        return function(*arguments, **named)

    scope.set_attr(place, name, interpreted)


def unwrap_first(unwrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    plain = frozenset({core.tensor, core.dtype, int, float, bool, str, type(None)})

    def unwrap_if_constexpr(value: Any) -> Any:
        return value if type(value) in plain else unwrap(value)

    return unwrap_if_constexpr
