"""A forked process never hangs: it computes what its parent does with one thread, or says at once what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynskip.execution.threads import most_threads
from dynskip.ops.native import unavailable_reason

SCRIPT = Path(__file__).parents[1] / "helpers" / "forking.py"


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_forked_process_computes_what_its_parent_does_or_says_at_once_why_not(num_threads: int) -> None:
    command = [sys.executable, str(SCRIPT), str(num_threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)  # a hang takes longer
    assert done.returncode == 0, done.stderr
    first, rest = done.stdout.split("\n", 1)
    num_models = 2 if unavailable_reason() else 4
    # generates and serves with the parent's tokens
    assert first == f"{num_models} models, different: [], threads: 1, told: {int(num_threads > 1)}"
    # asks for more threads, which is refused unless its parent was without any
    is_refused = "RuntimeError: check_fork: torch must use 1 thread in a forked process, got 2" in rest
    assert is_refused or (num_threads == 1 and rest.startswith("([("))
    # uses an AsyncLLM of its parent
    assert "RequestError: AsyncLLM: it must be used in the process that made it, " in rest
    assert rest.endswith("closed: None\n")


def test_more_threads_than_cpus_make_sense_up_to_a_point() -> None:
    assert (os.cpu_count() or 1) < most_threads() < 10**6
