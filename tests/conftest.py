"""What every test runs under; imported before the tests, and so before anything that reads these variables."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator

# Nothing is fetched: a test that needs the network fails here, on every machine, and not only on the one without.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# cuBLAS reads it once, before a test can ask for deterministic algorithms, which refuse to multiply without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# OpenMP's threads wait by spinning: beside other work on the same cores, tiny models would take minutes, not seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# As many processes as cores run tests already.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

# Triton reads this once, when it is imported: without a GPU its kernels run on CPU tensors under its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from interpreter import speed_up

    speed_up()

# No deadline: the machine may be shared. The same examples each time, so that a red run is red again;
# HYPOTHESIS_PROFILE=explore looks for new ones.
hypothesis.settings.register_profile("repeat", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


# Each is one test or a few, and takes minutes: begun last, it would keep one process busy when the others have ended.
LONG_FILES = (
    *("test_offline_compile.py", "test_prefixes.py", "test_gpu_parts.py", "test_gpu_command.py"),
    *("test_gpu_smoke.py", "test_smollm2.py"),
    *("test_engine_machine.py", "test_in_flight.py", "test_evaluation_run.py", "test_fine_tune.py"),
    *("test_report.py", "test_paper_pipeline.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


def pytest_collection_finish() -> None:
    """Takes what was imported out of the collections of garbage that tests ask for: each would read all of it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture
def three_threads() -> Iterator[None]:
    """A team of three within the test, of which two are not the caller."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
