"""What a decode step cannot take less than: the roofline of the rows that each layer has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynskip.costs.layer_costs import MachineSpeed, ModelBytes
from dynskip.models.config import DecoderConfig


@dataclass(frozen=True)
class WorkDone:
    """What one decode step did, on average over some: per layer the rows that ran and that computed a key and a value.

    num_entries: key-value entries read by the rows that ran, over all layers. num_rows: rows of embedding and head.
    """

    run_rows: tuple[float, ...]
    kv_rows: tuple[float, ...]
    num_entries: float
    num_rows: int

    @property
    def mean_layers(self) -> float:
        """How many layers a row ran on average."""
        return sum(self.run_rows) / self.num_rows

    @staticmethod
    def mean(works: Sequence[WorkDone]) -> WorkDone:
        """The average of steps of one batch."""
        count = len(works)
        return WorkDone(
            tuple(sum(rows) / count for rows in zip(*(work.run_rows for work in works), strict=True)),
            tuple(sum(rows) / count for rows in zip(*(work.kv_rows for work in works), strict=True)),
            sum(work.num_entries for work in works) / count,
            works[0].num_rows,
        )


def floor_ms(work: WorkDone, config: DecoderConfig, item_bytes: int, speed: MachineSpeed) -> float:
    """The least milliseconds of a step: weights of every layer with a row read once, or its products, plus the rest.

    As `roofline_ms`, with two things more. Rows that skip a layer but leave a key and a value there count the products
    of these two; a layer that only such rows visit reads these two matrices. Rows of the embedding count.
    item_bytes: of a weight, and of a value in a row.
    """
    shape = ModelBytes.of(config, item_bytes)
    kv_size = config.kv_entry_size * config.hidden_size  # of the matrices that make keys and values
    total = 0.0
    for run, kv in zip(work.run_rows, work.kv_rows, strict=True):
        # An average below one row is the share of the steps in which the layer has a row at all.
        only_kv = max(0.0, min(kv, 1.0) - min(run, 1.0))
        num_bytes = min(run, 1.0) * shape.layer_bytes + only_kv * kv_size * item_bytes
        total += speed.ms(num_bytes, run * shape.layer_flops_per_row + max(0.0, kv - run) * 2 * kv_size)
    total += speed.ms(work.num_entries * shape.kv_entry_bytes, 0)
    total += speed.ms(2 * work.num_rows * config.embedding_size * item_bytes, 0)
    return total + speed.ms(shape.head_bytes, work.num_rows * shape.head_flops_per_row)
