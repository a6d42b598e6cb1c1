"""Which attention prompts run: PyTorch's own for whole sequences, where there is one for the device, or the backend's.

In the first step of a batch, rows that run a layer attend to themselves and those before them in the layer's own rows:
plain causal attention of packed sequences, for which PyTorch has a kernel on a GPU. All else, and the deterministic
mode, is left to the backend.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from dynskip.ops.backends import Backend
from dynskip.routing.plan import LayerPlan

VARLEN = "torch.nn.attention.varlen"
# Newer torch has more arguments; these must mean what they mean here.
_ARGUMENTS = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale", "window_size")
_CAUSAL = (-1, 0)
# Heads that the kernel below PyTorch's takes: whole vectors of 16 bytes, and no wider than its tiles.
_HEAD_STEP, _MAX_HEAD_SIZE = 8, 256
# FlashAttention 2 needs Ampere.
_MIN_CAPABILITY = (8, 0)


def why_not_varlen(
    backend: Backend, dtype: torch.dtype, device: torch.device, head_size: int, by_position: bool = False
) -> str | None:
    """Why prompts do not run PyTorch's attention, in words; None where those in a batch's first step do.

    by_position: whether attention asks where tokens stand, for slopes or a window.
    """
    if backend.name != "triton":
        return f"the backend {backend.name} runs its own"
    if by_position:
        return "PyTorch's attention of packed sequences knows no positions of tokens"
    return _why_not(dtype, device, head_size)


def attention_name(
    backend: Backend,
    dtype: torch.dtype,
    device: torch.device,
    head_size: int,
    deterministic: bool,
    by_position: bool = False,
) -> str:
    """Which attention whole prompts run, with the reason, for people to read; arguments as in `why_not_varlen`."""
    if deterministic:
        return f"{backend.name}, because of the deterministic mode"
    reason = why_not_varlen(backend, dtype, device, head_size, by_position)
    return VARLEN if reason is None else f"{backend.name}, because {reason}"


def attend(
    backend: Backend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: LayerPlan,
    cu_seqlens_k: Tensor,
    key_limits: Tensor,
    scale: float,
    max_seqlen: int,
    causal: bool,
    deterministic: bool,
    by_position: tuple[Tensor | None, int, Tensor, Tensor] | tuple[()] = (),
) -> Tensor:
    """[R, H, D]: the attention of the rows that run a layer of a prefill step.

    query: [R, H, D]. key, value: [S, G, D], each sequence's from ``cu_seqlens_k`` on. key_limits: [R], int32.
    max_seqlen: no sequence brings more rows. causal: key and value are those of the running rows themselves, so that
    each row attends to the rows of its sequence up to itself, which is also what ``key_limits`` says. by_position:
    slopes, window and positions as `reference.prefill_attention` takes them, where the model has any.
    """
    reason = why_not_varlen(backend, query.dtype, query.device, query.shape[2], bool(by_position))
    if causal and not deterministic and reason is None:
        starts = plan.run.cu_seqlens
        group = query.shape[1] // key.shape[1]
        if group > 1:
            # A copy, small beside the products around it: not every torch takes fewer heads of keys.
            key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        return varlen_attention()(
            query, key, value, starts, starts, max_seqlen, max_seqlen, scale=scale, window_size=_CAUSAL
        )
    starts = plan.run.cu_seqlens
    return backend.prefill_attention(query, key, value, starts, cu_seqlens_k, key_limits, scale, *by_position)


@functools.cache
def varlen_attention() -> Callable[..., Tensor]:
    """PyTorch's attention of packed sequences of any length."""
    from torch.nn.attention.varlen import varlen_attn

    return cast("Callable[..., Tensor]", varlen_attn)


@functools.cache
def _why_not(dtype: torch.dtype, device: torch.device, head_size: int) -> str | None:
    if device.type != "cuda":
        return f"PyTorch has no attention of packed sequences for {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"PyTorch's attention of packed sequences takes bfloat16 and float16, not {dtype}"
    if head_size % _HEAD_STEP or head_size > _MAX_HEAD_SIZE:
        return f"PyTorch's attention takes heads of {_HEAD_STEP}, ..., {_MAX_HEAD_SIZE} elements, not {head_size}"
    if torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than what PyTorch's attention needs"
    return missing_varlen()


def missing_varlen() -> str | None:
    """What this torch lacks of the attention that is called here, in words; None where it has it."""
    try:
        arguments = inspect.signature(varlen_attention()).parameters
    except ImportError as error:
        return f"torch {torch.__version__} has no {VARLEN} ({error})"
    lacking = [name for name in _ARGUMENTS if name not in arguments]
    return f"torch {torch.__version__} has a {VARLEN} without {', '.join(lacking)}" if lacking else None
