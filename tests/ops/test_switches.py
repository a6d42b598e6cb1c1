"""The environment variables that change how kernels are launched: what each does, and that none is passed over."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dynskip.cli import main
from dynskip.ops import native
from dynskip.validation.offline.compile_kernels import plan_jobs

configs: Any = pytest.importorskip("dynskip.kernels.configs", reason="triton is not installed")
launches: Any = pytest.importorskip("dynskip.kernels.launches", reason="triton is not installed")
switches: Any = pytest.importorskip("dynskip.kernels.switches", reason="triton is not installed")

CPU = torch.device("cpu")
TABLES = Path(__file__).resolve().parents[2] / "bench" / "gpu" / "tables"


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (switches.PDL, switches.CONFIGS, switches.CARVEOUT):
        monkeypatch.delenv(name, raising=False)


def test_kernels_overlap_unless_they_are_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    with launches.compile_only(90, lambda op, kernel: None):
        for value, expected in ((None, True), ("1", True), ("0", False)):
            if value is not None:
                monkeypatch.setenv("DYNSKIP_PDL", value)
            assert configs.pdl_options({"PDL": True}, CPU) == {"USE_PDL": expected, "launch_pdl": expected}
            assert not configs.pdl_options({"PDL": False}, CPU)["launch_pdl"]


@pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))
def test_planning_is_told_of_the_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(native, "_op", lambda name: lambda *arguments, **options: told.append(options))
    for _ in range(2):
        native.plan_rows(torch.ones(1, 1, dtype=torch.bool), *([None] * 14))  # type: ignore[arg-type]
        monkeypatch.setenv("DYNSKIP_PDL", "0")
        monkeypatch.setenv("DYNSKIP_CARVEOUT", "100")
    assert told == [{"overlaps": True, "carveout": -1}, {"overlaps": False, "carveout": 100}]


def test_a_table_takes_the_place_of_the_devices_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def num_warps() -> int:
        return int(configs.get_config("norm_rows", CPU, torch.float16, 3)["num_warps"])

    def table(warps: int) -> dict[str, Any]:
        entry = {"max_rows": None, "PDL": False, "num_warps": warps}
        return {"device": None, "capability": None, "measured": None, "ops": {"norm_rows": {"2": [entry]}}}

    path = tmp_path / "mine.json"
    path.write_text(json.dumps(table(16)))
    before = num_warps()
    monkeypatch.setenv("DYNSKIP_CONFIGS", str(path))
    assert num_warps() == 16 != before
    # Of what it leaves out the default is taken, and a table that code puts in place goes before it.
    assert configs.get_config("gate_rows", CPU, torch.float16, 3)["num_warps"] == 4
    with configs.use_configs(table(8)):
        assert num_warps() == 8
    assert num_warps() == 16
    monkeypatch.delenv("DYNSKIP_CONFIGS")
    assert num_warps() == before


def test_the_table_is_compiled_offline_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    path = TABLES / "tiles-32.json"
    own = [job.config_path for job in plan_jobs(("bfloat16",), (90,))]
    monkeypatch.setenv("DYNSKIP_CONFIGS", str(path))
    assert [job.config_path for job in plan_jobs(("bfloat16",), (90,))] == [*own, path]
    assert [job.config_path for job in plan_jobs(("bfloat16",), (90,), config_paths=tuple(own))] == own


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DYNSKIP_PDL", "off", "DYNSKIP_PDL must be 0 or 1, got 'off'"),
        ("DYNSKIP_PDL", "", "DYNSKIP_PDL must be 0 or 1, got ''"),
        ("DYNSKIP_CONFIGS", "no/such.json", r"DYNSKIP_CONFIGS must name a file, got 'no/such\.json'"),
        ("DYNSKIP_CONFIGS", "", "DYNSKIP_CONFIGS must name a file, got ''"),
        ("DYNSKIP_CONFIGS", str(TABLES), "DYNSKIP_CONFIGS must name a file, got"),
        ("DYNSKIP_CARVEOUT", "101", r"DYNSKIP_CARVEOUT must be 0\.\.100, got '101'"),
        ("DYNSKIP_CARVEOUT", "-1", r"DYNSKIP_CARVEOUT must be 0\.\.100, got '-1'"),
        ("DYNSKIP_CARVEOUT", "", r"DYNSKIP_CARVEOUT must be 0\.\.100, got ''"),
    ],
)
def test_nonsense_is_refused_where_it_is_used_and_by_info(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    used = {
        "DYNSKIP_PDL": lambda: native.plan_rows(torch.ones(1, 1, dtype=torch.bool), *([None] * 14)),  # type: ignore[arg-type]
        "DYNSKIP_CONFIGS": lambda: configs.get_config("norm_rows", CPU, torch.float16, 3),
        "DYNSKIP_CARVEOUT": switches.carveout,
    }
    if name != "DYNSKIP_PDL" or native.unavailable_reason() is None:
        with pytest.raises(ValueError, match=f"^switches: {message}"):
            used[name]()
    assert main(["info"]) == 2
    assert name in capsys.readouterr().err


def test_a_broken_table_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{}")
    monkeypatch.setenv("DYNSKIP_CONFIGS", str(path))
    with pytest.raises(ValueError, match=r"read_table: .*broken\.json must have the keys"):
        configs.get_config("norm_rows", CPU, torch.float16, 3)


def test_info_shows_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["switches"] == {
        "DYNSKIP_PDL": "1: kernels may overlap",
        "DYNSKIP_CONFIGS": "the device's own table",
        "DYNSKIP_CARVEOUT": "as the driver sees fit",
    }
    path = TABLES / "tiles-32.json"
    for name, value in (("DYNSKIP_PDL", "0"), ("DYNSKIP_CONFIGS", str(path)), ("DYNSKIP_CARVEOUT", "100")):
        monkeypatch.setenv(name, value)
    assert main(["info"]) == 0
    table = dict(line.split("  ", maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert table["DYNSKIP_PDL"].strip() == "0: no kernel overlaps with the one before it"
    assert table["DYNSKIP_CONFIGS"].strip() == str(path)
    assert table["DYNSKIP_CARVEOUT"].strip() == "100 % of L1"


class FakeDriver:
    """Stands for libcuda: what kernels asked for, and how it answers."""

    def __init__(self, answer: int = 0) -> None:
        self.asked: list[tuple[int | None, int, int]] = []
        self.answer = answer

    def cuFuncSetAttribute(  # noqa: N802  # the driver's name
        self, function: ctypes.c_void_p, attribute: int, value: int
    ) -> int:
        self.asked.append((function.value, attribute, value))
        return self.answer


class FakeKernel:
    """Stands for a kernel of Triton's, compiled to the function of a handle."""

    def __init__(self, function: int) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: SimpleNamespace(function=self.function)


def test_every_kernel_asks_for_shared_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": driver}[name])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    launches._prefer_shared_memory.cache_clear()
    device = torch.device("cuda", 0)

    def launch(function: int) -> None:
        launches.launch("made_up", FakeKernel(function), (1,), (SimpleNamespace(device=device),), ())

    launch(2**40 + 1)
    assert driver.asked == []
    monkeypatch.setenv("DYNSKIP_CARVEOUT", "100")
    for function in (2**40 + 1, 7, 2**40 + 1, 7):
        launch(function)
    # 9: CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT.
    assert driver.asked == [(2**40 + 1, 9, 100), (7, 9, 100)]
    driver.answer = 400
    with pytest.raises(RuntimeError, match="launch: DYNSKIP_CARVEOUT must be taken by the driver, got CUDA error 400"):
        launch(8)
    launches.LAUNCHES.clear()


def entries(path: Path) -> dict[tuple[str, int, bool], list[Any]]:
    found: dict[tuple[str, int, bool], list[Any]] = configs.read_table(path)
    return found


def test_with_tiles_of_32_rows_no_product_has_more() -> None:
    with configs.use_configs(TABLES / "tiles-32.json"):
        for op in ("linear_rows", "qkv_rows", "linear_add_rows", "prefill_attention"):
            for deterministic in (False, True):
                for entry in configs.get_entries(op, CPU, torch.bfloat16, deterministic):
                    is_used = deterministic or op != "prefill_attention"
                    assert not is_used or entry.config["BLOCK_M"] <= 32
                    # Of the weights a warp group of sm_90 takes 64 rows at once, by the way that the table avoids.
                    assert deterministic or not entry.config.get("WEIGHTS_LEFT")
