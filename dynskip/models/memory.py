"""How much memory a loaded model takes, and took while it was loaded."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import psutil
from torch import nn

from dynskip.models.linear import Linear


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a model and of the process that loaded it.

    matrix_bytes: the one copy of every matrix, packed or dense.
    other_bytes: embeddings, biases and norms. A tied dense head is the embedding, and counts here.
    resting_bytes: resident memory of the process after loading.
    peak_bytes: the most that has been resident since the process began.
    """

    matrix_bytes: int
    other_bytes: int
    resting_bytes: int
    peak_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.matrix_bytes + self.other_bytes

    @staticmethod
    def of(model: nn.Module) -> MemoryReport:
        """The report for ``model`` as it is held now."""
        shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        linears = [m for m in model.modules() if isinstance(m, Linear) and (m.packed or id(m.weight) not in shared)]
        dense = {id(m.weight) for m in linears if not m.packed}
        others = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in dense)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak_bytes = peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
        return MemoryReport(
            sum(linear.weight_bytes for linear in linears), others, psutil.Process().memory_info().rss, peak_bytes
        )
