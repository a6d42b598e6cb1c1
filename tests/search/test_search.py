"""A search of a tiny model: what it finds, on which rows, and that neither a kill nor another weight goes unseen."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_models import item_lines
from models import NUM_LAYERS, tiny_model, word_tokenizer
from searches import OPTIONS, data_file, search, with_useless_layer
from streams import costs, engine

from dynskip import CausalLM, LayerPath, SamplingParams, causal_lm
from dynskip.costs.layer_costs import MachineSpeed
from dynskip.costs.step_costs import StepCosts
from dynskip.data.conversations import draw_conversations, encode_prompt, read_rows
from dynskip.data.corpus import Instruction
from dynskip.data.examples import Example
from dynskip.engine.closed_batch import Generation
from dynskip.evaluation.sweep.store import ItemStore
from dynskip.found import FOUND_PATHS, FoundPaths
from dynskip.measure import passes
from dynskip.measure.passes import by_influence, num_layer_runs
from dynskip.search import gauge as gauge_module
from dynskip.search import run as run_module
from dynskip.search.drafts import DraftGains
from dynskip.search.methods import by_swaps, greedily, num_removal_runs, removals, swaps
from dynskip.search.report import figure, table
from dynskip.search.run import FAMILIES, MEASUREMENTS, RESULT
from dynskip.speculation.draft import Draft

FULL = LayerPath.full(NUM_LAYERS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNSKIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run_module, "default_costs", lambda model: costs())


def prefers(good: set[int]) -> Callable[[Any], list[float]]:
    """Scores paths by how many of their layers are ``good``."""
    return lambda paths: [len(good & set(path.layers)) for path in paths]


def test_greedy_keeps_the_good_layers() -> None:
    found = greedily(NUM_LAYERS, 1, prefers({2, 5}))
    assert {budget: path.budget for budget, path in found.items()} == {budget: budget for budget in range(5, 0, -1)}
    assert found[2].layers == (2, 5) and found[5].layers == (1, 2, 3, 4, 5)


def test_swaps_end_at_a_path_that_no_exchange_improves() -> None:
    good = {1, 3, 4}
    [(budget, path)] = by_swaps({3: LayerPath.of(NUM_LAYERS, [0, 2, 5])}, prefers(good)).items()
    assert (budget, set(path.layers)) == (3, good)
    assert by_swaps({3: path}, prefers(good)) == {3: path}
    assert len(set(swaps(path))) == 9 and all(len(set(each.layers) & good) == 2 for each in swaps(path))


def test_influence_leaves_out_the_least() -> None:
    found = by_influence([0.5, 0.1, 0.3, 0.1, 0.9, 0.2], 3)
    assert {budget: path.layers for budget, path in found.items()} == {
        5: (0, 1, 2, 4, 5),
        4: (0, 2, 4, 5),
        3: (0, 2, 4),
    }


@pytest.mark.parametrize("least", [1, 3, 5])
def test_the_runs_of_a_greedy_search_are_known_before(least: int) -> None:
    runs = 0

    def evaluate(paths: Any) -> list[float]:
        nonlocal runs
        runs += num_layer_runs(paths)
        return [path.layers[0] for path in paths]

    greedily(NUM_LAYERS, least, evaluate)
    assert runs == num_removal_runs(NUM_LAYERS, least)
    assert len(removals(FULL)) == NUM_LAYERS


@pytest.mark.parametrize("method", ["influence", "greedy", "swap"])
def test_the_layer_that_does_nothing_goes_first(method: str, tmp_path: Path) -> None:
    model = with_useless_layer(3)
    result = search(model, tmp_path, dataclasses.replace(OPTIONS, score="agreement", method=method)).run()
    assert result.found.layers[5] == (0, 1, 2, 4, 5)
    assert sorted(result.found.layers) == [2, 3, 4, 5]
    assert LayerPath.found(model, 5).layers == (0, 1, 2, 4, 5) and LayerPath.found(model, 6) == FULL
    assert LayerPath.parse("found:4", NUM_LAYERS, model) == LayerPath.found(model, 4)


def test_the_loss_of_each_removal_is_looked_at(tmp_path: Path) -> None:
    model = tiny_model()
    one = search(model, tmp_path, dataclasses.replace(OPTIONS, budgets=(5,)))
    found = one.run().found.layers[5]
    by_hand = {path.layers: nats_by_hand(model, path, one.searched) for path in removals(FULL)}
    assert found == min(by_hand, key=by_hand.__getitem__)


def nats_by_hand(model: CausalLM, path: LayerPath, texts: list[Example]) -> float:
    """Nats a response token, one text after the other."""
    nats = tokens = 0.0
    for text in texts:
        ids = torch.tensor([[*text.prompt_ids, *text.response_ids]])
        logits = model(ids, paths=path).logits[0, len(text.prompt_ids) - 1 : -1]
        nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(text.response_ids), reduction="sum"))
        tokens += len(text.response_ids)
    return nats / tokens


def test_found_paths_are_no_worse_than_static_ones_on_the_rows_of_the_search(tmp_path: Path) -> None:
    model = tiny_model()
    one = search(model, tmp_path)
    result = one.run()
    with ItemStore(tmp_path / "run" / MEASUREMENTS) as store:
        gauge = gauge_module.Gauge(model, one.searched, store, one.items["search"], gauge_module.Bar(False))
        for budget, layers in result.found.layers.items():
            rivals = [LayerPath.uniform(6, budget), LayerPath.early_exit(6, budget)]
            values = [sum(each.nats) for each in gauge.measure("loss", [LayerPath.of(6, layers), *rivals])]
            assert min(values) == values[0]


def test_rows_of_the_judge_are_others_and_the_same_each_time(tmp_path: Path) -> None:
    model = tiny_model()
    one, again = search(model, tmp_path), search(model, tmp_path)
    assert len(one.searched) == len(one.judged) == 4
    assert not {text.prompt_ids for text in one.searched} & {text.prompt_ids for text in one.judged}
    assert (one.searched, one.judged) == (again.searched, again.judged)
    other = search(model, tmp_path, dataclasses.replace(OPTIONS, seed=2))
    assert other.judged != one.judged
    assert all(text.response_ids[-1] == model.eos_token_ids[0] for text in one.searched)


def test_a_question_that_stands_twice_is_drawn_once() -> None:
    tokenizer = word_tokenizer()
    answer = " ".join(["w007"] * 12)
    rows = [Instruction("w005", "", answer)] * 3 + [Instruction("w006", "", answer), Instruction("w007", "w1", answer)]
    with pytest.raises(ValueError, match=r"draw_conversations: rows must hold 3 without input.*, got 2\. Ask for"):
        draw_conversations(tokenizer, rows, [2, 1], 2, 0, 64)
    [[first], [second]] = draw_conversations(tokenizer, rows, [1, 1], 2, 0, 64)
    assert first.prompt_ids != second.prompt_ids


def test_prompts_stand_in_the_chat_template() -> None:
    tokenizer = word_tokenizer()
    assert len(encode_prompt(tokenizer, "w005")) > 5  # Alpaca's template
    tokenizer.chat_template = "{% for message in messages %}{{ 'w090 ' + message['content'] + ' w091' }}{% endfor %}"
    assert encode_prompt(tokenizer, "w005") == [90, 5, 91]


def test_t0_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t0.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n", encoding="utf-8")
    assert read_rows(path) == [Instruction("a", "", "b")]


class Killed(Exception):
    pass


@pytest.mark.parametrize(("score", "method"), [("loss", "swap"), ("speed", "greedy")])
def test_a_killed_search_goes_on_to_the_same_result(
    score: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(OPTIONS, score=score, method=method)
    model = tiny_model()
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    expected = search(model, tmp_path / "whole", options).run()
    measures = item_lines(tmp_path / "whole/run" / MEASUREMENTS)
    add, count = ItemStore.add, itertools.count()

    def dying(self: ItemStore, *args: Any) -> None:
        add(self, *args)
        if next(count) % 9 == 8:
            raise Killed

    monkeypatch.setattr(ItemStore, "add", dying)
    num_kills = 0
    while True:
        try:
            result = search(model, tmp_path / "killed", options).run()
            break
        except Killed:
            num_kills += 1
    assert num_kills >= 5
    assert (result.found, result.rows) == (expected.found, expected.rows)
    keys = [line["key"] for line in item_lines(tmp_path / "killed/run" / MEASUREMENTS)]
    assert len(keys) == len(set(keys)) == len(measures), "nothing was measured twice, and nothing else"


def test_texts_of_several_batches_are_measured_as_those_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(deterministic=True)
    found = []
    for name, tokens in (("one", 8192), ("several", 50)):
        monkeypatch.setattr(passes, "PASS_TOKENS", tokens)
        (tmp_path / name).mkdir()
        found.append(search(model, tmp_path / name, dataclasses.replace(OPTIONS, method="swap")).run())
    assert (found[0].found.layers, found[0].rows) == (found[1].found.layers, found[1].rows)


@pytest.mark.parametrize("score", ["loss", "speed"])
@pytest.mark.parametrize("method", ["influence", "greedy", "swap"])
def test_the_bar_ends_where_it_said(score: Any, method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, done = [], []

    class Counted(gauge_module.Bar):
        def plan(self, count: int) -> None:
            planned.append(count)

        def done(self, count: int) -> None:
            done.append(count)
            assert sum(done) <= sum(planned)

    monkeypatch.setattr(passes, "PASS_TOKENS", 50)  # several batches of texts
    monkeypatch.setattr(run_module, "Bar", Counted)
    model = tiny_model(deterministic=True)
    one = search(model, tmp_path, dataclasses.replace(OPTIONS, score=score, method=method))
    one.run()
    assert sum(done) == sum(planned) > 0
    with ItemStore(tmp_path / "run" / MEASUREMENTS) as store:
        assert gauge_module.Gauge(model, one.searched, store, one.items["search"], Counted(False)).num_parts("loss") > 1
    planned.clear()
    done.clear()
    search(model, tmp_path, dataclasses.replace(OPTIONS, score=score, method=method)).run()
    assert sum(done) == sum(planned) == 0, "all is there"


def test_the_frontier_stands_beside_static_rules(tmp_path: Path) -> None:
    model = with_useless_layer(3)
    one = search(model, tmp_path, dataclasses.replace(OPTIONS, budgets=(5, 2), score="agreement"))
    result = one.run()
    by_labels = {(row["metric"], row["family"], row["budget"]): row for row in result.rows}
    metrics = ("nats", "agreement")
    wanted = {(metric, family, budget) for metric in metrics for family in FAMILIES for budget in (5, 2)}
    assert set(by_labels) == wanted | {(metric, "full", 6) for metric in metrics}
    full, found = by_labels["nats", "full", 6], by_labels["nats", "found", 5]
    assert found["value"] == pytest.approx(full["value"], abs=1e-5) and found["layers"] == [0, 1, 2, 4, 5]
    assert by_labels["agreement", "uniform", 5]["value"] < 1.0
    assert all(row["low"] <= row["value"] <= row["high"] for row in result.rows)
    assert by_labels["agreement", "full", 6]["value"] == by_labels["agreement", "found", 5]["value"] == 1.0
    assert full["value"] == pytest.approx(nats_by_hand(model, FULL, one.judged), rel=1e-4)
    assert json.loads((tmp_path / "run" / RESULT).read_text())["rows"] == result.rows
    text = table(result.rows, FAMILIES)
    assert "nats a response token; at full depth" in text and f"{found['value']:.3f} [" in text
    pytest.importorskip("matplotlib")
    drawn = figure(result.rows, FAMILIES)
    assert drawn.startswith("<svg") and all(family in drawn for family in FAMILIES)


def test_both_kinds_of_draft_entries_are_searched(tmp_path: Path) -> None:
    model = with_useless_layer(3)
    options = dataclasses.replace(OPTIONS, score="speed", budgets=(5, 1))
    result = search(model, tmp_path, options).run()
    metrics = {row["metric"] for row in result.rows}
    assert metrics == {"nats", "agreement", "agreement_path", "gain_own", "gain_path"}
    draft = result.found.draft
    assert draft is not None and draft.agreement == 1.0 and draft.layers == (0, 1, 2, 4, 5)
    # Without the layer that does nothing a draft is always right.
    gains = DraftGains(costs())
    assert draft.gain == pytest.approx(gains.gain(Draft(LayerPath.of(6, draft.layers), draft.entries), 1.0), abs=1e-4)
    assert not result.found.layers, "the paths of a search for a draft are not the paths that texts want"
    served = engine(model=model)
    served.add_request([5, 6], SamplingParams(max_tokens=8, ignore_eos=True), draft="auto")
    [output] = served.run()
    assert output.draft == Draft(LayerPath.of(6, draft.layers), draft.entries)


def test_a_draft_that_does_not_pay_is_none(tmp_path: Path) -> None:
    model = tiny_model()
    result = search(model, tmp_path, dataclasses.replace(OPTIONS, score="speed", budgets=(5,))).run()
    assert result.found.draft is None and result.found.searched_draft
    assert result.found.conditions["draft"]["costs"], "on which device it does not pay"
    [output] = Generation(model, [[5, 6]], [SamplingParams(max_tokens=4)], draft="auto").engine.run()
    assert output.draft is None and output.num_drafted == 0


def test_what_a_search_has_left_is_read_once_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_useless_layer(3)
    served = engine(model=model)
    with pytest.raises(ValueError, match="find_draft: model must have paths that a search has found"):
        served.add_request([5, 6], draft="auto")
    search(model, tmp_path, dataclasses.replace(OPTIONS, score="speed", budgets=(5,))).run()
    looks, find = [], causal_lm.find_found_paths
    monkeypatch.setattr(causal_lm, "find_found_paths", lambda *args: looks.append(1) or find(*args))
    for _ in range(3):
        served.add_request([5, 6], SamplingParams(max_tokens=4, ignore_eos=True), draft="auto")
    drafts = [output.draft for output in served.run()]
    assert len(looks) == 1 and len(drafts) == 3
    assert all(draft is not None and draft.agreement == 1.0 for draft in drafts), "what is believed of it at first"


def test_a_beginning_gains_more_where_verifications_go_on_behind_it() -> None:
    exit_draft, other = Draft(LayerPath.early_exit(6, 2)), Draft(LayerPath.of(6, [1, 3]))
    plain, resuming = DraftGains(costs()), DraftGains(costs(), resumes=True)
    assert resuming.gain(other, 0.8) == plain.gain(other, 0.8) == plain.gain(exit_draft, 0.8)
    few = dataclasses.replace(
        StepCosts.modelled("slow", MachineSpeed(1000.0, 1.0)), num_layers=6
    )  # each row costs as much as all
    assert DraftGains(few, resumes=True).gain(exit_draft, 0.8) > DraftGains(few).gain(exit_draft, 0.8)


def test_searches_add_to_what_was_found(tmp_path: Path) -> None:
    model = with_useless_layer(2)
    search(model, tmp_path, dataclasses.replace(OPTIONS, score="speed", budgets=(5,))).run()
    with pytest.raises(ValueError, match=r"LayerPath.found: budget must be one that was searched \(none\), got 4"):
        LayerPath.found(model, 4)
    search(model, tmp_path, dataclasses.replace(OPTIONS, budgets=(4,))).run()
    search(model, tmp_path, dataclasses.replace(OPTIONS, budgets=(3,))).run()
    found = model.found_paths
    assert found is not None and sorted(found.layers) == [3, 4, 5] and found.draft is not None
    assert set(found.conditions) == {"paths", "draft"}


def test_a_model_in_a_folder_has_its_paths_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    model = CausalLM.from_pretrained(folder, dtype=torch.float32, backend="torch")
    result = search(model, tmp_path).run()
    assert result.kept == folder / FOUND_PATHS and not (tmp_path / "cache").exists()
    assert LayerPath.found(folder, 4) == LayerPath.found(str(folder), 4) == LayerPath.found(model, 4)
    halves = CausalLM.from_pretrained(folder, dtype=torch.bfloat16, backend="torch")
    assert halves.found_paths == model.found_paths, "the same weights in another dtype"
    other = result.found.weights.replace(result.found.weights[0], "x")
    dataclasses.replace(result.found, weights=other).write(folder / FOUND_PATHS)
    with pytest.raises(
        ValueError, match=r"found_paths: .*found-paths.json must be of the weights beside it, got one of"
    ):
        _ = model.found_paths


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "luck"}, r"search: score must be one of loss, agreement, speed, got 'luck'"),
        ({"method": "luck"}, r"search: method must be one of influence, greedy, swap, got 'luck'"),
        ({"budgets": (6,)}, r"search: budgets must lie in 1\.\.5, got 6"),
        ({"budgets": ()}, r"search: budgets must name at least one, got none"),
        ({"num_rows": 0}, r"search: rows must be at least 1"),
        ({"num_rows": 400}, r"draw_conversations: rows must hold 404 .*, got 40\."),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        search(tiny_model(), tmp_path, dataclasses.replace(OPTIONS, **options))


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    found = FoundPaths("ab", 6, {5: (0, 1, 2, 3, 4), 1: (2,)}, conditions={"paths": {"seed": 1}})
    found.write(path)
    assert FoundPaths.read(path) == found
    for broken in ('{"format": 2}', "[]", path.read_text().replace("[ 2 ]", "[7]"), "{"):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(ValueError, match=r"FoundPaths.read: path must hold found paths of format 1, got .*broken"):
            FoundPaths.read(tmp_path / "broken.json")
    assert data_file(tmp_path).exists()
