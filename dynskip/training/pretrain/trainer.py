"""transformers' Trainer with a layer path drawn for every batch, for phases that the clock may end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import OPTForCausalLM, PrinterCallback, TrainerCallback, TrainingArguments

from dynskip.data.batches import Batch, BatchPlan
from dynskip.training.head_loss import head_loss
from dynskip.training.pretrain.optimizer import MuonWithAdamW
from dynskip.training.response_loss import only_layers
from dynskip.training.resumable import ResumableTrainer, clear_broken, latest_checkpoint, saved_note
from dynskip.training.schedule import Clock, LearningRate, PathMenu


class StepLog:
    """JSON lines, one a step; a resumed run first drops the lines of steps that it will repeat."""

    def __init__(self, path: Path, first_step: int) -> None:
        kept: list[str] = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    break  # the line that a kill cut short: nothing after it can be older than the checkpoint
                if entry["step"] < first_step:
                    kept.append(line)
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)

    def write(self, **entry: object) -> None:
        """Append one line."""
        self._file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()


class _Pace(TrainerCallback):
    """Ends the phase when the clock says so, saves every few minutes, and reports after each step."""

    def __init__(self, clock: Clock, save_every_s: float, on_step: Callable[[int, float], None]) -> None:
        self._clock = clock
        self._save_every_s = save_every_s
        self._on_step = on_step
        self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        progress = self._clock.progress(state.global_step)
        self._on_step(state.global_step, progress)
        control.should_training_stop = progress >= 1.0
        if control.should_training_stop or time.monotonic() - self._saved >= self._save_every_s:
            control.should_save = True
            self._saved = time.monotonic()


class PathTrainer(ResumableTrainer):
    """A Trainer for one phase: batches from a plan, a path from a menu for each, one line a step in the log."""

    def __init__(
        self,
        model: OPTForCausalLM,
        directory: Path,
        plan: BatchPlan,
        *,
        menu: PathMenu,
        learning_rate: LearningRate,
        clock: Clock,
        num_steps: int,
        seed: int,
        muon_lr: float,
        adamw_lr: float,
        weight_decay: float,
        autocast: bool = True,
        use_cpu: bool = True,
        save_every_s: float = 300.0,
        on_step: Callable[[int, float], None] = lambda step, progress: None,
    ) -> None:
        self.decoder_model = model
        self.directory = directory
        self.menu = menu
        self.plan = plan
        self.rate = learning_rate
        self.clock = clock
        self.seed = seed
        self.log_file: StepLog | None = None
        self._rates = {"muon_lr": muon_lr, "adamw_lr": adamw_lr, "weight_decay": weight_decay}
        arguments = TrainingArguments(
            output_dir=str(directory),
            max_steps=num_steps,
            per_device_train_batch_size=1,
            bf16=autocast,
            use_cpu=use_cpu,
            save_strategy="no",
            save_total_limit=2,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            ignore_data_skip=True,
            remove_unused_columns=False,
            seed=seed,
            max_grad_norm=1.0,
        )
        super().__init__(model=model, args=arguments, train_dataset=plan)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Pace(clock, save_every_s, on_step))

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """The batches of the plan, from its first step on; the plan does the batching."""
        return DataLoader(self.plan, batch_size=1, shuffle=False, collate_fn=lambda items: items[0])

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Muon and AdamW in one."""
        if self.optimizer is None:
            self.optimizer = MuonWithAdamW(self.decoder_model, **self._rates)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The phase's learning-rate factor, as a function of step and clock."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.create_optimizer(), lambda step: self.rate.factor(step, self.clock.progress(step))
            )
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of the batch along the path of the step."""
        step = self.state.global_step
        path = self.menu.draw(self.seed, step, self.clock.progress(step))
        with only_layers(self.decoder_model, path), self.accelerator.autocast():
            hidden_states = self.decoder_model.model(inputs["input_ids"], use_cache=False).last_hidden_state
            loss = head_loss(hidden_states, self.decoder_model.lm_head.weight, inputs["labels"])
        if self.log_file is not None:
            self.log_file.write(
                step=step,
                depth=path.budget,
                loss=round(loss.item(), 6),
                num_tokens=inputs["input_ids"].numel(),
                lr_factor=round(self.rate.factor(step, self.clock.progress(step)), 6),
                elapsed_s=round(self.clock.elapsed_s, 2),
            )
        return (loss, None) if return_outputs else loss

    def checkpoint_note(self) -> dict[str, Any]:
        """The seconds of training so far, for the clock of a resumed phase."""
        return {"elapsed_s": self.clock.elapsed_s}

    def run(self) -> int:
        """The number of steps of the phase, trained to its end: from the latest complete checkpoint if there is one."""
        checkpoint = latest_checkpoint(self.directory)
        clear_broken(self.directory)
        saved = {"step": 0, "elapsed_s": 0.0}
        if checkpoint is not None:
            saved = saved_note(checkpoint)
        self.plan.first_step = int(saved["step"])
        self.log_file = StepLog(self.directory / "steps.jsonl", self.plan.first_step)
        self.clock.start(saved["elapsed_s"])
        try:
            if self.clock.progress(self.plan.first_step) < 1.0:
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            elif checkpoint is not None:
                self._load_from_checkpoint(str(checkpoint))
                self.state.global_step = int(saved["step"])
        finally:
            self.log_file.close()
        return self.state.global_step
