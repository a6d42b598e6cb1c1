"""What tests of training share: made-up data, a tiny checkpoint, small runs."""

from __future__ import annotations

import dataclasses
import json
import lzma
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family_hf
from transformers import OPTForCausalLM, PreTrainedTokenizerFast

from dynskip.data.corpus import (
    Instruction,
)
from dynskip.data.examples import Example
from dynskip.training.fine_tune.config import FineTuneConfig
from dynskip.training.pretrain.config import ModelShape, Phase, RunConfig
from dynskip.training.pretrain.run import new_model
from dynskip.training.pretrain.tokenizer import train_tokenizer
from dynskip.training.schedule import LearningRate

HELPERS = Path(__file__).parent
SHAPE = ModelShape(num_layers=4, hidden_size=32, ffn_size=48, num_heads=2, vocab_size=320, max_positions=64)


ANIMALS = ["otter", "heron", "badger", "lynx", "newt", "stoat", "vole", "crane", "hare", "mole"]


CPU = torch.device("cpu")


IGNORE_LIBRARIES = pytest.mark.filterwarnings("ignore")  # transformers, accelerate, datasets warn of their own affairs


def made_up_rows(num_rows: int) -> list[Instruction]:
    rows = []
    for number in range(num_rows):
        animal, other = ANIMALS[number % 10], ANIMALS[(number // 10) % 10]
        given = f"{animal} and {other}" if number % 3 == 0 else ""
        rows.append(Instruction(f"Where does {animal} number {number} live?", given, f"It lives near the {other}."))
    return rows


def made_up_passages(num_passages: int) -> list[str]:
    generator = random.Random(3)
    return [
        " ".join(f"The {generator.choice(ANIMALS)} met the {generator.choice(ANIMALS)} {n} times." for n in range(8))
        for _ in range(num_passages)
    ]


def wake_layers(model: OPTForCausalLM) -> OPTForCausalLM:
    """The model with random matrices in place of the zeros that it starts from."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return model


def examples_of_lengths(lengths: Sequence[int]) -> list[Example]:
    return [Example((1, 5), tuple(range(6, 4 + length)), length) for length in lengths]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An Alpaca file and a T0 file of invented sentences."""
    directory = tmp_path_factory.mktemp("data")
    alpaca, t0 = directory / "alpaca_data.json.xz", directory / "t0.jsonl.xz"
    with lzma.open(alpaca, "wt") as file:
        json.dump([dataclasses.asdict(row) for row in made_up_rows(120)], file)
    with lzma.open(t0, "wt") as file:
        for text in made_up_passages(30):
            file.write(json.dumps({"task": "made_up", "prompt": text, "completion": "yes<|endoftext|>"}) + "\n")
    return [alpaca, t0]


def small_run(save_every_s: float) -> RunConfig:
    weights = {4: 0.5, 2: 0.5}
    rate = LearningRate(1.0, 0.5, warmup_steps=2)
    return RunConfig(
        shape=SHAPE,
        phases=(
            Phase("pretrain", False, 0.3, weights, weights, rate, max_steps=7),
            Phase("finetune", True, 0.0, weights, weights, rate, max_steps=3),
        ),
        tokens_per_batch=256,
        window=32,
        save_every_s=save_every_s,
        num_watched_rows=4,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random OPT checkpoint with its tokenizer."""
    directory = tmp_path_factory.mktemp("checkpoint")
    texts = [text for row in made_up_rows(120) for text in (row.instruction, row.output)] + made_up_passages(30)
    tokenizer = train_tokenizer(texts, SHAPE.vocab_size, SHAPE.max_positions, progress=False)
    wake_layers(new_model(SHAPE, tokenizer, seed=0)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def family_checkpoint(directory: Path, checkpoint: Path, family: str, **changes: Any) -> Path:
    """A random model of ``family`` and of the sizes of ``checkpoint``, in ``directory`` with its tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    sizes = {"vocab_size": SHAPE.vocab_size, "num_hidden_layers": SHAPE.num_layers}
    family_hf(family, **{**sizes, **ids, **changes}).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "alpaca_data.json"
    path.write_text(json.dumps([dataclasses.asdict(row) for row in made_up_rows(120)]))
    return path


def small_config(checkpoint: Path, **changes: Any) -> FineTuneConfig:
    config = FineTuneConfig(
        str(checkpoint),
        learning_rate=1e-3,
        num_epochs=1,
        batch_size=8,
        micro_batch_size=4,
        max_tokens=64,
        num_steps=6,
        num_path_steps=4,
        eval_every=3,
        template="short",
        patience=None,
        paths=("uniform:2",),
        save_every_s=0.0,
    )
    return dataclasses.replace(config, **changes)


def run_script(script: str, *arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HELPERS}:{HELPERS.parent}/training"}
    file = Path(str(arguments[0])).parent / "script.py"
    file.write_text(textwrap.dedent(script))
    command = [sys.executable, *launcher, str(file), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
