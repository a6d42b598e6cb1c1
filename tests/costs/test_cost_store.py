"""Measured costs in the user's cache, whatever state it is in: nothing there keeps an engine from starting."""

from __future__ import annotations

import json
import os
import pwd
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
from models import NUM_LAYERS, tiny_model

from dynskip import Engine, OPTForCausalLM, SamplingParams
from dynskip.cli import main
from dynskip.costs.defaults import UnmeasuredCostsWarning, default_costs
from dynskip.costs.step_costs import StepCosts
from dynskip.costs.store import CostCacheWarning, cached_path, device_key, load_cached, shape_key
from dynskip.files import cache_folder

COSTS = replace(StepCosts.h200(), num_layers=NUM_LAYERS, draft_ratios={4: (1.5, 1.25)})
DEVICE, SHAPE = "a-device", f"l{NUM_LAYERS}-c32-f64-v101-float32"
CALIBRATE = ["calibrate", "--model", "opt-mini", "--rows", "1", "--prompt-len", "2", "--context", "4", "--prefill", "4"]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the costs of `SHAPE` are kept, in a cache that is empty."""
    monkeypatch.setenv("DYNSKIP_CACHE", str(tmp_path / "cache"))
    path = cached_path(DEVICE, SHAPE)
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without $HOME and without an entry in the password database, as containers have."""

    def unknown(user_id: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {user_id}")

    for name in ("HOME", "DYNSKIP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def generates(model: OPTForCausalLM) -> None:
    """An engine for the model starts with predicted costs, and works."""
    engine = Engine(model, batch=2)
    engine.add_request([5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(engine.run()[0].token_ids) == 3
    engine.close()


def changed(**values: object) -> str:
    """The text of a file of costs in which some values are others."""
    path = Path(os.environ["DYNSKIP_CACHE"]) / "whole.json"
    COSTS.write(path)
    return json.dumps(json.loads(path.read_text()) | values)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"null",
        b'{"format": 0}',
        b'{"format": 1}',
        b"\x80\x02binary",
        b"[" * 100_000,
    ],
)
def test_a_foreign_file_is_named_and_passed_over(text: bytes, kept: Path) -> None:
    kept.write_bytes(text)
    with pytest.warns(CostCacheWarning, match="Remove the file and run `dynskip calibrate`") as caught:
        assert load_cached(DEVICE, SHAPE) is None
    assert f"The costs in {kept} cannot be used (" in str(caught[0].message)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", 2),
        ("num_layers", str(NUM_LAYERS)),
        ("num_layers", 0),
        ("num_layers", NUM_LAYERS + 1),
        ("step_ms", None),
        ("step_ms", float("nan")),
        ("prefill_step_ms", -1.0),
        ("draft_ratios", {"4": [1.0]}),
        ("draft_ratios", {"4": [1.0, 0.0]}),
        ("draft_ratios", {"four": [1.0, 1.0]}),
        ("draft_ratios", {"0": [1.0, 1.0]}),
        ("decode", {}),
        ("prefill", {"layer": {"num_rows": [1.5], "ms": [1]}, "head": {"num_rows": [1], "ms": [1]}}),
        ("unheard_of", 1),
    ],
)
def test_a_file_with_a_wrong_value_is_passed_over(name: str, value: object, kept: Path) -> None:
    kept.write_text(changed())
    assert load_cached(DEVICE, SHAPE) == COSTS
    kept.write_text(changed(**{name: value}))
    with pytest.warns(CostCacheWarning):
        assert load_cached(DEVICE, SHAPE) is None


def test_an_engine_starts_beside_a_foreign_file(kept: Path) -> None:
    model = tiny_model()
    path = cached_path(device_key(), shape_key(model.decoder_config, "float32"))
    path.parent.mkdir(parents=True)
    path.write_text("")
    with pytest.warns(UnmeasuredCostsWarning), pytest.warns(CostCacheWarning):
        generates(model)


def test_a_folder_in_the_place_of_the_file_is_passed_over(kept: Path) -> None:
    kept.mkdir()
    with pytest.warns(CostCacheWarning, match="Is a directory"):
        assert load_cached(DEVICE, SHAPE) is None


def test_a_file_in_the_place_of_a_folder_holds_no_costs(kept: Path) -> None:
    kept.parent.rmdir()
    kept.parent.write_text("")
    assert load_cached(DEVICE, SHAPE) is None


def test_a_cache_that_is_closed_to_the_user_is_passed_over(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path, **options: object) -> NoReturn:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", closed)
    with pytest.warns(CostCacheWarning, match=r"\(Permission denied\).*Set DYNSKIP_CACHE to a folder of your own"):
        assert load_cached(DEVICE, SHAPE) is None


@pytest.mark.usefixtures("homeless")
def test_without_a_home_an_engine_works_with_predicted_costs() -> None:
    with pytest.warns(UnmeasuredCostsWarning):
        assert default_costs(tiny_model()).predicted
    with pytest.warns(UnmeasuredCostsWarning):
        generates(tiny_model())
    with pytest.raises(ValueError, match=r"cache_folder: the user must have a home, got none\. Set DYNSKIP"):
        cache_folder()


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("command", [CALIBRATE, ["simulate", "--device", "cpu"]])
def test_without_a_home_commands_say_where_to_keep_costs(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the user must have a home, got none. Set DYNSKIP_CACHE to a folder of your own." in error


def test_calibrate_says_before_it_measures_that_it_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DYNSKIP_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("dynskip.measure.calibration.measure_step_costs", lambda *_, **__: pytest.fail("measured"))
    assert main([*CALIBRATE, "--quiet"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert "must be a file that can be written, got: " in error and "Set DYNSKIP_CACHE to a folder" in error
    monkeypatch.setenv("DYNSKIP_CACHE", str(tmp_path / "cache"))
    assert main([*CALIBRATE, "--quiet", "--out", str(tmp_path / "file" / "costs.json")]) == 2
    assert "--out to a file" in capsys.readouterr().err


def test_a_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DYNSKIP_CACHE", "~/costs")
    assert cache_folder() == tmp_path / "costs"
