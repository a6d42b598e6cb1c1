"""Layer paths: the rules that make them, how they read, and what they refuse."""

from __future__ import annotations

import dataclasses
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynskip import LayerPath

# arXiv 2410.20022: the layers of uniform layer skipping in a model of 24, by budget.
ULS_24 = {
    4: [0, 6, 12, 18],
    6: [0, 4, 8, 12, 16, 20],
    8: [0, 3, 6, 9, 12, 15, 18, 21],
    10: [0, 3, 5, 8, 10, 12, 15, 17, 20, 22],
    12: list(range(0, 24, 2)),
    13: [0, 2, 4, 6, 8, 10, 12, 13, 15, 17, 19, 21, 23],
    16: [layer for layer in range(24) if layer % 3 != 1],
    18: [layer for layer in range(24) if layer not in (1, 5, 9, 13, 17, 21)],
    20: [layer for layer in range(24) if layer not in (1, 7, 13, 19)],
    22: [layer for layer in range(24) if layer not in (1, 13)],
    23: [layer for layer in range(24) if layer != 1],
    24: list(range(24)),
}

depths_and_budgets = st.integers(1, 60).flatmap(lambda depth: st.tuples(st.just(depth), st.integers(1, depth)))


@pytest.mark.parametrize(("budget", "layers"), ULS_24.items())
def test_uniform_paths_of_24_layers_are_those_of_the_paper(budget: int, layers: list[int]) -> None:
    assert list(LayerPath.uniform(24, budget=budget).layers) == layers


def test_uniform_paths_run_the_last_layer_from_budget_13_on() -> None:
    assert [budget for budget in range(1, 25) if 23 in LayerPath.uniform(24, budget=budget).layers] == [*range(13, 25)]


def test_uniform_paths_are_not_nested() -> None:
    layers = {budget: set(LayerPath.uniform(24, budget=budget).layers) for budget in (4, 8, 12, 16, 20, 24)}
    assert not layers[8] <= layers[12] and not layers[12] <= layers[16]
    assert layers[4] < layers[8] < layers[16] < layers[20] < layers[24]


@given(depths_and_budgets)
def test_uniform_follows_the_rule_for_every_depth(case: tuple[int, int]) -> None:
    num_layers, budget = case
    path = LayerPath.uniform(num_layers, budget=budget)
    # The i-th layer of the path is the first at which i <= layer * budget / num_layers: a ceiling, in closed form.
    assert path.layers == tuple(-(-i * num_layers // budget) for i in range(budget))
    assert path.budget == budget and path.layers[0] == 0


@given(depths_and_budgets)
def test_early_exit_runs_the_first_layers(case: tuple[int, int]) -> None:
    num_layers, budget = case
    assert LayerPath.early_exit(num_layers, budget=budget).layers == tuple(range(budget))


@given(depths_and_budgets, st.integers(0, 2**40), st.booleans())
def test_random_has_its_budget_and_repeats(case: tuple[int, int], seed: int, keep_first: bool) -> None:
    num_layers, budget = case
    path = LayerPath.random(num_layers, budget=budget, seed=seed, keep_first=keep_first)
    assert path.budget == budget and set(path.layers) <= set(range(num_layers))
    assert path == LayerPath.random(num_layers, budget=budget, seed=seed, keep_first=keep_first)
    assert path.layers[0] == 0 or not keep_first


def test_random_draws_every_layer_and_differs_by_seed() -> None:
    paths = [LayerPath.random(24, budget=8, seed=seed) for seed in range(200)]
    counts = [sum(layer in path.layers for path in paths) for layer in range(24)]
    # 200 draws with probability 1/3: 67 in the mean, standard deviation 6.7.
    assert min(counts) > 40 and max(counts) < 95
    assert len(set(paths)) > 190


def test_random_paths_are_the_same_on_every_machine() -> None:
    assert LayerPath.random(24, budget=8, seed=0).layers == (1, 8, 9, 12, 13, 15, 16, 23)
    assert LayerPath.random(24, budget=8, seed=0, keep_first=True).layers == (0, 2, 9, 13, 14, 16, 17, 23)


def test_full_and_mask() -> None:
    path = LayerPath.full(5)
    assert (path.layers, path.num_layers, path.budget) == ((0, 1, 2, 3, 4), 5, 5)
    mask = LayerPath.of(5, [4, 0, 2]).mask
    assert mask.dtype == torch.bool and mask.tolist() == [True, False, True, False, True]


def test_of_sorts_and_compares_by_value() -> None:
    path = LayerPath.of(24, [23, 0, 5])
    assert path.layers == (0, 5, 23)
    assert path == LayerPath.of(24, (0, 5, 23)) == LayerPath(24, (0, 5, 23))
    assert path != LayerPath.of(25, [0, 5, 23])
    assert len({path, LayerPath.of(24, [0, 23, 5])}) == 1
    assert pickle.loads(pickle.dumps(path)) == path


def test_a_path_cannot_be_changed() -> None:
    path = LayerPath.full(3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        path.layers = (0,)  # type: ignore[misc]
    path.mask[0] = False  # a copy
    assert path.mask.all()


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (LayerPath.full(24), "24/24 layers {0-23}"),
        (LayerPath.of(24, [0, 1, 2, 5, 22, 23]), "6/24 layers {0-2,5,22-23}"),
        (LayerPath.of(24, [7]), "1/24 layers {7}"),
        (LayerPath.of(24, [0]), "1/24 layers {0}"),
        (LayerPath.of(24, [], allow_empty=True), "0/24 layers {}"),
    ],
)
def test_a_path_prints_readably(path: LayerPath, text: str) -> None:
    assert str(path) == text
    assert repr(path) == f"LayerPath(num_layers={path.num_layers}, layers={path.layers})"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("full", LayerPath.full(24)),
        ("uniform:8", LayerPath.uniform(24, budget=8)),
        (" exit:12 ", LayerPath.early_exit(24, budget=12)),
        ("random:8:3", LayerPath.random(24, budget=8, seed=3)),
        ("layers:0,5,23", LayerPath.of(24, [0, 5, 23])),
    ],
)
def test_parse(text: str, path: LayerPath) -> None:
    assert LayerPath.parse(text, num_layers=24) == path


@pytest.mark.parametrize(
    "text", ["", "half", "full:3", "uniform", "uniform:", "uniform:x", "exit:1:2", "random:8", "layers:", "layers:1,,2"]
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"^LayerPath.parse: path must be full, uniform:B, .*got " + re.escape(repr(text))
    ):
        LayerPath.parse(text, num_layers=24)


@pytest.mark.parametrize("make", [LayerPath.uniform, LayerPath.early_exit, lambda n, b: LayerPath.random(n, b, seed=0)])
@pytest.mark.parametrize("budget", [0, -1, 25])
def test_budget_out_of_range(make: object, budget: int) -> None:
    with pytest.raises(ValueError, match=rf"budget must lie in 1\.\.24, got {budget}\."):
        make(24, budget)  # type: ignore[operator]


@pytest.mark.parametrize("budget", [8.0, True, "8", None])
def test_budget_of_another_type(budget: object) -> None:
    with pytest.raises(TypeError, match=r"LayerPath.uniform: budget must be an integer, got "):
        LayerPath.uniform(24, budget=budget)  # type: ignore[arg-type]


def test_parse_names_the_budget_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"LayerPath.uniform: budget must lie in 1\.\.24, got 30\."):
        LayerPath.parse("uniform:30", num_layers=24)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0, 5, 5], r"layers must be distinct, got 5 twice"),
        ([-1, 3], r"layers must lie in 0\.\.23, got -1"),
        ([3, 24], r"layers must lie in 0\.\.23, got 24"),
        ([], r"LayerPath.of: layers must name at least one layer, got none. Pass allow_empty=True"),
    ],
)
def test_of_refuses(layers: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerPath.of(24, layers)


@pytest.mark.parametrize("layer", [1.0, True, "1", None])
def test_of_refuses_what_is_no_integer(layer: object) -> None:
    with pytest.raises(TypeError, match=r"LayerPath.of: layers must be integers, got "):
        LayerPath.of(24, [layer])  # type: ignore[list-item]


def test_the_constructor_refuses_disorder() -> None:
    with pytest.raises(ValueError, match=r"layers must increase, got 1 after 3. Use LayerPath.of"):
        LayerPath(24, (3, 1))


@pytest.mark.parametrize("num_layers", [0, -3])
def test_num_layers_out_of_range(num_layers: int) -> None:
    with pytest.raises(ValueError, match=rf"LayerPath.full: num_layers must be at least 1, got {num_layers}"):
        LayerPath.full(num_layers)


def test_random_needs_an_integer_seed() -> None:
    with pytest.raises(TypeError, match=r"LayerPath.random: seed must be an integer, got 0.5"):
        LayerPath.random(24, budget=8, seed=0.5)  # type: ignore[arg-type]
