"""What validation is made of: the verdict on a case, errors and the errors that are allowed, and provoked faults."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynskip.ops.reference import ACTIVATION_FUNCTIONS
from dynskip.validation.tensors import Arguments


@dataclass(frozen=True)
class Result:
    """One case of one op: the largest error, what was allowed, and what else went wrong (None: nothing)."""

    backend: str
    dtype: str
    op: str
    case: str
    max_error: float
    allowed_error: float
    complaint: str | None = None

    @property
    def passed(self) -> bool:
        return self.complaint is None and self.max_error <= self.allowed_error

    @property
    def failure(self) -> str | None:
        """Why the case did not pass; None if it did."""
        if self.passed:
            return None
        return self.complaint or f"its error is {self.max_error:.1e}, allowed is {self.allowed_error:.1e}"


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Makes torch.empty give NaN inside the block, so that an element that an op leaves unwritten is seen.

    On a card it must be entered before the process's first matrix product, or CUBLAS_WORKSPACE_CONFIG be set by then:
    torch reads it once, and deterministic algorithms refuse cuBLAS without it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic
    filling = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    switches.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = filling


def change_one_element(result: Tensor) -> None:
    """Changes one element of `result`, if it has any, by more than the largest of them."""
    if result.numel():
        last = tuple(size - 1 for size in result.shape)
        if result.dtype == torch.bool:
            result[last] = ~result[last]
        elif result[last].isnan():
            result[last] = 1
        else:
            result[last] += 1 + result.nan_to_num().abs().max()


def to_float64(argument: Any) -> Any:
    """The argument of an op for its exact computation."""
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def allowed_error(exact: Tensor, eager: Tensor, magnified: float) -> float:
    """How far a result may be off, given the exact one, float64, and that of eager PyTorch in the working dtype.

    magnified: the largest value of which float32 rounds a part that stays in the result.
    """
    largest = exact.abs().max().item()
    rounding = torch.finfo(eager.dtype).eps / 2 * largest
    floor = rounding + torch.finfo(torch.float32).eps * (4 * largest + 2 * magnified)
    return max(2 * max_error(eager.double(), exact), floor)


def max_error(result: Tensor, exact: Tensor) -> float:
    """The largest difference; infinite if there is NaN."""
    error = (result - exact).abs()
    return float("inf") if error.isnan().any() else error.max().item()


def storage_bytes(tensor: Tensor) -> Tensor:
    """All bytes of the storage of `tensor`."""
    return torch.tensor([], dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def eager_layer_norm(arguments: Arguments) -> tuple[Tensor, float]:
    """PyTorch's LayerNorm, and how large its result would be without centering: what float32 rounds there stays.

    With `rms` the textbook formula of RMSNorm, which centers nothing.
    """
    row_ids, weight, bias, eps = (arguments[name] for name in ("row_ids", "weight", "bias", "eps"))
    rows = arguments["x"] if row_ids is None else arguments["x"][row_ids.long()]
    if arguments["rms"]:
        normed = eager_rms_norm(rows, weight, eps)
        return normed if bias is None else normed + bias, 0.0
    exact = rows.double()
    uncentered = (exact.abs().amax(1) / torch.sqrt(exact.var(1, correction=0) + eps)).max().item()
    magnified = uncentered if weight is None else uncentered * weight.abs().max().item()
    return F.layer_norm(rows, rows.shape[1:], weight, bias, eps), magnified


def eager_rms_norm(rows: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm as models write it: statistics in float32, the rest in the working dtype."""
    mean = rows.float().pow(2).mean(dim=-1, keepdim=True)
    normed = (rows.float() * torch.rsqrt(mean + eps)).to(rows.dtype)
    return normed if weight is None else normed * weight


def eager_rotate(arguments: Arguments) -> tuple[Tensor, float]:
    """The rotation as models write it, in the working dtype, after the RMSNorm of each head where there is one.

    With it comes the largest value that is turned.
    """
    x, weight, cos_sin = (arguments[name] for name in ("x", "weight", "cos_sin"))
    heads = x if weight is None else eager_rms_norm(x, weight, arguments["eps"])
    cos, sin = cos_sin[arguments["position_ids"]].to(x.dtype)[:, None].chunk(2, dim=-1)
    one, other, rest = heads.tensor_split([cos.shape[-1], 2 * cos.shape[-1]], dim=-1)
    magnified = heads.abs().max().item() if heads.numel() else 0.0
    return torch.cat([one * cos - other * sin, other * cos + one * sin, rest], dim=-1), magnified


def eager_activate(arguments: Arguments) -> tuple[Tensor, float]:
    """PyTorch's activation, and the product of its rounded result with the factors."""
    return eager_activation(arguments["x"], arguments["activation"], arguments["gated"], 0.0)


def eager_activation(values: Tensor, activation: str, gated: bool, magnified: float) -> tuple[Tensor, float]:
    """PyTorch's activation of `values`, each step rounded, and what is left of a rounding of size `magnified` in them.

    No activation is steeper than 9/8. A gate passes on the rounding of what it gates, and its own times that.
    """
    magnified *= 1.0 if activation in ("none", "relu") else 1.125
    if not gated:
        return ACTIVATION_FUNCTIONS[activation](values), magnified
    gates, gated_values = values.chunk(2, dim=-1)
    gates = ACTIVATION_FUNCTIONS[activation](gates)
    magnified *= gates.abs().max().item() + gated_values.abs().max().item()
    return gates * gated_values, magnified


def eager_attention(arguments: Arguments) -> tuple[Tensor, float]:
    """softmax(q k^T scale) v, row by row, each step rounded to the working dtype, and its largest score times value.

    The absolute error of a score becomes a relative error of its weight. What slopes take from scores is float32.
    """
    is_decode = "slot_table" in arguments
    k_name, v_name, place_name = ("k_cache", "v_cache", "slot_positions") if is_decode else ("k", "v", "key_positions")
    q, slopes, window = arguments["q"], arguments.get("slopes"), arguments.get("window", 0)
    group = q.shape[1] // arguments[k_name].shape[1]
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    magnified = 0.0
    for row, keys in enumerate((_decode_key_ids if is_decode else _prefill_key_ids)(arguments)):
        distances = None
        if slopes is not None or window:
            distances = arguments["position_ids"][row] - arguments[place_name][keys]
            if window:
                keys, distances = keys[distances < window], distances[distances < window]
        if len(keys):
            k, v = (arguments[name][keys].transpose(0, 1).repeat_interleave(group, dim=0) for name in (k_name, v_name))
            scores = q[row, :, None] @ k.transpose(1, 2) * arguments["scale"]
            largest = scores.abs().max().item()
            if slopes is not None:
                lessening = slopes[:, None, None] * distances
                scores = (scores.float() - lessening).to(q.dtype)
                largest = max(largest, lessening.abs().max().item())
            out[row] = (scores.softmax(dim=-1) @ v)[:, 0]
            magnified = max(magnified, largest * out[row].abs().max().item())
    return out, magnified


def _decode_key_ids(arguments: Arguments) -> Iterator[Tensor]:
    """The cache slots that each row attends to."""
    for sequence, length in zip(arguments["seq_ids"].tolist(), arguments["context_lens"].tolist(), strict=True):
        yield arguments["slot_table"][sequence, :length].long()


def _prefill_key_ids(arguments: Arguments) -> Iterator[Tensor]:
    """The packed keys that each row attends to."""
    device, limits = arguments["q"].device, arguments["key_limits"].tolist()
    starts_q, starts_k = arguments["cu_seqlens_q"].tolist(), arguments["cu_seqlens_k"].tolist()
    for sequence, first_key in enumerate(starts_k[:-1]):
        for row in range(starts_q[sequence], starts_q[sequence + 1]):
            yield torch.arange(first_key, first_key + limits[row], device=device)
