"""Training of controllers: the blended pass is the executor's, runs survive kills, a stranger's class trains too."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="training needs the extra 'train' (accelerate)")
pytest.importorskip("datasets", reason="the split of Alpaca needs the extra 'train' (datasets)")

from families import FAMILIES
from random_controllers import SEQUENCE_NAMES, random_controller
from torch import Tensor
from training_runs import (
    CPU,
    IGNORE_LIBRARIES,
    SHAPE,
    checkpoint,
    data,
    family_checkpoint,
    made_up_rows,
    run_script,
    small_config,
)
from transformers import OPTForCausalLM as HFOPTForCausalLM

from dynskip import LLM, OPTForCausalLM, SamplingParams
from dynskip.cli import main
from dynskip.controllers import LearnedTokenController, ModelSizes, TokenContext, load_controller
from dynskip.data.batches import IGNORED, pad_examples
from dynskip.data.examples import encode_examples
from dynskip.training.controller.config import ControllerConfig
from dynskip.training.controller.gated_model import ControlledModel
from dynskip.training.controller.run import ControllerRun
from dynskip.training.fine_tune.checkpoint_run import load_for_training, load_tokenizer
from dynskip.training.resumable import latest_checkpoint

__all__ = ["checkpoint", "data"]  # fixtures
SIZES = ModelSizes(SHAPE.num_layers, SHAPE.hidden_size, SHAPE.hidden_size)


class FullPrompt:
    """A controller whose decisions hold for responses; prompts, of known lengths, run everything."""

    def __init__(self, controller: LearnedTokenController, prompt_lengths: list[int]) -> None:
        self.controller = controller
        self.lengths = torch.tensor(prompt_lengths)

    def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
        """[N], bool."""
        is_prompt = context.position_ids < self.lengths[context.seq_ids.long()]
        return is_prompt | self.controller.active(layer, hidden_states, context)


def batch_of(checkpoint: Path, num_rows: int = 5) -> dict[str, Tensor]:
    return pad_examples(encode_examples(load_tokenizer(str(checkpoint)), made_up_rows(num_rows), 64), 0, True)


def controlled(checkpoint: Path, controller: Any, **options: Any) -> ControlledModel:
    return ControlledModel(
        load_for_training(str(checkpoint), CPU, with_loss=False), controller, **{"alpha": 3.0, **options}
    )


@pytest.fixture(scope="module", params=list(FAMILIES))
def any_checkpoint(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of each architecture."""
    if request.param == "opt":
        return checkpoint
    return family_checkpoint(tmp_path_factory.mktemp(request.param), checkpoint, request.param)


@pytest.mark.parametrize("name", ["fixed", "hidden", "mlp:8", *SEQUENCE_NAMES])
def test_the_blended_pass_is_the_executors(name: str, any_checkpoint: Path) -> None:
    checkpoint = any_checkpoint
    controller = random_controller(name, SIZES)
    batch = batch_of(checkpoint)
    is_response = batch["labels"] != IGNORED
    lengths = is_response.int().argmax(1).tolist()
    with torch.no_grad():
        ours = controlled(checkpoint, controller).eval()(**batch)

    model = OPTForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, backend="torch")
    counts = model.executor("compact").row_counts
    token_mask = torch.arange(batch["input_ids"].shape[1]) < torch.tensor(lengths)[:, None]
    token_mask |= is_response
    per_token = isinstance(controller, LearnedTokenController)
    if per_token:
        paths: Any = FullPrompt(controller, lengths)
    else:
        prompts = [ids[:length] for ids, length in zip(batch["input_ids"], lengths, strict=True)]
        paths = controller.choose_paths(prompts, [model.embed_tokens(ids) for ids in prompts])
    counts.reset()
    with torch.no_grad():
        logits = model(batch["input_ids"], token_mask.long(), paths).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED
    )
    torch.testing.assert_close(ours["cross_entropy"], losses, rtol=1e-4, atol=1e-5)
    num_responses = int(is_response.sum())
    if per_token:
        num_layers = (sum(counts.run) - sum(lengths) * SIZES.num_layers) / num_responses
    else:
        budgets = torch.tensor([path.budget for path in paths])
        assert sum(counts.run) == int((budgets * token_mask.sum(1)).sum())
        num_layers = float((budgets * is_response.sum(1)).sum()) / num_responses
    assert float(ours["num_layers"]) == pytest.approx(num_layers)
    expected = float(ours["cross_entropy"]) + 3.0 * num_layers / SIZES.num_layers
    assert float(ours["loss"]) == pytest.approx(expected, rel=1e-5)


def test_gates_of_one_change_nothing(checkpoint: Path) -> None:
    controller = random_controller("fixed", SIZES)
    with torch.no_grad():
        controller.weight.zero_()
        controller.bias.copy_(torch.tensor([-50.0, 50.0]).expand(4, 2))
    batch = batch_of(checkpoint)
    plain = load_for_training(str(checkpoint), CPU)(**batch)["loss"]
    with torch.no_grad():
        ours = controlled(checkpoint, controller).train()(**batch)
    assert torch.equal(ours["cross_entropy"], plain.detach())
    assert float(ours["num_layers"]) == 4


@pytest.mark.parametrize("name", ["hidden", "attention-pool"])
def test_the_loss_goes_back_to_the_controller_alone(name: str, checkpoint: Path) -> None:
    model = controlled(checkpoint, random_controller(name, SIZES)).train()
    torch.manual_seed(0)
    model(**batch_of(checkpoint))["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert set(dict(model.named_parameters())) == {f"controller.{n}" for n, _ in model.controller.named_parameters()}
    assert all(parameter.grad is None for parameter in model.model.parameters())
    gradient = model.controller.weight.grad
    assert isinstance(gradient, Tensor) and gradient.abs().sum() > 0


def test_soft_gates_through_the_model_follow_finite_differences(checkpoint: Path) -> None:
    controller = random_controller("fixed", SIZES)
    model = controlled(checkpoint, controller, hard=False).train()
    model.model.double()
    batch = batch_of(checkpoint, 2)

    def loss() -> Tensor:
        torch.manual_seed(4)  # the same noise every time
        return model(**batch)["loss"]

    loss().backward()
    gradient = controller.bias.grad
    assert gradient is not None
    for layer in (1, 2):
        values = []
        for move in (0.01, -0.01):
            with torch.no_grad():
                controller.bias[layer, 1] += move
                values.append(float(loss()))
                controller.bias[layer, 1] -= move
        # Halving the step moves the slope by less than the tolerance; float32 gates forbid a much smaller one.
        assert float(gradient[layer, 1]) == pytest.approx((values[0] - values[1]) / 0.02, rel=0.03)


def test_the_target_prices_the_distance(checkpoint: Path) -> None:
    controller = random_controller("hidden", SIZES)
    batch = batch_of(checkpoint)
    with torch.no_grad():
        free = controlled(checkpoint, controller).eval()(**batch)
    for target in (1.0, 3.5):
        with torch.no_grad():
            aimed = controlled(checkpoint, controller, target_layers=target).eval()(**batch)
        distance = abs(float(free["num_layers"]) - target) / 4
        assert float(aimed["loss"]) == pytest.approx(float(free["cross_entropy"]) + 3.0 * distance, rel=1e-5)


def controller_config(checkpoint: Path, controller: str = "hidden", **changes: Any) -> ControllerConfig:
    training = small_config(checkpoint, num_steps=6, learning_rate=0.05)
    return ControllerConfig(training, controller, **{"alpha": 20.0, **changes})


# Trains with controller_config and kills itself in its nth forward pass.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import test_controller_training
from dynskip.training.controller import gated_model
out, checkpoint, data, number = sys.argv[1:]
num_calls = 0
original = gated_model.head_loss
def head_loss(*args):
    global num_calls
    num_calls += 1
    if num_calls == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
gated_model.head_loss = head_loss
config = test_controller_training.controller_config(Path(checkpoint), backbone="joint")
test_controller_training.ControllerRun(config, Path(data), Path(out), torch.device("cpu"), progress=False).train()
"""


@IGNORE_LIBRARIES
def test_a_killed_run_resumes_to_the_same_controller_and_model(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = run_script(KILLED, killed, checkpoint, data, 10)
    assert process.returncode == -signal.SIGKILL, process.stderr
    left = latest_checkpoint(killed / "training")
    assert left is not None and left.name == "checkpoint-4"
    config = controller_config(checkpoint, backbone="joint")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for out in (killed, whole):
        ControllerRun(config, data, out, CPU, progress=False).train()
    torch.set_num_threads(num_threads)
    resumed, uninterrupted = load_controller(killed).state_dict(), load_controller(whole).state_dict()
    assert all(torch.equal(resumed[key], tensor) for key, tensor in uninterrupted.items())
    models = [HFOPTForCausalLM.from_pretrained(out / "model").state_dict() for out in (killed, whole)]
    start = HFOPTForCausalLM.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(models[0][key], tensor) for key, tensor in models[1].items())
    assert any(not torch.equal(start[key], tensor) for key, tensor in models[1].items())
    history = json.loads((whole / "curves.json").read_text())
    assert history == json.loads((killed / "curves.json").read_text())
    assert all(1 < entry["num_layers"] <= 4 for entry in history if "loss" in entry)
    evaluated = [entry for entry in history if "eval_loss" in entry]
    for entry in evaluated:
        assert entry["eval_loss"] == pytest.approx(entry["eval_cross_entropy"] + 20 * entry["eval_num_layers"] / 4)


@IGNORE_LIBRARIES
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
def test_controllers_of_other_architectures_are_trained(
    family: str, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    source = family_checkpoint(tmp_path / "source", checkpoint, family)
    config = controller_config(source, backbone="joint" if family == "gpt2" else "frozen")
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=2, eval_every=1))
    folder = ControllerRun(config, data, tmp_path / "out", CPU, progress=False).train()
    llm = LLM(folder / "model" if family == "gpt2" else source, dtype="float32")
    controller = load_controller(folder)
    assert controller.sizes == SIZES
    output = llm.generate(["Where?"], SamplingParams(max_tokens=3, ignore_eos=True), controller)
    assert len(output[0].token_ids) == 3


@IGNORE_LIBRARIES
def test_a_high_price_teaches_to_skip(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    config = controller_config(checkpoint, alpha=100.0)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=12, learning_rate=0.3))
    ControllerRun(config, data, tmp_path, CPU, progress=False).train()
    result = json.loads((tmp_path / "done.json").read_text())["validation"]
    assert result["eval_num_layers"] < 3
    with pytest.raises(ValueError, match=r"record_start: config must equal .* got alpha 100.0 there, 4.0 asked"):
        ControllerRun(dataclasses.replace(config, alpha=4.0), data, tmp_path, CPU, progress=False).train()


def test_rows_longer_than_the_positions_are_refused_before_data_is_read(checkpoint: Path, tmp_path: Path) -> None:
    config = controller_config(checkpoint)
    training = dataclasses.replace(config.training, max_tokens=SHAPE.max_positions + 1)
    with pytest.raises(ValueError, match=rf"train: --max-length must be at most {SHAPE.max_positions}, the positions"):
        ControllerRun(
            dataclasses.replace(config, training=training), tmp_path / "none", tmp_path / "run", CPU, progress=False
        ).train()


@IGNORE_LIBRARIES
def test_a_third_partys_class_trains_from_the_command_line(
    checkpoint: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(checkpoint), "--data", str(data), "--out", str(tmp_path), "--template", "short"]
    bounds = ["--steps", "controller=2", "--batch-size", "8", "--max-length", "64", "--lr", "0.1", "--alpha", "6"]
    name = "third_party_controller:ByPosition:0.2"
    assert main(["train", "--controller", name, *arguments, *bounds, "--quiet"]) == 0
    assert str(tmp_path) in capfd.readouterr().out
    controller = load_controller(tmp_path)
    slope = next(iter(controller.parameters()))
    assert not torch.allclose(slope[1:3], torch.full((2,), 0.2)) and torch.equal(slope[::3], torch.full((2,), 0.2))
    assert isinstance(controller, LearnedTokenController)
    output = LLM(checkpoint).generate(["Where?"], SamplingParams(max_tokens=3), controller, prompt_depth="full")
    assert len(output[0].token_ids) <= 3
    about = json.loads((tmp_path / "controller.json").read_text())["about"]
    assert about["alpha"] == 6 and about["template"] == "short" and about["backbone"] == "frozen"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "thawed"}, r"ControllerConfig: backbone must be 'frozen' or 'joint', got 'thawed'"),
        ({"alpha": -1.0}, r"ControllerConfig: alpha must be at least 0, got -1.0"),
        ({"temperature": 0.0}, r"ControllerConfig: temperature must be positive, got 0.0"),
        ({"target_layers": 0.0}, r"ControllerConfig: target_layers must be positive, got 0.0"),
        ({"controller": "hiden"}, r"controller_class: name must be one of fixed, hidden"),
    ],
)
def test_configs_are_checked(changes: dict[str, Any], message: str, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=message):
        controller_config(checkpoint, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "2"], "train: --alpha must be left out without --controller, got 2.0"),
        (["--controller", "hidden", "--path", "full"], "train: --path must be left out with --controller"),
        (["--controller", "hidden", "--preset", "opt-mini"], "train: --controller must be left out with the preset"),
        (["--controller", "hidden", "--steps", "full=3"], "train: --steps must be controller=N with N > 0"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", str(data), "--out", str(tmp_path), *arguments]) == 2
    error = capfd.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
