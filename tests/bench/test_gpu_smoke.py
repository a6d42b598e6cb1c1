"""The smoke test of `make gpu`, on a CPU with shapes that take no time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_runs import BESIDE, SMOKE, checks

from bench.gpu import smoke, smoke_cases
from bench.gpu.replays import RepeatedStep
from dynskip.kernels.configs import FOLDER, KEYS, get_entries, use_configs
from dynskip.measure import device
from dynskip.measure.device import get_device
from dynskip.ops.row_ops import ROW_OP_NAMES

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("options", [[], BESIDE], ids=["opt", "llama"])
def test_the_smoke_test_checks_every_op_and_replays_a_step(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoke, "TILES", FOLDER / "generic.json")
    assert smoke.main([*SMOKE, *options, "--out", str(tmp_path), "--commit", "abc123"]) == 0
    found = checks(tmp_path)
    assert {line["verdict"] for line in found.values()} == {"ok"}
    assert {name.split()[0] for name in found} >= {*ROW_OP_NAMES, "step", "dependent", "counters", "tiles", "more"}
    assert all(found[name]["us"] > 0 for name in found if name.split()[0] in ROW_OP_NAMES)
    assert found["qkv_rows qkv"]["conditions"]["commit"] == "abc123"


@pytest.mark.usefixtures("interpreted")
def test_a_wrong_op_fails_the_smoke_test_and_the_others_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoke.Smoke, "check_step", lambda self, rows, kept: None)  # tried above
    assert smoke.main([*SMOKE, "--out", str(tmp_path), "--inject-fault", "norm_rows"]) == 1
    verdicts = {name: line["verdict"] for name, line in checks(tmp_path).items()}
    assert verdicts["norm_rows"] == "FAILED" and list(verdicts.values()).count("FAILED") == 1
    assert list(verdicts)[-1] == "plan_rows"


def test_a_smoke_test_of_a_broken_device_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(self: smoke.Smoke, task: Any, fault: str | None) -> None:
        asked.append(task.op)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def broken(self: device.Cpu) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(smoke.Smoke, "check_op", refuse)
    monkeypatch.setattr(device.Cpu, "synchronize", broken)
    assert smoke.main([*SMOKE, "--out", str(tmp_path)]) == 1
    found = checks(tmp_path)
    assert len(asked) == 1 and {line["verdict"] for line in found.values()} == {"FAILED"}
    assert "illegal memory access" in found["linear_rows fc1"]["found"]
    assert found["plan_rows"]["found"] == "not checked: the device serves this process no more"


def test_without_time_the_smoke_test_fails_but_not_for_what_is_extra(tmp_path: Path) -> None:
    assert smoke.main([*SMOKE, "--out", str(tmp_path), "--limit-s", "0"]) == 1
    assert {line["verdict"] for line in checks(tmp_path).values()} == {"FAILED"}
    journal = smoke.Journal(tmp_path, {})
    checker = smoke.Smoke(get_device("cpu"), torch.float32, smoke_cases.TINY, journal, deadline=0.0)
    checker.attempt("more replays", 2, lambda: None, if_time=True)
    assert journal.num_failed == 0 and checks(tmp_path)["more replays"]["verdict"] == "NOT RUN"


class Steps:
    """Stands for `FusedSteps`: one row whose step adds its token to its logits, ``drift`` more in each later run."""

    def __init__(self, drift: float = 0.0) -> None:
        integers = [torch.zeros(1, dtype=torch.int64) for _ in range(4)]
        self.workload = SimpleNamespace(batch=1)
        self.shape = SimpleNamespace(max_rows=1)
        self.cache = SimpleNamespace(
            context_lens=integers[0],
            slot_cursor=integers[1],
            k_cache=torch.zeros(2, 1, 4),
            v_cache=torch.zeros(2, 1, 4),
        )
        self.fused = SimpleNamespace(run=self.run, head=lambda rows: None)
        self.fused.buffers = SimpleNamespace(
            token_ids=integers[2] + 5,
            position_ids=integers[3],
            slots=torch.zeros(1, 1, dtype=torch.int32),
            logits=torch.zeros(1, 8),
            hidden_states=torch.zeros(1, 4),
        )
        self.drift, self.num_runs = drift, 0

    def run(self, work: object) -> None:
        buffers = self.fused.buffers
        self.num_runs += 1
        buffers.token_ids.add_(1)
        self.cache.context_lens.add_(1)
        buffers.logits.copy_(buffers.token_ids + self.cache.context_lens + self.drift * (self.num_runs > 3))
        self.cache.k_cache[0] = buffers.logits[0, 0]


@pytest.mark.parametrize(("drift", "num_different"), [(0.0, 0), (1e-3, 6)])
def test_replays_start_from_one_state_and_other_bits_are_counted(drift: float, num_different: int) -> None:
    steps = Steps(drift)
    repeated = RepeatedStep(get_device("cpu"), steps)  # type: ignore[arg-type]
    assert repeated.logits.tolist() == [[7.0] * 8]
    graph = repeated.captured()  # runs once
    assert repeated.count_different(graph, 7) == num_different
    assert steps.num_runs == 9 and int(steps.cache.context_lens) == 1


def test_a_zero_of_another_sign_is_other_bits() -> None:
    steps = Steps()
    repeated = RepeatedStep(get_device("cpu"), steps)  # type: ignore[arg-type]
    steps.fused.head = lambda rows: steps.fused.buffers.hidden_states.mul_(-1.0)
    assert repeated.count_different(repeated.captured(), 1) == 0, "two runs: minus zero, and zero again"
    assert repeated.count_different(repeated.captured(), 2) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_dependent_launches_all_else_stays(dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    before = {op: get_entries(op, cpu, dtype) for op in KEYS}
    with use_configs(smoke_cases.without_dependent_launches(cpu)):
        for op, entries in before.items():
            after = get_entries(op, cpu, dtype)
            assert [(entry.max_rows, entry.shape) for entry in after] == [(e.max_rows, e.shape) for e in entries]
            for one, other in zip(entries, after, strict=True):
                changed = {"PDL": False} if "PDL" in one.config else {}
                assert dict(other.config) == {**one.config, **changed}
