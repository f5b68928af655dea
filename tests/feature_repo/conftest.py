"""A real feature store on a small log, made once."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from feature_repo.store import refresh
from penstock.events import read_events
from tests.small_log import a_log, write_log

SEED = 27


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    events, histories = a_log(SEED)
    return write_log(tmp_path_factory.mktemp("log"), events, histories)


@pytest.fixture(scope="session")
def home(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose store holds the log's features; tests only read it."""
    home = tmp_path_factory.mktemp("home")
    refresh(home, log, home / "out")
    return home


@pytest.fixture(scope="session")
def events(log: Path) -> pl.DataFrame:
    return read_events(log)
