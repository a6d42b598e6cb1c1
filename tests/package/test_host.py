"""What is said of the machine."""

from __future__ import annotations

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
