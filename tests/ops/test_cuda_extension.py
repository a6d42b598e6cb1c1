"""The CUDA part of the extension, where nvcc is: built by setup.py as for a torch with CUDA; its host code is run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

# setup.py, in a fresh interpreter whose torch was built with CUDA, or says so.
SETUP = """
import runpy, sys, torch
if torch.version.cuda is None:
    torch.version.cuda = sys.argv.pop()
    torch._C._cuda_getDeviceCount = lambda: 0
runpy.run_path("setup.py", run_name="__main__")
"""


def find_toolkit() -> Path | None:
    """The CUDA toolkit with which setup.py would build."""
    on_path = shutil.which("nvcc")
    named = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    beside = [Path(on_path).resolve().parents[1]] if on_path else []
    homes = [Path(home) for home in named] or [*beside, Path("/usr/local/cuda")]
    return next((home for home in homes if (home / "bin/nvcc").exists() and (home / "include/cuda.h").exists()), None)


def find_cuobjdump() -> str | None:
    """The cuobjdump that triton carries, or the toolkit's."""
    try:
        from triton import knobs
    except ImportError:
        return shutil.which("cuobjdump")
    return str(knobs.nvidia.cuobjdump.path)


TOOLKIT, CUOBJDUMP = find_toolkit(), find_cuobjdump()
COMPILER = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
if TOOLKIT is None or COMPILER is None:
    pytest.skip("needs nvcc and a C++ compiler", allow_module_level=True)


def run(*command: object, **options: object) -> str:
    """The standard output of a command that must succeed."""
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, **options)  # type: ignore[call-overload]
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return str(ended.stdout)


@dataclass(frozen=True)
class Build:
    """An extension of the CUDA sources and the op of the plan alone: without the other CPU sources it takes seconds."""

    library: Path
    objects: dict[str, Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    tree = tmp_path_factory.mktemp("tree")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    shutil.copytree(ROOT / "csrc", tree / "csrc", ignore=shutil.ignore_patterns("bindings.cpp"))
    for path in (tree / "csrc" / "cpu").glob("*.cpp"):
        if path.name != "plan_rows.cpp":
            path.unlink()
    (tree / "dynskip").mkdir()
    shutil.copy(ROOT / "dynskip" / "version.py", tree / "dynskip" / "version.py")

    # A torch without CUDA has no libraries to link against; empty ones of their names leave the symbols open.
    stubs = tree / "stubs"
    stubs.mkdir()
    for name in ("torch_cuda", "c10_cuda"):
        run(COMPILER, "-shared", "-x", "c++", os.devnull, "-o", stubs / f"lib{name}.so")
    release = re.search(r"release (\d+\.\d+)", run(TOOLKIT / "bin/nvcc", "--version"))
    assert release is not None
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    environment |= {"CUDA_HOME": str(TOOLKIT), "LIBRARY_PATH": str(stubs), "DYNSKIP_BUILD_CUDA": "1", "MAX_JOBS": "2"}
    arguments = ["build_ext", "--build-lib", "lib", "--build-temp", "temp", release[1]]
    if torch.version.cuda is not None:
        arguments.pop()
    run(sys.executable, "-c", SETUP, *arguments, cwd=tree, env=environment)
    (library,) = (tree / "lib" / "dynskip").iterdir()
    objects = {path.stem: path for path in (tree / "temp").rglob("cuda/*.o")}
    return Build(library, objects)


def test_one_abi3_library_of_all_cuda_sources(build: Build) -> None:
    assert build.library.name == "_C.abi3.so"
    assert set(build.objects) == {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}


def test_the_library_asks_for_nothing_newer_than_the_oldest_torch(build: Build) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    undefined = run("nm", "-D", "--undefined-only", build.library).split()
    for name in ("aoti_torch_get_current_cuda_stream", "cudaGraphLaunch", "cudaLaunchKernelExC"):
        assert any(symbol.split("@")[0] == name for symbol in undefined), name
    # C functions of torch's stable ABI; a C++ symbol of torch's or c10's would bind the library to one torch.
    assert not [symbol for symbol in undefined if symbol.startswith("_Z") and re.search(r"\d(c10|at|torch)\d", symbol)]
    # Newer than the ABI of 2.11.
    assert not {"torch_stream_native_handle", "torch_exception_get_what"} & set(undefined)


@pytest.mark.skipif(CUOBJDUMP is None, reason="needs triton's or the toolkit's cuobjdump")
def test_no_kernel_spills_and_both_architectures_are_there(build: Build) -> None:
    printed = run(CUOBJDUMP, "-res-usage", build.library)
    kernels: dict[str, dict[str, int]] = {}
    architecture = ""
    for line in printed.splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif "REG:" in line:
            kernels[architecture] = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line)}
    assert set(kernels) == {"sm_80", "sm_90"}
    for usage in kernels.values():
        assert usage["STACK"] == 0 and usage["LOCAL"] == 0
        # A block of 1024 threads has 65536 registers.
        assert usage["REG"] <= 64
    assert re.search(r"Fatbin ptx code:\n=+\narch = sm_90", printed), "no portable form for newer GPUs"


@pytest.mark.skipif(CUOBJDUMP is None, reason="needs triton's or the toolkit's cuobjdump")
def test_the_kernel_waits_for_the_one_before_it_where_they_overlap(build: Build) -> None:
    sections = run(CUOBJDUMP, "-sass", build.objects["plan_rows"]).split("Fatbin elf code:")[1:]
    code = {match[1]: section for section in sections if (match := re.search(r"arch = (sm_\d+)", section))}
    assert set(code) == {"sm_80", "sm_90"}
    assert "ACQBULK" not in code["sm_80"]
    # Nothing is loaded from memory that the kernel before may still write.
    wait, load = code["sm_90"].find("ACQBULK"), re.search(r"\bLDG?\.", code["sm_90"])
    assert wait > 0 and load is not None and wait < load.start()


def test_host_code_launches_what_it_should(build: Build, tmp_path: Path) -> None:
    from torch.utils.cpp_extension import include_paths

    program = tmp_path / "cuda_without_a_gpu"
    run(
        *(COMPILER, "-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-DUSE_CUDA"),
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        *(f"-I{path}" for path in (ROOT / "csrc", *include_paths())),
        *("-isystem", TOOLKIT / "include"),
        *(ROOT / "tests" / "cuda_without_a_gpu.cpp", ROOT / "csrc" / "cpu" / "plan_rows.cpp"),
        *build.objects.values(),
        *(f"-L{TOOLKIT / folder}" for folder in ("lib64", "lib")),
        *("-lcudart", f"-Wl,-rpath,{TOOLKIT / 'lib64'}:{TOOLKIT / 'lib'}"),
        *("-o", program),
    )
    assert run(program).endswith("checks hold\n")
