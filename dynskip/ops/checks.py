"""Checks of tensor arguments that read no values; their errors name function, argument, requirement and remedy."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """The short name of a dtype: float32, int64."""
    return str(dtype).removeprefix("torch.")


def find_dtype(function: str, dtype: torch.dtype | str) -> torch.dtype:
    """The dtype of weights that ``dtype`` is or names; ValueError for another. ``"torch.float32"`` is a name too."""
    names = {dtype_name(each): each for each in FLOAT_DTYPES}
    found = names.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in FLOAT_DTYPES:
        raise ValueError(f"{function}: dtype must be float32, bfloat16 or float16, got {dtype}.")
    return found


def check_no_grad(function: str, **tensors: Tensor | None) -> None:
    """Raises RuntimeError if autograd would have to record one of `tensors`."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{function}: {name} must not require grad, got a tensor that does. The ops are for inference: call "
                f"them under torch.no_grad(), or train through dynskip.reference or the reference executor."
            )


def check_tensor(
    function: str, name: str, tensor: Tensor, shape: tuple[int | str, ...], like: Tensor | None = None
) -> None:
    """Raises unless `tensor` has `shape` (a letter stands for any size) and, given `like`, its dtype and device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(tensor).__name__}. Pass a torch.Tensor.")
    actual = tuple(tensor.shape)
    fits = len(actual) == len(shape) and all(
        not isinstance(w, int) or w == a for w, a in zip(shape, actual, strict=True)
    )
    if not fits:
        wanted = "[" + ", ".join(map(str, shape)) + "]"
        raise ValueError(f"{function}: {name} must have shape {wanted}, got {list(actual)}. Reshape or slice it.")
    if like is None:
        return
    if tensor.dtype != like.dtype:
        wanted, got = dtype_name(like.dtype), dtype_name(tensor.dtype)
        raise TypeError(
            f"{function}: {name} must be {wanted} like the first argument, got {got}. Use {name}.to(torch.{wanted})."
        )
    check_device(function, name, tensor, like)


def check_device(function: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """Raises ValueError unless `tensor` lies on the device of `like`."""
    if tensor.device != like.device:
        raise ValueError(
            f"{function}: {name} must be on {like.device} like the first argument, got {tensor.device}. "
            f"Use {name}.to({str(like.device)!r})."
        )


def check_float(function: str, name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the ops can compute in the dtype of `tensor`."""
    if tensor.dtype not in FLOAT_DTYPES:
        names = ", ".join(map(dtype_name, FLOAT_DTYPES))
        raise TypeError(
            f"{function}: {name} must be one of {names}, got {dtype_name(tensor.dtype)}. "
            f"Convert it, or use dynskip.reference.{function}, which takes float64 too."
        )


def check_index(function: str, name: str, tensor: Tensor, shape: tuple[int | str, ...], like: Tensor) -> None:
    """Raises unless `tensor` has `shape`, int32, the device of `like`, and a contiguous last dimension."""
    check_tensor(function, name, tensor, shape)
    if tensor.dtype != torch.int32:
        raise TypeError(f"{function}: {name} must be int32, got {dtype_name(tensor.dtype)}. Use {name}.int().")
    check_device(function, name, tensor, like)
    check_packed(function, name, tensor, num_dims=1)


def check_packed(function: str, name: str, tensor: Tensor, num_dims: int) -> None:
    """Raises ValueError unless the last `num_dims` dimensions of `tensor` are contiguous."""
    expected = 1
    for dim in range(tensor.dim() - 1, tensor.dim() - 1 - num_dims, -1):
        if tensor.shape[dim] != 1 and tensor.stride(dim) != expected and tensor.numel() > 0:
            what = "be contiguous" if num_dims == tensor.dim() else f"be contiguous in its last {num_dims} dimension(s)"
            raise ValueError(f"{function}: {name} must {what}, got strides {tensor.stride()}. Use {name}.contiguous().")
        expected *= tensor.shape[dim]
