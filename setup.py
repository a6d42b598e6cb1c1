"""Builds the optional C++ extension ``dynskip._C``; everything else about the package stands in pyproject.toml.

``DYNSKIP_BUILD_EXT=0`` skips the extension, ``=1`` makes a failing build an error. Unset: the extension is built where
torch and a C++ compiler are there, and a failing build leaves the package without it, with a warning.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SWITCH = "DYNSKIP_BUILD_EXT"
# The oldest torch whose stable ABI the extension may use (2.11) and the oldest Python (3.11): one abi3 file serves all
# later ones. Raise them together with the torch range and requires-python in pyproject.toml.
TORCH_TARGET_VERSION = "0x020b000000000000"
WHEEL_TAG = "cp311"

# No -march: the file must run on any machine of its architecture. Sources that want AVX-512 ask for it per function.
# No -ffast-math: it would let the compiler reorder sums, and the results of a row would depend on its length.
COMPILE_ARGS = ["-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]


def wanted() -> bool | None:
    """Whether the caller asked for the extension: True = it must build, False = skip it, None = try."""
    value = os.environ.get(SWITCH, "")
    if value in ("", "0", "1"):
        return {"": None, "0": False, "1": True}[value]
    raise SystemExit(f"setup.py: {SWITCH} must be 0 (skip), 1 (must build) or unset (try), got {value!r}.")


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


def warn(reason: str) -> None:
    """Print, on standard error, that the package is being built without its extension, and how to force it."""
    line = "!" * 100
    print(
        f"{line}\n! dynskip is built WITHOUT its C++ extension (backend 'native'): {reason}.\n"
        f"! To see the build fail with its own message:  {SWITCH}=1 pip install -v --no-build-isolation -e .\n"
        f"! To build without it and without this warning: {SWITCH}=0\n{line}",
        file=sys.stderr,
        flush=True,
    )


def sources() -> list[str]:
    """C++ files of the extension, relative to this file; CUDA sources will stand in csrc/cuda/, beside csrc/cpu/."""
    return sorted(
        str(path.relative_to(ROOT)) for folder in ("csrc", "csrc/cpu") for path in ROOT.glob(f"{folder}/*.cpp")
    )


def extension_arguments() -> dict[str, Any]:
    """The arguments of ``setup`` that concern the extension; empty where none is to be built."""
    must = wanted()
    files = sources()
    if must is False or not files:
        return {}
    lacking = missing()
    if lacking is not None:
        if must:
            raise SystemExit(f"setup.py: {SWITCH}=1, but {lacking}.")
        warn(lacking)
        return {}

    from torch.utils.cpp_extension import BuildExtension, CppExtension

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
                warn(f"the build failed: {type(error).__name__}: {error}")

    extension = CppExtension(
        "dynskip._C",
        files,
        include_dirs=[str(ROOT / "csrc")],
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")),
        extra_compile_args=[*COMPILE_ARGS, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"],
        py_limited_api=True,  # torch's build defines Py_LIMITED_API itself
    )
    command: type[build_ext] = OptionalBuildExtension
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": command},
        "options": {"bdist_wheel": {"py_limited_api": WHEEL_TAG}},
    }


setup(**extension_arguments())
