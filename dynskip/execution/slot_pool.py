"""The slots of a key-value cache: which are free, and by how many sequences each of the others is owned.

On a CPU the books are kept by numpy: a parallel loop of PyTorch's leaves OpenMP's threads spinning for milliseconds, in
which they take a core from the step that follows. Some of its loops are parallel however short, others from 32,768 on.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BYTES_PER_SLOT = 13
"""What the pool's own tensors take for each slot."""


class KVCacheMemoryError(MemoryError):
    """The key-value cache does not fit in memory, or has no slot left."""


def by_numpy(device: torch.device) -> bool:
    """Whether numpy keeps the books of caches on ``device``."""
    return device.type == "cpu"


class SlotPool:
    """Slots 0..num_slots-1, given out and taken back. Its tensors are changed in place: graphs hold their addresses.

    free_slots: [num_slots], int32, a stack: from place ``num_used`` on the free slots, each once, in the order in which
    they are given out. What stands before is out of date.
    num_extra_owners: [num_slots], int32, how many own a taken slot besides the first.
    is_kept: [num_slots], bool, whether one of its owners is no sequence: see `keep`.
    cursor: [1], int32, the place in ``free_slots`` from which the device itself takes slots: see `reserve`.
    num_used: how many slots are taken; after `reserve` the device may have taken fewer, which `settle` finds out.
    may_share: whether a slot may have more than one owner.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.free_slots = torch.arange(num_slots, dtype=torch.int32, device=device)
        self.num_extra_owners = torch.zeros_like(self.free_slots)
        self.is_kept = torch.zeros_like(self.free_slots, dtype=torch.bool)
        self.cursor = torch.zeros(1, dtype=torch.int32, device=device)
        self.num_used = 0
        self.may_share = False
        self._seen_at = torch.zeros_like(self.free_slots)
        # The cursor is wrong once the host itself gives out slots or takes some back.
        self._cursor_is_current = True
        self._is_num_used_exact = True

    @property
    def num_bytes(self) -> int:
        """Bytes held by the tensors."""
        tensors = (self.free_slots, self.num_extra_owners, self.is_kept, self._seen_at, self.cursor)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def clear(self) -> None:
        """Take all slots back; they are given out as at the beginning."""
        if by_numpy(self.free_slots.device):
            self.free_slots.numpy()[:] = np.arange(self.num_slots, dtype=np.int32)
            self.num_extra_owners.numpy()[:] = 0
            self.is_kept.numpy()[:] = False
        else:
            torch.arange(self.num_slots, out=self.free_slots)
            self.num_extra_owners.zero_()
            self.is_kept.zero_()
        self.cursor.zero_()
        self.num_used = 0
        self.may_share = False
        self._cursor_is_current = self._is_num_used_exact = True

    def take(self, num_slots: int, function: str) -> Tensor:
        """[num_slots], int32: free slots, each of which has one owner now. ``function`` asks, should there be too few.

        Those that the device was promised and left are among them.
        """
        self.settle()
        first = self.num_used
        self._use(num_slots, function)
        self._cursor_is_current = False
        if by_numpy(self.free_slots.device):
            return torch.from_numpy(self.free_slots.numpy()[first : self.num_used].copy())
        return self.free_slots[first : self.num_used].clone()

    def reserve(self, num_slots: int, function: str, exact: bool) -> None:
        """Let the device take up to ``num_slots`` free slots from the cursor on, with ``exact`` all of them.

        What the device leaves is given to its next steps, or to the next `take`.
        """
        if not self._cursor_is_current:
            self.cursor.fill_(self.num_used)
        self._use(num_slots, function)
        self._cursor_is_current = True
        self._is_num_used_exact = self._is_num_used_exact and (exact or num_slots == 0)

    def settle(self) -> None:
        """Count the slots that the device took, not those that it was promised: waits for it, if they can differ."""
        if not self._is_num_used_exact:
            self.num_used = int(self.cursor)
            self._is_num_used_exact = True

    def distinct(self, slots: Tensor) -> Tensor:
        """``slots`` ([N], int32), each once."""
        # Duplicates race for one cell; the entry that reads back its own index is kept. No sort, and no table to clear.
        if by_numpy(slots.device):
            ids, seen_at = slots.numpy(), self._seen_at.numpy()
            seen_at[ids] = places = np.arange(len(ids), dtype=np.int32)
            is_first = seen_at[ids] == places
            return slots if is_first.all() else torch.from_numpy(ids[is_first])
        order = torch.arange(slots.numel(), dtype=torch.int32, device=slots.device)
        self._seen_at.scatter_(0, slots.long(), order)
        has_won = self._seen_at.index_select(0, slots) == order
        return slots if bool(has_won.all()) else slots.masked_select(has_won)

    def add_owner(self, slots: Tensor) -> None:
        """Count one more owner of each of the distinct, taken ``slots`` ([N], int32)."""
        self.may_share = True
        if by_numpy(slots.device):
            self.num_extra_owners.numpy()[slots.numpy()] += 1
        else:
            self.num_extra_owners.index_add_(0, slots, torch.ones_like(slots))

    def drop_owner(self, slots: Tensor) -> int:
        """Count one owner less of each of the distinct, taken ``slots`` ([N], int32); how many became free by it."""
        if self.may_share and by_numpy(slots.device):
            ids, owners = slots.numpy(), self.num_extra_owners.numpy()
            others = owners[ids]
            if others.any():
                owners[ids] = np.maximum(others - 1, 0)
                slots = torch.from_numpy(ids[others == 0])
        elif self.may_share and bool((num_extra := self.num_extra_owners.index_select(0, slots)).any()):
            self.num_extra_owners.index_copy_(0, slots.long(), (num_extra - 1).clamp_(min=0))
            slots = slots.masked_select(num_extra == 0)
        self._free(slots)
        return slots.numel()

    def keep(self, slots: Tensor) -> None:
        """Own the distinct, taken ``slots`` ([N], int32), none of which is kept, beside the sequences that do."""
        self._mark(slots, True)
        self.add_owner(slots)

    def let_go(self, slots: Tensor) -> int:
        """Own the kept ``slots`` ([N], int32) no more; how many became free by it."""
        self._mark(slots, False)
        return self.drop_owner(slots)

    def rebuild(self, num_owners: Tensor) -> None:
        """Make the slots with owners the taken ones, and all others free.

        num_owners: [num_slots], int32, how many sequences own each; what is kept has one more.
        """
        num_owners = num_owners + self.is_kept
        free = (num_owners == 0).nonzero().squeeze(1)
        self.num_used = self.num_slots - free.numel()
        self.free_slots[self.num_used :] = free
        torch.clamp(num_owners - 1, min=0, out=self.num_extra_owners)
        self.may_share = bool(self.num_extra_owners.any())
        self._cursor_is_current, self._is_num_used_exact = False, True

    def _mark(self, slots: Tensor, is_kept: bool) -> None:
        if by_numpy(slots.device):
            self.is_kept.numpy()[slots.numpy()] = is_kept
        else:
            self.is_kept.index_fill_(0, slots.long(), is_kept)

    def _use(self, num_slots: int, function: str) -> None:
        if num_slots > self.num_slots - self.num_used:
            self.settle()
        num_left = self.num_slots - self.num_used
        if num_slots > num_left:
            raise KVCacheMemoryError(
                f"{function}: num_slots must be at most {num_left}, the slots left of {self.num_slots}, got "
                f"{num_slots}. Create the cache with more slots."
            )
        self.num_used += num_slots

    def _free(self, slots: Tensor) -> None:
        """Put ``slots`` back, to be given out before all others."""
        assert self._is_num_used_exact, "slots come back once it is known which were taken"
        end = self.num_used
        self.num_used -= slots.numel()
        if by_numpy(slots.device):
            self.free_slots.numpy()[self.num_used : end] = slots.numpy()
        else:
            self.free_slots[self.num_used : end] = slots
        self._cursor_is_current = False
