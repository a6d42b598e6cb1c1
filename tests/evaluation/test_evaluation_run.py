"""Sweeps in a folder: they survive kills, repeat, refuse another setup, and say what they will take."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from evaluation_models import arguments, item_lines, save_checkpoint, save_data, tiny_setup
from families import FAMILIES, family_hf
from models import tiny_hf, tiny_model

from dynskip.assets import opt_mini_directory
from dynskip.causal_lm import OPTForCausalLM
from dynskip.cli import main
from dynskip.evaluation.registry import EXPERIMENTS, run_item
from dynskip.evaluation.run import EvalRun, duration, num_parameters
from dynskip.evaluation.sweep.context import Context
from dynskip.evaluation.sweep.store import ItemStore
from dynskip.evaluation.tasks.generations import generate_items, read_generations

pytest.importorskip("datasets", reason="datasets is not installed")
pytest.importorskip("rouge_score", reason="rouge-score is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a sibling and data."""
    directory = tmp_path_factory.mktemp("sweep")
    tiny_setup(directory)
    save_checkpoint(directory / "sibling", seed=1)
    save_checkpoint(directory / "full", seed=2)
    return directory


def lines(out: Path) -> list[dict[str, Any]]:
    return item_lines(out / "items")


# Runs the command in children that it kills once they have finished a few more items and a random moment has passed,
# until it has killed often enough; the last one ends by itself. It imports once and forks before anything has computed,
# so that each start takes no seconds.
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
import dynskip.evaluation.run, dynskip.cli.eval
import datasets, rouge_score.rouge_scorer, transformers.models.opt.modeling_opt
from dynskip.cli import main
arguments, num_kills = json.loads(sys.argv[1]), int(sys.argv[2])
draw = random.Random(int(sys.argv[3]))
items = Path(arguments[arguments.index("--out") + 1]) / "items"

def start():
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        os._exit(main(arguments))
    return child

def finished():
    files = [path for path in items.glob("*.jsonl") if path.name.count(".") == 1]
    return sum(path.read_bytes().count(b"\\n") for path in files)

for _ in range(num_kills):
    wanted, child = finished() + draw.randint(0, 2), start()
    while finished() < wanted:
        ended, status = os.waitpid(child, os.WNOHANG)
        assert not ended, f"over before it was killed: {status}"
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
status = os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1])
assert status == 0, status
"""


@pytest.mark.parametrize("seed", [0])
def test_killed_at_random_moments_the_same_command_finishes_without_loss(
    folder: Path, tmp_path: Path, seed: int
) -> None:
    command = arguments(folder, tmp_path / "killed", experiment="oracle")
    driver = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps(command), "6", str(seed)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert driver.returncode == 0, driver.stderr
    assert main(arguments(folder, tmp_path / "whole", experiment="oracle")) == 0
    killed, whole = lines(tmp_path / "killed"), lines(tmp_path / "whole")
    assert len({line["key"] for line in killed}) == len(killed) == len(whole)
    # Each item but the times is the same, bit for bit, as of a run that nobody killed.
    untimed = {line["key"]: line["result"] for line in whole if line["item"]["task"] != "time"}
    assert len(untimed) == len(whole) - 1 == 48
    assert untimed == {line["key"]: line["result"] for line in killed if line["item"]["task"] != "time"}
    assert (tmp_path / "killed" / "summary.json").exists()


def test_a_finished_run_does_nothing_again(folder: Path, tmp_path: Path) -> None:
    assert main(arguments(folder, tmp_path / "run")) == 0
    before = lines(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert main(arguments(folder, tmp_path / "run")) == 0
    assert lines(tmp_path / "run") == before
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert again["static"] == summary["static"]
    starts = [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "starts").iterdir())]
    assert len(starts) == 2 and starts[0]["versions"]["torch"] and starts[0]["host"]
    # Another experiment on the same generations adds what it lacks only.
    assert main(arguments(folder, tmp_path / "run", experiment="oracle")) == 0
    greedy = [line for line in lines(tmp_path / "run") if line["item"]["task"] == "generate"]
    assert sum(line["item"]["seed"] == 0 for line in greedy) == 12, "6 of them along paths of one depth"
    both = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert both["static"] == summary["static"] and both["oracle"]["n"] == 12


def test_a_run_of_another_setup_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    with EvalRun(tiny_setup(folder), out, progress=False):
        pass
    for changes, difference in (
        ({"max_tokens": 9}, "the run has max_tokens 8, not 9"),
        ({"temperature": 1.0, "seeds": 2}, "seeds 1, not 2; temperature 0.7, not 1.0"),
    ):
        with pytest.raises(ValueError, match="the setup must be that of the run") as caught:
            EvalRun(tiny_setup(folder, **changes), out)
        assert difference in str(caught.value)
    assert main([*arguments(folder, out), "--top-p", "0.5"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("dynskip eval: error: eval: the setup must be that of the run") and "top_p 1.0, not" in error
    )
    # A moved model is the same model.
    moved = tmp_path / "moved"
    save_checkpoint(moved)
    (moved / "model").mkdir()
    for file in moved.glob("*.*"):
        file.rename(moved / "model" / file.name)
    (moved / "data.json").write_bytes((folder / "data.json").read_bytes())
    with EvalRun(tiny_setup(moved), out, progress=False):
        pass


def test_budgets_and_labels_may_come_and_none_goes(folder: Path, tmp_path: Path) -> None:
    out, labels = tmp_path / "run", tmp_path / "labels.jsonl"
    labels.write_text("{}\n", encoding="utf-8")
    (tmp_path / "other.jsonl").write_text("[]\n", encoding="utf-8")
    for options in ({"budgets": (2,)}, {"budgets": (2, 3), "labels": labels, "label_prompts": 7}):
        with EvalRun(tiny_setup(folder, **options), out, progress=False):
            pass
    for changes, difference in (
        ({"budgets": (3,)}, "the run has budgets [2, 3], not [3]"),
        ({"labels": None}, "not None"),
        ({"labels": tmp_path / "other.jsonl"}, "the run has labels_hash"),
        ({"label_prompts": 8}, "the run has label_prompts 7, not 8"),
    ):
        with pytest.raises(ValueError, match="the setup must be that of the run") as caught:
            EvalRun(tiny_setup(folder, **{**options, **changes}), out)
        assert difference in str(caught.value)


def test_items_without_their_config_are_refused(folder: Path, tmp_path: Path) -> None:
    setup = tiny_setup(folder)
    with EvalRun(setup, tmp_path, progress=False) as evaluation:
        item = generate_items(setup, setup.checkpoint, ["full"])[0]
        evaluation.store.add(item, {"rows": []}, 1.0)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"must hold the config\.json of its items"):
        EvalRun(setup, tmp_path)


def test_a_full_disk_ends_a_run_in_one_line_and_the_rest_is_done_later(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    real_add = ItemStore.add
    count = 0

    def full_after_three(store: ItemStore, *args: Any) -> None:
        nonlocal count
        count += 1
        if count > 3:
            monkeypatch.setattr(os, "write", no_space)
        try:
            real_add(store, *args)
        finally:
            monkeypatch.setattr(os, "write", real_write)

    real_write = os.write

    def no_space(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ItemStore, "add", full_after_three)
    assert main(arguments(folder, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "make room" in error and len(error.splitlines()) == 1
    monkeypatch.undo()
    assert len(lines(tmp_path / "run")) == 3
    assert main(arguments(folder, tmp_path / "run")) == 0
    assert len({line["key"] for line in lines(tmp_path / "run")}) == len(lines(tmp_path / "run")) == 32


def test_seeds_repeat_and_differ(folder: Path) -> None:
    setup = tiny_setup(folder)
    first, again = Context(setup), Context(setup)
    paths = ["uniform:2", "full"]
    for seed in (0, 1):
        item = generate_items(setup, setup.checkpoint, paths, seed=seed)[0]
        assert run_item(item, first) == run_item(item, again)
    one, two = (run_item(generate_items(setup, setup.checkpoint, paths, seed=seed)[0], first) for seed in (1, 2))
    assert one["paths"]["full"]["token_ids"] != two["paths"]["full"]["token_ids"]


def test_generations_are_those_of_each_prompt_alone(folder: Path, tmp_path: Path) -> None:
    """What shares a batch, and in which order, changes nothing: greedy texts in float32 are those of a batch of one."""
    from dynskip import LLM, LayerPath, SamplingParams
    from dynskip.evaluation.tasks.generations import rouge_l

    setup = tiny_setup(folder)
    context = Context(setup)
    items = generate_items(setup, setup.checkpoint, ["uniform:2", "full"])
    with ItemStore(tmp_path / "items") as store:
        for item in items:
            store.add(item, run_item(item, context), 1.0)
        generations = read_generations(store, items)
        tokens = [ids for item in items for ids in store.token_ids(item)["paths"]["uniform:2"]["token_ids"]]
    llm = context.llm(setup.checkpoint.hash)
    assert isinstance(llm, LLM) and generations.rouge_l.shape == (12, 2)
    for row, ids, score in zip(
        context.prompts(setup.checkpoint.hash, "test").rows,
        tokens,
        generations.along(["uniform:2"]).rouge_l,
        strict=True,
    ):
        (alone,) = llm.generate([list(row.prompt_ids)], SamplingParams(max_tokens=8), LayerPath.uniform(6, budget=2))
        assert alone.token_ids == ids
        assert rouge_l([row.reference], [alone.text or ""])[0] == pytest.approx(score[0], abs=1e-6)


def test_the_sections_of_all_families(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    siblings = ["--sibling", f"2={folder / 'sibling'}", "--sibling", f"6={folder / 'full'}"]
    for experiment in ("static", "oracle", "hidden-states"):
        assert main(arguments(folder, tmp_path, *siblings, experiment=experiment)) == 0
    out = capsys.readouterr().out
    assert "oracle: With one set of weights, several paths, the oracle matches full depth at a mean of" in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name in ("static", "oracle", "hidden_states"):
        section = summary[name]
        assert section["n"] == 12 and section["notes"] and "statements" not in section
        for row in section["rows"]:
            assert row["low"] is None or row["high"] is None or row["low"] <= row["high"], row
    static = {
        (row["family"], row["budget"]): row["value"] for row in summary["static"]["rows"] if row["metric"] == "rouge_l"
    }
    assert set(static) == {
        *(("paths", budget) for budget in (2, 4, 6)),
        *(("siblings", budget) for budget in (2, 6)),
        *(("untuned", budget) for budget in (2, 4, 6)),
    }
    assert static["siblings", 6] == static["untuned", 6]
    oracle = summary["oracle"]
    assert {row["family"] for row in oracle["rows"]} == {"paths", "siblings"}
    means = {(row["family"], row["budget"]): row["value"] for row in oracle["rows"] if row["metric"] == "mean"}
    assert means == {key: static[key] for key in means} and len(means) == 4
    assert all(len(curve["budgets"]) == len(curve["values"]) == 401 for curve in oracle["curves"])
    assert {row["weights"] for row in summary["hidden_states"]["rows"]} == {"paths", "full-tuned"}
    of_weights = summary["hidden_states"]["notes"][-2:]
    assert "full-tuned: the sibling of 6 layers, tuned at full depth only" in of_weights[0]
    assert of_weights[1].startswith("The siblings of 2 layers are not compared")
    conditions = summary["conditions"]
    assert conditions["num_layers"] == 6 and conditions["left_out"] == {"empty response": 0, "too long": 0}
    assert conditions["versions"]["torch"] and conditions["split_sizes"]["test"] == 12


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
def test_checkpoints_of_other_architectures_are_scored(family: str, folder: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", family=family)
    save_data(tmp_path / "data.json")
    out = tmp_path / "out"
    assert main(arguments(tmp_path, out)) == 0
    assert main(arguments(tmp_path, out, experiment="hidden-states")) == 0
    summary = json.loads((out / "summary.json").read_text())
    conditions = summary["conditions"]
    hf_model = family_hf(family)
    assert conditions["num_parameters"] == sum(parameter.numel() for parameter in hf_model.parameters())
    assert conditions["hidden_size"] == 32 and conditions["max_positions"] == (2048 if family == "bloom" else 64)
    generated = [line for line in lines(out) if line["item"]["task"] == "generate"]
    assert generated and all(line["result"] for line in generated)


@pytest.mark.parametrize("variant", ["pre-norm", "post-norm-projected", "untied"])
def test_a_tied_head_counts_once(variant: str) -> None:
    parameters = tiny_hf(variant).parameters()  # yields a tied head once
    assert num_parameters(tiny_model(variant)) == sum(parameter.numel() for parameter in parameters)


def test_opt_mini_has_as_many_parameters_as_its_pages_say() -> None:
    count = num_parameters(OPTForCausalLM.from_pretrained("opt-mini"))
    assert count == 11_562_240
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"opt-mini ({count / 1e6:.1f} M parameters" in readme
    assert f"opt-mini has {count / 1e6:.1f} M parameters" in readme
    assert f"{count / 1e6:.1f} million parameters" in (opt_mini_directory() / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="finds its processes the way Linux names them")
def test_workers_end_with_a_killed_parent_and_give_what_one_process_gives(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = arguments(folder, tmp_path / "run", "--workers", "2", experiment="oracle")
    parent = subprocess.Popen([sys.executable, "-m", "dynskip", *command], stderr=subprocess.DEVNULL)
    process = psutil.Process(parent.pid)
    deadline = time.monotonic() + 120
    while not lines(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = process.children(recursive=True)
    assert workers, "the run was over before it had workers"
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    capfd.readouterr()
    assert main(command) == 0
    assert capfd.readouterr().err == "", "--quiet holds for workers, too"
    assert main(arguments(folder, tmp_path / "one", experiment="oracle")) == 0
    shared, one = lines(tmp_path / "run"), lines(tmp_path / "one")
    assert len({line["key"] for line in shared}) == len(shared) == len(one) == 49
    untimed = {line["key"]: line["result"] for line in one if line["item"]["task"] != "time"}
    assert untimed == {line["key"]: line["result"] for line in shared if line["item"]["task"] != "time"}


def test_an_estimate_comes_first(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with EvalRun(tiny_setup(folder), tmp_path, progress=True) as evaluation:
        evaluation.run(["static"])
        error = capsys.readouterr().err
        assert error.index("static: 11 items to do, time not known yet (0 are done)") < error.index("11/11 items")
        # Finished items tell how long others of their kinds take.
        items = dict.fromkeys(EXPERIMENTS["static"].plan(evaluation.setup, evaluation.store))
        kinds = Counter(item.kind for item in items)
        assert re.fullmatch(r"about \d+ s", evaluation._time_left(kinds, num_workers=1))
        new = dataclasses.replace(next(iter(items)), path="uniform:1")
        kinds[new.kind] += 1
        assert evaluation._time_left(kinds, num_workers=1).endswith(" s and 1 of kinds not timed yet")
    assert "static: 11 items to do" in (tmp_path / "log.txt").read_text()
    assert [duration(seconds) for seconds in (0.2, 80, 600, 9000)] == ["1 s", "80 s", "10 min", "2.5 h"]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--budgets", "2,9"], "budgets must lie in 1..6, the layers of the model, got 9"),
        (["--budgets", "two"], "--budgets must be layer counts with commas between, got 'two'"),
        (["--sibling", "x=y"], "--sibling must be BUDGET=NAME, each budget once, got 'x=y'"),
        (["--prompts", "13"], "prompts must be at most the 12 rows of the split that can be scored, got 13"),
        (["--workers", "0"], "workers must be at least 1, got 0"),
        (["--template", "long"], "template must be one of alpaca, chat, short, got 'long'"),
    ],
)
def test_mistakes_end_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], complaint: str
) -> None:
    assert main([*arguments(folder, tmp_path), *more]) == 2
    error = capsys.readouterr().err
    assert complaint in error and len(error.splitlines()) == 1


def test_an_unknown_experiment_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, tmp_path, experiment="everything")) == 2
    assert "EXPERIMENT must be all or one of oracle, hidden-states, static" in capsys.readouterr().err
    assert not (tmp_path / "config.json").exists()
