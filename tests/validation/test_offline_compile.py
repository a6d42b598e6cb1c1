"""The kernels compiled for GPUs that need not be there: that they fit, and that one which does not is noticed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynskip import cli
from dynskip.cli.validate import CAPABILITIES, DEFAULT_CAPABILITIES
from dynskip.kernels.configs import FOLDER, config_names
from dynskip.ops.row_ops import ROW_OP_NAMES
from dynskip.validation.offline import compile_kernels
from dynskip.validation.offline.compile_kernels import (
    MAX_SHARED_BYTES,
    MISALIGNED,
    TRITON_OP_NAMES,
    CompiledKernel,
    compile_offline,
    plan_jobs,
)
from dynskip.validation.offline.resources import count_tensor_core_instructions

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


@pytest.fixture(scope="module", autouse=True)
def compiled_before(pytestconfig: pytest.Config) -> Iterator[None]:
    """Triton finds a compiled kernel again by its source, its constants and its own version; warnings are errors."""
    assert pytestconfig.cache is not None
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(pytestconfig.cache.mkdir("triton")))
        monkeypatch.setenv("PYTHONWARNINGS", "error")
        yield


@pytest.fixture(scope="module")
def compiled(compiled_before: None) -> list[CompiledKernel]:
    """OPT's kernels with every entry of the tables for one architecture, which are those of 16 bits and of 32.

    And two kernels in float16, and those of other decoders, of Llama for three architectures. All together: a process
    takes seconds to begin.
    """
    jobs = plan_jobs(("bfloat16", "float32"), (90,), everywhere=False)
    jobs += plan_jobs(("float16",), (90,), ("linear_add_rows", "prefill_attention"), shapes=("opt-1.3b",), rows=(8,))
    jobs += plan_jobs(("bfloat16",), (90,), shapes=tuple(OF_ITS_OWN), rows=(8,))
    jobs += plan_jobs(("bfloat16",), (80, 100), shapes=("llama-3.2-1b",), rows=(8,))
    return compile_offline(jobs, progress=False)


@pytest.fixture(scope="module")
def kernels(compiled: list[CompiledKernel]) -> list[CompiledKernel]:
    return [kernel for kernel in compiled if kernel.case.startswith("opt-")]


def test_every_entry_of_the_tables_fits(kernels: list[CompiledKernel]) -> None:
    assert [f"{kernel}: {kernel.complaint}" for kernel in kernels if kernel.complaint] == []
    for dtype in ("bfloat16", "float32"):
        op_names = {kernel.op for kernel in kernels if kernel.dtype == dtype}
        assert op_names == set(TRITON_OP_NAMES) - {"rotate_rows", "place_rows"}
    assert {kernel.config for kernel in kernels} == set(config_names())


def test_products_run_on_tensor_cores(compiled: list[CompiledKernel]) -> None:
    products = {"bfloat16": ("bf16",), "float16": ("f16",), "float32": ("f32",)}
    for kernel in compiled:
        # A table may have a row or two multiplied and summed.
        assert kernel.products in ((), products[kernel.dtype]), kernel
        uses_tensor_cores = bool(kernel.products) and kernel.dtype != "float32"
        assert (kernel.tensor_core_instructions > 0) == uses_tensor_cores, kernel
    for capability in DEFAULT_CAPABILITIES:
        multiplying = {kernel.op for kernel in compiled if kernel.capability == capability and kernel.products}
        assert multiplying >= {"linear_rows", "qkv_rows", "linear_add_rows", "prefill_attention"}


def test_kernels_of_a_step_overlap_where_the_gpu_can(compiled: list[CompiledKernel]) -> None:
    of_step = [kernel for kernel in compiled if kernel.op in ROW_OP_NAMES]
    assert {kernel.capability for kernel in of_step if kernel.num_waits and kernel.num_signals} == {90, 100}
    for kernel in of_step:
        if kernel.config == "generic":
            assert kernel.overlaps_the_kernel_before == (kernel.capability >= 90), kernel
            assert bool(kernel.num_waits) == bool(kernel.num_signals) == (kernel.capability >= 90), kernel


def test_no_kernel_is_compiled_again_for_the_list_of_another_layer(kernels: list[CompiledKernel]) -> None:
    assert [kernel for kernel in kernels if kernel.case.endswith(MISALIGNED)] == []


# Other decoders: all ops are compiled. Those of which each has kernels that those before it have not, because of:
OF_ITS_OWN = {
    # RMSNorm, a gate, queries that share keys, unequal parts; wider heads and matrices; heads that are normalised.
    "llama-3.2-1b": {"linear_rows", "qkv_rows", "attend_rows", "linear_add_rows", "norm_rows", "rotate_rows"},
    "llama-3-8b": {"attend_rows", "prefill_attention"},
    "qwen3-1.7b": {"rotate_rows", "attend_rows"},
    # Slopes, tanh-GELU; a window; heads that turn in part, GELU; three heads of keys, narrow matrices.
    "bloom-1b7": {"linear_rows", "place_rows", "attend_rows", "prefill_attention"},
    "mistral-7b": {"attend_rows", "prefill_attention"},
    "pythia-1.4b": {"rotate_rows", "linear_rows"},
    "smollm2-135m": {"qkv_rows", "attend_rows"},
    # These with LayerNorm and biases.
    "gpt2": {"qkv_rows", "norm_rows"},
}


def test_every_op_of_other_decoders_fits(compiled: list[CompiledKernel]) -> None:
    others = [kernel for kernel in compiled if not kernel.case.startswith("opt-")]
    assert [f"{kernel}: {kernel.complaint}" for kernel in others if kernel.complaint] == []
    assert [kernel for kernel in others if kernel.case.endswith(MISALIGNED)] == []
    found: dict[tuple[int, str], set[str]] = {}
    for kernel in others:
        found.setdefault((kernel.capability, kernel.case.partition(",")[0]), set()).add(kernel.op)
    assert all(found[90, name] >= op_names for name, op_names in OF_ITS_OWN.items()), found
    of_llama = set(TRITON_OP_NAMES) - {"place_rows"}
    assert found[80, "llama-3.2-1b"] == found[100, "llama-3.2-1b"] == of_llama
    multiplying = {kernel.op for kernel in others if kernel.products}
    assert multiplying == {
        *("linear_rows", "qkv_rows", "linear_add_rows", "prefill_attention", "attend_rows", "decode_attention")
    }


# Every op of a prompt, for any number of sequences and for lists that stand anywhere: prints the op of each kernel that
# had to be compiled.
OF_PROMPTS = """
import json, sys, torch
from triton.runtime import driver
from dynskip.ops.backends import get_backend
from dynskip.kernels.launches import compile_only
from dynskip.validation.offline.worker import OfflineDriver

driver.set_active(OfflineDriver(90))
triton, found = get_backend("triton"), {}
x, qkv = torch.empty(8, 768).half(), torch.empty(8, 3, 12, 64).half()
cache = torch.empty(64, 12, 64).half()

def index(size, offset):
    return torch.empty(size + offset, dtype=torch.int32)[offset:]

with compile_only(90, lambda op, kernel: found.setdefault(kernel.hash, op)):
    for num_sequences in (1, 2, 16, 17, 300):
        for offset in range(4):
            ends, ids = index(num_sequences + 1, offset), index(8, offset)
            triton.prefill_attention(*qkv.unbind(1), ends, ends, ids, 0.125)
            triton.gather_layer_norm(x, ids, None, None, 1e-5)
            triton.scatter_add(x, ids, x)
            triton.kv_store(qkv[:, 1], qkv[:, 2], cache, cache, ids)
    for context_len in (1, 16, 17, 300):
        for offset in range(4):
            table, ids = torch.empty(8, context_len, dtype=torch.int32), index(8, offset)
            triton.decode_attention(qkv[:, 0], cache, cache, table, ids, ids, 0.125)
print(json.dumps(sorted(found.values())))
"""


def test_no_kernel_of_a_prompt_is_compiled_again_for_other_sequences() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-c", OF_PROMPTS], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [
        *("decode_attention", "gather_layer_norm", "kv_store", "prefill_attention", "scatter_add")
    ]


COMPILE = ["validate", "--compile", "--fewer", "--capability", "90", "--dtype", "bfloat16", "--op", "linear_add_rows"]


@pytest.fixture
def greedy(tmp_path: Path) -> Callable[..., str]:
    """A table of one entry for linear_add_rows, with constants that ask too much."""

    def write(**constants: int) -> str:
        table = json.loads((FOLDER / "generic.json").read_text(encoding="utf-8"))
        entries = table["ops"]["linear_add_rows"]
        entry = entries["2"][-1] | constants
        entries["2"] = [entry]
        entries["deterministic"]["2"] = {name: value for name, value in entry.items() if name != "max_rows"}
        path = tmp_path / "greedy.json"
        path.write_text(json.dumps(table), encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize(
    ("constants", "complaint"),
    [
        ({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 1, "num_stages": 1}, "spills .* bytes a thread"),
        (
            {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 8},
            "needs .* bytes of shared memory, may have 232448",
        ),
    ],
)
def test_a_table_that_asks_too_much_is_noticed(
    constants: dict[str, int], complaint: str, greedy: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*COMPILE, "--config", greedy(**constants)]) == 1
    out = capsys.readouterr().out
    assert "greedy" in out and "FAILED" in out and re.search(f"failed: opt-.*: {complaint}", out)


def test_a_complaint_is_in_the_report(greedy: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMPILE, "--config", greedy(BLOCK_K=8), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    assert any(re.fullmatch("does not compile: .*", kernel["complaint"] or "") for kernel in report["kernels"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, None),
        ({"num_warps": 64}, "has 64 warps, may have 32"),
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


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1, %r2 }, ...;", 1),
        ("@%p4 wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r1}, %rd3, %rd4, %p3, 1, 1, 0, 0;", 1),
        ("@%p12 tcgen05.mma.cta_group::1.kind::f16 [ %r5 + 0 ], %rd1, %rd2, %r6, %p7;", 1),
        ("fma.rn.f32 %r1, %r2, %r3, %r4;", 0),
        ("wgmma.wait_group.sync.aligned 0;", 0),
        ("tcgen05.commit.cta_group::1.mbarrier::arrive::one.b64 [%r1];", 0),
        ("// begin inline asm mma.sync", 0),
    ],
)
def test_instructions_of_tensor_cores(line: str, count: int) -> None:
    assert count_tensor_core_instructions(f"\t{line}\n\tret;\n" * 3) == 3 * count


def test_command_prints_a_table(kernels: list[CompiledKernel], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(COMPILE) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match("kernel +config +dtype +GPU +variants +registers +spilled +shared +of +tensor core", lines[0])
    rows = [line.split() for line in lines[1:-1]]
    assert ["linear_add_rows_kernel", "generic", "bfloat16", "sm_90"] in [row[:4] for row in rows]
    assert {row[-1] for row in rows} == {"ok"}
    assert re.match(r"(\d+) of \1 compiled kernels fit", lines[-1])


def test_command_refuses_what_has_no_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--capability", "90"], "--capability says what to compile: it needs --compile"),
        (["--fewer"], "--fewer says what to compile: it needs --compile"),
        (["--compile", "--op", "plan_rows"], "plan_rows is compiled with the C++ extension"),
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
    assert compile_kernels.DEFAULT_CAPABILITIES == DEFAULT_CAPABILITIES
