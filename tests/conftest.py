"""What all tests share: a quiet TensorFlow, an order that wastes no time, and workers that are taken for programs."""

from __future__ import annotations

import os
import sys
from collections import Counter

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# pyspark ends a process whose main module has no file, as that of a worker of pytest-xdist: it takes it for a doctest
if not hasattr(sys.modules["__main__"], "__file__"):
    sys.modules["__main__"].__file__ = __file__


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The loop first, which takes longest and must not be what all wait for; then the files with most tests."""
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.get_closest_marker("e2e") is None, -sizes[item.path], str(item.path)))
