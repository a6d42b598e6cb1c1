"""transformers' Trainer for one stage, which goes on from wherever a kill has left it."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from dynskip.data.batches import Batch, Plan, group_in_order, pad_examples
from dynskip.data.examples import Example
from dynskip.files import write_text

_COMPLETE = "complete.json"
# Of TrainingArguments, where a trainer says nothing else. Checkpoints come when `after_step` or the clock asks for one.
_DEFAULTS: dict[str, Any] = {
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
    "save_strategy": "steps",
    "save_steps": 1_000_000_000,
    "logging_steps": 1,
}


class NotFiniteError(ArithmeticError):
    """A training has diverged."""


def check_numbers(numbers: Mapping[str, float], step: int, directory: Path) -> None:
    """Raise NotFiniteError where one of the named numbers of a step, counted from 1, is infinite or NaN."""
    if all(math.isfinite(number) for number in numbers.values()):
        return
    shown = ", ".join(f"{name} {number:.6g}" for name, number in numbers.items())
    raise _error(f"loss must be finite, got {shown} at step {step}", directory)


def check_weights(model: nn.Module, step: int, directory: Path) -> None:
    """Raise NotFiniteError where a weight is infinite or NaN after ``step`` steps. Cost: reads all weights once."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise _error(f"weights must be finite, got {name} with infinities or NaN after step {step}", directory)


def _error(fault: str, directory: Path) -> NotFiniteError:
    return NotFiniteError(
        f"train: {fault} in {directory}. Nothing was exported. Start again in another folder with a lower learning "
        "rate, more warm-up steps, or in float32."
    )


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    complete = [path.parent for path in directory.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def _clear_broken(directory: Path) -> None:
    """Delete what kills have left of checkpoints: the Trainer would count them, and drop whole ones in their place."""
    for folder in directory.glob("checkpoint-*"):
        if not (folder / _COMPLETE).exists():
            shutil.rmtree(folder)


class _AfterStep(TrainerCallback):
    """Asks the trainer what a step is followed by, and has it save by the clock."""

    def __init__(self, trainer: ResumableTrainer, save_every_s: float) -> None:
        self._trainer = trainer
        self._save_every_s = save_every_s
        self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.after_step(control)
        late = torch.tensor(float(time.monotonic() - self._saved >= self._save_every_s), device=args.device)
        # One process's clock decides for all, since all must take part in saving.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(late, src=0)
        if control.should_save or late.item():
            control.should_save = True
            self._saved = time.monotonic()


class ResumableTrainer(Trainer):
    """The Trainer of a stage. Its checkpoints in ``directory``, killed at any point, are either whole or not counted.

    Numbers that are not finite end it with a NotFiniteError, before weights or a checkpoint are made of them.
    plan: its batches. progress: show a bar. options: of TrainingArguments, where trainers differ.
    """

    def __init__(
        self,
        model: nn.Module,
        directory: Path,
        plan: Plan,
        *,
        use_cpu: bool,
        save_every_s: float,
        progress: bool,
        **options: Any,
    ) -> None:
        arguments = TrainingArguments(
            output_dir=str(directory),
            max_steps=plan.num_steps,
            gradient_accumulation_steps=plan.num_micro_batches,
            use_cpu=use_cpu,
            max_grad_norm=1.0,
            report_to="none",
            ignore_data_skip=True,
            remove_unused_columns=False,
            disable_tqdm=not progress,
            **_DEFAULTS | options,
        )
        # Several GPUs in one process would be nn.DataParallel, which knows nothing of the shares of a plan.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        super().__init__(model=model, args=arguments, train_dataset=plan)
        self.directory = directory
        self.plan = plan
        self._loss: Tensor | None = None
        self._clip = self.accelerator.clip_grad_norm_
        self.accelerator.clip_grad_norm_ = self._clip_and_check
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(_AfterStep(self, save_every_s))
        if progress:
            self.add_callback(LossBar)

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """The batches of the plan, which does the batching and knows its process."""
        # Starting a loader draws a number. From a generator of its own: the random state that a checkpoint brings back
        # must be the one that the next step would have seen.
        return DataLoader(
            self.plan, batch_size=1, shuffle=False, collate_fn=lambda items: items[0], generator=torch.Generator()
        )

    def after_step(self, control: Any) -> None:
        """Set in the Trainer's ``control`` what follows the step: an evaluation, a checkpoint, the end of the stage."""

    def validation_batches(
        self, examples: Sequence[Example], pad_id: int, *, num_tokens: int, response_only: bool = True
    ) -> Iterator[dict[str, Tensor]]:
        """This process's share of ``examples``, on its device, in batches of at most ``num_tokens`` tokens."""
        batches = group_in_order([example.num_tokens for example in examples], num_tokens)
        for rows in batches[self.args.process_index :: self.args.world_size]:
            batch = pad_examples([examples[row] for row in rows], pad_id, response_only, multiple=8)
            yield self._prepare_inputs(batch)

    def report(self, metrics: dict[str, float]) -> dict[str, float]:
        """Log the metrics of an evaluation and return them; NotFiniteError where one is not finite."""
        check_numbers(metrics, self.state.global_step, self.directory)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def checkpoint_note(self) -> dict[str, Any]:
        """What to keep beside each checkpoint; ``begin`` gets it back."""
        return {}

    def begin(self, note: dict[str, Any]) -> None:
        """Make ready for ``plan.first_step``. note: that of the checkpoint of this step; empty for none."""

    def is_finished(self) -> bool:
        """Whether nothing is left to train, before a start at ``plan.first_step``."""
        return self.plan.first_step >= self.plan.num_steps

    def run(self) -> None:
        """Train to the end of the stage, from its latest whole checkpoint where there is one."""
        checkpoint = latest_checkpoint(self.directory)
        if self.is_world_process_zero():
            _clear_broken(self.directory)
        self.accelerator.wait_for_everyone()
        note: dict[str, Any] = {}
        if checkpoint is not None:
            note = json.loads((checkpoint / _COMPLETE).read_text())
            self.state.log_history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        self.plan.first_step = self.state.global_step = int(note.get("step", 0))
        self.begin(note)
        if not self.is_finished():
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        elif checkpoint is not None:
            self._load_from_checkpoint(str(checkpoint))

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
        check_numbers(numbers, self.state.global_step + 1, self.directory)
        return grad_norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # The last update may have spoilt what no loss has seen yet.
        check_weights(model, self.state.global_step, self.directory)
        super()._save_checkpoint(model, trial)
        # Every process has written its part (its random state, its share of the optimizer) behind this line.
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            # A checkpoint counts only with this file in it, written last: a kill can leave a broken folder behind,
            # but the whole one before it is still there.
            note = json.dumps({"step": self.state.global_step, **self.checkpoint_note()})
            write_text(self.directory / f"checkpoint-{self.state.global_step}" / _COMPLETE, note, sync=True)
        self.accelerator.wait_for_everyone()


class LossBar(ProgressCallback):
    """Trainer's progress bar, with the last losses behind it in place of a line for each step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss") if name in (logs or {})}
            if shown:
                self.training_bar.set_postfix(shown, refresh=False)
