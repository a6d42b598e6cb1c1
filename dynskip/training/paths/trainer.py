"""transformers' Trainer of a model along a menu of paths; its checkpoints hold only what is trained."""

from __future__ import annotations

import random
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dynskip.data.batches import Batch, StepPlan
from dynskip.data.examples import Example
from dynskip.paths import LayerPath
from dynskip.training.paths.config import PathsConfig
from dynskip.training.paths.model import PathsModel
from dynskip.training.resumable import ResumableTrainer
from dynskip.training.stage import processes

_WEIGHTS = "trained.safetensors"
_EVAL_TOKENS_PER_BATCH = 4096
# The draw favours a path by this power of its layers: deeper ones at the beginning, shallower ones at the end.
_ANNEALING = 2.0


def draw_paths(menu: Sequence[LayerPath], count: int | None, seed: int, step: int, progress: float) -> list[LayerPath]:
    """The paths that a step trains, in the menu's order: a function of the arguments, so that a resumed run draws the
    same. count: how many, each once; None: all. progress: 0 to 1, how much of the training is done."""
    if count is None or count == len(menu):
        return list(menu)
    # Of keys u ** (1 / weight) the greatest are a draw by weight without return (Efraimidis and Spirakis, 2006).
    source = random.Random(f"{seed} paths {step}")
    power = _ANNEALING * (1 - 2 * progress)
    keys = [source.random() ** (1 / path.budget**power) for path in menu]
    drawn = sorted(range(len(menu)), key=lambda index: -keys[index])[:count]
    return [menu[index] for index in sorted(drawn)]


class PathsTrainer(ResumableTrainer):
    """Trains ``model`` along ``menu`` on ``examples``; its log has the loss of each path, by its number of layers."""

    plan: StepPlan

    def __init__(
        self,
        config: PathsConfig,
        model: PathsModel,
        menu: Sequence[LayerPath],
        examples: Sequence[Example],
        validation: Sequence[Example],
        pad_id: int,
        directory: Path,
        *,
        use_cpu: bool,
        progress: bool,
    ) -> None:
        self.config, self.menu, self.validation, self.pad_id = config, list(menu), validation, pad_id
        self.paths_model = model
        self._losses: list[tuple[list[LayerPath], Tensor]] = []
        self._response_only = config.loss == "response"
        started = processes(use_cpu)
        plan = StepPlan(
            examples,
            pad_id=pad_id,
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            num_steps=config.num_steps,
            seed=config.seed,
            rank=started.process_index,
            num_processes=started.num_processes,
            response_only=self._response_only,
        )
        super().__init__(
            model,
            directory,
            plan,
            use_cpu=use_cpu,
            save_every_s=config.save_every_s,
            progress=progress,
            per_device_train_batch_size=config.micro_batch_size,
            learning_rate=config.learning_rate,
            warmup_steps=config.warmup_steps,
            weight_decay=0.0,
            bf16=config.precision == "bfloat16",
            ddp_find_unused_parameters=True,
            save_total_limit=2,
            seed=config.seed,
        )
        # The model divides by num_items_in_batch, which the Trainer counts over micro-batches and processes.
        self.model_accepts_loss_kwargs = True

    def after_step(self, control: Any) -> None:
        """Evaluate every so many steps and at the end; save at the end."""
        is_last = self.state.global_step == self.plan.num_steps
        if is_last or self.state.global_step % self.config.eval_every == 0:
            control.should_evaluate = True
            control.should_save = is_last

    def begin(self, note: dict[str, Any]) -> None:
        """Say how long the training will take, and how much memory."""
        if self.is_world_process_zero() and not self.args.disable_tqdm and not self.is_finished():
            seconds, peak_gib = self.estimate()
            num_left = self.plan.num_steps - self.plan.first_step
            print(f"train: about {seconds / 60:.0f} minutes for {num_left} steps, {peak_gib:.1f} GiB", file=sys.stderr)

    def estimate(self) -> tuple[float, float]:
        """Seconds that the steps which are left will take, and the GiB that this process takes at most: by one step
        that is run and forgotten."""
        first = self.plan.first_step
        batches = [self._prepare_inputs(self.plan.micro_batch(first, m)) for m in range(self.plan.num_micro_batches)]
        seconds = 0.0
        with torch.random.fork_rng(enabled=True):
            for _ in range(2):  # the first pays for what is made once
                start = time.monotonic()
                for batch in batches:
                    with self.accelerator.autocast():
                        self.compute_loss(self.paths_model, batch).backward()
                seconds = time.monotonic() - start
        self.paths_model.zero_grad()
        self._losses.clear()
        if self.args.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.args.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        # Steps differ in length: a sample of those to come.
        steps = range(first, self.plan.num_steps, max(1, (self.plan.num_steps - first) // 64))
        num_tokens = [sum(self.plan.examples[row].num_tokens for row in self.plan.rows(step)) for step in steps]
        mean_length = sum(num_tokens) / len(num_tokens) / num_tokens[0]
        return seconds * mean_length * (self.plan.num_steps - first), peak / 2**30

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch along the paths of its step."""
        step = self.state.global_step
        paths = draw_paths(self.menu, self.config.paths_per_step, self.config.seed, step, step / self.plan.num_steps)
        self.paths_model.paths = paths
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._losses.append((paths, outputs["losses"]))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a step's line has the loss of each of its paths."""
        if "loss" in logs and self._losses:
            (paths, first), *others = self._losses
            total = self.accelerator.reduce(sum((losses for _, losses in others), first.clone()), "sum").tolist()
            logs = {**logs, **{f"loss_{path.budget}_layers": each for path, each in zip(paths, total, strict=True)}}
            self._losses.clear()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Of the texts held back, the loss of each path and ``eval_loss``, their mean; nats a token."""
        self.paths_model.train(False)
        self.paths_model.paths = self.menu
        total = torch.zeros(len(self.menu) + 1, dtype=torch.float64, device=self.args.device)
        options: dict[str, Any] = {"num_tokens": _EVAL_TOKENS_PER_BATCH, "response_only": self._response_only}
        for inputs in self.validation_batches(self.validation, self.pad_id, **options):
            with self.accelerator.autocast():
                losses = self.paths_model(**inputs)["losses"]
            num_tokens = (inputs["labels"][:, 1:] >= 0).sum()
            total += torch.cat([losses.double() * num_tokens, num_tokens[None].double()])
        *sums, num_tokens = self.accelerator.reduce(total, "sum").tolist()
        scores = {
            f"eval_loss_{path.budget}_layers": value / num_tokens for path, value in zip(self.menu, sums, strict=True)
        }
        return self.report({"eval_loss": sum(scores.values()) / len(scores), **scores})

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        directory = Path(output_dir or self.directory)
        directory.mkdir(parents=True, exist_ok=True)
        trained = {name: weight.detach() for name, weight in self._trained()}
        save_file(trained, str(directory / _WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        held = load_file(Path(resume_from_checkpoint) / _WEIGHTS, device=str(self.args.device))
        with torch.no_grad():
            for name, weight in self._trained():
                weight.copy_(held.pop(name))
        assert not held, "a checkpoint of this model"

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in self.paths_model.named_parameters() if weight.requires_grad]
