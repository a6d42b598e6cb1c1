"""The prompt-only router: known answers on prompts that tell everything, and on prompts that tell nothing."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
import torch

from dynskip import LayerPath
from dynskip.controllers import SequenceController
from dynskip.evaluation.experiments.router import add_q, learning_curves
from dynskip.evaluation.routers.gain_share import captured_share, captured_share_difference
from dynskip.evaluation.routers.path_router import (
    PathRouter,
    RouterController,
    choose_at_price,
    price_for_budget,
    router_inputs,
)
from dynskip.evaluation.routers.prompt_features import common_prefix, head_length, prompt_features
from dynskip.evaluation.stats.intervals import Interval
from dynskip.evaluation.tasks.routes import Learned

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install dynskip[eval]")

COSTS = np.array([4.0, 8.0, 12.0, 24.0])
PREDICTORS = ["logistic", "boosting", "ridge", "transformer"]


def prompts_of_kinds(num_rows: int, seed: int, told: bool) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, 20] and scores [N, 4]: half of the prompts need all layers, the others are as good with 4.

    told: whether the features tell which half a prompt belongs to.
    """
    generator = np.random.default_rng(seed)
    needs_depth = generator.random(num_rows) < 0.5
    features = generator.normal(size=(num_rows, 20))
    if told:
        features[:, 3] += 8 * needs_depth
    gains = np.where(needs_depth[:, None], [0.0, 0.02, 0.04, 0.3], 0.0)
    return features, 0.3 + gains + generator.normal(0, 0.01, (num_rows, 4))


def oracle_of(scores: np.ndarray, budget: float) -> np.ndarray:
    return choose_at_price(scores, COSTS, price_for_budget(scores, COSTS, budget))


def as_embeddings(features: np.ndarray) -> np.ndarray:
    """[N], object: for each row of features [N, F] one to three tokens whose embeddings they are."""
    inputs = np.empty(len(features), dtype=np.object_)
    for row, values in enumerate(features):
        inputs[row] = torch.from_numpy(values).float().expand(1 + row % 3, -1)
    return inputs


def capture(predictor: str, told: bool, seed: int = 0, budget: float = 14.0) -> tuple[dict[str, Interval], np.ndarray]:
    features, scores = prompts_of_kinds(600, seed, told)
    if predictor == "transformer":
        features = as_embeddings(features)
    train, test = slice(0, 300), slice(300, 600)
    router = PathRouter(predictor, COSTS, seed=seed)
    router.fit(features[train], scores[train], oracle_of(scores[train], budget), budget)
    chosen = router.choose(features[test])
    return captured_share(scores[test], chosen, oracle_of(scores[test], COSTS[chosen].mean()), seed=seed), chosen


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_prompts_that_tell_everything_are_captured(predictor: str) -> None:
    captured, chosen = capture(predictor, told=True)
    share, low, high = captured["captured_share"]
    assert 0.9 < share <= 1.0
    assert low > 0.85 and low <= share <= high
    # It is paid for: about half of the prompts run all layers, and the mean keeps near to the budget.
    assert 12.5 < COSTS[chosen].mean() < 15.5


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_prompts_that_tell_nothing_give_nothing(predictor: str) -> None:
    # An interval misses in 1 of 20 draws of data; of four at most one may.
    covered = 0
    for seed in range(4):
        captured, chosen = capture(predictor, told=False, seed=seed)
        if len(set(chosen.tolist())) == 1:  # one path for all: exactly its own random assignment
            assert captured["gain"] == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
            covered += 1
            continue
        _, low, high = captured["gain"]
        covered += low <= 0 <= high
    assert covered >= 3


def test_the_oracle_itself_captures_everything() -> None:
    _, scores = prompts_of_kinds(200, 0, told=True)
    oracle = oracle_of(scores, 10.0)
    captured = captured_share(scores, oracle, oracle)
    assert captured["captured_share"] == pytest.approx((1.0, 1.0, 1.0))
    assert captured["rouge_l"].value == pytest.approx(captured["oracle"].value)


def test_random_assignment_is_the_expected_score_of_the_same_depths_dealt_at_random() -> None:
    _, scores = prompts_of_kinds(200, 1, told=True)
    chosen = oracle_of(scores, 10.0)
    generator = np.random.default_rng(0)
    rows = np.arange(200)
    dealt = np.mean([scores[rows, generator.permutation(chosen)].mean() for _ in range(4000)])
    captured = captured_share(scores, chosen, chosen)
    assert captured["random"].value == pytest.approx(dealt, abs=1e-3)
    assert captured["gain"].value == pytest.approx(captured["rouge_l"].value - captured["random"].value)


def test_choices_of_several_seeds_count_alike() -> None:
    _, scores = prompts_of_kinds(100, 0, told=True)
    chosen = np.stack([np.zeros(100, dtype=np.int64), np.full(100, 3)])
    captured = captured_share(scores, chosen, np.full(100, 3))
    assert captured["rouge_l"].value == pytest.approx((scores[:, 0].mean() + scores[:, 3].mean()) / 2)
    assert captured["gain"].value == pytest.approx(0.0)


def test_one_path_for_all_has_no_share() -> None:
    _, scores = prompts_of_kinds(50, 0, told=True)
    cheapest = np.zeros(50, dtype=np.int64)
    captured = captured_share(scores, cheapest, cheapest)
    assert "captured_share" not in captured
    assert captured["gain"].value == pytest.approx(0.0)


def test_a_share_minus_another_is_paired_by_sequence() -> None:
    _, scores = prompts_of_kinds(400, 3, told=True)
    oracle = oracle_of(scores, 14.0)
    generator = np.random.default_rng(0)
    blind = np.where(generator.random(400) < 0.3, generator.permutation(oracle), oracle)
    oracle_of_blind = oracle_of(scores, COSTS[blind].mean())
    shares = [
        captured_share(scores, *choice)["captured_share"] for choice in ((oracle, oracle), (blind, oracle_of_blind))
    ]
    difference = captured_share_difference(scores, oracle, oracle, blind, oracle_of_blind)
    assert difference is not None and difference.value == pytest.approx(shares[0].value - shares[1].value)
    assert difference.low > 0.1, "three of ten choices at random are seen"
    # Two choices that err on the same sequences differ by less than their own errors would add up to.
    also = blind.copy()
    also[:4] = oracle[:4]
    apart = captured_share_difference(scores, also, oracle_of_blind, blind, oracle_of_blind)
    assert apart is not None and apart.high - apart.low < 0.3 * (shares[1].high - shares[1].low)
    alike = captured_share_difference(scores, blind, oracle_of_blind, blind, oracle_of_blind)
    assert alike == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    cheapest = np.zeros(400, dtype=np.int64)
    assert captured_share_difference(scores, blind, oracle_of_blind, cheapest, cheapest) is None


def test_a_learning_curve_is_told_by_its_ends() -> None:
    none = np.zeros(1, dtype=np.int64)
    every = [
        Learned(predictor, features, size, at, none, none)
        for predictor, features, size, at in (
            *(("ridge", "state", size, at) for size in (500, 250, 1000) for at in (8.0, 20.0)),
            ("boosting", "state", 1000, 8.0),
        )
    ]
    ends = [(few.size, many.size, many.predictor, many.at) for few, many in learning_curves(every)]
    assert ends == [(250, 1000, "ridge", 8.0), (250, 1000, "ridge", 20.0)]


def test_shares_stand_beside_p_and_q() -> None:
    values = (
        ("captured_share_nats", 0.3),
        ("captured_share_nats", 0.1),
        ("gain_nats", 0.3),
        ("captured_share_nats", 0.0),
    )
    rows = [{"metric": metric, "value": value, "low": value - 0.098, "high": value + 0.098} for metric, value in values]
    add_q(rows, "captured_share_nats")
    p = [2 * NormalDist().cdf(-abs(value) / 0.05) for value in (0.3, 0.1, 0.0)]
    tested = [row for row in rows if row["metric"] == "captured_share_nats"]
    assert [row["p"] for row in tested] == pytest.approx(p, abs=1e-5)
    assert [row["q"] for row in tested] == pytest.approx([3 * p[0], 1.5 * p[1], 1.0], abs=1e-5)
    assert "p" not in rows[2] and "q" not in rows[2]


def test_a_price_keeps_to_its_budget() -> None:
    worths = np.random.default_rng(0).normal(size=(500, 4))
    for budget in (4.0, 5.6, 9.3, 24.0):
        price = price_for_budget(worths, COSTS, budget)
        cost = COSTS[choose_at_price(worths, COSTS, price)].mean()
        assert cost <= budget
        # A little cheaper a layer and the budget is broken: nothing was left unused but the last prompt's step.
        assert budget - cost < 20 / 500 + 1e-9 or price == 0.0
    assert price_for_budget(worths, COSTS, 1000.0) == 0.0


def test_of_equal_paths_the_cheapest_is_chosen() -> None:
    costs = np.array([24.0, 4.0, 8.0])
    assert choose_at_price(np.ones((2, 3)), costs, 0.0).tolist() == [1, 1]


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_an_oracle_that_chose_one_path_is_followed(predictor: str) -> None:
    features = np.random.default_rng(0).normal(size=(40, 6))
    features = as_embeddings(features) if predictor == "transformer" else features
    scores = np.tile([0.9, 0.1, 0.1, 0.1], (40, 1))
    router = PathRouter(predictor, COSTS).fit(features, scores, np.zeros(40, dtype=np.int64), 6.0)
    assert router.choose(features).tolist() == [0] * 40


def test_the_same_seed_routes_alike() -> None:
    features, scores = prompts_of_kinds(200, 0, told=True)
    first, second = (
        PathRouter("boosting", COSTS, seed=3).fit(features, scores, oracle_of(scores, 10.0), 10.0).choose(features)
        for _ in range(2)
    )
    assert np.array_equal(first, second)


def test_features_of_a_prompt() -> None:
    embeddings = torch.arange(12.0).reshape(6, 2)
    features = prompt_features([5, 5, 7, 8, 9, 9], embeddings, num_prefix=2)
    assert features.tolist() == pytest.approx([5.0, 6.0, 7.0, 8.0, 6.0, np.log(6), 4.0, 4 / 6])
    # A prompt that is all template is described by its last token.
    assert prompt_features([1, 2], torch.eye(2), num_prefix=9).tolist()[2:4] == [0.0, 1.0]


def test_the_transformer_reads_what_stands_behind_the_template() -> None:
    table = torch.eye(6)
    prompts = [[1, 2, 4, 5], [1, 2], [3]]
    inputs = router_inputs("transformer", prompts, [table[ids] for ids in prompts], heads=[[1, 2]])
    # A prompt that is all template is told by its last token.
    assert [rows.argmax(1).tolist() for rows in inputs] == [[4, 5], [2], [3]]
    features = router_inputs("logistic", prompts, [table[ids] for ids in prompts], heads=[[1, 2]])
    assert np.array_equal(features[0], prompt_features(prompts[0], table[prompts[0]], 2))


def test_the_common_prefix_is_the_template() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert common_prefix([[1, 2], [1, 2, 4]]) == 1
    assert common_prefix([[3], [4]]) == 0


def test_a_prompt_is_known_by_the_head_of_its_template() -> None:
    heads = [(1, 2), (1, 2, 3)]
    assert [head_length(prompt, heads) for prompt in ([1, 2, 3, 9], [1, 2, 9], [1, 9], [2])] == [3, 2, 0, 0]


@pytest.mark.parametrize("predictor", ["ridge", "transformer"])
def test_the_controller_gives_each_prompt_the_path_of_its_router(predictor: str) -> None:
    paths = [LayerPath.uniform(6, budget=2), LayerPath.full(6)]
    generator = np.random.default_rng(0)
    prompts = [torch.tensor([1, 2, 10 + 40 * (row % 2) + int(generator.integers(20))]) for row in range(60)]
    table = torch.eye(80)
    features = router_inputs(predictor, [ids.tolist() for ids in prompts], [table[ids] for ids in prompts], [[1, 2]])
    scores = np.array([[0.5, 0.4 + 0.4 * (row % 2)] for row in range(60)])
    router = PathRouter(predictor, [2.0, 6.0]).fit(features, scores, scores.argmax(1), 4.0)
    controller = RouterController(router, paths, heads=[[1, 2]])
    assert isinstance(controller, SequenceController)
    chosen = controller.choose_paths(prompts, [table[ids] for ids in prompts])
    agreed = sum(path == paths[row % 2] for row, path in enumerate(chosen))
    assert agreed >= 54


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: PathRouter("tree", COSTS),
            "predictor must be one of logistic, boosting, ridge, transformer, got 'tree'",
        ),
        (
            lambda: PathRouter("ridge", COSTS).fit(np.ones((9, 2)), np.ones((9, 4)), np.zeros(9, int), 8.0),
            "features must hold at least 10 prompts, got 9",
        ),
        (
            lambda: PathRouter("ridge", COSTS).fit(np.ones((10, 2)), np.ones((10, 3)), np.zeros(10, int), 8.0),
            r"scores must be \[10, 4\] and labels \[10\]",
        ),
        (
            lambda: PathRouter("ridge", COSTS).fit(np.ones((10, 2)), np.ones((10, 4)), np.zeros(10, int), 3.0),
            "budget must be at least the cheapest path's 4, got 3",
        ),
        (lambda: PathRouter("ridge", COSTS).choose(np.ones((1, 2))), "Call fit"),
        (lambda: RouterController(PathRouter("ridge", COSTS), [LayerPath.full(6)]), "paths must be one per cost"),
        (lambda: common_prefix([]), "prompts must hold at least one prompt"),
        (lambda: prompt_features([1, 2], torch.ones(3, 4)), r"embeddings must be \[2, E\]"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
