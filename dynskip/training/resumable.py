"""transformers' Trainer with checkpoints that count only once they are whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

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
    """A Trainer whose checkpoints, killed at any point, are either whole or not counted."""

    def checkpoint_note(self) -> dict[str, Any]:
        """What to keep beside each checkpoint."""
        return {}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        # Every process has written its part (its random state, its share of the optimizer) behind this line.
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            # A checkpoint counts only with this file in it, written last: a kill can leave a broken folder behind,
            # but the whole one before it is still there.
            directory = Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"
            partial = directory / (_COMPLETE + ".partial")
            with partial.open("w") as file:
                json.dump({"step": self.state.global_step, **self.checkpoint_note()}, file)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(directory / _COMPLETE)
        self.accelerator.wait_for_everyone()
