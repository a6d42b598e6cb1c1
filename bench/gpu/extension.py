"""The C++ and CUDA extension for the card that is here: the one that was carried along, or one built now, in place."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dynskip.ops import native

_ROOT = Path(__file__).resolve().parents[2]


def why_not_usable(device: str) -> str | None:
    """Why the extension that is in place does not serve ``device``, "cuda" or "cpu"; None where it does."""
    if native.unavailable_reason() is not None or device == "cpu":
        return native.unavailable_reason()
    return None if native.has_cuda() else native.CUDA_MISSING


def main(argv: Sequence[str] | None = None) -> int:
    """The part ``build`` of `make gpu`."""
    parser = argparse.ArgumentParser(prog="bench.gpu.extension", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the CUDA part is not needed")
    parser.add_argument(
        "--only-check", action="store_true", help="build nothing; exit status 1 where it does not serve"
    )
    args = parser.parse_args(argv)
    reason = why_not_usable(args.device)
    if reason is None:
        print("the extension that is in place serves this machine")
        return 0
    print(reason, flush=True)
    if args.only_check:
        return 1
    environment = os.environ | {"DYNSKIP_BUILD_EXT": "1"}
    if args.device == "cuda":
        # For this card alone: a third of the time that all architectures take.
        major, minor = torch.cuda.get_device_capability()
        environment |= {"DYNSKIP_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    # Forced: one that does not load may be newer than its sources.
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    built = subprocess.run(command, cwd=_ROOT, env=environment, check=False)
    if built.returncode != 0:
        return built.returncode
    # A process that has failed to load it does not see what stands there now.
    again = [sys.executable, "-m", "bench.gpu.extension", "--only-check", "--device", args.device]
    return subprocess.run(again, cwd=_ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
