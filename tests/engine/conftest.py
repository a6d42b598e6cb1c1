"""What tests of the engine share."""

from __future__ import annotations

import random

import pytest
from drafts import draw_lengths


@pytest.fixture
def random_lengths(monkeypatch: pytest.MonkeyPatch) -> random.Random:
    """Lengths drawn at random, in place of those that pay."""
    return draw_lengths(monkeypatch)
