"""A training whose numbers are no longer finite ends with an error, and leaves nothing that says success."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="training needs the extra 'train' (accelerate)")
pytest.importorskip("datasets", reason="the split of Alpaca needs the extra 'train' (datasets)")

from torch import nn
from training_runs import checkpoint, corpora, data, small_config, small_run

from dynskip.cli import main
from dynskip.training.fine_tune.run import FineTuneRun
from dynskip.training.fine_tune.trainer import FineTuneTrainer
from dynskip.training.pretrain.run import TrainingRun
from dynskip.training.resumable import NotFiniteError, ResumableTrainer, check_numbers, check_weights, latest_checkpoint

__all__ = ["checkpoint", "corpora", "data"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers, accelerate and datasets warn of their own affairs


def claims_success(directory: Path) -> list[str]:
    """What lies in the folder of a run and would be taken for a result."""
    names = ("done.json", "model", "export", "scores.json", "controller.json")
    return [str(path) for name in names for path in directory.rglob(name)]


def spoil(trainer: type[ResumableTrainer], step: int, change: Callable[[nn.Module], None]) -> Callable[..., Any]:
    """A training step of ``trainer`` that changes the model's gradients during a step, counted from 0."""
    healthy = trainer.training_step

    def training_step(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        loss = healthy(self, model, *args, **kwargs)
        if self.state.global_step == step:
            change(model)
        return loss

    return training_step


def fill_a_gradient(value: float) -> Callable[[nn.Module], None]:
    """Sets one gradient of a model to ``value``."""

    def change(model: nn.Module) -> None:
        next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = value

    return change


def options(checkpoint: Path, data: Path, out: Path) -> list[str]:
    """Options of `dynskip train` for a small fine-tune."""
    files = ["--model", str(checkpoint), "--data", str(data), "--out", str(out), "--template", "short", "--quiet"]
    return [*files, "--batch-size", "4", "--micro-batch", "4", "--max-length", "64"]


def test_a_diverging_fine_tune_ends_with_status_1_and_one_line(
    checkpoint: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = options(checkpoint, data, tmp_path / "run")
    steps = ["--steps", "full=6", "--steps", "paths=1", "--path", "uniform:2"]
    assert main(["train", "--preset", "paper", *arguments, *steps, "--lr", "1e10"]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if "dynskip train" in line]
    assert len(lines) == 1
    assert re.search(r"train: loss must be finite, got loss \S+, gradient norm \S+ at step \d in ", lines[0])
    assert f"in {tmp_path / 'run' / 'full'}. Nothing was exported. Start again in another folder" in lines[0]
    assert claims_success(tmp_path) == []


def test_a_diverging_controller_ends_with_status_1(
    checkpoint: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [*options(checkpoint, data, tmp_path), "--joint", "--steps", "controller=4", "--lr", "1e20"]
    assert main(["train", "--controller", "hidden", *arguments]) == 1
    assert "must be finite, got" in capfd.readouterr().err
    assert claims_success(tmp_path) == []


def test_a_diverging_pretraining_exports_nothing(corpora: list[Path], tmp_path: Path) -> None:
    config = dataclasses.replace(small_run(0.0), muon_lr=1e30, adamw_lr=1e30)
    with pytest.raises(NotFiniteError, match=r"train: (loss|weights) must be finite, got .* step \d+"):
        TrainingRun(config, corpora, tmp_path, lambda *_: {"score": 1.0}, progress=False).train()
    assert claims_success(tmp_path) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_ends_the_training_before_it_spoils_weights(
    value: float, checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = spoil(FineTuneTrainer, 3, fill_a_gradient(value))
    run = FineTuneRun(small_config(checkpoint), data, tmp_path, torch.device("cpu"), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(FineTuneTrainer, "training_step", step)
        with pytest.raises(NotFiniteError, match=r"gradient norm (nan|inf) at step 4 in"):
            run.train()
    assert claims_success(tmp_path) == []
    # The last checkpoint is sound: the run goes on from there, and ends.
    kept = latest_checkpoint(tmp_path / "full")
    assert kept is not None and kept.name == "checkpoint-3"
    assert set(run.train()) == {"full", "uniform-2"}


def test_a_validation_loss_ends_the_training(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FineTuneTrainer, "validation_means", lambda self, names: [math.nan] * len(names))
    with pytest.raises(NotFiniteError, match=r"got eval_loss nan at step 3 in"):
        FineTuneRun(small_config(checkpoint), data, tmp_path, torch.device("cpu"), progress=False).train()
    assert claims_success(tmp_path) == []


@pytest.mark.parametrize("num_good", [0, 5, 10])
def test_scores_that_are_not_finite_end_a_pretraining(num_good: int, corpora: list[Path], tmp_path: Path) -> None:
    # Scores come at the end of each of the two phases, and of the exported model.
    calls = []

    def evaluate(*arguments: Any) -> dict[str, float]:
        calls.append(arguments)
        return {"full": 1.0 if len(calls) <= num_good else math.nan}

    with pytest.raises(NotFiniteError, match=r"got full nan at step"):
        TrainingRun(small_run(0.0), corpora, tmp_path, evaluate, progress=False).train()
    assert not (tmp_path / "export").exists()


def test_no_checkpoint_is_made_of_spoilt_weights(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = FineTuneTrainer.evaluate

    def evaluate(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = healthy(self, *args, **kwargs)
        with torch.no_grad():
            next(self.loss_model.parameters()).view(-1)[0] = math.nan
        return metrics

    monkeypatch.setattr(FineTuneTrainer, "evaluate", evaluate)
    config = small_config(checkpoint, save_every_s=1e9)
    with pytest.raises(NotFiniteError, match=r"weights must be finite, got .* with infinities or NaN after step 3"):
        FineTuneRun(config, data, tmp_path, torch.device("cpu"), progress=False).train()
    assert latest_checkpoint(tmp_path / "full") is None and claims_success(tmp_path) == []


def test_finite_numbers_pass(tmp_path: Path) -> None:
    check_numbers({"loss": 1e30, "gradient norm": 0.0}, 1, tmp_path)
    layer = nn.Linear(2, 2)
    check_weights(layer, 1, tmp_path)
    with torch.no_grad():
        layer.bias[1] = math.inf
    with pytest.raises(NotFiniteError, match="got bias with infinities or NaN after step 7"):
        check_weights(layer, 7, tmp_path)
