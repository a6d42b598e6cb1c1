"""These tests start a cluster: `make ray` runs them, `make test` says that it did not."""

from __future__ import annotations

import importlib.util

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a cluster unless it was asked for by its mark."""
    reason = None
    if config.option.markexpr != "ray":
        reason = "starts a cluster of Ray's: make ray"
    elif importlib.util.find_spec("ray") is None:
        reason = "ray is not installed: make ray installs it"
    for item in items:
        if item.get_closest_marker("ray") is not None and reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
