"""Learned controllers: exact gates, straight-through gradients, layers counted as the executor counts them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from models import NUM_LAYERS, VOCAB_SIZE, random_prompts, tiny_model
from random_controllers import SEQUENCE_NAMES, SIZES, random_controller

from dynskip import LLM, LayerPath, SamplingParams
from dynskip.controllers import (
    CountingController,
    HiddenStateGate,
    LearnedSequenceController,
    LearnedTokenController,
    SequenceController,
    TokenContext,
    TokenController,
    load_controller,
    make_controller,
    save_controller,
)
from dynskip.controllers.gumbel import gumbel_gate, gumbel_noise, keyed_noise
from dynskip.controllers.registry import controller_class
from dynskip.controllers.token_controllers import parse_width

THIRD_PARTY = "third_party_controller:ByPosition"
TOKEN_NAMES = ["fixed", "hidden", "mlp:8", "mlp:hidden/8", THIRD_PARTY]
PROMPTS = random_prompts([5, 1, 7])


def context(num_rows: int) -> TokenContext:
    rows = torch.arange(num_rows)
    return TokenContext(rows.int(), rows, torch.zeros(num_rows, dtype=torch.bool))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_soft_gates_have_the_gradient_of_finite_differences(temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 2, dtype=torch.float64) * 2
    noise = gumbel_noise((7, 2), logits.device).double()
    # gumbel_gate works in float32: the difference is taken over a step that it can resolve.
    leaf = logits.float().requires_grad_()
    gumbel_gate(leaf, temperature, hard=False, noise=noise.float()).sum().backward()
    step = 1e-2
    for row in range(7):
        for column in range(2):
            up, down = logits.clone(), logits.clone()
            up[row, column] += step
            down[row, column] -= step
            values = [torch.softmax((moved + noise) / temperature, -1)[row, 1] for moved in (up, down)]
            slope = float(values[0] - values[1]) / (2 * step)
            assert leaf.grad is not None
            assert float(leaf.grad[row, column]) == pytest.approx(slope, abs=2e-4)


def test_soft_gates_are_the_softmax_over_noisy_logits() -> None:
    logits, noise = torch.randn(50, 2), gumbel_noise((50, 2), torch.device("cpu"))
    expected = torch.softmax((logits + noise) / 0.7, -1)[:, 1]
    torch.testing.assert_close(gumbel_gate(logits, 0.7, hard=False, noise=noise), expected)


def test_straight_through_goes_back_like_soft() -> None:
    noise = gumbel_noise((40, 2), torch.device("cpu"))
    gradients = []
    for hard in (True, False):
        logits = torch.linspace(-3, 3, 80).view(40, 2).clone().requires_grad_()
        gate = gumbel_gate(logits, 0.9, hard, noise)
        (gate * torch.arange(40)).sum().backward()
        gradients.append(logits.grad)
        if hard:
            assert set(gate.tolist()) == {0.0, 1.0}
    assert gradients[0] is not None and gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])
    assert gradients[0].abs().sum() > 0


def test_without_noise_sampling_is_argmax() -> None:
    logits = torch.randn(100, 2)
    gate = gumbel_gate(logits, 1.0, hard=True)
    assert torch.equal(gate, logits.argmax(-1).float())
    assert gumbel_gate(torch.zeros(1, 2), 1.0, hard=True).item() == 1.0  # a tie runs, as HiddenStateGate has it


def test_gumbel_gates_run_as_often_as_softmax_says() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0]).expand(20_000, 2)
    share = gumbel_gate(logits, 0.3, hard=True, noise=gumbel_noise((20_000, 2), logits.device)).mean()
    probability = 1 / (1 + math.exp(-1))
    assert float(share) == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / 20_000))


def test_keyed_noise_is_logistic_and_knows_its_key_only() -> None:
    positions = torch.arange(20_000)
    noise = keyed_noise(3, None, 5, positions)
    assert torch.equal(noise[100:120], keyed_noise(3, None, 5, positions[100:120]))
    sequences = torch.full_like(positions, 1)
    own = keyed_noise(3, sequences, 5, positions)
    assert torch.equal(own[100:120], keyed_noise(3, sequences[100:120], 5, positions[100:120]))
    others = (keyed_noise(4, None, 5, positions), keyed_noise(3, None, 6, positions), own)
    for other in (*others, keyed_noise(3, sequences + 1, 5, positions)):
        correlation = torch.corrcoef(torch.stack([noise, other]))[0, 1]
        assert abs(float(correlation)) < 4 / math.sqrt(20_000)
    # Sequences side by side at one position draw as independently as positions of one sequence.
    across = keyed_noise(3, positions, 5, sequences)
    assert abs(float(torch.corrcoef(torch.stack([across[1:], across[:-1]]))[0, 1])) < 4 / math.sqrt(20_000)
    assert float((across < 0).float().mean()) == pytest.approx(0.5, abs=2 / math.sqrt(20_000))
    for quantile in (0.1, 0.5, 0.9):
        expected = math.log(quantile / (1 - quantile))
        share = float((noise < expected).float().mean())
        assert share == pytest.approx(quantile, abs=4 * math.sqrt(quantile * (1 - quantile) / 20_000))
    assert abs(float(torch.corrcoef(torch.stack([noise[1:], noise[:-1]]))[0, 1])) < 4 / math.sqrt(20_000)


@pytest.mark.parametrize("name", TOKEN_NAMES)
def test_token_controllers_follow_the_protocol(name: str) -> None:
    controller = random_controller(name)
    assert isinstance(controller, TokenController) and not isinstance(controller, SequenceController)
    assert isinstance(controller, LearnedTokenController) and controller.num_layers == NUM_LAYERS
    rows = torch.randn(30, 32)
    assert controller.active(0, rows, context(30)).all() and controller.active(5, rows, context(30)).all()
    for layer in range(1, 5):
        active = controller.active(layer, rows, context(30))
        logits = controller.logits(layer, rows, context(30))
        assert torch.equal(active, logits[:, 1] >= logits[:, 0])


@pytest.mark.parametrize("name", ["hidden", "mlp:8"])
def test_hidden_states_matter_to_those_that_read_them(name: str) -> None:
    active = torch.stack([random_controller(name).active(layer, torch.randn(60, 32), context(60)) for layer in (1, 2)])
    assert 0 < active.float().mean() < 1 and any(0 < row.float().mean() < 1 for row in active)


def test_a_fresh_controller_prefers_to_run() -> None:
    for name in ["fixed", "hidden", "mlp:8"]:
        controller = make_controller(name, SIZES)
        assert isinstance(controller, LearnedTokenController)
        assert controller.active(2, torch.randn(50, 32), context(50)).float().mean() > 0.9


@pytest.mark.parametrize("name", ["fixed", "hidden"])
def test_linear_controllers_become_gates(name: str) -> None:
    controller = random_controller(name)
    gate = controller.to_gate()
    assert isinstance(gate, HiddenStateGate) and gate.always == controller.always
    rows = torch.randn(200, 32)
    for layer in range(NUM_LAYERS):
        assert torch.equal(gate.active(layer, rows, context(200)), controller.active(layer, rows, context(200)))


@pytest.mark.parametrize("sample", [False, True])
def test_decisions_do_not_depend_on_neighbours(sample: bool) -> None:
    controller = random_controller("hidden")
    controller.sample = sample
    rows, places = torch.randn(40, 32), context(40)
    alone = [
        controller.active(2, rows[row : row + 1], dataclasses.replace(places, position_ids=torch.tensor([row])))
        for row in range(40)
    ]
    assert torch.equal(torch.cat(alone), controller.active(2, rows, places))


def test_sampled_decisions_repeat_with_their_seed() -> None:
    controller = random_controller("hidden")
    rows = torch.randn(300, 32)
    argmax = controller.active(3, rows, context(300))
    controller.sample = True
    drawn = []
    for seed in (1, 1, 2):
        controller.seed = seed
        drawn.append(controller.active(3, rows, context(300)))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], argmax)
    logits = controller.logits(3, rows, context(300)).detach()
    expected = float(torch.softmax(logits, -1)[:, 1].mean())
    assert float(drawn[0].float().mean()) == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(300))


@pytest.mark.parametrize("name", SEQUENCE_NAMES)
def test_sequence_controllers_choose_a_path_per_prompt(name: str) -> None:
    controller = random_controller(name)
    assert isinstance(controller, SequenceController) and not isinstance(controller, TokenController)
    assert isinstance(controller, LearnedSequenceController)
    llm = LLM(tiny_model(backend="torch"))
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=3, ignore_eos=True), controller)
    embeddings = [llm.model.embed_tokens(torch.tensor(prompt)) for prompt in PROMPTS]
    logits = controller.logits(embeddings)
    for output, row in zip(outputs, logits, strict=True):
        runs = {layer for layer in range(NUM_LAYERS) if row[layer, 1] >= row[layer, 0]} | {0, NUM_LAYERS - 1}
        assert output.path == LayerPath.of(NUM_LAYERS, runs)
    controller.sample = True
    ids = [torch.tensor(prompt) for prompt in PROMPTS]
    together = controller.choose_paths(ids, embeddings)
    assert together == [controller.choose_paths([one], [other])[0] for one, other in zip(ids, embeddings, strict=True)]


def test_a_window_sees_the_end_of_the_prompt_only() -> None:
    controller = random_controller("window:2")
    prompt = torch.randn(6, 32)
    other = torch.cat([torch.randn(4, 32), prompt[4:]])
    assert torch.equal(controller.logits([prompt]), controller.logits([other]))
    assert not torch.equal(controller.logits([prompt]), controller.logits([prompt[:5]]))


@pytest.mark.parametrize("kv_policy", ["propagate", "evict", "share"])
@pytest.mark.parametrize("name", ["hidden", "mlp:8"])
def test_counts_are_the_executors(name: str, kv_policy: str) -> None:
    model = tiny_model(backend="torch")
    controller = CountingController(random_controller(name), NUM_LAYERS)
    params = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=VOCAB_SIZE)
    counts = model.executor("compact").row_counts
    counts.reset()
    LLM(model).generate(PROMPTS, params, controller, kv_policy=kv_policy, prompt_depth="full")
    num_prompt_rows = sum(map(len, PROMPTS))
    num_decoded = len(PROMPTS) * 5  # the last token of an output is never run
    assert [run - num_prompt_rows for run in counts.run] == controller.num_run
    assert controller.num_asked == [num_decoded] * NUM_LAYERS
    assert controller.mean_layers == pytest.approx(sum(controller.num_run) / num_decoded)
    assert 2 < controller.mean_layers < NUM_LAYERS


@pytest.mark.parametrize("name", [*TOKEN_NAMES, *SEQUENCE_NAMES])
def test_a_folder_brings_a_controller_back(name: str, tmp_path: Path) -> None:
    controller = random_controller(name)
    controller.temperature = 0.5
    save_controller(controller, name, tmp_path, {"alpha": 4.0})
    loaded = load_controller(tmp_path, sample=True, seed=9)
    assert type(loaded) is type(controller) and loaded.sample and loaded.seed == 9 and loaded.temperature == 0.5
    tensors = controller.state_dict()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in loaded.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert json.loads((tmp_path / "controller.json").read_text())["about"] == {"alpha": 4.0}


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"load_controller: .* must hold controller.json, got none"):
        load_controller(tmp_path)
    controller = random_controller("hidden")
    save_controller(controller, "hidden", tmp_path)
    save_controller(random_controller("mlp:8"), "hidden", tmp_path)
    with pytest.raises(ValueError, match=r"load_controller: .* must hold the weights of its controller, got: "):
        load_controller(tmp_path)
    with torch.no_grad():
        controller.weight[0, 0, 0] = math.nan
    save_controller(controller, "hidden", tmp_path)
    with pytest.raises(ValueError, match=r"load_controller: weight must hold finite numbers only, got NaN"):
        load_controller(tmp_path)
    (tmp_path / "controller.json").write_text("{}")
    with pytest.raises(ValueError, match=r"load_controller: .* must name always, controller, sizes, temperature"):
        load_controller(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hiden", r"controller_class: name must be one of fixed, hidden, mlp, window, attention-pool or"),
        ("no.such.module:Class", r"controller_class: name must be an importable package.module:Class"),
        ("third_party_controller:Nothing", r"controller_class: name must be an importable package.module:Class"),
        ("pathlib:Path", r"controller_class: pathlib:Path must be a subclass of LearnedTokenController or"),
        ("hidden:3", r"HiddenController: argument must be left out, got '3'"),
        ("window:all", r"WindowController: argument must be a number of tokens, got 'all'"),
        ("mlp:wide", r"MLPController: argument must be a width, hidden or hidden/N, got 'wide'"),
    ],
)
def test_unknown_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_controller(name, SIZES)


def test_widths_and_arguments() -> None:
    assert [parse_width(text, 192) for text in ("24", "hidden/8", "hidden/2", "hidden")] == [24, 24, 96, 192]
    assert controller_class(f"{THIRD_PARTY}:0.5")[1] == "0.5"
    own = make_controller(f"{THIRD_PARTY}:0.5", SIZES)
    assert float(next(iter(own.parameters()))[0].detach()) == 0.5
    with pytest.raises(ValueError, match=r"HiddenController: hidden_states must be \[N, 32\], got \[3, 16\]"):
        random_controller("hidden").active(1, torch.zeros(3, 16), context(3))
