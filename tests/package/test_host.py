"""What is said of the machine, and of the state that runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dynskip import host


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model name": "AMD EPYC", "cpu family": "25", "model": "17"}, "AMD EPYC (family 25, model 17)"),
        ({"model name": "AMD EPYC 9B14", "cpu family": "25", "model": "17"}, "AMD EPYC 9B14"),
        ({"model name": "Neoverse"}, "Neoverse"),
    ],
)
def test_a_name_without_a_number_gets_one(
    fields: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "cpu_fields", lambda: fields)
    assert host.cpu_model() == expected


def test_without_fields_the_platform_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_fields() -> dict[str, Any]:
        return {}

    monkeypatch.setattr(host, "cpu_fields", no_fields)
    monkeypatch.setattr(host.platform, "processor", lambda: "")
    monkeypatch.setattr(host.platform, "machine", lambda: "riscv")
    assert host.cpu_model() == "riscv"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_commit_says_whether_code_differs_from_it_and_nothing_of_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(host, "__file__", str(tmp_path / "dynskip" / "host.py"))
    assert host.commit() is None
    files = ("dynskip/host.py", "bench/peers/run.py", "bench/drafts.py", "bench/results/drafts/a.jsonl", "README.md")
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before", encoding="utf-8")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    clean = host.commit()
    assert clean is not None and len(clean) == 12
    for name, is_code in zip(files, (True, True, True, False, False), strict=True):
        (tmp_path / name).write_text("after", encoding="utf-8")
        assert host.commit() == clean + "+" * is_code, name
        git("checkout", "-q", "--", name)
