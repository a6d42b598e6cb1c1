"""What a compiled kernel takes of a GPU, read from its machine code with the tools that Triton carries."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Tensor cores: HMMA and its kin up to sm_89, HGMMA and its kin on sm_90, UTCHMMA and its kin on sm_100.
_TENSOR_CORE = re.compile(r"[BDHIOQ]MMA|[BHIQ]GMMA|UTC[A-Z]*MMA")
# A line of assembly: its address, perhaps a predicate, its instruction.
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


@dataclass(frozen=True)
class Resources:
    """Registers a thread, bytes a thread that did not fit into them, and how often the tensor cores are called on."""

    registers: int
    spilled_bytes: int
    tensor_core_instructions: int


def read_resources(cubin: bytes) -> Resources:
    """The resources of the one kernel in `cubin`."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, assembly = _cuobjdump("-res-usage", path), _cuobjdump("-sass", path)
    figures = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    assert {"REG", "STACK", "LOCAL"} <= set(figures), usage
    instructions = _INSTRUCTION.findall(assembly)
    assert "EXIT" in instructions, assembly[:1000]
    return Resources(
        registers=int(figures["REG"]),
        spilled_bytes=int(figures["STACK"]) + int(figures["LOCAL"]),
        tensor_core_instructions=sum(map(is_tensor_core_instruction, instructions)),
    )


def is_tensor_core_instruction(name: str) -> bool:
    """Whether the instruction `name`, without its modifiers, multiplies matrices."""
    return _TENSOR_CORE.fullmatch(name) is not None


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, option, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
