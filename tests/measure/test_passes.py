"""What a search measures: equal to plain passes of the model, whichever candidates share their beginnings."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from families import FAMILIES, family_hf
from models import NUM_LAYERS, cpu_backend, random_prompts, tiny_model
from torch.nn.functional import cross_entropy

from dynskip import CausalLM, LayerPath
from dynskip.data.examples import Example
from dynskip.execution.step import Step
from dynskip.measure.passes import DraftPass, Measured, Pass, block_influence, num_layer_runs, run_paths
from dynskip.routing.plan import Plan

# The family and changes of its config: every architecture, ALiBi and windows among them.
MODELS = [pytest.param(family, next(iter(variants.values()), {}), id=family) for family, variants in FAMILIES.items()]
MODELS.append(pytest.param("mistral", {"sliding_window": 3}, id="window"))
FULL = LayerPath.full(NUM_LAYERS)
PATHS = [
    FULL,
    *(LayerPath.of(NUM_LAYERS, set(FULL.layers) - {layer}) for layer in FULL.layers),
    LayerPath.of(NUM_LAYERS, [0, 3, 4]),
    LayerPath.of(NUM_LAYERS, [2]),
    LayerPath.of(NUM_LAYERS, [], allow_empty=True),
]


def texts(lengths: tuple[tuple[int, int], ...] = ((7, 5), (1, 3), (4, 1), (11, 9))) -> list[Example]:
    """Random prompts and responses of these lengths."""
    tokens = iter(random_prompts([prompt + response for prompt, response in lengths], seed=3))
    found = []
    for prompt, _ in lengths:
        ids = next(tokens)
        found.append(Example(tuple(ids[:prompt]), tuple(ids[prompt:]), 0))
    return found


def measured_by(batch: Pass, paths: list[LayerPath]) -> dict[LayerPath, Measured]:
    found: dict[LayerPath, Measured] = {}
    run_paths(batch, paths, found.__setitem__)
    return found


def tiny(family: str, changes: dict[str, Any], backend: str) -> CausalLM:
    return CausalLM.from_hf(family_hf(family, dtype=torch.float32, **changes), backend=cpu_backend(backend))


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_nats_and_agreement_are_those_of_plain_passes(family: str, changes: dict[str, Any], backend: str) -> None:
    model = tiny(family, changes, backend)
    found = measured_by(Pass(model, texts()), PATHS)
    assert list(found) != PATHS and set(found) == set(PATHS)
    for path, measured in found.items():
        for index, text in enumerate(texts()):
            ids = torch.tensor([[*text.prompt_ids, *text.response_ids]])
            with torch.no_grad():
                logits = model(ids, paths=[path], executor="reference").logits[0, len(text.prompt_ids) - 1 : -1]
            targets = torch.tensor(text.response_ids)
            nats = float(cross_entropy(logits, targets, reduction="sum"))
            assert measured.nats[index] == pytest.approx(nats, rel=1e-4)
            assert measured.agreed[index] == int((logits.argmax(1) == targets).sum())
            assert measured.num_tokens[index] == len(targets)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_a_draft_on_the_paths_entries_sees_what_its_first_guess_sees(
    family: str, changes: dict[str, Any], backend: str
) -> None:
    model = tiny(family, changes, backend)
    found = measured_by(DraftPass(model, texts()), PATHS)
    executor = model.executor("reference")

    paths = [PATHS[2], PATHS[7], PATHS[9], FULL]

    def step(tokens: list[int], first: int, paths: list[LayerPath]) -> Step:
        """The same tokens in a sequence for each of the paths."""
        num, positions = len(paths), torch.arange(first, first + len(tokens))
        plan = Plan.per_sequence(paths, [len(tokens)] * num)
        return Step(torch.tensor(tokens * num), positions.repeat(num), torch.arange(num), plan)

    for index, text in enumerate(texts()):
        ids = [*text.prompt_ids, *text.response_ids]
        nats = torch.zeros(len(paths))
        for place in range(len(text.prompt_ids) - 1, len(ids) - 1):
            cache = executor.new_cache(len(paths), 64, 0)
            with torch.no_grad():
                if place:
                    executor.run(step(ids[:place], 0, [FULL] * len(paths)), cache)
                logits = executor.head(executor.run(step([ids[place]], place, paths), cache))
            nats += cross_entropy(logits, torch.tensor(ids[place + 1]).expand(len(paths)), reduction="none")
        for path, expected in zip(paths, nats.tolist(), strict=True):
            assert found[path].nats[index] == pytest.approx(expected, rel=1e-4)
    # At full depth both kinds of entries are the same; shallower they are not.
    own = measured_by(Pass(model, texts()), PATHS)
    assert found[FULL].nats == pytest.approx(own[FULL].nats, rel=1e-4)
    assert found[PATHS[7]].nats != pytest.approx(own[PATHS[7]].nats, rel=1e-3)


@pytest.mark.parametrize("kind", [Pass, DraftPass])
def test_a_path_measures_the_same_whatever_is_measured_with_it(kind: type[Pass]) -> None:
    batch = kind(tiny_model(deterministic=True), texts())
    together = measured_by(batch, PATHS)
    random.Random(0).shuffle(shuffled := list(PATHS))
    assert measured_by(batch, shuffled) == together
    for path in PATHS:
        assert measured_by(batch, [path]) == {path: together[path]}


def test_each_beginning_runs_once() -> None:
    model = tiny_model()
    batch = Pass(model, texts())
    for paths in (PATHS, PATHS[:1], list(itertools.islice(PATHS, 1, 7)), []):
        before, told = list(model.executor().row_counts.run), []
        run_paths(batch, paths, lambda path, measured: None, told.append)
        rows = sum(model.executor().row_counts.run) - sum(before)
        assert rows == num_layer_runs(paths) * len(batch.token_ids) and sum(told) == num_layer_runs(paths)
    removals = PATHS[1:7]
    assert num_layer_runs(removals) == 5 + 5 + 4 + 3 + 2 + 1 < sum(path.budget for path in removals)


def test_equal_paths_are_measured_once() -> None:
    found: list[LayerPath] = []
    run_paths(Pass(tiny_model(), texts()), [FULL, FULL], lambda path, measured: found.append(path))
    assert found == [FULL]


def test_influence_is_the_turn_of_the_states() -> None:
    model = tiny_model()
    influence = block_influence(model, texts())
    states = []
    executor = model.executor("reference")
    for text in texts():
        tokens = [*text.prompt_ids, *text.response_ids][:-1]
        plan = Plan.per_sequence([FULL], [len(tokens)])
        step = Step(torch.tensor(tokens), torch.arange(len(tokens)), torch.tensor([0]), plan)
        inputs: list[torch.Tensor] = []
        with torch.no_grad():
            last = executor.run(step, None, lambda _, state, inputs=inputs: inputs.append(state.clone()))
        states.append(torch.stack([*inputs, last]))
    every = torch.cat(states, dim=1).double()
    dots = (every[1:] * every[:-1]).sum(2) / (every[1:].norm(dim=2) * every[:-1].norm(dim=2))
    assert influence == pytest.approx((1 - dots.mean(1)).tolist(), rel=1e-4)
