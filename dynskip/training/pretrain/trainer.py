"""transformers' Trainer with a layer path drawn for every batch, for phases that the clock may end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import OPTForCausalLM

from dynskip.data.batches import Batch, BatchPlan
from dynskip.data.examples import Example
from dynskip.models.hf_model import only_layers
from dynskip.training.pretrain.config import Phase, RunConfig
from dynskip.training.pretrain.optimizer import MuonWithAdamW
from dynskip.training.response_loss import head_loss
from dynskip.training.resumable import ResumableTrainer, check_numbers
from dynskip.training.schedule import Clock

# The step count of a phase that only minutes bound.
_UNBOUNDED_STEPS = 1_000_000


def cut_log(path: Path, first_step: int) -> None:
    """Drop the lines of steps that a run which goes on at ``first_step`` will repeat; an empty log where none is."""
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


class PathTrainer(ResumableTrainer):
    """A Trainer for one phase: a path from its menu for each batch, one line a step in ``steps.jsonl``.

    score: the scores of the model as it is, kept in ``watched.jsonl`` now and then; None: nothing is watched.
    """

    def __init__(
        self,
        model: OPTForCausalLM,
        directory: Path,
        config: RunConfig,
        phase: Phase,
        examples: Sequence[Example],
        windows: Sequence[tuple[int, ...]],
        *,
        pad_id: int,
        seed: int,
        score: Callable[[OPTForCausalLM], dict[str, float]] | None,
        progress: bool,
    ) -> None:
        self.decoder_model = model
        self.config = config
        self.menu = phase.menu(config.shape.num_layers)
        self.rate = phase.learning_rate
        self.clock = Clock(phase.max_steps, phase.max_minutes)
        self.seed = seed
        plan = BatchPlan(
            examples,
            windows,
            pad_id=pad_id,
            tokens_per_batch=config.tokens_per_batch,
            passage_share=phase.passage_share,
            response_only=phase.response_only,
            seed=seed,
            num_steps=phase.max_steps or _UNBOUNDED_STEPS,
        )
        super().__init__(
            model,
            directory,
            plan,
            use_cpu=not torch.cuda.is_available(),
            save_every_s=config.save_every_s,
            progress=False,  # it has a bar of its own
            per_device_train_batch_size=1,
            bf16=True,
            save_strategy="no",
            save_total_limit=2,
            logging_strategy="no",
            seed=seed,
        )
        self._score = score
        self._watched_at = time.monotonic()
        self._bar = tqdm(
            total=1000,
            desc=phase.name,
            disable=not progress,
            bar_format="{desc} {percentage:5.1f}%|{bar}| {elapsed} < {remaining}{postfix}",
            mininterval=5,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Muon and AdamW in one."""
        if self.optimizer is None:
            rates = {name: getattr(self.config, name) for name in ("muon_lr", "adamw_lr", "weight_decay")}
            self.optimizer = MuonWithAdamW(self.decoder_model, **rates)
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
            loss = head_loss(hidden_states, self.decoder_model.lm_head.weight, None, inputs["labels"])
        self._append(
            "steps.jsonl",
            step=step,
            depth=path.budget,
            loss=round(loss.item(), 6),
            num_tokens=inputs["input_ids"].numel(),
            lr_factor=round(self.rate.factor(step, self.clock.progress(step)), 6),
            elapsed_s=round(self.clock.elapsed_s, 2),
        )
        return (loss, None) if return_outputs else loss

    def after_step(self, control: Any) -> None:
        """End the phase when the clock says so; show how far it is, and score the model now and then."""
        step = self.state.global_step
        progress = self.clock.progress(step)
        if self._bar.n == 0:
            self._bar.initial = round(1000 * progress)  # what a resumed phase has behind it is no guide to its pace
        self._bar.n = round(1000 * progress)
        self._bar.set_postfix_str(f"step {step}", refresh=False)
        self._bar.update(0)
        is_time = time.monotonic() - self._watched_at >= 2 * self.config.save_every_s
        if self._score is not None and (progress >= 1.0 or is_time):
            self._watched_at = time.monotonic()
            scores = self._score(self.decoder_model)
            check_numbers(scores, step, self.directory)
            self._append("watched.jsonl", step=step, progress=round(progress, 4), **scores)
        control.should_training_stop = progress >= 1.0
        control.should_save |= control.should_training_stop

    def _append(self, name: str, **entry: object) -> None:
        with (self.directory / name).open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def checkpoint_note(self) -> dict[str, Any]:
        """The seconds of training so far, for the clock of a resumed phase."""
        return {"elapsed_s": self.clock.elapsed_s}

    def begin(self, note: dict[str, Any]) -> None:
        """Start the clock, and the log after what a checkpoint knows of."""
        cut_log(self.directory / "steps.jsonl", self.plan.first_step)
        self.clock.start(note.get("elapsed_s", 0.0))

    def is_finished(self) -> bool:
        """Whether the clock has come to its end."""
        return self.clock.progress(self.plan.first_step) >= 1.0

    def run(self) -> None:
        """Train to the end of the phase, from its latest whole checkpoint where there is one."""
        try:
            super().run()
        finally:
            self._bar.close()
