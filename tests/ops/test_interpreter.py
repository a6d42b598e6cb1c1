"""What the tests change about Triton's interpreter, which their kernels run under."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from triton import language as tl
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are compiled here")


def test_every_builtin_is_replaced_while_a_kernel_runs_and_put_back() -> None:
    packages = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)

    def builtins() -> list[str]:
        return [
            f"{package.__name__}.{name}"
            for package in packages
            for name, member in inspect.getmembers(package)
            if tl.core.is_builtin(member)
        ]

    of_both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    before = builtins()
    for _ in range(2):
        scope = interpreter._patch_lang(of_both)
        nested = interpreter._patch_lang(of_both)
        assert builtins() == []
        nested.restore()
        assert builtins() == []
        scope.restore()
        assert builtins() == before and "triton.language.load" in before


def test_sums_are_asserted_to_be_in_range_only_where_that_is_asked_for() -> None:
    options = interpreter.interpreter_builder.options
    assert options.sanitize_overflow == options.debug
