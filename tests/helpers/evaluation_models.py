"""A tiny checkpoint with its tokenizer and a tiny data set, for tests of sweeps."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from families import family_hf
from models import word_tokenizer

from dynskip.controllers import ModelSizes, make_controller, save_controller
from dynskip.evaluation.sweep.setup import Setup


def arguments(folder: Path, out: Path, *more: str, experiment: str = "static") -> list[str]:
    """The command that runs an experiment in ``out`` on ``model`` and ``data.json`` of ``folder``."""
    return [
        *("eval", experiment, "--model", str(folder / "model"), "--data", str(folder / "data.json")),
        *("--out", str(out), "--prompts", "12", "--shard-size", "2", "--budgets", "2,4", "--candidates", "2"),
        *("--max-tokens", "8", "--seeds", "1", "--resamples", "20", "--timed-batch", "4", "--dtype", "float32"),
        *("--threads", "1", "--quiet", *more),
    ]


def item_lines(folder: Path) -> list[dict[str, Any]]:
    """The finished items in the files of all writers of a store; of a killed writer all but what it had begun."""
    files = sorted(path for path in folder.glob("*.jsonl") if path.name.count(".") == 1)
    return [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def save_checkpoint(directory: Path, seed: int = 0, family: str = "opt") -> Path:
    """A random model of 6 layers that knows 101 words, saved with its tokenizer."""
    family_hf(family, seed).save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return directory


def rows(num_rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of words that the tokenizer knows; every third has an input."""
    generator = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{generator.randrange(4, 101):03}" for _ in range(generator.randrange(low, high)))

    return [
        {"instruction": f"{words(2, 9)} row{row}", "input": words(1, 6) if row % 3 == 0 else "", "output": words(3, 12)}
        for row in range(num_rows)
    ]


def save_data(path: Path, num_rows: int = 80, seed: int = 0) -> Path:
    """A file of ``rows``."""
    path.write_text(json.dumps(rows(num_rows, seed)), encoding="utf-8")
    return path


def tiny_setup(directory: Path, **changes: Any) -> Setup:
    """A setup of seconds on the checkpoint ``model`` and the file ``data.json`` of ``directory``, made if missing."""
    if not (directory / "model").exists():
        save_checkpoint(directory / "model")
    if not (directory / "data.json").exists():
        save_data(directory / "data.json")
    options: dict[str, Any] = {
        "budgets": (2, 4),
        "candidates": (2,),
        "prompts": 12,
        "seeds": 1,
        "max_tokens": 8,
        "shard_size": 4,
        "timed_batch": 4,
        "resamples": 20,
        "siblings": {},
        "dtype": "float32",
    }
    return Setup.of(str(directory / "model"), directory / "data.json", **{**options, **changes})


def steered_setup(directory: Path, **changes: Any) -> Setup:
    """``tiny_setup`` with a fixed-input controller and one that reads hidden states, both random, made if missing."""
    setup = tiny_setup(directory)
    folders = []
    for seed, name in enumerate(("fixed", "hidden")):
        torch.manual_seed(seed)
        controller = make_controller(name, ModelSizes(setup.num_layers, 32, 32))
        with torch.no_grad():
            for parameter in controller.parameters():
                parameter.normal_()
        about = {"alpha": 4.0, "backbone": "frozen", "model": str(directory / "model"), "training_seed": 0}
        folders.append(directory / name)
        save_controller(controller, name, folders[-1], about)
    options: dict[str, Any] = {"prompts": 8, "controllers": folders, "timed_rounds": 2}
    return tiny_setup(directory, **{**options, **changes})
