"""What a compiled kernel takes of a GPU, read from its machine code with the tools that Triton carries."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynskip.files import write_text

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


def read_resources(cubin: bytes, multiplies: bool) -> Resources:
    """The resources of the one kernel in `cubin`. Unless it `multiplies` matrices, nobody looks for tensor cores.

    Triton's cache keeps what the tools say of each kernel, since they take about as long as the compiler.
    """
    import triton

    folder = Path(triton.knobs.cache.dir) / "dynskip-resources"
    kept = folder / f"{hashlib.sha256(cubin).hexdigest()}-{'all' if multiplies else 'usage'}.json"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps(_inspect(cubin, multiplies)))  # in one piece: another process may look for it
    said = json.loads(kept.read_text(encoding="utf-8"))
    return Resources(
        registers=int(said["usage"]["REG"]),
        spilled_bytes=int(said["usage"]["STACK"]) + int(said["usage"]["LOCAL"]),
        tensor_core_instructions=sum(
            count for name, count in said["instructions"].items() if is_tensor_core_instruction(name)
        ),
    )


def complaint(error: str | None, spilled_bytes: int, shared_bytes: int, max_shared_bytes: int) -> str | None:
    """Why a GPU should not run a kernel that takes so much, or that does not compile for that `error`."""
    if error is not None:
        return f"does not compile: {error}"
    if spilled_bytes:
        return f"spills {spilled_bytes} bytes a thread"
    if shared_bytes > max_shared_bytes:
        return f"needs {shared_bytes} bytes of shared memory, may have {max_shared_bytes}"
    return None


def is_tensor_core_instruction(name: str) -> bool:
    """Whether the instruction `name`, without its modifiers, multiplies matrices."""
    return _TENSOR_CORE.fullmatch(name) is not None


def count_instructions(assembly: str) -> dict[str, int]:
    """How often each instruction stands in a kernel, as cuobjdump prints it; without predicates and modifiers."""
    instructions = Counter(_INSTRUCTION.findall(assembly))
    assert instructions["EXIT"], f"no program in {assembly[:1000]}"
    return dict(instructions)


def _inspect(cubin: bytes, multiplies: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        text = _cuobjdump("-res-usage", path)
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
        assert {"REG", "STACK", "LOCAL"} <= set(usage), text
        return {"usage": usage, "instructions": count_instructions(_cuobjdump("-sass", path)) if multiplies else {}}


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, option, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
