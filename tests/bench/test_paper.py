"""The committed run in pieces: what is unpacked, done and packed again, and how many rows a comparison needs."""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path
from typing import Any

import pytest
from evaluation_models import save_checkpoint, steered_setup, tiny_setup

from bench import paper
from dynskip.evaluation.report.write import write_report
from dynskip.evaluation.stats.intervals import DETECTABLE
from dynskip.evaluation.sweep.checkpoints import Checkpoint
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.sweep.training_curves import RUN
from dynskip.files import write_json
from dynskip.training.stage import write_curves

for package in ("datasets", "rouge_score", "sklearn", "scipy", "matplotlib"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install dynskip[eval]")


def lines_of(folder: Path) -> list[dict[str, Any]]:
    with lzma.open(folder / paper.PACKED, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def setup_in(folder: Path, rows: int) -> Setup:
    if not (folder / "before").exists():
        save_checkpoint(folder / "before", seed=1)
    changes = {"likelihood_prompts": rows, "rule_prompts": 4, "train_prompts": 4, "state_prompts": 4}
    return tiny_setup(folder, backbone=str(folder / "before"), likelihood_only=True, **changes)


def test_a_piece_starts_from_what_another_machine_has_committed(tmp_path: Path) -> None:
    committed = tmp_path / "committed"
    paper.run(setup_in(tmp_path, 4), ["static"], committed, tmp_path / "first", progress=False)
    few = lines_of(committed)
    # A longer run, in a new folder: the items of the shorter one are taken as they are.
    summary = paper.run(setup_in(tmp_path, 8), ["static", "depth"], committed, tmp_path / "second", progress=False)
    many = lines_of(committed)
    assert all(line in many for line in few) and len(many) > len(few)
    assert [json.dumps(line["item"], sort_keys=True) for line in many] == sorted(
        json.dumps(line["item"], sort_keys=True) for line in many
    )
    assert (summary["static"]["n_nats"], summary["depth"]["n_nats"]) == (8, 8)
    before = (committed / paper.PACKED).read_bytes()
    again = paper.run(setup_in(tmp_path, 8), ["static", "depth"], committed, tmp_path / "third", progress=False)
    assert (committed / paper.PACKED).read_bytes() == before, "nothing was missing, and the order is that of the items"
    assert again["static"] == summary["static"]
    for page in write_report(committed):
        text = page.read_text(encoding="utf-8")
        assert "Not run" in text and "the weights before any tuning" in text
    table = [line.split() for line in paper.power_table(summary).splitlines() if "nats - backbone" in line]
    assert [cells[7] for cells in table] == ["2", "4", "6"]


def test_what_a_killed_run_has_left_is_packed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed, work = tmp_path / "committed", tmp_path / "work"
    setup = setup_in(tmp_path, 8)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("dynskip.evaluation.experiments.static.summarise", interrupted)
        with pytest.raises(KeyboardInterrupt):
            paper.run(setup, ["static"], committed, work, progress=False)
    left = lines_of(committed)
    assert left and not (committed / "summary.json").exists()
    (committed / paper.PACKED).unlink()  # as after kill -9, which packs nothing
    paper.run(setup, ["static"], committed, work, progress=False)
    assert lines_of(committed) == left


def test_controllers_are_judged_without_texts_beside_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = tmp_path / "committed"
    draws = {
        "draws": 1,
        "likelihood_prompts": 8,
        "rule_prompts": 4,
        "timed_rounds": 2,
    }  # a run that may grow by prompts
    before = paper.run(
        tiny_setup(tmp_path, likelihood_only=True, **draws), ["static"], committed, tmp_path / "first", progress=False
    )
    few = lines_of(committed)
    setup = steered_setup(tmp_path, prompts=6, controller_prompts=4, controller_seeds=1, **draws)
    assert not setup.likelihood_only, "other pieces generate"
    summary = paper.run(setup, ["controllers"], committed, tmp_path / "second", progress=False)
    many = lines_of(committed)
    added = [line["item"] for line in many if line not in few]
    assert all(line in many for line in few)
    assert {item["task"] for item in added} == {"controlled-likelihood"}
    assert {item["options"]["controller"] for item in added} == {each.hash for each in setup.controllers}
    assert len(added) == len(setup.controllers) * 2, "likelier decisions, one draw"
    assert summary["static"] == before["static"] and summary["controllers"]["n_nats"] == 4
    assert summary["conditions"]["prompts"] == 6, "the texts of the other pieces"
    monkeypatch.setattr("sys.argv", ["paper", "--data", str(tmp_path / "data.json"), "controllers"])
    with pytest.raises(SystemExit, match="2"):
        paper.main()


def test_the_curves_of_all_trainings_are_one_file(tmp_path: Path) -> None:
    controllers = steered_setup(tmp_path).controllers
    trainings = {controller.label: controller.directory for controller in controllers}
    with pytest.raises(FileNotFoundError, match=r"curves\.csv"):
        paper.keep_curves(trainings, "controller", tmp_path / "all.csv")
    for place, controller in enumerate(controllers):
        write_curves(controller.directory, [{"step": 1, "loss": 2.5}, {"step": 1, "eval_loss": 2.0 + place}])
        write_json(controller.directory / RUN, {"config": {"num_steps": place}})
    paper.keep_controllers(controllers, tmp_path)
    names = [controller.label for controller in controllers]
    assert len(set(names)) == 2
    assert json.loads((tmp_path / paper.CONTROLLERS).read_text(encoding="utf-8")) == {
        controller.label: {"hash": controller.hash, "trained": {"num_steps": place}}
        for place, controller in enumerate(controllers)
    }
    assert (tmp_path / paper.CURVES).read_text(encoding="utf-8").splitlines() == [
        "controller,step,eval_loss,loss",
        *(line for place, name in enumerate(names) for line in (f'"{name}",1,,2.5', f'"{name}",1,{2.0 + place},')),
    ]


def test_one_sibling_leaves_what_is_known_of_the_others(tmp_path: Path) -> None:
    def trained(budget: int, loss: float) -> tuple[Path, Checkpoint]:
        run = tmp_path / f"{budget}-{loss}"
        (run / "adapter").mkdir(parents=True)
        config = {"method": "lora", "rank": 4, "num_steps": 1, "batch_size": 2, "learning_rate": loss, "adapter": None}
        write_json(run / RUN, {"config": config})
        (run / "training").mkdir()
        write_curves(run / "training", [{"step": 1, "loss": loss}])
        return run / "adapter", Checkpoint(run / "adapter", f"hash of {budget} at {loss}", 8)

    def keep(**trainings: tuple[Path, Checkpoint]) -> None:
        given = {int(name[1:]): folder for name, (folder, _) in trainings.items()}
        siblings = {**dict(paper.known_siblings(tmp_path)), **{int(k[1:]): each for k, (_, each) in trainings.items()}}
        paper.keep_siblings(given, tuple(siblings.items()), tmp_path)

    keep(b4=trained(4, 1.0), b6=trained(6, 2.0))
    keep(b6=trained(6, 3.0))
    known = dict(paper.known_siblings(tmp_path))
    assert {budget: each.hash for budget, each in known.items()} == {4: "hash of 4 at 1.0", 6: "hash of 6 at 3.0"}
    assert (tmp_path / paper.SIBLING_CURVES).read_text(encoding="utf-8").splitlines() == [
        "budget,step,loss", "4,1,1.0", "6,1,3.0",
    ]  # fmt: skip
    assert paper.trainings_of(tmp_path) == [
        "Siblings of 4 layers: adapters of rank 4, 1 steps of 2 rows, learning rate 1.",
        "Siblings of 6 layers: adapters of rank 4, 1 steps of 2 rows, learning rate 3.",
    ]


def test_each_section_has_its_own_rows_in_the_table_of_power() -> None:
    def row(family: str, detectable: float) -> dict[str, Any]:
        found = {"metric": "nats - full", "family": family, "budget": 6, "value": 0.5, "margin": 0.02}
        return {**found, "detectable": detectable, "verdict": "higher"}

    summary = {
        "conditions": {"margin_nats": 0.02},
        "static": {"n": 3, "n_nats": 100, "rows": [row("paths", 0.04)]},
        "siblings": {"n": 50, "rows": [row("paths", 0.01), row("siblings", 0.04)]},
    }
    lines = [line for line in paper.power_table(summary).splitlines() if "nats - full" in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [(each[1], each[3], each[6]) for each in cells] == [("paths", "100", "400"), ("siblings", "50", "200")]


def test_token_ids_and_features_are_not_committed(tmp_path: Path) -> None:
    with ItemStore(tmp_path / "work" / "items") as store:
        for task in ("generate", "features"):
            item = WorkItem(task, "c" * 16, "full", "d" * 16, "test", 0, 0)
            store.add(item, {"rouge_l": [0.5], "token_ids": [[1, 2, 3]]}, 1.0)
    assert paper.pack(tmp_path / "work", tmp_path / "committed") == 1
    (line,) = lines_of(tmp_path / "committed")
    assert line["result"] == {"rouge_l": [0.5]} and "apart" not in line


def test_items_of_controllers_that_are_not_given_go(tmp_path: Path) -> None:
    with ItemStore(tmp_path / "work" / "items") as store:
        for name in ("here", "gone", None):
            options = () if name is None else (("controller", name),)
            store.add(
                WorkItem("likelihood", "c" * 16, str(name), "d" * 16, "test", 0, 0, options), {"nats": [1.0]}, 1.0
            )
    assert paper.pack(tmp_path / "work", tmp_path / "all") == 3
    assert paper.pack(tmp_path / "work", tmp_path / "committed", ["here"]) == 2
    assert [line["item"]["path"] for line in lines_of(tmp_path / "committed")] == ["here", "None"]


@pytest.mark.parametrize(("seen", "needed"), [(0.02, 200), (0.04, 800), (0.01, 50), (None, None)])
def test_rows_grow_with_the_square_of_what_is_seen(seen: float | None, needed: int | None) -> None:
    row = {"margin": 0.02} if seen is None else {"margin": 0.02, "detectable": seen}
    assert paper.rows_needed(row, 200) == needed
    if seen == 0.02:  # by the textbook: (z of 0.975 + z of 0.8) standard deviations over the root of the rows
        deviation = seen * math.sqrt(200) / DETECTABLE
        assert math.ceil(round((DETECTABLE * deviation / 0.02) ** 2, 6)) == needed
