"""``dynskip search`` from the command line, on a folder with a tiny model."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import tiny_hf, word_tokenizer
from searches import data_file

from dynskip.cli import main
from dynskip.cli.search import add_options
from dynskip.found import FOUND_PATHS, FoundDraft, FoundPaths
from dynskip.search.methods import METHODS
from dynskip.search.run import FIGURE, RESULT, SCORES


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model in ``model``, its data in ``rows.json``, and a cache of its own."""
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("DYNSKIP_CACHE", str(tmp_path / "cache"))
    tiny_hf().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    data_file(tmp_path)
    return tmp_path


def search(folder: Path, *options: str) -> int:
    rows = ["--rows", "3", "--judge-rows", "3", "--dtype", "float32", "--backend", "torch"]
    return main(["search", str(folder / "model"), "--data", str(folder / "rows.json"), *rows, *options])


def test_a_search_prints_the_frontier_and_generate_takes_the_path(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    assert search(folder, "--budget", "3,5", "--out", str(folder / "run")) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[1].split() == ["layers", "found", "uniform", "exit", "random"]
    assert [line.split()[0] for line in lines[2:4]] == ["5", "3"]
    assert [line.split()[0] for line in lines if line.startswith("found:")] == ["found:5", "found:4", "found:3"]
    assert json.loads((folder / "run" / RESULT).read_text())["rows"]
    assert (folder / "run" / FIGURE).read_text().startswith("<svg")
    assert (folder / "model" / FOUND_PATHS).is_file()
    arguments = ["--model", str(folder / "model"), "--dtype", "float32", "--json", "--max-tokens", "2"]
    assert main(["generate", *arguments, "--path", "found:3", "w005 w006"]) == 0
    output = json.loads(capsys.readouterr().out)
    found = json.loads((folder / "model" / FOUND_PATHS).read_text())
    assert output["layers"] == found["layers"]["3"] and len(output["layers"]) == 3
    assert main(["generate", *arguments, "--path", "found:2", "w005 w006"]) == 2
    assert "budget must be one that was searched (3, 4, 5), got 2" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:No costs were measured")
def test_a_search_for_a_draft_says_what_it_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search(folder, "--score", "speed", "--all", "--method", "influence") == 0
    out = capsys.readouterr().out
    assert "gain as a draft that reads the full path's entries, predicted" in out and "\ndraft: " in out
    assert list((folder / "cache/search").iterdir()), "measures are kept where no folder is given"
    assert "found:" not in out
    arguments = ["generate", "--model", str(folder / "model"), "--dtype", "float32", "--max-tokens", "3", "w005 w006"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    found = FoundPaths.read(folder / "model" / FOUND_PATHS)
    one = FoundDraft((0, 1, 2, 4), "own", 0.9, 1.2, "cpu")
    replace(found, draft=one).write(folder / "model" / FOUND_PATHS)
    assert main([*arguments, "--draft", "auto"]) == 0
    printed = capsys.readouterr()
    assert printed.out == text and printed.err == "dynskip generate: draft 4/6 layers {0-2,4}, own entries\n"
    assert main([*arguments, "--draft", "auto", "--path", "exit:4"]) == 0
    assert (
        capsys.readouterr().err
        == "dynskip generate: no draft: it is searched for all layers, and no prompt runs them\n"
    )
    replace(found, draft=None).write(folder / "model" / FOUND_PATHS)
    assert main([*arguments, "--draft", "auto"]) == 0
    printed = capsys.readouterr()
    assert printed.out == text and printed.err == "dynskip generate: no draft: the search has found none that pays\n"


def test_scores_and_methods_are_those_of_the_search() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    choices = {action.dest: tuple(action.choices) for action in parser._actions if action.choices}
    assert choices["score"] == tuple(SCORES) and choices["method"] == METHODS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "3,x"], "--budget must be layer counts with commas between, got '3,x'"),
        (["--budget", "9"], "budgets must lie in 1..5, got 9"),
        (["--budget", "3", "--all"], "not allowed with argument"),
        (["--rows", "400", "--budget", "3"], "rows must hold 403 without input"),
        (["--score", "luck"], "invalid choice: 'luck'"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search(folder, *options) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_the_data_file_is_looked_for_before_the_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["search", str(folder / "no-such-model"), "--budget", "3", "--data"]
    for path in (folder / "no-such-file.json", folder):
        assert main([*arguments, str(path)]) == 2
        assert capsys.readouterr().err == (
            f"dynskip search: error: --data must name a file, got {str(path)!r}. Check the path.\n"
        )
    assert main([*arguments, str(folder / "rows.json")]) == 2
    assert "no-such-model" in capsys.readouterr().err
