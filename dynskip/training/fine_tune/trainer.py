"""transformers' Trainer for one stage of a fine-tune: the loss of responses, skipped layers not computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynskip.data.batches import IGNORED, Batch, StepPlan
from dynskip.models.hf_model import only_layers
from dynskip.paths import LayerPath
from dynskip.training.fine_tune.checkpoint_run import CheckpointRun
from dynskip.training.response_loss import ResponseLoss
from dynskip.training.resumable import ResumableTrainer
from dynskip.training.schedule import PathMenu
from dynskip.training.stage import processes

_EVAL_TOKENS_PER_BATCH = 8192


def evaluations_since_best(history: Sequence[dict[str, Any]]) -> int:
    """How many evaluations in a Trainer's log have passed since the one with the least loss."""
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


class FineTuneTrainer(ResumableTrainer):
    """The Trainer of one stage of ``run``, along ``paths``, of which each step draws one.

    is_full: for as many steps as the full-depth stage has.
    """

    def __init__(
        self,
        run: CheckpointRun,
        model: nn.Module,
        directory: Path,
        paths: Sequence[LayerPath],
        *,
        is_full: bool,
        seed: int,
    ) -> None:
        config = run.training
        self.loss_model = model
        self.menu = PathMenu(tuple(paths), (1.0,) * len(paths), (1.0,) * len(paths))
        self.validation = run.validation
        self.pad_id = run.tokenizer.pad_token_id
        self.path_seed = seed
        self.patience = config.patience
        self.eval_every = config.eval_every or math.ceil(len(run.examples) / config.batch_size)
        self.epochs_per_step = config.batch_size / len(run.examples)
        use_cpu = run.device.type == "cpu"
        started = processes(use_cpu)
        plan = StepPlan(
            run.examples,
            pad_id=self.pad_id,
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            num_steps=config.steps(len(run.examples), is_full),
            seed=seed,
            rank=started.process_index,
            num_processes=started.num_processes,
        )
        if config.gradient_checkpointing:
            enable: Any = model.gradient_checkpointing_enable
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        super().__init__(
            model,
            directory,
            plan,
            use_cpu=use_cpu,
            save_every_s=config.save_every_s,
            progress=run.progress,
            per_device_train_batch_size=config.micro_batch_size,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            warmup_steps=config.warmup_steps,
            bf16=config.precision == "bfloat16",
            ddp_find_unused_parameters=len(paths) > 1,
            save_total_limit=3,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            seed=seed,
        )
        # The model divides by num_items_in_batch, which the Trainer counts over micro-batches and processes.
        self.model_accepts_loss_kwargs = True

    def after_step(self, control: Any) -> None:
        """Evaluate and save every so many steps and at the end."""
        if self.state.global_step % self.eval_every == 0 or self.state.global_step == self.plan.num_steps:
            control.should_evaluate = control.should_save = True

    def path(self, step: int) -> LayerPath:
        """The path of a step, the same in every process and micro-batch."""
        return self.menu.draw(self.path_seed, step, 0.0)

    def along(self, path: LayerPath) -> AbstractContextManager[None]:
        """Within the context the model runs the layers of ``path`` only."""
        assert isinstance(self.loss_model, ResponseLoss), "other models bring their own context"
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
        """As every trainer does, and end the stage where evaluations have long not been better."""
        super().report(metrics)
        if self._is_out_of_patience():
            self.control.should_training_stop = True
        return metrics

    def validation_means(self, names: Sequence[str]) -> list[float]:
        """What the model's pass gives under ``names``: means over the response tokens of the validation rows."""
        total = torch.zeros(len(names) + 1, dtype=torch.float64, device=self.args.device)
        for inputs in self.validation_batches(self.validation, self.pad_id, num_tokens=_EVAL_TOKENS_PER_BATCH):
            with self.accelerator.autocast():
                outputs = self.loss_model(**inputs, num_items_in_batch=1)
            num_tokens = (inputs["labels"] != IGNORED).sum()
            total += torch.stack([*(outputs[name] for name in names), num_tokens]).double()
        *sums, num_tokens = self.accelerator.reduce(total, "sum").tolist()
        return [value / num_tokens for value in sums]

    def is_finished(self) -> bool:
        """Whether nothing is left to train: all steps are done, or evaluations have long not been better."""
        return super().is_finished() or self._is_out_of_patience()

    def _is_out_of_patience(self) -> bool:
        return self.patience is not None and evaluations_since_best(self.state.log_history) >= self.patience

    @property
    def history(self) -> list[dict[str, Any]]:
        """The log, an entry a step and an evaluation, with the epochs of the data."""
        # The Trainer's own epochs are those of the plan, which has but one.
        return [
            {**entry, "epoch": round(entry["step"] * self.epochs_per_step, 6)}
            for entry in self.state.log_history
            if "loss" in entry or "eval_loss" in entry
        ]

    def result(self) -> dict[str, Any]:
        """The ``step`` of the best evaluation, ``num_steps`` in all, and the ``validation`` of that step."""
        history = self.history
        best = min((entry for entry in history if "eval_loss" in entry), key=lambda entry: entry["eval_loss"])
        return {"step": best["step"], "num_steps": max(entry["step"] for entry in history), "validation": best}

    @property
    def best_checkpoint(self) -> Path:
        """That of the best evaluation."""
        return self.directory / f"checkpoint-{self.result()['step']}"
