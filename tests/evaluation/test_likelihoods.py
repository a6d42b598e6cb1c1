"""Log-likelihoods of references against plain passes, rules for the layers of a budget, and routers that read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_models import save_checkpoint, tiny_setup
from made_up_results import made_up_setup, summary_of
from torch.nn.functional import cross_entropy

from dynskip import LayerPath
from dynskip.evaluation.registry import EXPERIMENTS, run_item
from dynskip.evaluation.sweep.context import Context
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.tasks.likelihoods import (
    Likelihoods,
    likelihood_items,
    member_items,
    member_likelihoods,
    read_likelihoods,
)
from dynskip.evaluation.tasks.path_families import equal_paths, families
from dynskip.evaluation.tasks.prompt_facts import feature_items, read_features
from dynskip.evaluation.tasks.rivals import influence_items, read_influence, rival_paths
from dynskip.evaluation.tasks.routes import cascade, sizes
from dynskip.evaluation.tasks.strategies import drawn_name, drawn_path, is_drawn, strategy_path

pytest.importorskip("datasets", reason="datasets is not installed")
pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install dynskip[eval]")


def likelihoods_of(items: list[WorkItem], context: Context, folder: Path) -> Likelihoods:
    """What ``items`` give."""
    with ItemStore(folder / "items.jsonl") as store:
        for item in items:
            store.add(item, run_item(item, context), 1.0)
        return read_likelihoods(store, items)


def test_references_have_the_nats_of_plain_passes(tmp_path: Path) -> None:
    setup = tiny_setup(tmp_path, likelihood_prompts=7)
    context = Context(setup)
    paths = ["uniform:2", "full", "layers:0,1,5"]
    items = likelihood_items(setup, setup.checkpoint, paths, tokens=True)
    assert [item.shard for item in items] == [0, 1]
    found = likelihoods_of(items, context, tmp_path)
    rows = context.prompts(setup.checkpoint.hash, "test", 7).rows
    model = context.llm(setup.checkpoint.hash).model
    first = 0
    for place, row in enumerate(rows):
        ids, start = torch.tensor([row.prompt_ids + row.response_ids]), len(row.prompt_ids) - 1
        count = len(row.response_ids)
        for column, path in enumerate(paths):
            with torch.no_grad():
                logits = model(ids, paths=[LayerPath.parse(path, 6)]).logits[0, start:-1].double()
            each = cross_entropy(logits, torch.tensor(row.response_ids), reduction="none")
            assert found.nats[place, column] == pytest.approx(float(each.sum()), abs=1e-4)
            assert found.token_nats[first : first + count, column] == pytest.approx(each.tolist(), rel=1e-3)
            before = torch.distributions.Categorical(logits=logits[0]).entropy()
            assert found.entropy[place, column] == pytest.approx(float(before), abs=1e-4)
        first += count
    assert found.num_tokens.tolist() == [len(row.response_ids) for row in rows] and len(found.token_nats) == first
    assert found.scores == pytest.approx(-found.nats / found.num_tokens[:, None])
    few = found.first(2)
    assert few.nats.shape == (2, 3) and len(few.token_nats) == few.num_tokens.sum() == len(few.token_units)
    assert np.bincount(found.token_units).tolist() == found.num_tokens.tolist()


def test_a_longer_run_has_the_whole_shards_of_a_shorter_one(tmp_path: Path) -> None:
    """The first rows are the same whatever comes behind them; a part of a shard is an item of its own."""
    few, many = (tiny_setup(tmp_path, likelihood_prompts=count) for count in (6, 10))
    short, long = (likelihood_items(setup, setup.checkpoint, ["full"]) for setup in (few, many))
    assert short[0] == long[0] and short[1] not in long and len(long) == 3
    rows = [row for setup, items in ((few, short), (many, long)) for row in _rows_of(setup, items)]
    assert rows[:6] == rows[6:12] and len(rows) == 16
    state_items = [EXPERIMENTS["hidden-states"].plan(setup, None) for setup in (few, many)]  # type: ignore[arg-type]
    assert state_items[0] == state_items[1], "their number has not changed"


def _rows_of(setup: Setup, items: list[WorkItem]) -> list[int]:
    context = Context(setup)
    return [row.index for item in items for row in context.shard(item)]


def test_tuning_is_compared_with_the_weights_before_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "before", seed=1)
    setup = tiny_setup(tmp_path, backbone=str(tmp_path / "before"), likelihood_only=True, rule_prompts=4)
    context = Context(setup)
    with ItemStore(tmp_path / "items") as store:
        while missing := store.missing(EXPERIMENTS["static"].plan(setup, store)):
            assert {item.task for item in missing} <= {"likelihood", "influence"}, "nothing is generated or timed"
            for item in missing:
                store.add(item, run_item(item, context), 1.0)
        section = EXPERIMENTS["static"].summarise(setup, store)
        members = families(setup)
        tuned, before = (member_likelihoods(setup, store, members[name]) for name in ("paths", "backbone"))
    assert len(tuned.token_nats) == tuned.num_tokens.sum() and not len(before.token_nats)
    compared = [row for row in section["rows"] if row["metric"] == "nats - backbone"]
    assert [row["budget"] for row in compared] == [2, 4, 6]
    means = ((tuned.nats - before.nats) / tuned.num_tokens.sum()).sum(0)
    assert [row["value"] for row in compared] == pytest.approx(means, abs=1e-6)
    assert (section["n"], section["n_nats"]) == (12, 12)
    assert any("rules for layers on 4" in note for note in section["notes"])


@pytest.mark.parametrize("name", ["oracle", "router", "depth"])
def test_references_alone_make_a_section(name: str, tmp_path: Path) -> None:
    """Nothing is generated and nothing timed, and what is said by log-likelihood is what the whole run says."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install dynskip[eval]")
    (tmp_path / "alone").mkdir()
    (tmp_path / "all").mkdir()
    alone = summary_of(made_up_setup(prompts=24, likelihood_only=True), name, tmp_path / "alone")
    whole = summary_of(made_up_setup(prompts=24), name, tmp_path / "all")
    with ItemStore(tmp_path / "alone" / "items") as store:
        assert {line["item"]["task"] for line in store.lines()} <= {"likelihood", "facts", "features"}
    kept = [row for row in whole["rows"] if "_nats" in row["metric"]]
    found = alone["rows"]
    assert found and all("_nats" in row["metric"] for row in found)
    if name == "depth":  # adjusted for fewer tests
        kept, found = ([{**row, "q": None} for row in rows] for rows in (kept, found))
    assert found == kept


def test_members_are_scored_with_their_own_weights(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "sibling", seed=1)
    setup = tiny_setup(tmp_path, siblings={2: str(tmp_path / "sibling")}, prompts=4)
    context = Context(setup)
    members = families(setup)["siblings"]
    with ItemStore(tmp_path / "items.jsonl") as store:
        for item in member_items(setup, members):
            store.add(item, run_item(item, context), 1.0)
        found = member_likelihoods(setup, store, members)
    for column, member in enumerate(members):
        (item,) = likelihood_items(setup, member.checkpoint, [member.path], tokens=True)
        alone = run_item(item, context)["paths"][member.path]["nats"]
        assert found.nats[:, column] == pytest.approx(alone, abs=1e-4)


def test_features_hold_what_the_head_reads_at_the_prompts_end(tmp_path: Path) -> None:
    setup = tiny_setup(tmp_path, prompts=3)
    context = Context(setup)
    items = feature_items(setup, setup.checkpoint, "test")
    with ItemStore(tmp_path / "items.jsonl") as store:
        for item in items:
            store.add(item, run_item(item, context), 1.0)
        embedding, state, both = (read_features(store, items, what) for what in ("embedding", "state", "all"))
    model = context.llm(setup.checkpoint.hash).model
    for row, found in zip(context.prompts(setup.checkpoint.hash, "test").rows, state, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([row.prompt_ids]), output_hidden_states=True).hidden_states
        assert found == pytest.approx(states[-1][0, -1].double().numpy(), abs=1e-4)
    assert np.array_equal(both, np.concatenate([embedding, state], axis=1))


def test_random_layers_are_drawn_for_each_reference(tmp_path: Path) -> None:
    """An interval over references is then one over their paths, too."""
    setup = tiny_setup(tmp_path, likelihood_prompts=7)
    context = Context(setup)
    names = [drawn_name("rls", 3, 1), "uniform:3", drawn_name("rls-first", 2, 2)]
    items = likelihood_items(setup, setup.checkpoint, names)
    found = likelihoods_of(items, context, tmp_path)
    rows = context.prompts(setup.checkpoint.hash, "test", 7).rows
    model = context.llm(setup.checkpoint.hash).model
    paths = [
        [
            strategy_path("rls", 3, 6, 1, row.index),
            LayerPath.uniform(6, 3),
            strategy_path("rls-first", 2, 6, 2, row.index),
        ]
        for row in rows
    ]
    assert len({own[0] for own in paths}) > 3 and all(own[2].layers[0] == 0 for own in paths)
    for place, (row, own) in enumerate(zip(rows, paths, strict=True)):
        ids, start = torch.tensor([row.prompt_ids + row.response_ids]), len(row.prompt_ids) - 1
        for column, path in enumerate(own):
            with torch.no_grad():
                logits = model(ids, paths=[path]).logits[0, start:-1].double()
            nats = float(cross_entropy(logits, torch.tensor(row.response_ids), reduction="sum"))
            assert found.nats[place, column] == pytest.approx(nats, abs=1e-4)


def test_rules_have_their_budget_and_influence_is_measured_apart(tmp_path: Path) -> None:
    setup = tiny_setup(tmp_path, budgets=(2, 4), seeds=2, train_prompts=5, searched=None)
    items = influence_items(setup, setup.checkpoint)
    assert {item.split for item in items} == {"validation"} and len(items) == 2
    context = Context(setup)
    with ItemStore(tmp_path / "items.jsonl") as store:
        for item in items:
            store.add(item, run_item(item, context), 1.0)
        influence = read_influence(store, items)
    assert len(influence) == 6 and all(0 < value < 2 for value in influence)
    rules = rival_paths(setup, influence)
    assert list(rules) == ["uniform", "exit", "random", "random-first", "influence"], "nothing was searched"
    budgets = {
        (rule, budget): {
            (drawn_path(path, 6, 0) if is_drawn(path) else LayerPath.parse(path, 6)).budget for path in paths
        }
        for rule, by_budget in rules.items()
        for budget, paths in by_budget.items()
    }
    assert all(found == {budget} for (_, budget), found in budgets.items()) and len(budgets) == 10
    assert rules["exit"][2] == ["layers:0,1"] and len(rules["random"][4]) == 2
    assert all(map(is_drawn, rules["random"][4])) and not is_drawn(rules["influence"][4][0])
    kept = {int(layer) for layer in rules["influence"][2][0].removeprefix("layers:").split(",")}
    assert kept == set(np.argsort(influence)[-2:].tolist())


@pytest.mark.parametrize("count", [2, 3, 4])
def test_equally_deep_paths_are_distinct_neighbours(count: int) -> None:
    setup = made_up_setup()
    paths = [LayerPath.parse(path, 24) for path in equal_paths(setup, count)]
    assert len(set(paths)) == count and {path.budget for path in paths} == {12}
    assert paths[0] == LayerPath.uniform(24, 12)
    assert all(len(set(path.layers) & set(paths[0].layers)) == 11 for path in paths[1:])
    assert equal_paths(setup, 100) == [], "there are not so many neighbours"


def test_searched_paths_come_from_their_file(tmp_path: Path) -> None:
    from dynskip.found import FoundPaths

    file = tmp_path / "found-paths.json"
    FoundPaths("0" * 64, 6, {4: (0, 1, 4, 5), 2: (0, 5)}).write(file)
    setup = tiny_setup(tmp_path, searched=file, rule="searched")
    assert setup.path_of(4) == "layers:0,1,4,5" and setup.path_of(6) == "full"
    assert [member.path for member in families(setup)["paths"]] == ["layers:0,5", "layers:0,1,4,5", "full"]
    assert rival_paths(setup, [0.1] * 6)["searched"] == {2: ["layers:0,5"], 4: ["layers:0,1,4,5"]}
    for budget, seed in ((2, 1), (6, 2)):
        save_checkpoint(tmp_path / f"sibling-{budget}", seed)
    siblings = {budget: str(tmp_path / f"sibling-{budget}") for budget in (2, 6)}
    found = families(tiny_setup(tmp_path, searched=file, rule="searched", siblings=siblings))
    assert {name: [member.path for member in members] for name, members in found.items()} == {
        "paths": ["layers:0,5", "layers:0,1,4,5", "full"],
        "siblings": ["layers:0,5", "full"],
        "untuned": ["layers:0,5", "layers:0,1,4,5", "full"],
    }, "weights are compared along one path"
    with pytest.raises(ValueError, match="searched must hold a path of each budget, got none of 3 layers"):
        tiny_setup(tmp_path, searched=file, rule="searched", budgets=(3,))
    FoundPaths("0" * 64, 8, {4: (0, 1, 4, 5)}).write(file)
    with pytest.raises(ValueError, match="searched must be paths through the 6 layers of the model, got 8"):
        tiny_setup(tmp_path, searched=file)
    with pytest.raises(ValueError, match="rule must be one of uniform, searched, got 'best'"):
        tiny_setup(tmp_path, rule="best")


def test_a_cascade_goes_deeper_where_it_is_unsure() -> None:
    generator = np.random.default_rng(0)
    entropy, test_entropy = generator.uniform(0, 3, 4000), generator.uniform(0, 3, 4000)
    costs = np.array([4.0, 8.0, 24.0])
    chosen = cascade(entropy, test_entropy, costs, 9.0)
    assert set(chosen.tolist()) == {0, 2} and costs[chosen].mean() == pytest.approx(9.0, abs=1.0)
    assert test_entropy[chosen == 2].min() > test_entropy[chosen == 0].max()
    assert costs[cascade(entropy, entropy, costs, 9.0)].mean() <= 9.0
    assert (cascade(entropy, test_entropy, costs, 4.0) == 2).mean() < 0.002, "surer than the least sure that was known"


def test_a_learning_curve_doubles_and_ends_with_all() -> None:
    assert sizes(7800) == [250, 500, 1000, 2000, 4000, 7800] and sizes(64) == [64] and sizes(250) == [250]


def test_every_section_tells_of_log_likelihoods(tmp_path: Path) -> None:
    """The second score stands in each section, with what it could have shown."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install dynskip[eval]")
    setup = made_up_setup(prompts=24, likelihood_prompts=40)
    wanted = {
        "static": {"nats", "nats - full", "rule_nats", "rule_nats - uniform"},
        "oracle": {"mean_nats", "gain_nats", "matching_budget_nats", "surviving_share_nats"},
        "router": {"score_nats", "gain_nats", "captured_share_nats", "over_static_nats", "layers_nats"},
        "depth": {"spearman_nats", "spearman_within_nats", "ties_nats"},
    }
    for name, metrics in wanted.items():
        folder = tmp_path / name
        folder.mkdir()
        section = summary_of(setup, name, folder)
        assert metrics <= {row["metric"] for row in section["rows"]}, name
        assert (section["n"], section["n_nats"]) == (24, 40)
        rows = [row for row in section["rows"] if row["metric"] in metrics and row["low"] is not None]
        assert rows and all(row["detectable"] >= 0 for row in rows if row["high"] is not None)
        if name == "static":
            assert {row["verdict"] for row in section["rows"] if row["metric"] == "nats - full"} <= {
                "equivalent",
                "lower",
                "higher",
                "open",
            }
            assert all(0 <= row["p"] <= row["q"] + 1e-6 for row in rows if row["metric"] == "rule_nats - uniform")
        if name == "oracle":
            controls = {row["control"] for row in section["rows"] if row["metric"] == "gain_nats"}
            assert controls == {"oracle", "oracle per token", "equal depth, greedy", "equal depth per token"}
            by_token = {
                row["control"]: row["value"]
                for row in section["rows"]
                if row["metric"] == "gain_nats" and row["place"] == "third"
            }
            assert by_token["oracle per token"] > by_token["oracle"], "more to choose, more to gain"
            (alike,) = section["equal_paths"]
            assert alike == {"family": "paths", "paths": equal_paths(setup, 4)}
        if name == "router":
            predictors = {row["predictor"] for row in section["rows"] if row["metric"] == "gain_nats"}
            assert predictors == {"ridge", "boosting", "cascade"}
            shares = [row for row in rows if row["metric"] == "captured_share_nats"]
            assert shares and all(0 <= row["p"] <= row["q"] + 1e-6 <= 1 + 1e-6 for row in shares)
