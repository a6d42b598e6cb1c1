"""The table of depths: the files that it is read from, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from api import NAME
from models import NUM_LAYERS, tiny_model

from dynskip import CausalLM, LayerPath
from dynskip.assets import FOUND_PATHS_FOLDER
from dynskip.found import FoundDraft, FoundPaths
from dynskip.serving.depths import DepthTable
from dynskip.serving.errors import APIError
from dynskip.speculation.draft import Draft


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return tiny_model()


def written(folder: Path, text: str) -> Path:
    """A file with that text."""
    file = folder / "paths"
    file.write_text(text, encoding="utf-8")
    return file


def found(num_layers: int = NUM_LAYERS) -> FoundPaths:
    """What a search might have left."""
    return FoundPaths(
        "digest", num_layers, {4: (0, 1, 2, 5), 2: (0, 5)}, FoundDraft((0, 5), "own", 0.8, 1.2, "cpu"), True
    )


def test_a_table_of_a_search_names_found_paths(model: CausalLM, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    found().write(file)
    table = DepthTable(model, NAME, file)
    assert {budget: named.name for budget, named in table.entries.items()} == {2: "found:2", 4: "found:4", 6: "full"}
    assert table.entries[4].path.layers == (0, 1, 2, 5)
    assert table.of(None, "found:2", None, None).named.path.layers == (0, 5)
    assert table.names == [NAME, f"{NAME}@2", f"{NAME}@4", f"{NAME}@6"]


def test_a_table_of_lines_may_have_notes(model: CausalLM, tmp_path: Path) -> None:
    table = DepthTable(model, NAME, written(tmp_path, "# shallow\n\n exit:3 \r\nuniform:1\n"))
    assert list(table.entries) == [1, 3, 6]
    assert table.entries[3].path == LayerPath.early_exit(NUM_LAYERS, 3)


def test_what_a_search_has_left_for_the_model_is_the_table(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "found_paths", found())
    table = DepthTable(model, NAME)
    assert list(table.entries) == [2, 4, 6]
    assert table.of(None, None, None, "auto").draft == Draft(LayerPath.of(NUM_LAYERS, [0, 5]))
    assert table.of(None, "uniform:3", None, "auto").draft is None
    assert table.of(None, None, None, "exit:2").draft == Draft(LayerPath.early_exit(NUM_LAYERS, 2))


def test_without_a_table_there_are_no_names_but_one(model: CausalLM) -> None:
    table = DepthTable(model, NAME)
    assert not table.entries
    assert table.names == [NAME]
    with pytest.raises(APIError, match="; smollm2-135m-instruct and smollm2-135m-paths come with some") as refused:
        table.of(f"{NAME}@4", None, None, None)
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")
    for path in ("found-paths/smollm2-135m-instruct.json", "smollm2-135m-paths/found-paths.json"):
        assert FoundPaths.read(FOUND_PATHS_FOLDER.parent / path).layers, "what the error says of them holds"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform:2\nexit:2\n", "must have a number of layers each, got exit:2 beside uniform:2"),
        ("\n# nothing\n", "must hold at least one path, got none"),
        ("uniform:9\n", "budget must lie in 1..6, got 9"),
        ("sideways\n", "path must be full, uniform:B"),
        ('{"format": 1}', "must hold found paths of format 1"),
        ("{", "must hold found paths of format 1"),
    ],
)
def test_a_bad_file_is_refused(model: CausalLM, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DepthTable(model, NAME, written(tmp_path, text))


def test_paths_of_another_model_are_refused(model: CausalLM, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    found(8).write(file)
    with pytest.raises(ValueError, match="must hold paths of 6 layers, got paths of 8"):
        DepthTable(model, NAME, file)


def test_a_bad_default_is_refused(model: CausalLM) -> None:
    with pytest.raises(ValueError, match="path must be full"):
        DepthTable(model, NAME, path="sideways")
    with pytest.raises(ValueError, match="must have paths that a search has found"):
        DepthTable(model, NAME, draft="auto")
