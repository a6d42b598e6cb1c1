"""What one needs to know to repeat a run: versions, commit, hashes of its data."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dynskip.files import file_hash
from dynskip.host import commit


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
