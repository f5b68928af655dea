"""A source, the gateway's feedback and mended rows become one log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from kfp import dsl

from components.ingest import ingest
from penstock.events import LogError, read_events
from penstock.feedback import FeedbackLog
from penstock.quarantine import bring_back, text
from tests.small_log import HOUR, START, an_event, write_log


@pytest.fixture
def source(tmp_path: Path) -> Path:
    events = [an_event(n, n % 5, n % 7, START + n * HOUR, click=n % 2) for n in range(20)]
    return write_log(tmp_path / "source", events)


def run(log: Path, source: Path, **arguments: Any) -> None:
    arguments = {"feedback": "", "mended": "[]"} | arguments
    options = json.dumps({"path": str(source)})
    ingest.python_func(source="canonical", options=options, log=dsl.Dataset(uri=str(log)), **arguments)


@pytest.mark.parametrize("with_feedback", [False, True])
def test_the_gateways_feedback_is_added(tmp_path: Path, source: Path, with_feedback: bool) -> None:
    feedback = tmp_path / "feedback"
    if with_feedback:
        with FeedbackLog(feedback) as told:
            where = {"time_ms": 1_772_000_000_000, "scenario": 0, "device": 1, "features_us": None}
            told.impressions(2**52, 1, [3, 4], **where, release=2, variant="champion")
            told.outcomes(2**52, [{"item_id": 4, "click": 1}])
    run(tmp_path / "log", source, feedback=str(feedback))
    events = read_events(tmp_path / "log")
    assert events.filter(pl.col("release").is_null()).equals(read_events(source))
    shown = events.filter(pl.col("release") == 2).sort("position")
    assert shown.select("item_id", "click").rows() == ([(3, 0), (4, 1)] if with_feedback else [])


def test_mended_rows_are_put_in_place(tmp_path: Path, source: Path) -> None:
    row = read_events(source).filter(pl.col("event_id") == 7)
    mended = row.with_columns(text(row), click=pl.lit(0, pl.Int8))
    kept_in = bring_back({"events": mended}, tmp_path / "mended")
    run(tmp_path / "log", source, mended=json.dumps([str(kept_in)]))
    events = read_events(tmp_path / "log")
    assert events.height == 20
    assert events.filter(pl.col("event_id") == 7)["click"].to_list() == [0]


def test_what_is_unknown_is_named(tmp_path: Path) -> None:
    log = dsl.Dataset(uri=str(tmp_path / "log"))
    with pytest.raises(ValueError, match=r"unknown datasets 'nowhere': there are .*simulator"):
        ingest.python_func(source="nowhere", options="{}", feedback="", mended="", log=log)
    with pytest.raises(ValueError, match=r"unknown parameter colour"):
        ingest.python_func(source="simulator", options='{"colour": 1}', feedback="", mended="", log=log)
    with pytest.raises(LogError, match="no such directory"):
        run(tmp_path / "log", tmp_path / "nowhere")
