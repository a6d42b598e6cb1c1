"""What a compiled kernel takes of a GPU: read from its machine code, with the tool that Triton carries, and its PTX."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Products on tensor cores (PTX ISA): of a warp on any, of four on sm_90, on sm_100. The assembler makes one instruction
# of each.
_TENSOR_CORE = re.compile(r"^\s*(?:@!?%\w+\s+)?(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", re.MULTILINE)


@dataclass(frozen=True)
class Resources:
    """Registers a thread, and bytes a thread that did not fit into them."""

    registers: int
    spilled_bytes: int


def read_resources(cubin: bytes) -> Resources:
    """The resources of the one kernel in `cubin`."""
    import triton

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(amount) for name, amount in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    assert {"REG", "STACK", "LOCAL"} <= set(usage), text
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"])


def count_tensor_core_instructions(ptx: str) -> int:
    """How often the kernel in `ptx` calls on the tensor cores."""
    return len(_TENSOR_CORE.findall(ptx))


def complaint(error: str | None, spilled_bytes: int, shared_bytes: int, max_shared_bytes: int) -> str | None:
    """Why a GPU should not run a kernel that takes so much, or that does not compile for that `error`."""
    if error is not None:
        return f"does not compile: {error}"
    if spilled_bytes:
        return f"spills {spilled_bytes} bytes a thread"
    if shared_bytes > max_shared_bytes:
        return f"needs {shared_bytes} bytes of shared memory, may have {max_shared_bytes}"
    return None
