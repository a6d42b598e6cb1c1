"""Controllers in an evaluation: whose layers are counted, who is compared with whom, and folders that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_models import steered_setup, tiny_setup
from models import NUM_LAYERS, random_prompts, tiny_hf, tiny_model, word_tokenizer
from torch import Tensor

from dynskip import SamplingParams
from dynskip.controllers import ModelSizes, TokenContext, make_controller, save_controller
from dynskip.controllers.gumbel import keyed_noise
from dynskip.engine.closed_batch import Generation
from dynskip.evaluation.experiments.controllers import (
    NUM_NOISE_SEEDS,
    NUM_ROWS,
    NUM_TRAININGS,
    Point,
    Texts,
    _over,
    _recipe_rows,
)
from dynskip.evaluation.registry import EXPERIMENTS, run_item
from dynskip.evaluation.stats.frontiers import Measured
from dynskip.evaluation.sweep.checkpoints import ControllerFolder
from dynskip.evaluation.sweep.context import Context
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore
from dynskip.evaluation.sweep.training_curves import TrainingCurve
from dynskip.evaluation.tasks.controller_decisions import ResponseDecisions, SequenceCounter
from dynskip.evaluation.tasks.controller_runs import controlled_likelihood_items
from dynskip.evaluation.tasks.likelihoods import member_likelihoods
from dynskip.evaluation.tasks.path_families import families
from dynskip.training.stage import write_curves


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
    counter = SequenceCounter(controller, [1, 2, 3], NUM_LAYERS)
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
    odd = [runs for layer, runs in enumerate(counter.layer_runs) if layer % 2]
    assert sum(counter.layer_runs) == sum(counter.num_run) and len(set(odd)) == 1 and odd[0] < counter.layer_runs[0]
    with pytest.raises(ValueError, match="must have the 2 sequences that keys were given for, got 3"):
        SequenceCounter(controller, [1, 2], NUM_LAYERS).watch(generation)


class Sampled:
    """Runs each layer in half of the cases, by noise that is drawn for the sequence; keeps the keys it was given."""

    def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
        """[N], bool."""
        return keyed_noise(7, context.sequence_keys, layer, context.position_ids) >= 0


def test_a_sampled_decision_knows_its_sequence_and_not_its_batch() -> None:
    model = tiny_model()
    prompts = random_prompts([4, 4, 4])

    def runs(chosen: list[int]) -> list[int]:
        counter = SequenceCounter(Sampled(), [place + 1 for place in chosen], NUM_LAYERS)
        params = [SamplingParams(max_tokens=9, ignore_eos=True)] * len(chosen)
        generation = Generation(model, [prompts[0] for _ in chosen], params, counter, "propagate", "full")
        counter.watch(generation)
        generation.run()
        return counter.num_run

    together = runs([0, 1, 2])
    assert len(set(together)) > 1, "one prompt three times, three draws"
    assert [runs([place])[0] for place in range(3)] == together == runs([2, 1, 0])[::-1]


def test_references_are_scored_as_they_would_be_generated() -> None:
    """Prompts run all layers, decisions fall on response tokens: likelihoods of a plain pass under the same mask."""
    model = tiny_model()
    prompts, responses = random_prompts([3, 5]), random_prompts([6, 2], seed=1)
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    input_ids, mask = torch.zeros(2, width, dtype=torch.int64), torch.zeros(2, width, dtype=torch.int64)
    active = torch.ones(2, width, NUM_LAYERS, dtype=torch.bool)
    for seq, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = torch.tensor([*prompt, *response])
        input_ids[seq, : len(ids)], mask[seq, : len(ids)] = ids, 1
        for layer in range(NUM_LAYERS):
            positions = torch.arange(len(ids))
            noise = keyed_noise(7, torch.full((len(ids),), seq + 5), layer, positions)
            active[seq, : len(ids), layer] = (noise >= 0) | (positions < len(prompt))
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    decisions = ResponseDecisions(Sampled(), [5, 6], NUM_LAYERS, [3, 5], lengths)
    with torch.no_grad():
        ours = model(input_ids, mask, decisions, kv_policy="propagate").logits
        plain = model(input_ids, mask, active, kv_policy="propagate").logits
    torch.testing.assert_close(ours, plain)
    assert decisions.num_tokens == [5, 1], "nothing is predicted from the last token"
    expected = [int(active[seq, p : n - 1].sum()) for seq, (p, n) in enumerate(zip((3, 5), lengths, strict=True))]
    assert decisions.num_run == expected and sum(decisions.layer_runs) == sum(expected)


def test_the_count_is_that_of_the_executor() -> None:
    model = tiny_model()
    counter = SequenceCounter(EveryOther(), [1, 2], NUM_LAYERS)
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
    texts = Texts(np.array(scores), tokens + 1, tokens * layers, tokens)
    return Point(name, found, Measured(texts.rouge_l, tokens, texts.num_run, tokens), texts)


def test_controllers_are_compared_at_as_many_layers() -> None:
    frontier = [point("a", 4, [0.2, 0.2]), point("b", 8, [0.4, 0.6]), point("c", 24, [0.5, 0.5])]
    between = _over(point("x", 5, [0.5, 0.1]), frontier)
    assert between is not None
    assert between.tolist() == pytest.approx([0.5 - (0.75 * 0.2 + 0.25 * 0.4), 0.1 - (0.75 * 0.2 + 0.25 * 0.6)])
    at_one = _over(point("x", 8, [0.5, 0.5]), frontier)
    assert at_one is not None and at_one.tolist() == pytest.approx([0.1, -0.1])
    assert _over(point("x", 3, [0.5, 0.5]), frontier) is None
    assert _over(point("x", 25, [0.5, 0.5]), frontier) is None


def curve(num_steps: int = NUM_ROWS // 8, *validation: tuple[float, float]) -> TrainingCurve:
    """A training of 8 rows a step. validation: losses at shares of the steps; without, 2 nats from the middle on."""
    losses = validation or ((0.5, 2.0), (1.0, 2.0))
    training = tuple((step, 3.0) for step in range(1, num_steps + 1))
    return TrainingCurve(8, training, tuple((int(share * num_steps), loss) for share, loss in losses))


TRAINED = curve()


def recipes(
    layers: float,
    trainings: int = NUM_TRAININGS,
    draws: int = NUM_NOISE_SEEDS,
    lead: float = 0.1,
    trained: TrainingCurve | None = TRAINED,
    fixed_trained: TrainingCurve | None = TRAINED,
) -> list[Point]:
    """Sampled controllers: fixed ones at 4 and 8 layers, and one that reads hidden states and leads the line."""
    generator = np.random.default_rng(0)
    found = []
    for recipe, kind, cost, score in (
        ("fixed, alpha 4", "fixed", 4.0, 0.2),
        ("fixed, alpha 2", "fixed", 8.0, 0.4),
        ("hidden, alpha 4", "hidden", layers, 0.05 * layers + lead),
    ):
        for training in range(trainings):
            for seed in range(1, draws + 1):
                labels = {"recipe": recipe, "kind": kind, "width": None, "alpha": 4.0, "target_layers": None}
                labels |= {"backbone": "frozen", "choice": "sampled", "seed": seed, "training_seed": training}
                scores = score + 0.02 * generator.standard_normal(50) + 0.002 * generator.standard_normal()
                tokens = np.full(50, 10.0)
                likelihood = Measured(10 * scores, tokens, tokens * cost, tokens)
                texts = Texts(scores, tokens, tokens * cost, tokens)
                made = fixed_trained if kind == "fixed" else trained
                found.append(Point(f"{recipe} {training} {seed}", labels, likelihood, texts, trained=made))
    return found


def verdicts(points: list[Point], tmp_path: Path) -> dict[str, tuple[str, list[str]]]:
    rows = _recipe_rows(tiny_setup(tmp_path, resamples=200), points)
    assert [row["recipe"] for row in rows] == ["hidden, alpha 4"] * 2
    return {row["metric"]: (row["verdict"], row["reasons"]) for row in rows}


def test_recipes_are_better_worse_open_or_untested(tmp_path: Path) -> None:
    both = ("over_fixed", "over_fixed_nats")
    assert verdicts(recipes(6.0), tmp_path) == {metric: ("better", []) for metric in both}
    assert verdicts(recipes(6.0, lead=-0.1), tmp_path) == {metric: ("worse", []) for metric in both}
    assert {verdict for verdict, _ in verdicts(recipes(6.0, lead=0.0), tmp_path).values()} == {"open"}
    for points, reason in (
        (recipes(9.0), "beyond"),
        (recipes(6.0, trainings=2), "trainings"),
        (recipes(6.0, draws=4), "noise"),
    ):
        assert verdicts(points, tmp_path) == {metric: ("untested", [reason]) for metric in both}


@pytest.mark.parametrize(
    ("trained", "reason"),
    [
        (None, "curves"),
        (curve(NUM_ROWS // 8 - 1), "rows"),
        (curve(200, (0.5, 2.0), (1.0, 1.97)), "moving"),
        (curve(200, (0.5, 2.0), (1.0, 2.03)), "moving"),
        (curve(200, (1.0, 2.0)), "moving"),
        (curve(200, (0.25, 2.5), (0.75, 2.0), (0.8, 2.1), (1.0, 2.01)), None),
    ],
    ids=["no curves", "too few rows", "falls", "rises", "seen once", "stands still"],
)
def test_what_is_not_trained_long_enough_is_untested(
    tmp_path: Path, trained: TrainingCurve | None, reason: str | None
) -> None:
    found = ("better", []) if reason is None else ("untested", [reason])
    assert set(map(str, verdicts(recipes(6.0, trained=trained), tmp_path).values())) == {str(found)}
    assert set(map(str, verdicts(recipes(6.0, fixed_trained=trained), tmp_path).values())) == {str(found)}


def test_a_recipe_stands_still_where_its_trainings_do_together(tmp_path: Path) -> None:
    """They are compared by their mean; each on its own moves by a decision that turns over."""
    points = recipes(6.0)
    falling, rising = curve(200, (0.5, 2.0), (1.0, 1.97)), curve(200, (0.5, 2.0), (1.0, 2.03))
    for kind in ("hidden", "fixed"):
        moving = [p for p in points if p.labels["kind"] == kind]
        turned = {0: falling, 1: rising, 2: TRAINED}
        changed = [replace(p, trained=turned[p.labels["training_seed"]]) if p in moving else p for p in points]
        assert {verdict for verdict, _ in verdicts(changed, tmp_path).values()} == {"better"}
        for row in _recipe_rows(tiny_setup(tmp_path, resamples=20), changed):
            assert row["moved"] == pytest.approx(0.0, abs=1e-9) and row["moved_single"] == pytest.approx(0.03)


def test_fixed_recipes_count_where_a_recipe_is_held_against_them(tmp_path: Path) -> None:
    far = [
        replace(point, labels={**point.labels, "recipe": "fixed, alpha 1"}, trained=None)
        for point in recipes(6.0, trainings=1, draws=1)
        if point.labels["recipe"] == "fixed, alpha 2"
    ]
    more = [replace(p, likelihood=replace(p.likelihood, cost=1.5 * p.likelihood.cost)) for p in far]
    more = [replace(p, texts=replace(p.texts, num_run=1.5 * p.texts.num_run)) for p in more if p.texts is not None]
    assert len(more) == 1 and verdicts([*recipes(6.0), *more], tmp_path) == verdicts(recipes(6.0), tmp_path)
    found = verdicts([*recipes(9.0), *more], tmp_path)
    assert found["over_fixed_nats"] == ("untested", ["trainings", "noise", "curves"])


def test_a_training_is_read_from_what_it_has_left(tmp_path: Path) -> None:
    assert TrainingCurve.of(tmp_path) is None
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}, {"step": 2, "eval_loss": 2.25}]
    write_curves(tmp_path, [*history, {"step": 4, "loss": 2.0}, {"step": 4, "eval_loss": 2.125}])
    assert TrainingCurve.of(tmp_path) is None, "the rows of a step are not known"
    (tmp_path / "run.json").write_text(json.dumps({"config": {"batch_size": 4}}))
    found = TrainingCurve.of(tmp_path)
    assert found == TrainingCurve(4, ((1, 3.0), (2, 2.5), (4, 2.0)), ((2, 2.25), (4, 2.125)))
    assert (found.num_rows, found.moved) == (16, -0.125)


def section_of(setup: Setup, folder: Path) -> tuple[dict[str, Any], set[str]]:
    """The section once all items are done in ``folder``, and the tasks of these."""
    context = Context(setup)
    with ItemStore(folder) as store:
        for item in store.missing(EXPERIMENTS["controllers"].plan(setup, store)):
            store.add(item, run_item(item, context), 1.0)
        tasks = {line["item"]["task"] for line in store.lines()}
        return EXPERIMENTS["controllers"].summarise(setup, store), tasks


def test_references_alone_make_a_section(tmp_path: Path) -> None:
    """Nothing is generated and nothing timed, and what is said by log-likelihood is what the whole run says."""
    alone, tasks = section_of(steered_setup(tmp_path, likelihood_only=True), tmp_path / "alone")
    assert tasks == {"likelihood", "controlled-likelihood"}
    whole, more = section_of(steered_setup(tmp_path), tmp_path / "whole")
    assert more == {*tasks, "generate", "controlled", "time-controlled"}
    told = {"nats", "layers_nats", "over_static_nats", "skip_rate_nats", "over_fixed_nats"}
    assert {row["metric"] for row in alone["rows"]} <= told
    assert {"rouge_l", "layers", "num_tokens", "over_static", "skip_rate", "ms_per_token"} <= {
        row["metric"] for row in whole["rows"]
    }
    untimed = [{**row, "timed_as": None} for row in whole["rows"] if row["metric"] in told and "timed_as" in row]
    assert [row for row in alone["rows"] if row["metric"] in told - {"skip_rate_nats", "over_fixed_nats"}] == untimed
    rates = {row["layer"]: row["value"] for row in alone["rows"] if row["metric"] == "skip_rate_nats"}
    assert len(rates) == steered_setup(tmp_path).num_layers and rates[0] == 0.0, "the first layer always runs"
    assert (alone["n"], alone["n_nats"], whole["n"]) == (8, 8, 8)
    assert [each["num_rows"] for each in alone["trained"]] == [None, None], "saved, never trained"
    compared = [row for row in alone["rows"] if row["metric"] == "over_fixed_nats"]
    assert compared and all("curves" in row["reasons"] for row in compared)


def test_fewer_prompts_are_judged_under_controllers_than_along_paths(tmp_path: Path) -> None:
    few = steered_setup(tmp_path, likelihood_only=True, controller_prompts=6)
    section, _ = section_of(few, tmp_path / "items")
    assert section["n_nats"] == 6
    many = steered_setup(tmp_path, likelihood_only=True)
    items = [controlled_likelihood_items(setup, setup.controllers[0], 0) for setup in (few, many)]
    assert items[0][0] == items[1][0] and items[0][1] != items[1][1], "whole shards of fewer are among those of more"
    full = [row for row in section["rows"] if row["metric"] == "nats" and row["controller"] == "full"]
    with ItemStore(tmp_path / "items") as store:
        scored = member_likelihoods(few, store, families(few)["paths"]).first(6)
    assert [row["value"] for row in full] == pytest.approx([scored.nats[:, -1].sum() / scored.num_tokens.sum()])
    with pytest.raises(
        ValueError, match="controller_prompts must be at most the 8 prompts whose references are scored"
    ):
        steered_setup(tmp_path, controller_prompts=9)


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
    change(folder, lambda about: about.update(training_seed=3))
    seeded = ControllerFolder.of(folder)
    assert seeded.label == "mlp:4, alpha 6, frozen model, seed 3" and seeded.recipe == "mlp:4, alpha 6, frozen model"


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
