"""Each program of bench/ says how it is called."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
PROGRAMS = sorted(
    ".".join(path.relative_to(BENCH.parent).with_suffix("").parts)
    for path in BENCH.rglob("*.py")
    if all(part in path.read_text(encoding="utf-8") for part in ("ArgumentParser(", "\ndef main("))
)


assert "bench.paper" in PROGRAMS


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_says_how_it_is_called(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        program = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("bench", "dynskip"):
            raise
        pytest.skip(f"needs {error.name}")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as exit_status:
        program.main()
    assert exit_status.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")
