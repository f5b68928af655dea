from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from penstock.events import EVENTS, HISTORIES, ITEMS, USERS, LogError, read_events, read_table
from penstock.quarantine import add_mended, bring_back, files, in_file, read, text
from tests.small_log import HOUR, START, Row, an_event, write_log

DAY = 24 * HOUR


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Twelve events over six days, two of them equal."""
    events = [an_event(n, n % 3, n % 4, START + n * DAY / 2) for n in range(12)]
    return write_log(tmp_path / "log", [*events, events[5]])


def put_aside(frame: pl.DataFrame, **changes: Any) -> pl.DataFrame:
    """Rows of a table as they come from quarantine, corrected."""
    return frame.with_columns(text(frame)).with_columns(
        pl.lit(value, dtype=frame.schema[name]).alias(name) for name, value in changes.items()
    )


def events_where(log: Path, number: int) -> pl.DataFrame:
    return read_events(log).filter(pl.col("event_id") == number)


def test_mended_rows_take_the_place_of_the_bad_ones(log: Path, tmp_path: Path) -> None:
    before = read_events(log)
    days = {path: path.read_bytes() for path in (log / "events").glob("*/*.parquet")}
    rows = pl.concat(
        [
            put_aside(events_where(log, 3), click=1),
            put_aside(events_where(log, 7), event_time=START + 20 * DAY, created_time=START + 20 * DAY),
        ]
    )
    users = put_aside(read_table(log / "users.parquet", USERS).head(1), fans_count=9)
    kept_in = bring_back({"events": rows, "users": users}, tmp_path / "mended")

    assert add_mended(log, [kept_in]) == 3

    after = read_events(log)
    expected = before.with_columns(
        click=pl.when(pl.col("event_id") == 3).then(1).otherwise("click").cast(pl.Int8),
        event_time=pl.when(pl.col("event_id") == 7).then(START + 20 * DAY).otherwise("event_time"),
        created_time=pl.when(pl.col("event_id") == 7).then(START + 20 * DAY).otherwise("created_time"),
    )
    assert after.equals(expected.select(*EVENTS.schema).sort("event_time", "event_id"))
    assert (log / "events" / "dt=2026-03-21" / "mended.parquet").is_file()
    assert read_table(log / "users.parquet", USERS).sort("user_id")["fans_count"].to_list() == [9, 4, 4]
    # files without a mended row are as they were
    untouched = [path for path in days if path.read_bytes() == days[path]]
    assert len(untouched) == len(days) - 2
    # and once more changes nothing
    assert add_mended(log, [kept_in]) == 3
    assert read_events(log).equals(after)


def test_of_equal_rows_as_many_go_as_were_mended(log: Path, tmp_path: Path) -> None:
    twice = events_where(log, 5)
    assert twice.height == 2
    add_mended(log, [bring_back({"events": put_aside(twice.head(1), event_id=500)}, tmp_path / "mended")])
    assert read_events(log)["event_id"].sort().to_list() == [*range(12), 500]


def test_a_row_without_a_key_is_found_by_what_it_was(log: Path, tmp_path: Path) -> None:
    nameless = read_events(log).with_columns(
        event_id=pl.when(pl.col("event_id") == 4).then(None).otherwise("event_id").cast(pl.Int64)
    )
    for path in (log / "events").glob("*/*.parquet"):
        path.unlink()
    nameless.write_parquet(log / "events" / "dt=2026-03-01" / "rows.parquet")
    lost = nameless.filter(pl.col("event_id").is_null())
    add_mended(log, [bring_back({"events": put_aside(lost, event_id=400)}, tmp_path / "mended")])
    assert read_events(log)["event_id"].sort().to_list() == [0, 1, 2, 3, 5, 5, 6, 7, 8, 9, 10, 11, 400]


def test_the_last_mending_of_a_row_counts(log: Path, tmp_path: Path) -> None:
    row = events_where(log, 2)
    for change in ({"click": 1}, {"click": 0, "like": 1}, {"event_id": 200}):
        bring_back({"events": put_aside(row, **change)}, tmp_path / "mended")
    paths = files(tmp_path / "mended")
    assert len(paths) == 3
    add_mended(log, paths[:2])
    assert events_where(log, 2).select("click", "like").rows() == [(0, 1)]
    add_mended(log, paths)
    assert read_events(log)["event_id"].sort().to_list() == [0, 1, 3, 4, 5, 5, 6, 7, 8, 9, 10, 11, 200]


def test_a_mended_row_counts_when_its_source_changed_otherwise(log: Path, tmp_path: Path) -> None:
    kept_in = bring_back({"events": put_aside(events_where(log, 2), click=1)}, tmp_path / "mended")
    other = write_log(tmp_path / "other", [an_event(n, n % 3, n % 4, START + n * DAY / 2, like=1) for n in range(12)])
    add_mended(other, [kept_in])
    assert events_where(other, 2).select("click", "like").rows() == [(1, 0)]


def test_histories_may_be_new_to_the_log(log: Path, tmp_path: Path) -> None:
    history: Row = {"user_id": 1, "event_time": START, "created_time": START, "items": [1, 2]}
    rows = put_aside(pl.DataFrame([history], schema=HISTORIES.schema))
    assert add_mended(log, [bring_back({"histories": rows}, tmp_path / "mended")]) == 1
    assert read_table(log / "histories.parquet", HISTORIES).to_dicts() == [history]


def test_nothing_is_kept_twice_or_overwritten(log: Path, tmp_path: Path) -> None:
    row = put_aside(events_where(log, 2), click=1)
    first = bring_back({"events": row}, tmp_path / "mended")
    assert bring_back({"events": row}, tmp_path / "mended") == first
    assert bring_back({"events": row.with_columns(like=pl.lit(1, pl.Int8))}, tmp_path / "mended") != first
    assert len(list((tmp_path / "mended").iterdir())) == 2
    assert add_mended(log, []) == 0


def test_a_file_that_pandas_wrote_is_read_all_the_same(log: Path, tmp_path: Path) -> None:
    items = read_table(log / "items.parquet", ITEMS)
    tables = {"events": put_aside(events_where(log, 2)), "items": put_aside(items)}
    in_file(tables).to_pandas().to_parquet(tmp_path / "edited.parquet")
    assert pl.read_parquet(tmp_path / "edited.parquet").schema["user_id"] == pl.Float64
    found = read(tmp_path / "edited.parquet")
    assert {name: frame.to_dicts() for name, frame in found.items()} == {
        name: frame.to_dicts() for name, frame in tables.items()
    }


def test_the_original_says_the_row_in_full(log: Path) -> None:
    said = json.loads(put_aside(events_where(log, 2), click=1)["original"][0])
    assert list(said) == list(EVENTS.schema)
    assert (said["event_id"], said["click"], said["event_time"]) == (2, 0, "2026-03-02T00:00:00+00:00")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: rows.drop("original"), "column original is missing; is it a quarantine file"),
        (lambda rows: rows.with_columns(original=pl.lit(None, pl.String)), "a row of events has no original"),
        (lambda rows: rows.with_columns(table=pl.lit("orders")), "there is no table 'orders' in a log, only users"),
        (lambda rows: rows.drop("click"), "column click is missing from the events table"),
        (lambda rows: rows.with_columns(click=pl.lit("yes")), "column click is String, not Int8"),
        (lambda rows: rows.with_columns(event_time=pl.lit(5)), "column event_time is Int32, not Datetime.*is no time"),
    ],
)
def test_a_file_that_is_no_quarantine_is_refused(log: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    spoil(in_file({"events": put_aside(events_where(log, 2))})).write_parquet(tmp_path / "file")
    with pytest.raises(LogError, match=message) as caught:
        read(tmp_path / "file")
    assert str(caught.value).startswith(f"{tmp_path / 'file'}: ")
    with pytest.raises(LogError, match="no such file"):
        read(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"PAR1 and no more")
    with pytest.raises(LogError, match="not readable as Parquet"):
        read(tmp_path / "file")
