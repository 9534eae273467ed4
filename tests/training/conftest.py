"""The cache writes by size alone, unless a test wants otherwise."""

import math

import pytest

from qadapter.training import base_cache


@pytest.fixture(autouse=True)
def written_by_size_alone(monkeypatch):
    """On a busy machine half a minute may pass, and there would be one more shard."""
    monkeypatch.setattr(base_cache, "FLUSH_SECONDS", math.inf)
