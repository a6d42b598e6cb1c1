"""What one needs to know to repeat a run: versions, commit, hashes of its data."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit() -> str | None:
    """The commit of the checkout that this file stands in, or None outside of one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def provenance(config: dict[str, Any], data: Sequence[Path]) -> dict[str, Any]:
    """The ``config`` of a run beside versions, machine, commit, and the hash of each data file."""
    return {
        "config": config,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "accelerate")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "num_threads": torch.get_num_threads(),
        "commit": commit(),
        "data": {path.name: file_hash(path) for path in data},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_json(path: Path, value: object) -> None:
    """Write ``value`` so that a kill leaves either the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.rename(path)
