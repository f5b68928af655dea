"""The point-in-time join against plain loops over ten thousand histories, and each of its rules by hand."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import polars as pl
import pytest

from penstock.point_in_time import PointInTimeError, rows_as_of, rows_since
from tests.histories import ASKED, MINUTE, SOURCE, SPAN, START, TIME, UNKNOWN, histories, known

HISTORIES = 10_000


@pytest.fixture(scope="module")
def many() -> tuple[pl.DataFrame, pl.DataFrame]:
    return histories(HISTORIES, seed=20240501)


def ask(asked: pl.DataFrame, source: pl.DataFrame, **options: Any) -> list[int | None]:
    """The number of the row in force for each entity row."""
    options = {"created_time": "created", "keys": {"entity_id": "entity_id"}} | options
    rows = rows_as_of(asked, source, time="event_timestamp", event_time="event", **options)
    assert (len(rows), rows.dtype) == (asked.height, pl.UInt32)
    return rows.to_list()


def minutes(*rows: tuple[float, float], entity: int = 1) -> pl.DataFrame:
    """Source rows of an entity from (event, created) in minutes."""
    found = [
        {"entity_id": entity, "event": START + event * MINUTE, "created": START + created * MINUTE, "value": number}
        for number, (event, created) in enumerate(rows)
    ]
    return pl.DataFrame(found, schema=SOURCE)


def at(*times: float, entity: int | None = 1) -> pl.DataFrame:
    """Entity rows of an entity at times in minutes."""
    return pl.DataFrame(
        [{"entity_id": entity, "event_timestamp": START + time * MINUTE} for time in times], schema=ASKED
    )


@pytest.mark.parametrize("created", [True, False])
@pytest.mark.parametrize("ttl", [None, timedelta(0), 4 * MINUTE])
def test_ten_thousand_histories(many: tuple[pl.DataFrame, pl.DataFrame], created: bool, ttl: timedelta | None) -> None:
    source, asked = many
    assert asked.filter(pl.col("entity_id") < UNKNOWN)["entity_id"].n_unique() == HISTORIES
    expected = known(source.rows(named=True), asked.rows(named=True), created=created, ttl=ttl)
    assert ask(asked, source, created_time="created" if created else None, ttl=ttl) == expected


def test_the_histories_hold_every_difficulty(many: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    source, asked = many
    late, back = pl.col("created") > pl.col("event"), pl.col("created") < pl.col("event")
    twice = pl.struct("entity_id", "event", "created").is_duplicated()
    counts = source.select(late=late.sum(), back=back.sum(), twice=twice.sum())
    assert min(counts.row(0)) > 1_000
    on_stamp = asked.join(source, left_on=["entity_id", "event_timestamp"], right_on=["entity_id", "event"], how="semi")
    on_arrival = asked.join(
        source.filter(late), left_on=["entity_id", "event_timestamp"], right_on=["entity_id", "created"], how="semi"
    )
    before = asked.filter(pl.col("event_timestamp") < START)
    unknown = asked.filter(pl.col("entity_id") >= UNKNOWN)
    none = asked.filter(pl.col("entity_id").is_null())
    repeated = asked.filter(asked.is_duplicated())
    without = asked.join(source, on="entity_id", how="anti")
    assert min(map(len, (on_stamp, on_arrival, before, repeated, without))) > 1_000
    assert min(map(len, (unknown, none))) > 100


def test_a_key_of_two_columns(many: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    source, asked = many
    number = pl.col("entity_id")
    parts = [(number // 100).cast(pl.Int32).alias("block"), (number % 100).cast(pl.String).alias("place")]
    keys = {"block": "source_block", "place": "place"}
    split = source.with_columns(parts).rename({"block": "source_block"}).drop("entity_id")
    expected = known(source.rows(named=True), asked.rows(named=True))
    assert ask(asked.with_columns(parts).drop("entity_id"), split, keys=keys) == expected


@pytest.mark.parametrize("stop", [-1, 0, 5, 11, SPAN, 3 * SPAN])
def test_filling_a_store_in_steps_gives_what_is_in_force(many: tuple[pl.DataFrame, pl.DataFrame], stop: int) -> None:
    source, _ = many
    held: dict[int, int] = {}
    steps = [START - MINUTE * SPAN, *(START + minute * MINUTE for minute in range(0, stop, 4)), START + stop * MINUTE]
    for since, until in itertools.pairwise(steps):
        rows = rows_since(
            source, keys=["entity_id"], event_time="event", created_time="created", since=since, until=until
        )
        part = source[rows]
        assert part["entity_id"].is_unique().all()
        assert part["entity_id"].null_count() == 0
        held |= dict(zip(part["entity_id"], part["value"], strict=True))
    asked = pl.DataFrame({"entity_id": range(HISTORIES), "event_timestamp": steps[-1]}, schema=ASKED)
    expected = known(source.rows(named=True), asked.rows(named=True))
    assert [held.get(entity) for entity in range(HISTORIES)] == expected


def test_a_late_row_counts_from_its_arrival_and_an_older_one_replaces_nothing() -> None:
    source = minutes((0, 0), (10, 30), (20, 20))
    assert ask(at(0, 10, 19, 20, 30, 31), source) == [0, 0, 0, 2, 2, 2]
    assert ask(at(0, 10, 19, 20, 30, 31), source, created_time=None) == [0, 1, 1, 2, 2, 2]
    assert ask(at(9, 10, 29, 30), source[:2]) == [0, 0, 0, 1]


def test_equal_stamps_go_by_arrival_then_by_place() -> None:
    assert ask(at(9), minutes((1, 3), (1, 2), (1, 3), (1, 1))) == [2]
    assert ask(at(2), minutes((1, 3), (1, 2), (1, 3), (1, 1))) == [1]
    assert ask(at(9), minutes((1, 3), (1, 2), (1, 1)), created_time=None) == [2]


def test_a_clock_that_went_back_makes_no_row_known_before_it_happened() -> None:
    source = minutes((5, 1), (3, 9))
    assert ask(at(1, 4, 5, 9, 10), source) == [None, None, 0, 0, 0]


def test_ttl_counts_from_the_event_and_hides_what_is_older_still() -> None:
    source = minutes((0, 0), (1, 1), (2, 50))
    assert ask(at(1, 11, 11.001, 50, 60), source, ttl=10 * MINUTE) == [1, 1, None, None, None]
    assert ask(at(60), source, ttl=58 * MINUTE) == [2]
    assert ask(at(60), source, ttl=timedelta.max) == [2]
    late_and_old = minutes((8, 8), (2, 9))
    assert ask(at(9, 13, 18, 19), late_and_old, ttl=10 * MINUTE) == [0, 0, 0, None]


def test_no_rows_on_either_side() -> None:
    assert ask(at(), minutes((0, 0))) == []
    assert ask(at(1, 2), minutes()) == [None, None]
    nobody = pl.DataFrame({"entity_id": [None, None], "event_timestamp": [START, None]}, schema_overrides=ASKED)
    assert ask(nobody, minutes((0, 0)).with_columns(entity_id=pl.lit(None, pl.Int64))) == [None, None]
    assert ask(nobody.with_columns(entity_id=pl.lit(None)), minutes((0, 0))) == [None, None]
    assert ask(at(1).with_columns(event_timestamp=pl.lit(None, TIME)), minutes((0, 0))) == [None]


def test_naive_times_are_utc_and_zones_are_instants() -> None:
    source, asked = minutes((0, 0), (60, 60)), at(59, 60)
    naive = pl.col("event", "created").dt.replace_time_zone(None)
    assert ask(asked, source.with_columns(naive)) == [0, 1]
    assert ask(asked.with_columns(pl.col("event_timestamp").dt.replace_time_zone(None)), source) == [0, 1]
    assert ask(asked.with_columns(pl.col("event_timestamp").dt.convert_time_zone("Asia/Kolkata")), source) == [0, 1]


@pytest.mark.parametrize("asked_unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_units_are_compared_exactly(unit: str, asked_unit: str) -> None:
    in_unit = pl.col("event", "created").dt.cast_time_unit(unit)  # type: ignore[arg-type]
    source = minutes((0, 0), (5, 7)).with_columns(in_unit)
    asked = at(0, 6, 7, 8).with_columns(pl.col("event_timestamp").dt.cast_time_unit(asked_unit))  # type: ignore[arg-type]
    assert ask(asked, source, ttl=5 * MINUTE) == [0, None, 1, 1]
    if asked_unit == "ns":
        close = asked.with_columns(pl.col("event_timestamp") + pl.duration(nanoseconds=pl.Series([-1, 1, -1, 1])))
        assert ask(close, source, ttl=3 * MINUTE) == [None, None, None, None]
        assert ask(close, source, ttl=3 * MINUTE + timedelta(microseconds=1)) == [None, None, None, 1]


def test_times_beyond_what_a_unit_holds_stay_beyond() -> None:
    source = minutes((0, 0), (1, 1)).with_columns(
        created=pl.Series([datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)], dtype=TIME)
    )
    asked = at(0, 5).with_columns(pl.col("event_timestamp").dt.cast_time_unit("ns"))
    assert ask(asked, source) == [0, 0]
    assert ask(asked, source, ttl=1000 * 365 * timedelta(days=1)) == [0, 0]
    earliest = source.with_columns(event=pl.lit(datetime(1700, 1, 1, tzinfo=UTC), pl.Datetime("ns", "UTC")))
    assert ask(asked, earliest, ttl=300 * 365 * timedelta(days=1)) == [None, None]
    assert ask(asked, earliest, ttl=400 * 365 * timedelta(days=1)) == [0, 0]


def test_keys_of_other_widths_match_and_of_other_kinds_do_not() -> None:
    source, asked = minutes((0, 0)), at(1, 1).with_columns(entity_id=pl.Series([1, 2**40]))
    assert ask(asked, source.with_columns(pl.col("entity_id").cast(pl.Int8))) == [0, None]
    assert ask(asked.with_columns(pl.col("entity_id").cast(pl.UInt64)), source) == [0, None]
    words = source.with_columns(entity_id=pl.Series(["a"], dtype=pl.Categorical))
    assert ask(asked.with_columns(entity_id=pl.Series(["a", "b"])), words) == [0, None]
    with pytest.raises(PointInTimeError, match="entity_id of the entity rows is String, of the source Int64"):
        ask(asked.with_columns(pl.col("entity_id").cast(pl.String)), source)
    with pytest.raises(PointInTimeError, match="needs a key"):
        ask(asked, source, keys={})


@pytest.mark.parametrize("column", ["event", "created"])
def test_a_source_row_without_a_stamp_is_an_error(column: str) -> None:
    source = minutes((0, 0), (1, 1)).with_columns(pl.when(pl.col("value") > 0).then(column).alias(column))
    with pytest.raises(PointInTimeError, match=f"1 of the 2 rows of the source have no {column}"):
        ask(at(1), source)


def test_a_time_must_be_one() -> None:
    with pytest.raises(PointInTimeError, match="event_timestamp of the entity rows is String"):
        ask(at(1).with_columns(pl.col("event_timestamp").cast(pl.String)), minutes((0, 0)))
    with pytest.raises(PointInTimeError, match="created of the source is Date"):
        ask(at(1), minutes((0, 0)).with_columns(pl.col("created").dt.date()))


def test_bounds_in_any_zone_are_instants() -> None:
    source = minutes((0, 0), (5, 9), (10, 10))
    for zone in (None, timezone(timedelta(hours=9))):
        since, until = (
            time.replace(tzinfo=None) if zone is None else time.astimezone(zone)
            for time in (START + 5 * MINUTE, START + 9 * MINUTE)
        )
        found = rows_since(
            source, keys=["entity_id"], event_time="event", created_time="created", since=since, until=until
        )
        assert found.to_list() == [1]
