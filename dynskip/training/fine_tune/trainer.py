"""transformers' Trainer for one stage of a fine-tune: the loss of responses, skipped layers not computed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from dynskip.data.batches import IGNORED, Batch, group_in_order, pad_examples
from dynskip.data.examples import Example
from dynskip.paths import LayerPath
from dynskip.training.fine_tune.config import FineTuneConfig
from dynskip.training.fine_tune.row_order import StepPlan
from dynskip.training.finite import check_numbers
from dynskip.training.response_loss import ResponseLossOPT, only_layers
from dynskip.training.resumable import ResumableTrainer, clear_broken, latest_checkpoint, saved_note
from dynskip.training.schedule import PathMenu

_EVAL_TOKENS_PER_BATCH = 8192
_NEVER = 1_000_000_000


def evaluations_since_best(history: Sequence[dict[str, Any]]) -> int:
    """How many evaluations in a Trainer's log have passed since the one with the least loss."""
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


class _Rhythm(TrainerCallback):
    """Evaluates and saves every so many steps and at the end, saves by the clock in between, ends a stage early."""

    def __init__(self, eval_every: int, patience: int | None, save_every_s: float) -> None:
        self._eval_every = eval_every
        self._patience = patience
        self._save_every_s = save_every_s
        self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._eval_every == 0 or state.global_step == state.max_steps:
            control.should_evaluate = control.should_save = True
        late = torch.tensor(float(time.monotonic() - self._saved >= self._save_every_s), device=args.device)
        # One process's clock decides for all, since all must take part in saving.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(late, src=0)
        if control.should_save or late.item():
            control.should_save = True
            self._saved = time.monotonic()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._patience is not None and evaluations_since_best(state.log_history) >= self._patience:
            control.should_training_stop = True


class FineTuneTrainer(ResumableTrainer):
    """A Trainer for one stage; its checkpoints, log and best step live in ``directory``."""

    def __init__(
        self,
        model: nn.Module,
        directory: Path,
        config: FineTuneConfig,
        menu: PathMenu,
        examples: Sequence[Example],
        validation: Sequence[Example],
        *,
        pad_id: int,
        num_steps: int,
        seed: int,
        use_cpu: bool,
        progress: bool,
    ) -> None:
        self.loss_model = model
        self.directory = directory
        self.menu = menu
        self.validation = validation
        self.pad_id = pad_id
        self.path_seed = seed
        self.patience = config.patience
        self.epochs_per_step = config.batch_size / len(examples)
        self.history: list[dict[str, Any]] = []
        arguments = TrainingArguments(
            output_dir=str(directory),
            max_steps=num_steps,
            per_device_train_batch_size=config.micro_batch_size,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            warmup_steps=config.warmup_steps,
            lr_scheduler_type="linear",
            optim="adamw_torch",
            max_grad_norm=1.0,
            bf16=config.precision == "bfloat16",
            use_cpu=use_cpu,
            ddp_find_unused_parameters=len(menu.paths) > 1,
            save_strategy="steps",
            save_steps=_NEVER,
            save_total_limit=3,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            logging_steps=1,
            report_to="none",
            disable_tqdm=not progress,
            ignore_data_skip=True,
            remove_unused_columns=False,
            seed=seed,
        )
        # Several GPUs in one process would be nn.DataParallel, which knows nothing of the shares of a StepPlan.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        plan = StepPlan(
            examples,
            pad_id=pad_id,
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            num_steps=num_steps,
            seed=seed,
            rank=arguments.process_index,
            num_processes=arguments.world_size,
        )
        arguments.gradient_accumulation_steps = plan.num_micro_batches
        if config.gradient_checkpointing:
            enable: Any = model.gradient_checkpointing_enable
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        super().__init__(model=model, args=arguments, train_dataset=plan)
        self.plan = plan
        # The model divides by num_items_in_batch, which the Trainer counts over micro-batches and processes.
        self.model_accepts_loss_kwargs = True
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if progress:
            self.add_callback(_Bar)
        eval_every = config.eval_every or math.ceil(len(examples) / config.batch_size)
        self.add_callback(_Rhythm(eval_every, config.patience, config.save_every_s))

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """The batches of the plan, which does the batching and knows its process."""
        # Starting a loader draws a number. From a generator of its own: the random state that a checkpoint brings back
        # must be the one that the next step would have seen.
        return DataLoader(
            self.plan, batch_size=1, shuffle=False, collate_fn=lambda items: items[0], generator=torch.Generator()
        )

    def path(self, step: int) -> LayerPath:
        """The path of a step, the same in every process and micro-batch."""
        return self.menu.draw(self.path_seed, step, 0.0)

    def along(self, path: LayerPath) -> AbstractContextManager[None]:
        """Within the context the model runs the layers of ``path`` only."""
        assert isinstance(self.loss_model, ResponseLossOPT), "other models bring their own context"
        return only_layers(self.loss_model, path)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch along the path of its step."""
        with self.along(self.path(self.state.global_step)):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a step's line says how many layers it ran."""
        if "loss" in logs and len(self.menu.paths) > 1:
            logs = {**logs, "num_layers": self.path(self.state.global_step - 1).budget}
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """``eval_loss``: nats per response token of the validation rows, the mean over the menu's paths."""
        self.loss_model.train(False)
        scores = {}
        for path in self.menu.paths:
            with self.along(path):
                (scores[f"eval_loss_{path.budget}_layers"],) = self.validation_means(("loss",))
        return self.report({"eval_loss": sum(scores.values()) / len(scores), **(scores if len(scores) > 1 else {})})

    def report(self, metrics: dict[str, float]) -> dict[str, float]:
        """Log the metrics of an evaluation and return them; NotFiniteError where one is not finite."""
        check_numbers(metrics, self.state.global_step, self.directory)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def validation_means(self, names: Sequence[str]) -> list[float]:
        """What the model's pass gives under ``names``: means over the response tokens of the validation rows."""
        total = torch.zeros(len(names) + 1, dtype=torch.float64, device=self.args.device)
        batches = group_in_order([example.num_tokens for example in self.validation], _EVAL_TOKENS_PER_BATCH)
        for rows in batches[self.args.process_index :: self.args.world_size]:
            batch = pad_examples([self.validation[row] for row in rows], self.pad_id, response_only=True, multiple=8)
            inputs: dict[str, Tensor] = self._prepare_inputs(batch)
            with self.accelerator.autocast():
                outputs = self.loss_model(**inputs, num_items_in_batch=1)
            num_tokens = (inputs["labels"] != IGNORED).sum()
            total += torch.stack([*(outputs[name] for name in names), num_tokens]).double()
        *sums, num_tokens = self.accelerator.reduce(total, "sum").tolist()
        return [value / num_tokens for value in sums]

    def run(self) -> Path:
        """The checkpoint of the best evaluation, after the stage has come to its end from wherever it was."""
        directory = self.directory
        checkpoint = latest_checkpoint(directory)
        if self.is_world_process_zero():
            clear_broken(directory)
        self.accelerator.wait_for_everyone()
        first_step, history = 0, []
        if checkpoint is not None:
            first_step = int(saved_note(checkpoint)["step"])
            history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        self.plan.first_step = first_step
        if first_step < self.args.max_steps and not self._ended_early(history):
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            history = self.state.log_history
        # The Trainer's own epochs are those of the plan, which has but one.
        self.history = [
            {**entry, "epoch": round(entry["step"] * self.epochs_per_step, 6)}
            for entry in history
            if "loss" in entry or "eval_loss" in entry
        ]
        best = min((entry for entry in self.history if "eval_loss" in entry), key=lambda entry: entry["eval_loss"])
        return directory / f"checkpoint-{best['step']}"

    def _ended_early(self, history: Sequence[dict[str, Any]]) -> bool:
        return self.patience is not None and evaluations_since_best(history) >= self.patience


class _Bar(ProgressCallback):
    """Trainer's progress bar, with the last losses behind it in place of a line for each step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss") if name in (logs or {})}
            if shown:
                self.training_bar.set_postfix(shown, refresh=False)
