"""Cases, and the repeatable random tensors that they are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]

POISON = -77
"""What integers hold where an op has no business."""


@dataclass(frozen=True)
class Case:
    """Arguments for one call of one op, and the words that describe them."""

    op: str
    name: str
    arguments: Arguments

    def copy_arguments(self) -> Arguments:
        """Fresh arguments with copies of whole storages, so that writes beside a strided tensor can be seen too."""
        return {name: map_tensors(copy_with_storage, argument) for name, argument in self.arguments.items()}


def copy_with_storage(tensor: Tensor) -> Tensor:
    """A copy of `tensor` with the same strides, in a copy of all of its storage."""
    storage = tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]  # torch's own
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def map_tensors(function: Callable[[Tensor], Tensor], argument: Any) -> Any:
    """`argument` with `function` applied to it, or to the tensors in it if it is a named tuple of some."""
    if isinstance(argument, Tensor):
        return function(argument)
    if isinstance(argument, tuple) and hasattr(argument, "_fields"):
        return type(argument)(*(map_tensors(function, item) for item in argument))
    return argument


def tensors_in(name: str, argument: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `argument` is or holds, named after it."""
    if isinstance(argument, Tensor):
        yield name, argument
    elif isinstance(argument, tuple) and hasattr(argument, "_fields"):
        for field, item in zip(argument._fields, argument, strict=True):
            yield from tensors_in(f"{name}.{field}", item)


class Draw:
    """Repeatable random tensors of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(20241027)

    def normal(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return drawn.to(self.device, self.dtype)

    def matrix(self, num_outputs: int, num_inputs: int) -> Tensor:
        return self.normal(num_outputs, num_inputs)

    def strided(self, *shape: int) -> Tensor:
        """Normal values in rows that lie apart, with NaN in between."""
        poisoned = self.nan(shape[0], 3, *shape[1:])
        poisoned[:, 1] = self.normal(*shape)
        return poisoned[:, 1]

    def nan(self, *shape: int) -> Tensor:
        return torch.full(shape, float("nan"), dtype=self.dtype, device=self.device)

    def index(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int32, from `low` to below `high`."""
        place = self.generator.device
        return torch.randint(low, high, shape, generator=self.generator, dtype=torch.int32, device=place).to(
            self.device
        )

    def permutation(self, size: int) -> list[int]:
        return torch.randperm(size, generator=self.generator, device=self.generator.device).tolist()

    def guarded(self, tensor: Tensor, filler: float | None = None) -> Tensor:
        """A contiguous copy of `tensor` amid a storage of `filler`, by default NaN or POISON, where no op has business.

        The filler takes 64 elements on each side, so that the copy is aligned as a tensor of its own.
        """
        size = tensor.numel()
        if filler is None:
            filler = float("nan") if tensor.is_floating_point() else POISON
        storage = torch.full((size + 128,), filler, dtype=tensor.dtype, device=tensor.device)
        storage[64 : 64 + size] = tensor.reshape(-1)
        return storage[64 : 64 + size].view(tensor.shape)

    def row_ids(self, num_chosen: int, num_rows: int) -> Tensor:
        return self.index(*sorted(self.permutation(num_rows)[:num_chosen]))


class PlainDraw(Draw):
    """Tensors as a model has them: drawn on the device, without guards, products with unit rows about 1."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self.generator = torch.Generator(device).manual_seed(0)

    def matrix(self, num_outputs: int, num_inputs: int) -> Tensor:
        return self.normal(num_outputs, num_inputs).mul_(num_inputs**-0.5)

    def guarded(self, tensor: Tensor, filler: float | None = None) -> Tensor:
        return tensor


class EmptyDraw(PlainDraw):
    """Tensors that hold whatever they hold: for compiling only.

    offset: where lists and other integers stand, in elements behind an aligned address.
    """

    def __init__(self, dtype: torch.dtype, offset: int = 0, device: torch.device | str = "cpu") -> None:
        super().__init__(dtype, torch.device(device))
        self.offset = offset

    def normal(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    nan = normal

    def matrix(self, num_outputs: int, num_inputs: int) -> Tensor:
        return self.normal(num_outputs, num_inputs)

    def guarded(self, tensor: Tensor, filler: float | None = None) -> Tensor:
        if tensor.is_floating_point():
            return tensor
        place = torch.empty(tensor.numel() + self.offset, dtype=tensor.dtype, device=tensor.device)
        place = place[self.offset :].view(tensor.shape)
        return place.copy_(tensor)
