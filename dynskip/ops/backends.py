"""The sets of launchers that can run the ops, and the choice between them. A choice is explicit, or it is announced."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dynskip.ops import torch_backend

BACKEND_NAMES = ("torch", "triton", "native")


class BackendWarning(UserWarning):
    """The backend in use is not the fastest that this machine could have."""


@dataclass(frozen=True)
class Backend:
    """The launchers of one backend, as `dynskip.ops.reference` specifies them.

    They check nothing: `dynskip.ops` does, for callers from outside.
    """

    name: str
    gather_layer_norm: Callable[..., Tensor]
    scatter_add: Callable[[Tensor, Tensor | None, Tensor], None]
    kv_store: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    decode_attention: Callable[..., Tensor]
    prefill_attention: Callable[..., Tensor]
    rotate: Callable[..., None]
    activate: Callable[..., Tensor]


OP_NAMES = tuple(field.name for field in fields(Backend) if field.name != "name")


@functools.cache
def get_backend(name: str) -> Backend:
    """The backend `name`, whether or not it can run on a given device (`available_backends` tells).

    Raises: ValueError for an unknown name; ImportError or RuntimeError where the backend's code cannot be loaded.
    """
    if name == "torch":
        return _collect(name, torch_backend)
    if name == "native":
        from dynskip.ops import native

        reason = native.unavailable_reason()
        if reason is not None:
            raise RuntimeError(f"get_backend: name must be a backend that this machine has, got 'native'. {reason}")
        return _collect(name, native)
    if name == "triton":
        return _load_triton()
    raise ValueError(f"get_backend: name must be one of {', '.join(BACKEND_NAMES)}, got {name!r}. Choose one of these.")


def available_backends(device: torch.device | str) -> dict[str, str | None]:
    """For each backend, None if it can run on `device`, else the reason why not and what would help."""
    kind = torch.device(device).type
    return {name: _reasons[name](kind) for name in BACKEND_NAMES}


def resolve_backend(name: str, device: torch.device | str) -> Backend:
    """The backend to use on `device`: the one named, or for "auto" triton on a GPU and native on a CPU.

    Where "auto" has to take torch instead, a BackendWarning says once how to get the faster one. Raises: ValueError for
    an unknown name, RuntimeError for a named backend that cannot run on `device`.
    """
    return _resolve(name, torch.device(device).type)


@functools.cache
def _resolve(name: str, kind: str) -> Backend:
    if name == "auto":
        preferred = {"cuda": "triton", "cpu": "native"}.get(kind, "torch")
        reason = _reasons[preferred](kind)
        if reason is None:
            return get_backend(preferred)
        warnings.warn(
            f"The torch backend runs on {kind} because {preferred} cannot. {reason}", BackendWarning, stacklevel=3
        )
        return get_backend("torch")
    if name not in BACKEND_NAMES:
        names = ", ".join(("auto", *BACKEND_NAMES))
        raise ValueError(f"resolve_backend: name must be one of {names}, got {name!r}. Choose one of these.")
    reason = _reasons[name](kind)
    if reason is not None:
        raise RuntimeError(f"resolve_backend: name must be a backend that runs on {kind}, got {name!r}. {reason}")
    return get_backend(name)


def _collect(name: str, module: object) -> Backend:
    return Backend(name, *(getattr(module, op) for op in OP_NAMES))


def _load_triton() -> Backend:
    from dynskip.kernels.activate import activate
    from dynskip.kernels.decode_attention import decode_attention
    from dynskip.kernels.kv_store import kv_store
    from dynskip.kernels.norm_rows import gather_layer_norm
    from dynskip.kernels.prefill_attention import prefill_attention
    from dynskip.kernels.rotate_rows import rotate
    from dynskip.kernels.scatter_add import scatter_add

    return Backend(
        "triton", gather_layer_norm, scatter_add, kv_store, decode_attention, prefill_attention, rotate, activate
    )


def _why_not_triton(kind: str) -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}). Install it: pip install 'triton>=3.6'."
    if kind == "cuda":
        return None
    if kind != "cpu":
        return f"Triton kernels run on cuda, not on {kind}. Use the torch backend."
    from triton.runtime.interpreter import InterpretedFunction

    # Triton's own functions become interpreted ones when triton is imported, ours when they are: both need the
    # variable.
    if not (triton.knobs.runtime.interpret and isinstance(triton.language.sum, InterpretedFunction)):
        return "To run Triton kernels on CPU tensors set TRITON_INTERPRET=1 before triton is imported."
    return None


def _why_not_native(kind: str) -> str | None:
    if kind != "cpu":
        return f"The native backend runs on cpu, not on {kind}. Use the triton or torch backend."
    from dynskip.ops import native

    return native.unavailable_reason()


_reasons: dict[str, Callable[[str], str | None]] = {
    "torch": lambda kind: None,
    "triton": _why_not_triton,
    "native": _why_not_native,
}
