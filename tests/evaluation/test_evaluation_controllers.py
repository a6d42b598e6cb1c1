"""Controllers in an evaluation: whose layers are counted, who is compared with whom, and folders that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import NUM_LAYERS, random_prompts, tiny_hf, tiny_model, word_tokenizer
from torch import Tensor

from dynskip import SamplingParams
from dynskip.controllers import ModelSizes, TokenContext, make_controller, save_controller
from dynskip.engine.closed_batch import Generation
from dynskip.evaluation.experiments.controllers import Point, _over
from dynskip.evaluation.sweep.checkpoints import ControllerFolder
from dynskip.evaluation.tasks.controller_runs import SequenceCounter


class EveryOther:
    """Runs even layers for even positions and all layers for odd ones; keeps what it was asked."""

    def __init__(self) -> None:
        self.num_run = 0

    def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
        """[N], bool."""
        active = (context.position_ids % 2 == 1) | torch.tensor(layer % 2 == 0)
        self.num_run += int(active.sum())
        return active


def test_layers_are_counted_for_the_sequence_that_ran_them() -> None:
    controller = EveryOther()
    counter = SequenceCounter(controller)
    prompts, lengths = random_prompts([3, 4, 6]), [7, 2, 1]
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
    generation = Generation(tiny_model(), prompts, params, counter, "propagate", "full")
    counter.watch(generation)
    generation.run()
    assert counter.num_tokens == [length - 1 for length in lengths], "the first token comes of the prompt"
    for prompt, length, num_run in zip(prompts, lengths, counter.num_run, strict=True):
        positions = range(len(prompt), len(prompt) + length - 1)
        assert num_run == sum(NUM_LAYERS if position % 2 else (NUM_LAYERS + 1) // 2 for position in positions)
    assert sum(counter.num_run) == controller.num_run


def test_the_count_is_that_of_the_executor() -> None:
    model = tiny_model()
    counter = SequenceCounter(EveryOther())
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in (6, 3)]
    generation = Generation(model, random_prompts([3, 4]), params, counter, "evict", "full")
    counter.watch(generation)
    generation.prefill()
    counts = model.executor().row_counts
    counts.reset()
    while generation.running:
        generation.step()
    assert sum(counter.num_run) == sum(counts.run) > 0


def point(name: str, layers: float, scores: list[float], **labels: Any) -> Point:
    """A controller that runs ``layers`` for each of ten tokens of every sequence."""
    tokens = np.full(len(scores), 10.0)
    found = {"kind": "hidden", "parameters": 100, **labels}
    return Point(name, found, np.array(scores), tokens + 1, tokens * layers, tokens)


def test_controllers_are_compared_at_as_many_layers() -> None:
    frontier = [point("a", 4, [0.2, 0.2]), point("b", 8, [0.4, 0.6]), point("c", 24, [0.5, 0.5])]
    between = _over(point("x", 5, [0.5, 0.1]), frontier)
    assert between is not None
    assert between.tolist() == pytest.approx([0.5 - (0.75 * 0.2 + 0.25 * 0.4), 0.1 - (0.75 * 0.2 + 0.25 * 0.6)])
    at_one = _over(point("x", 8, [0.5, 0.5]), frontier)
    assert at_one is not None and at_one.tolist() == pytest.approx([0.1, -0.1])
    assert _over(point("x", 3, [0.5, 0.5]), frontier) is None
    assert _over(point("x", 25, [0.5, 0.5]), frontier) is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A controller of a tiny model, with the model beside it."""
    tiny_hf().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    controller = make_controller("mlp:4", ModelSizes(NUM_LAYERS, 32, 32))
    about = {"alpha": 4.0, "backbone": "frozen", "model": str(tmp_path / "model")}
    save_controller(controller, "mlp:4", tmp_path / "controller", about)
    return tmp_path / "controller"


def change(folder: Path, changes: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite what is said of the training."""
    file = folder / "controller.json"
    config = json.loads(file.read_text())
    changes(config["about"])
    file.write_text(json.dumps(config))


def test_a_folder_says_what_it_holds(folder: Path) -> None:
    found = ControllerFolder.of(folder)
    assert (found.name, found.kind, found.width, found.alpha) == ("mlp:4", "mlp", 4, 4.0)
    assert (found.kv_policy, found.prompt_depth, found.label) == ("propagate", "full", "mlp:4, alpha 4, frozen model")
    assert found.checkpoint.num_layers == NUM_LAYERS
    assert ControllerFolder.of(folder).hash == found.hash
    change(folder, lambda about: about.update(alpha=6.0))
    assert ControllerFolder.of(folder).hash != found.hash


def test_a_joint_controller_brings_its_own_weights(folder: Path) -> None:
    (folder.parent / "model").rename(folder / "own")
    change(folder, lambda about: about.update(backbone="joint", model="own", target_layers=3.0))
    found = ControllerFolder.of(folder)
    assert found.checkpoint.directory == folder / "own"
    assert found.label == "mlp:4, target 3, joint"


def test_one_that_decides_per_sequence_stores_by_its_path(folder: Path) -> None:
    about = {"alpha": 4.0, "backbone": "frozen", "model": str(folder.parent / "model")}
    save_controller(make_controller("window:4", ModelSizes(NUM_LAYERS, 32, 32)), "window:4", folder, about)
    found = ControllerFolder.of(folder)
    assert (found.kv_policy, found.prompt_depth) == (None, "path")


def test_folders_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must hold controller\.json"):
        ControllerFolder.of(tmp_path / "nowhere")
    change(folder, lambda about: about.pop("model"))
    with pytest.raises(ValueError, match="must say model of its training"):
        ControllerFolder.of(folder)
    change(folder, lambda about: about.update(model=str(tmp_path / "gone")))
    with pytest.raises(FileNotFoundError, match="must be a directory"):
        ControllerFolder.of(folder)
