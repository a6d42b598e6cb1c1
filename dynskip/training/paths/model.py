"""A model with its own full depth as a teacher, and a pass that returns what a step's paths lose on average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from dynskip.data.batches import IGNORED
from dynskip.models.hf_model import hf_layers, only_layers
from dynskip.paths import LayerPath
from dynskip.training.paths.distill_loss import Head, distill_loss
from dynskip.training.response_loss import head_loss

if TYPE_CHECKING:
    from peft import PeftModel


def with_adapter(model: PreTrainedModel, rank: int, folder: str | None = None) -> PeftModel:
    """``model``, frozen, with a LoRA adapter of ``rank`` on every matrix of its layers.

    folder: of the adapter; None: one that changes nothing yet. Raises ValueError where it is of another rank.
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer

    if folder is not None:
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=True)
        found = getattr(adapted.peft_config["default"], "r", None)
        if found != rank:
            raise ValueError(f"with_adapter: {folder} must be a LoRA adapter of rank {rank}, got {found}.")
    else:
        kinds = {type(module).__name__ for module in hf_layers(model).modules()}
        names = {
            name.rpartition(".")[2]
            for name, module in hf_layers(model).named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        }
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=sorted(names),
            task_type="CAUSAL_LM",
            fan_in_fan_out="Conv1D" in kinds,
        )
        adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # autocast rounds what a product takes: nothing is widened first
    return adapted


@contextmanager
def merged_weights(model: PreTrainedModel) -> Iterator[None]:
    """Within, a matrix of ``model`` that has an adapter is one tensor, the product of the factors added to it.

    That sum is made at its first use and serves all passes, so that a path costs as many products as without an
    adapter. Gradients reach the factors through it; gradients and sums take twice the memory of the matrices.
    """
    adapted = []
    if hasattr(model, "peft_config"):
        from peft.tuners.lora import LoraLayer

        adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for module in adapted:
        module.forward = _MergedProduct(module)
    try:
        yield
    finally:
        for module in adapted:
            del module.forward


class _MergedProduct:
    """The forward of ``layer``, an adapted matrix, with one product."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.weights: dict[str, Tensor] = {}

    def __call__(self, rows: Tensor) -> Tensor:
        base = self.layer.get_base_layer()
        if not self.weights:
            down, up = (factors["default"].weight for factors in (self.layer.lora_A, self.layer.lora_B))
            pair = (down.T, up.T) if self.layer.fan_in_fan_out else (up, down)
            self.weights["weight"] = torch.addmm(base.weight, *pair, alpha=self.layer.scaling["default"])
        product: Tensor = functional_call(base, self.weights, rows)
        return product


class PathsModel(nn.Module):
    """``model`` along paths, beside its full depth as it came.

    model: of transformers. adapter: what is trained of it where the rest is frozen; the teacher is the model without
    it. None: all is trained, and the teacher is a frozen copy. loss: see `PathsConfig`.
    """

    def __init__(self, model: PreTrainedModel, adapter: PeftModel | None, loss: str) -> None:
        super().__init__()
        self.trained: nn.Module = model
        # In lists, where nn.Module does not look: the one wraps the model that it already has, the other is frozen.
        self._adapter = [adapter]
        self.loss = loss
        self.paths: Sequence[LayerPath] = ()
        self._teacher: list[PreTrainedModel] = []
        if adapter is None and loss == "distill":
            self._teacher = [deepcopy(model).requires_grad_(False).train(False)]
        self.train(False)

    @property
    def adapter(self) -> PeftModel | None:
        """The adapter around the model."""
        return self._adapter[0]

    @property
    def model(self) -> PreTrainedModel:
        """The model that is trained."""
        model = self.trained
        assert isinstance(model, PreTrainedModel), "as it was given"
        return model

    def _apply(self, fn: Any, recurse: bool = True) -> PathsModel:
        for teacher in self._teacher:
            teacher._apply(fn)
        moved: PathsModel = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it bare
        return moved

    def train(self, mode: bool = True) -> PathsModel:
        """Nothing is dropped out in training either: a teacher does not guess what its student has lost."""
        return super().train(False)

    def forward(self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> dict[str, Tensor]:
        """``loss``, the mean over ``paths`` of ``losses`` [P]: each summed over the labelled tokens, divided by
        ``num_items_in_batch``; None: by their number.

        input_ids, labels: [B, T], int64, padded on the right, where no token that counts sees the padding.
        """
        counted = labels[:, 1:] != IGNORED
        share = 1.0 if num_items_in_batch is None else counted.sum() / num_items_in_batch
        head = _head(self.model)
        if self.loss == "response":
            with merged_weights(self.model):
                states = [self._states(self.model, input_ids, path) for path in self.paths]
            losses = torch.stack([head_loss(each, *head, labels) for each in states])
        else:
            with torch.no_grad(), self._as_it_came() as teacher:
                wanted = self._states(teacher, input_ids, None)[:, :-1][counted]
                wanted_head = _head(teacher)
            with merged_weights(self.model):
                students = [self._states(self.model, input_ids, path)[:, :-1][counted] for path in self.paths]
            losses = distill_loss(wanted, students, wanted_head, head if head.weight.requires_grad else None)
        losses = losses * share
        return {"loss": losses.mean(), "losses": losses.detach()}

    @contextmanager
    def _as_it_came(self) -> Iterator[PreTrainedModel]:
        """The teacher, within the context."""
        adapter = self.adapter
        if adapter is None:
            yield self._teacher[0]
            return
        with adapter.disable_adapter():
            yield self.model

    @staticmethod
    def _states(model: PreTrainedModel, input_ids: Tensor, path: LayerPath | None) -> Tensor:
        if path is None:
            states: Tensor = model.base_model(input_ids, use_cache=False).last_hidden_state
            return states
        with only_layers(model, path):
            return PathsModel._states(model, input_ids, None)


def _head(model: PreTrainedModel) -> Head:
    head: Any = model.get_output_embeddings()
    return Head(head.weight, head.bias)
