"""`Place`: where an item is done, as far as the last bits of its sums depend on it."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import lru_cache

from dynskip.host import cpu_features


@dataclass(frozen=True, slots=True)
class Place:
    """host: the machine's name. isa: the instruction sets of its CPU, or the name of its GPU; "" where unknown."""

    host: str = ""
    isa: str = ""

    @staticmethod
    @lru_cache
    def here(device: str = "cpu") -> Place:
        """The place of this process, with what computes on ``device``."""
        if device == "cpu":
            return Place(platform.node(), " ".join(cpu_features()) or platform.machine())
        import torch

        return Place(platform.node(), str(torch.cuda.get_device_name(device)))

    def __str__(self) -> str:
        return self.host or "a host that is not known"
