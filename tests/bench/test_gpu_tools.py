"""The profile and the sanitizer of `make gpu`, on a CPU with shapes that take no time."""

from __future__ import annotations

import stat
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from gpu_runs import BESIDE, LLAMA, NO_DEVICE

from bench.gpu import parts, profile_layer, recorder, sanitize
from dynskip import OPTForCausalLM
from dynskip.measure.random_models import hf_config, random_hf_model
from dynskip.models.shapes import SHAPES

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.mark.parametrize("shape", ["tiny", LLAMA])
def test_the_profile_launches_a_layer(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--shape", shape, "--vocab-size", "64", "--context-len", "5", "--ops", "reference"]
    assert profile_layer.main(arguments) == 0
    assert capsys.readouterr().out.count("one layer, plan and head launched") == len(profile_layer.BATCHES)
    assert profile_layer.main([*NO_DEVICE, *BESIDE, "--dry-run"]) == 0
    assert f"one layer of {LLAMA}, context 5, at 1,16,64 rows" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "tiny"])
def test_every_shape_has_a_tiny_one(name: str) -> None:
    """All that it is made of stays; transformers has a model of it."""
    shape, small = SHAPES[name], recorder.tiny_shape(SHAPES[name])
    sizes = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_size", "ffn_size", "embedding_size",
             "rotary", "window")  # fmt: skip
    assert replace(small, **{field: getattr(shape, field) for field in sizes}) == shape
    assert (small.num_kv_heads < small.num_heads) == (shape.num_kv_heads < shape.num_heads)
    assert (small.rotary_size * shape.head_size == shape.rotary_size * small.head_size) and small.hidden_size == 32
    model = OPTForCausalLM.from_hf(random_hf_model(hf_config(small, 64)), backend="torch", pack=False)
    assert replace(model.decoder_config, rotary=None) == replace(small, vocab_size=64, rotary=None)


def test_the_sanitizer_sees_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--backend", "torch", "--dtype", "float32", "--cases", "2"]
    assert sanitize.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count(": ok") == 14 and "all results are within their error budgets" in printed
    assert sanitize.main(["--dry-run"]) == 0
    assert "plan_rows: " in capsys.readouterr().out


def fake_tool(directory: Path, name: str, script: str) -> Path:
    path = directory / name
    path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(script))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        ("print('ERROR SUMMARY: 0 errors')", 0, "memcheck: ok"),
        ("import sys; print('Invalid read'); sys.exit(99)", 99, "memcheck: FAILED (99)"),
        ("import sys; print('Error: Device not supported. x'); sys.exit(1)", 77, "SKIPPED: memcheck cannot watch"),
        ("import os; print(os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'] * 3)", 0, "111"),
        ("import sys; print(sys.argv[-11:])", 0, "'-m', 'bench.gpu.sanitize', '--cases', '3'"),
    ],
)
def test_what_the_sanitizer_says_is_understood(
    script: str, status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = fake_tool(tmp_path, "compute-sanitizer", script)
    assert sanitize.main(["--sanitizer", str(tool)]) == status
    assert said in capsys.readouterr().out


def test_one_op_can_be_watched_alone(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--backend", "torch", "--dtype", "float32", "--cases", "2", "--op", "kv_store"]
    assert sanitize.main(arguments) == 0
    assert capsys.readouterr().out.count(": ok") == 2


def test_ncu_leaves_the_clocks_alone(tmp_path: Path) -> None:
    script = "import sys; open(sys.argv[sys.argv.index('--log-file') + 1], 'w').write(' '.join(sys.argv))"
    tool = fake_tool(tmp_path, "ncu", script)
    assert profile_layer.main(["--ncu", str(tool), "--out", str(tmp_path / "out"), *BESIDE]) == 0
    written = (tmp_path / "out" / "profile.txt").read_text()
    assert f"--shape {parts.BESIDE} --batches 1,16,64" in written
    assert "--clock-control none" in written and "--profile-from-start off" in written
