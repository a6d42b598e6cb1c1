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


def check_rows(
    function: str, name: str, rows: Tensor, shape: tuple[int | str, ...], like: Tensor | None = None
) -> None:
    """Raises unless `rows` has `shape`, each row contiguous, and the dtype and device of `like`, or one of the ops'."""
    check_tensor(function, name, rows, shape, like)
    if rows.dtype not in FLOAT_DTYPES:
        names = ", ".join(map(dtype_name, FLOAT_DTYPES))
        raise TypeError(
            f"{function}: {name} must be one of {names}, got {dtype_name(rows.dtype)}. "
            f"Convert it, or use dynskip.reference.{function}, which takes float64 too."
        )
    check_packed(function, name, rows, num_dims=len(shape) - 1)


def check_index(
    function: str,
    name: str,
    tensor: Tensor,
    shape: tuple[int | str, ...],
    like: Tensor,
    dtype: torch.dtype = torch.int32,
) -> None:
    """Raises unless `tensor` has `shape`, `dtype`, the device of `like`, and a contiguous last dimension."""
    check_tensor(function, name, tensor, shape)
    if tensor.dtype != dtype:
        cast = {torch.int32: "int", torch.int64: "long", torch.float32: "float"}[dtype]
        raise TypeError(
            f"{function}: {name} must be {dtype_name(dtype)}, got {dtype_name(tensor.dtype)}. Use {name}.{cast}()."
        )
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


def check_groups(function: str, name: str, keys: Tensor, q: Tensor) -> None:
    """Raises ValueError unless the heads of `keys`, `[*, G, D]`, divide those of `q`, `[R, H, D]`."""
    num_heads, num_kv_heads = q.shape[1], keys.shape[1]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"{function}: {name} must have a number of heads that divides the {num_heads} of q, got {num_kv_heads}. "
            "Each of them serves equally many query heads."
        )


def check_positions(
    function: str,
    q: Tensor,
    slopes: Tensor | None,
    window: int,
    position_ids: Tensor | None,
    keys_name: str,
    key_positions: Tensor | None,
    keys: Tensor,
) -> None:
    """Checks what scores depend on beside queries and keys. keys_name: of `key_positions`, which `keys` stand at."""
    if slopes is not None:
        check_index(function, "slopes", slopes, (q.shape[1],), q, torch.float32)
    if window < 0:
        raise ValueError(f"{function}: window must be at least 0, got {window}. Pass 0 for attention without a window.")
    for name, positions in (("position_ids", position_ids), (keys_name, key_positions)):
        if positions is None:
            if slopes is not None or window:
                raise ValueError(
                    f"{function}: {name} must be given with slopes or a window, got None. Pass the positions of the "
                    f"{'queries' if name == 'position_ids' else 'keys'}."
                )
        elif name == "position_ids":
            check_index(function, name, positions, (q.shape[0],), q, torch.int64)
        else:
            takes_int64 = name == "key_positions" and positions.dtype == torch.int64
            check_index(function, name, positions, (keys.shape[0],), q, torch.int64 if takes_int64 else torch.int32)


def check_caches(function: str, k_cache: Tensor, v_cache: Tensor, shape: tuple[int | str, ...], rows: Tensor) -> None:
    """Raises unless both caches are contiguous, of one `shape`, and of the dtype and on the device of `rows`."""
    check_tensor(function, "k_cache", k_cache, shape, like=rows)
    check_tensor(function, "v_cache", v_cache, tuple(k_cache.shape), like=rows)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_packed(function, name, cache, num_dims=3)
