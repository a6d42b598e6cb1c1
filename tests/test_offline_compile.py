"""The kernels compiled for GPUs that need not be there: that they fit, and that one which does not is noticed."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from dynskip import cli, offline_compile, ops
from dynskip.cli.validate import CAPABILITIES, DEFAULT_CAPABILITIES
from dynskip.cubin import is_tensor_core_instruction
from dynskip.offline_compile import MAX_SHARED_BYTES, CompiledKernel, compile_offline, plan_jobs

pytest.importorskip("triton", reason="Triton is not installed")

RIGHT = CompiledKernel(
    op="linear_rows",
    kernel="linear_rows_kernel",
    config="nvidia-h200",
    dtype="bfloat16",
    capability=90,
    case="OPT-1.3b, 1 row",
    registers=128,
    shared_bytes=200 * 1024,
    tensor_core_instructions=8,
    products=("bf16",),
    num_waits=1,
    num_signals=1,
    overlaps_the_kernel_before=True,
)


@pytest.fixture
def compiled_before(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton finds a compiled kernel again by its source, its constants and its own version; warnings are errors."""
    assert pytestconfig.cache is not None
    monkeypatch.setenv("TRITON_CACHE_DIR", str(pytestconfig.cache.mkdir("triton")))
    monkeypatch.setenv("PYTHONWARNINGS", "error")


@pytest.mark.usefixtures("compiled_before")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_kernel_fits_every_gpu(dtype: str) -> None:
    capabilities = DEFAULT_CAPABILITIES if dtype == "bfloat16" else (90,)
    kernels = compile_offline(plan_jobs((dtype,), capabilities), progress=False)
    assert [f"{kernel}: {kernel.complaint}" for kernel in kernels if kernel.complaint] == []
    for capability in capabilities:
        of_capability = [kernel for kernel in kernels if kernel.capability == capability]
        assert {kernel.op for kernel in of_capability} == set(ops.OP_NAMES)
        products = {product for kernel in of_capability for product in kernel.products}
        assert products == {"bf16" if dtype == "bfloat16" else "f32"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, None),
        ({"spilled_bytes": 8}, "spills 8 bytes a thread"),
        ({"shared_bytes": 227 * 1024 + 1}, "needs 232449 bytes of shared memory, may have 232448"),
        ({"config": "generic"}, "needs 204800 bytes of shared memory, may have 101376"),
        ({"tensor_core_instructions": 0}, "multiplies 16-bit matrices without tensor cores"),
        ({"tensor_core_instructions": 0, "products": ("f32",)}, None),
        ({"capability": 80, "shared_bytes": 0}, "waits for the kernel before it, which sm_80 cannot"),
        ({"num_waits": 0}, "overlaps with the kernel before it and never waits for that"),
        (
            {"overlaps_the_kernel_before": False},
            "waits for the kernel before it, but is launched after its end",
        ),
        ({"error": "PTXASError: too much"}, "does not compile: PTXASError: too much"),
    ],
)
def test_each_way_of_not_fitting_is_a_complaint(changes: dict[str, object], complaint: str | None) -> None:
    assert dataclasses.replace(RIGHT, **changes).complaint == complaint


@pytest.mark.parametrize("name", ["HMMA", "HGMMA", "QGMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA", "QMMA"])
def test_instructions_of_tensor_cores(name: str) -> None:
    assert is_tensor_core_instruction(name)


@pytest.mark.parametrize("name", ["HFMA2", "FFMA", "MMA", "UTCATOMSWS", "UTCBAR", "LDSM", "WARPGROUP"])
def test_instructions_of_others(name: str) -> None:
    assert not is_tensor_core_instruction(name)


@pytest.mark.usefixtures("compiled_before")
def test_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["validate", "--compile", "--capability", "90", "--dtype", "bfloat16", "--op", "prefill_attention"]
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(
        r"kernel +config +dtype +GPU +variants +registers +spilled +shared +of +tensor core +verdict", lines[0]
    )
    assert lines[1].split()[:4] == ["prefill_attention_kernel", "generic", "bfloat16", "sm_90"]
    assert lines[1].endswith("ok")
    assert lines[2].startswith("3 of 3 compiled kernels fit")


@pytest.mark.usefixtures("compiled_before")
def test_command_fails_where_a_kernel_does_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MAX_SHARED_BYTES, 90, 45_000)
    command = ["validate", "--compile", "--capability", "90", "--dtype", "bfloat16", "--op", "prefill_attention"]
    assert cli.main(command) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out and "of shared memory, may have 45000" in out
    assert cli.main([*command, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    complaints = {kernel["case"]: kernel["complaint"] for kernel in report["kernels"]}
    assert complaints["OPT-125m"] is None
    assert re.fullmatch(r"needs \d+ bytes of shared memory, may have 45000", complaints["OPT-6.7b"])


def test_command_refuses_what_has_no_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--capability", "90"], "--capability says what to compile for: it needs --compile"),
        (["--compile", "--backend", "torch"], "--backend is about running kernels: it has no meaning with --compile"),
        (["--compile", "--inject-fault", "kv_store"], "--inject-fault is about running kernels"),
        (["--compile", "--capability", "70"], "invalid choice: 70"),
    ):
        assert cli.main(["validate", *options]) == 2
        assert message in capsys.readouterr().err


def test_an_unknown_capability_is_an_error() -> None:
    with pytest.raises(ValueError, match="plan_jobs: capabilities must be among 80, 86, 89, 90, 100, 120, got 70"):
        plan_jobs(("bfloat16",), (70,))


def test_the_command_line_knows_the_capabilities() -> None:
    assert tuple(MAX_SHARED_BYTES) == CAPABILITIES
    assert offline_compile.DEFAULT_CAPABILITIES == DEFAULT_CAPABILITIES
