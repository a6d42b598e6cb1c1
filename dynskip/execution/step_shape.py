"""What the host knows of a decode step before it runs: pure data, from which launches follow, and keys of graphs."""

from __future__ import annotations

from dataclasses import dataclass, field

from dynskip.controllers import TokenController
from dynskip.kernels.row_list import row_bucket
from dynskip.routing.plan import KVPolicy, Plan
from dynskip.routing.routes import ControllerDecision


@dataclass(frozen=True)
class LayerBounds:
    """Bounds, each a bucket or 0, of how many rows run ``layer`` and for how many it computes key and value."""

    layer: int
    max_run: int
    max_kv: int


@dataclass(frozen=True)
class StepShape:
    """Row bounds of a decode step, the key of its CUDA graph; ``layers`` may have rows, in increasing order.

    controller: asked at each layer which rows run it; None where a mask says so beforehand. Two steps of one controller
        are equal, so the key is its identity.
    """

    max_rows: int
    kv_policy: KVPolicy
    layers: tuple[LayerBounds, ...]
    controller: TokenController | None = field(default=None, compare=False)
    controller_id: int = field(init=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "controller_id", 0 if self.controller is None else id(self.controller))
        # Each step looks up its graph by its shape, most often the same object as before.
        key = (self.max_rows, self.kv_policy, self.layers, self.controller_id)
        object.__setattr__(self, "_hash", hash(key))

    def __hash__(self) -> int:
        return self._hash

    @staticmethod
    def of(plan: Plan) -> StepShape:
        """The shape of a decode step that follows ``plan``: exact buckets where its mask is known, else all rows."""
        num_rows = plan.rows.num_rows
        if plan.active is None:
            assert isinstance(plan.decide, ControllerDecision), "routing makes the plans of controllers"
            return StepShape.unknown(num_rows, plan.num_layers, plan.kv_policy, plan.decide.controller)
        layers = []
        for layer, (num_run, num_kv) in enumerate(plan.num_rows_by_layer):
            if num_run or num_kv:
                layers.append(LayerBounds(layer, row_bucket(num_run), row_bucket(num_kv)))
        return StepShape(row_bucket(num_rows), plan.kv_policy, tuple(layers))

    @staticmethod
    def unknown(
        num_rows: int, num_layers: int, kv_policy: KVPolicy, controller: TokenController | None = None
    ) -> StepShape:
        """The shape of a step of ``num_rows`` rows whose mask the device alone knows: any layer may have any row."""
        bucket = row_bucket(num_rows)
        layers = tuple(LayerBounds(layer, bucket, bucket) for layer in range(num_layers))
        return StepShape(bucket, kv_policy, layers, controller)
