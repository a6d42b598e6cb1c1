"""A pytest plugin: of all tests, runs every n-th from the i-th on, so that n processes together run all of them.

The kernels of different tests are compiled by the CPU, one after the other in a process; a card waits for it.
"""

from __future__ import annotations

import os

import pytest

VARIABLE = "DYNSKIP_TEST_SHARD"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of other shards; the variable holds "i/n"."""
    shard, num_shards = map(int, os.environ[VARIABLE].split("/"))
    assert 0 <= shard < num_shards, f"{VARIABLE} must be i/n with i < n"
    mine = [item for index, item in enumerate(items) if index % num_shards == shard]
    others = [item for index, item in enumerate(items) if index % num_shards != shard]
    config.hook.pytest_deselected(items=others)
    items[:] = mine
