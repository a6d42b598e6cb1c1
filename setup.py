"""Builds the optional C++ extension ``dynskip._C``; everything else about the package stands in pyproject.toml.

``DYNSKIP_BUILD_EXT=0`` skips the extension, ``=1`` makes a failing build an error. Unset: the extension is built where
torch and a C++ compiler are there, and a failing build leaves the package without it, with a warning.

``DYNSKIP_BUILD_CUDA=0`` leaves out the extension's CUDA part, ``=1`` makes an extension without it an error. Unset: it
is built where torch itself has CUDA and nvcc is there; a torch with CUDA but without nvcc is worth a warning.
``CUDA_HOME`` names the toolkit, ``TORCH_CUDA_ARCH_LIST`` the architectures.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
EXT_SWITCH, CUDA_SWITCH = "DYNSKIP_BUILD_EXT", "DYNSKIP_BUILD_CUDA"
# The oldest torch whose stable ABI the extension may use (2.11) and the oldest Python (3.11): one abi3 file serves all
# later ones. Raise them together with the torch range and requires-python in pyproject.toml.
TORCH_TARGET_VERSION = "0x020b000000000000"
WHEEL_TAG = "cp311"
WHOLE = "its C++ extension (backend 'native')"

# No -march: the file must run on any machine of its architecture. Sources that want AVX-512 ask for it per function.
# No -ffast-math: it would let the compiler reorder sums, and the results of a row would depend on its length.
COMPILE_ARGS = ["-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
# USE_CUDA: torch's headers declare the current stream only then.
CUDA_COMPILE_ARGS = ["-O3", "-DUSE_CUDA", "-Xcompiler", "-fvisibility=hidden"]
# Machine code for A100 and H100, H200; what is newer compiles the latter's portable form when it loads.
CUDA_ARCHITECTURES = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",
]


def wanted(switch: str) -> bool | None:
    """What the caller asked for: True = it must be built, False = skip it, None = try."""
    value = os.environ.get(switch, "")
    if value in ("", "0", "1"):
        return {"": None, "0": False, "1": True}[value]
    raise SystemExit(f"setup.py: {switch} must be 0 (skip), 1 (must build) or unset (try), got {value!r}.")


def compiler() -> str | None:
    """The C++ compiler that torch's build would call, or None where there is none."""
    candidates = [os.environ.get("CXX", ""), *(sysconfig.get_config_var("CXX") or "").split(), "c++", "g++", "clang++"]
    return next((found for name in candidates if name and (found := shutil.which(name.split()[0]))), None)


def missing() -> str | None:
    """What the build lacks on this machine, with the way to get it, or None."""
    if compiler() is None:
        return "no C++ compiler was found; install g++ or clang++, or name one in CXX"
    if importlib.util.find_spec("torch") is None:
        return "torch is not in the build environment; install torch first and pass --no-build-isolation to pip"
    return None


def cuda_home() -> Path | None:
    """The CUDA toolkit: the one that CUDA_HOME names, that of the nvcc on PATH, or the one in its usual place."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    homes = [Path(on_path).resolve().parents[1]] if on_path else []
    homes = [Path(named)] if named else [*homes, Path("/usr/local/cuda")]
    homes = [home for home in homes if (home / "bin/nvcc").exists()]
    # An nvcc on PATH may be a script that calls the one of a toolkit elsewhere: prefer a folder with the headers.
    return next((home for home in homes if (home / "include/cuda_runtime.h").exists()), homes[0] if homes else None)


def missing_for_cuda() -> str | None:
    """What the CUDA part lacks on this machine, with the way to get it, or None."""
    import torch

    home = cuda_home()
    if torch.version.cuda is None:
        return "torch was built without CUDA; install a torch with CUDA"
    if home is None:
        return f"nvcc was not found; install the CUDA {torch.version.cuda} toolkit, or name its folder in CUDA_HOME"
    printed = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.\d+", printed)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = "no version" if release is None else release[0]
        return (
            f"{home}/bin/nvcc says {found} and torch was built with CUDA {torch.version.cuda}; name a toolkit of the "
            "same major version in CUDA_HOME"
        )
    return None


def with_cuda() -> bool:
    """Whether the extension gets its CUDA part; where it does not and torch has CUDA, it says why."""
    must = wanted(CUDA_SWITCH)
    if must is False:
        return False
    lacking = missing_for_cuda()
    if lacking is None:
        return True
    if must:
        raise SystemExit(f"setup.py: {CUDA_SWITCH}=1, but {lacking}.")
    import torch

    if torch.version.cuda is not None:
        warn("the CUDA part of its C++ extension (planning and graphs on a GPU)", CUDA_SWITCH, lacking)
    return False


def warn(part: str, switch: str, reason: str) -> None:
    """Print, on standard error, what the package is being built without, and how to force it."""
    line = "!" * 100
    print(
        f"{line}\n! dynskip is built WITHOUT {part}: {reason}.\n"
        f"! To see the build fail with its own message:  {switch}=1 pip install -v --no-build-isolation -e .\n"
        f"! To build without it and without this warning: {switch}=0\n{line}",
        file=sys.stderr,
        flush=True,
    )


def sources(cuda: bool) -> list[str]:
    """The files of the extension, relative to this one."""
    patterns = ["csrc/*.cpp", "csrc/cpu/*.cpp"] + (["csrc/cuda/*.cu"] if cuda else [])
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def make_extension(cuda: bool) -> Any:
    """The extension, as torch's build wants it."""
    # torch looks for the toolkit once, when this module is imported, and takes the folder of a script for it.
    if cuda:
        os.environ["CUDA_HOME"] = str(cuda_home())
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    definitions = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", *(["-DDYNSKIP_WITH_CUDA"] if cuda else [])]
    arguments: dict[str, Any] = {
        "include_dirs": [str(ROOT / "csrc")],
        "depends": sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")),
        "py_limited_api": True,  # torch's build defines Py_LIMITED_API itself
    }
    if not cuda:
        return CppExtension("dynskip._C", sources(cuda), extra_compile_args=[*COMPILE_ARGS, *definitions], **arguments)
    architectures = [] if os.environ.get("TORCH_CUDA_ARCH_LIST") else CUDA_ARCHITECTURES
    compile_args = {
        "cxx": [*COMPILE_ARGS, *definitions],
        "nvcc": [*CUDA_COMPILE_ARGS, *definitions, *architectures],
    }
    return CUDAExtension("dynskip._C", sources(cuda), extra_compile_args=compile_args, **arguments)


def extension_arguments() -> dict[str, Any]:
    """The arguments of ``setup`` that concern the extension; empty where none is to be built."""
    must, must_cuda = wanted(EXT_SWITCH), wanted(CUDA_SWITCH)
    if must is False and must_cuda:
        raise SystemExit(f"setup.py: {CUDA_SWITCH}=1 needs the extension, which {EXT_SWITCH}=0 skips. Set only one.")
    if must is False or not sources(cuda=False):
        return {}
    must = must or must_cuda
    lacking = missing()
    if lacking is not None:
        if must:
            raise SystemExit(f"setup.py: {CUDA_SWITCH if must_cuda else EXT_SWITCH}=1, but {lacking}.")
        warn(WHOLE, EXT_SWITCH, lacking)
        return {}
    extension = make_extension(with_cuda())
    from torch.utils.cpp_extension import BuildExtension

    class OptionalBuildExtension(BuildExtension):  # type: ignore[misc]  # torch is untyped where mypy runs without it
        """Builds the extension; a failure is an error only where the caller asked for the extension."""

        def run(self) -> None:
            """Build, or warn and leave no stale file of an earlier build behind."""
            try:
                super().run()
            except Exception as error:
                if must:
                    raise
                # An old _C beside new Python sources would be loaded without a word.
                for stale in ROOT.glob("dynskip/_C*.so"):
                    stale.unlink()
                self.extensions = []
                warn(WHOLE, EXT_SWITCH, f"the build failed: {type(error).__name__}: {error}")

    command: type[build_ext] = OptionalBuildExtension
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": command},
        "options": {"bdist_wheel": {"py_limited_api": WHEEL_TAG}},
    }


setup(**extension_arguments())
