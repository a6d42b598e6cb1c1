"""The choice of a backend: explicit, or announced."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from dynskip import ops
from dynskip.ops import backends, checked, native
from dynskip.ops.backends import BackendWarning, available_backends, get_backend, resolve_backend


@pytest.fixture
def forget_resolved() -> Iterator[None]:
    """Lets a test change what is available, and nothing after it see the change."""
    backends._resolve.cache_clear()
    yield
    backends._resolve.cache_clear()


def test_every_backend_has_every_op() -> None:
    for name, reason in available_backends("cpu").items():
        if reason is None:
            backend = get_backend(name)
            assert backend.name == name
            assert all(callable(getattr(backend, op)) for op in ops.OP_NAMES)


def test_torch_is_always_available() -> None:
    assert available_backends("cpu")["torch"] is None
    assert resolve_backend("torch", "cpu").name == "torch"


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"get_backend: name must be one of torch, triton, native, got 'cuda'"):
        get_backend("cuda")
    with pytest.raises(
        ValueError, match=r"resolve_backend: name must be one of auto, torch, triton, native, got 'cpp'"
    ):
        resolve_backend("cpp", "cpu")
    with pytest.raises(ValueError, match="use_backend: name must be one of auto"), ops.use_backend("fast"):
        pass


def test_native_is_for_the_cpu() -> None:
    with pytest.raises(
        RuntimeError, match=r"name must be a backend that runs on cuda, got 'native'\. The native backend"
    ):
        resolve_backend("native", "cuda")


def test_triton_does_not_run_on_other_devices() -> None:
    with pytest.raises(RuntimeError, match="Triton kernels run on cuda, not on meta"):
        resolve_backend("triton", "meta")


def test_auto_says_when_the_native_backend_is_missing(monkeypatch: pytest.MonkeyPatch, forget_resolved: None) -> None:
    monkeypatch.setattr(native, "unavailable_reason", lambda: "It is not built. Build it.")
    with pytest.warns(BackendWarning, match=r"torch backend runs on cpu because native cannot\. It is not built\."):
        assert resolve_backend("auto", "cpu").name == "torch"
    # Said once: warnings are errors in these tests.
    assert resolve_backend("auto", "cpu").name == "torch"
    with pytest.raises(RuntimeError, match=r"got 'native'\. It is not built\. Build it\."):
        resolve_backend("native", "cpu")


def test_auto_takes_native_where_it_is_built(monkeypatch: pytest.MonkeyPatch, forget_resolved: None) -> None:
    monkeypatch.setattr(native, "unavailable_reason", lambda: None)
    assert resolve_backend("auto", "cpu").name == "native"


def test_use_backend_nests_and_ends() -> None:
    with ops.use_backend("torch"):
        assert ops.current_backend().name == "torch"
        with ops.use_backend("triton"):
            assert checked._backend_name.get() == "triton"
        assert ops.current_backend("cpu").name == "torch"
    assert checked._backend_name.get() == "auto"


def test_use_backend_ends_with_an_error() -> None:
    with pytest.raises(KeyError), ops.use_backend("torch"):
        raise KeyError
    assert checked._backend_name.get() == "auto"


@pytest.mark.parametrize("when", ["never", "too late"])
def test_triton_on_the_cpu_asks_for_its_interpreter(when: str) -> None:
    code = "import triton, os\n" + ("os.environ['TRITON_INTERPRET'] = '1'\n" if when == "too late" else "")
    code += "from dynskip.ops.backends import resolve_backend\nresolve_backend('triton', 'cpu')"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "RuntimeError: resolve_backend: name must be a backend that runs on cpu, got 'triton'." in ended.stderr
    assert "set TRITON_INTERPRET=1 before triton is imported" in ended.stderr


def test_a_missing_triton_is_named_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, forget_resolved: None
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match=r"Triton cannot be imported .*pip install 'triton>=3\.6'"):
        resolve_backend("triton", torch.device("cpu"))
