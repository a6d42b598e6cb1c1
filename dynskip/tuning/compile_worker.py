"""The process that compiles candidates: see `compiling`, which starts it without Triton's interpreter.

python -m dynskip.tuning.compile_worker CAPABILITY reads a JSON object a line, and answers each with one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

import torch
from triton.errors import TritonError
from triton.runtime import driver

from dynskip.kernels.configs import use_configs
from dynskip.kernels.launches import compile_only
from dynskip.models.config import DecoderConfig, Rotary
from dynskip.ops.row_ops import get_row_ops
from dynskip.tuning.compiling import Usage
from dynskip.tuning.space import Constants
from dynskip.tuning.table import candidate_table
from dynskip.tuning.tasks import Task
from dynskip.tuning.workload import Workload
from dynskip.validation.offline.resources import read_resources
from dynskip.validation.offline.worker import OfflineDriver


def compile_candidate(capability: int, task: Task, constants: Constants) -> Usage:
    """What the largest of the kernels takes that a launch of ``task`` needs."""
    usages: list[Usage] = []

    def receive(op: str, kernel: Any) -> None:
        resources = read_resources(kernel.asm["cubin"])
        usages.append(Usage(resources.registers, resources.spilled_bytes, kernel.metadata.shared))

    workload = Workload(task, get_row_ops("triton"), torch.device("cpu"), empty=True)
    try:
        with use_configs(candidate_table(task, constants)), compile_only(capability, receive):
            workload.launch()
    except (TritonError, RuntimeError) as error:  # what the compiler raises is why there is no such candidate
        return Usage(error=" ".join(f"{type(error).__name__}: {error}".split())[:300])
    return Usage(*(max(getattr(usage, name) for usage in usages) for name in _FIGURES))


_FIGURES = ("registers", "spilled_bytes", "shared_bytes")


def main(capability: int) -> None:
    """Answers requests until there are no more."""
    driver.set_active(OfflineDriver(capability))
    # The compiler prints what it cannot assemble; answers go where nothing else does.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        config = request["task"].pop("config")
        rotary = None if config["rotary"] is None else Rotary(**config.pop("rotary"))
        task = Task(**request["task"], config=DecoderConfig(**config | {"rotary": rotary}))
        usage = compile_candidate(capability, task, request["constants"])
        answers.write(json.dumps(dataclasses.asdict(usage)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
