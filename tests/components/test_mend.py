"""The way of a bad row: put aside, corrected by a person, held to the rules again, and back in the next log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from kfp import dsl

from components.expectations import validate_log
from components.ingest import ingest
from components.mend import mend
from penstock import days, quarantine
from penstock.events import EVENTS, LogError, read_events
from tests.small_log import HOUR, START, an_event, write_log

SPOILT: dict[int, dict[str, Any]] = {
    10: {"click": 2},
    20: {"watch_time_ms": None},
    30: {"user_id": 50},  # a user who is bad
    40: {"user_id": 999},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    events = [an_event(n, n % 5, n % 7, START + n * HOUR, click=n % 2) for n in range(60)]
    log = write_log(tmp_path / "source", events)
    rows = pl.DataFrame(
        [row | SPOILT.get(row["event_id"], {}) for row in read_events(log).to_dicts()], schema=EVENTS.schema
    )
    for path in (log / "events").glob("*/*.parquet"):
        path.unlink()
    pl.concat([rows, rows.filter(pl.col("event_id") == 50)]).write_parquet(
        log / "events" / "dt=2026-03-01" / "x.parquet"
    )
    users = pl.read_parquet(log / "users.parquet")
    bad = users.head(1).with_columns(user_id=pl.lit(50, pl.Int64), is_creator=pl.lit(7, pl.Int64))
    pl.concat([users, bad]).write_parquet(log / "users.parquet")
    return log


def prepare(home: Path, source: Path, name: str) -> tuple[dict[str, int], Path]:
    """Ingests and validates, as the DAG does: bad rows by table, and the quarantine."""
    run = home / "runs" / "prepare" / name
    mended = json.dumps([str(path) for path in quarantine.files(home / "mended")])
    options = json.dumps({"path": str(source)})
    log = run / "ingest" / "log"
    ingest.python_func(source="canonical", options=options, feedback="", mended=mended, log=dsl.Dataset(uri=str(log)))
    (run / "ingest" / "_SUCCESS.json").write_text("{}")
    found = validate_log(
        log, run / "good", run / "quarantine", run / "docs", max_bad_share=1.0, severity={}, limits=days.Config()
    )
    return dict(found.bad), run / "quarantine"


def corrected(file: Path, to: Path, values: dict[tuple[str, int], dict[str, Any]]) -> Path:
    """A copy of a quarantine with other values, by table and id."""
    frame = pl.read_parquet(file)
    keys = {"events": "event_id", "users": "user_id", "items": "item_id"}
    rows = [row | values.get((row["table"], row[keys[row["table"]]]), {}) for row in frame.to_dicts()]
    pl.DataFrame(rows, schema=frame.schema).write_parquet(to)
    return to


def test_mended_rows_come_back_and_the_others_are_left_with_the_reason(tmp_path: Path, source: Path) -> None:
    home = tmp_path / "home"
    bad, put_aside = prepare(home, source, "first")
    assert bad == {"users": 1, "items": 0, "events": 5}
    file = corrected(
        put_aside,
        tmp_path / "corrected.parquet",
        {
            ("events", 10): {"click": 1},
            ("events", 20): {"watch_time_ms": -3},
            ("users", 50): {"is_creator": 1},
            ("events", 50): {"event_id": 5000, "request_id": 5000},
        },
    )

    done = mend(file, home)

    # the event of user 50 is good as it is, now that the user is
    assert done.taken == {"users": 1, "events": 3}
    assert done.kept_in is not None
    assert done.kept_in.parent == home / "mended"
    assert done.refused.select("event_id", "reason").sort("event_id").rows() == [
        (20, "watch_time_ms must be between 0 and 86400000"),
        (40, "user_id must be in users"),
    ]
    assert done.left_in == tmp_path / "corrected-rest.parquet"
    assert pl.read_parquet(done.left_in).equals(done.refused)

    # done twice, nothing new
    again = mend(file, home)
    assert (again.taken, again.kept_in) == (done.taken, done.kept_in)
    assert len(quarantine.files(home / "mended")) == 1

    # the next run has each once
    bad, _ = prepare(home, source, "second")
    assert bad == {"users": 0, "items": 0, "events": 2}
    good = read_events(home / "runs" / "prepare" / "second" / "good")
    assert sorted(good["event_id"]) == sorted([*set(range(60)) - {20, 40}, 5000])
    assert good.filter(pl.col("event_id") == 10)["click"].to_list() == [1]

    # what was left can be mended later, in its own file
    rest = corrected(done.left_in, done.left_in, {("events", 20): {"watch_time_ms": 3}, ("events", 40): {"user_id": 4}})
    last = mend(rest, home)
    assert (last.taken, last.left_in) == ({"events": 2}, None)
    bad, _ = prepare(home, source, "third")
    assert sum(bad.values()) == 0
    assert read_events(home / "runs" / "prepare" / "third" / "good").height == 61


def test_a_row_cannot_take_the_place_of_another(tmp_path: Path, source: Path) -> None:
    home = tmp_path / "home"
    _, put_aside = prepare(home, source, "first")
    values: dict[tuple[str, int], dict[str, Any]] = {("events", 10): {"click": 0, "event_id": 11, "request_id": 11_000}}
    done = mend(corrected(put_aside, tmp_path / "file", values), home)
    assert done.refused.filter(pl.col("event_id").is_in([11, 50])).sort("event_id").select(
        "event_id", "reason"
    ).rows() == [
        (11, "event_id must be unique"),
        (50, "event_id must be unique"),
    ]


def test_a_row_of_another_log_is_refused(tmp_path: Path, source: Path) -> None:
    home = tmp_path / "home"
    _, put_aside = prepare(home, source, "first")
    other = write_log(tmp_path / "other", [an_event(n, n % 5, n % 7, START + n * HOUR, like=1) for n in range(60)])
    prepare(home, other, "second")
    done = mend(corrected(put_aside, tmp_path / "file", {("events", 10): {"click": 1}}), home)
    assert (done.taken, done.kept_in) == ({}, None)
    assert set(done.refused["reason"]) == {
        f"it is not as it was in {home}/runs/prepare/second/ingest/log: correct it in the newest quarantine"
    }


def test_without_a_log_there_is_nothing_to_hold_rows_to(tmp_path: Path, source: Path) -> None:
    _, put_aside = prepare(tmp_path / "home", source, "first")
    with pytest.raises(LogError, match="no log has been ingested here"):
        mend(put_aside, tmp_path / "elsewhere")
