"""transformers' Trainer with checkpoints that count only once they are whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from dynskip.files import write_text
from dynskip.training.finite import check_numbers, check_weights

_COMPLETE = "complete.json"


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    complete = [path.parent for path in directory.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def clear_broken(directory: Path) -> None:
    """Delete what kills have left of checkpoints: the Trainer would count them, and drop whole ones in their place."""
    for folder in directory.glob("checkpoint-*"):
        if not (folder / _COMPLETE).exists():
            shutil.rmtree(folder)


def saved_note(checkpoint: Path) -> dict[str, Any]:
    """What a trainer wrote beside a whole checkpoint: its step, and its ``checkpoint_note``."""
    note: dict[str, Any] = json.loads((checkpoint / _COMPLETE).read_text())
    return note


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints, killed at any point, are either whole or not counted.

    Numbers that are not finite end it with a NotFiniteError, before weights or a checkpoint are made of them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loss: Tensor | None = None
        self._clip = self.accelerator.clip_grad_norm_
        self.accelerator.clip_grad_norm_ = self._clip_and_check

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of a micro-batch, which is added up for the check of its step."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        return loss

    def _clip_and_check(self, *args: Any, **kwargs: Any) -> Any:
        """Clip gradients; the last that happens before the optimizer's step, once all micro-batches are done."""
        grad_norm = self._clip(*args, **kwargs)
        loss, self._loss = self._loss, None
        assert loss is not None, "gradients come from a training step"
        numbers = {"loss": float(loss), "gradient norm": float(grad_norm)}
        check_numbers(numbers, self.state.global_step + 1, Path(self.args.output_dir or "."))
        return grad_norm

    def checkpoint_note(self) -> dict[str, Any]:
        """What to keep beside each checkpoint."""
        return {}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # The last update may have spoilt what no loss has seen yet.
        check_weights(model, self.state.global_step, Path(self.args.output_dir or "."))
        super()._save_checkpoint(model, trial)
        # Every process has written its part (its random state, its share of the optimizer) behind this line.
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            # A checkpoint counts only with this file in it, written last: a kill can leave a broken folder behind,
            # but the whole one before it is still there.
            directory = Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"
            note = {"step": self.state.global_step, **self.checkpoint_note()}
            write_text(directory / _COMPLETE, json.dumps(note), sync=True)
        self.accelerator.wait_for_everyone()
