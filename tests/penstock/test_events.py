from __future__ import annotations

from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from penstock.events import EVENTS, ITEMS, TABLES, USERS, LogError, conform, read_table
from tests.small_log import START, an_event, write_log

A_ROW = pl.DataFrame([an_event(1, 2, 3, START)], schema=EVENTS.schema)


@pytest.mark.parametrize(
    ("column", "values", "read"),
    [
        ("position", pl.Series([4.0]), 4),  # what pandas makes of whole numbers with gaps
        ("user_id", pl.Series(["12"]), 12),
        ("click", pl.Series([True]), 1),
        ("outcome_time", pl.Series([None]), None),
        ("event_time", pl.Series([datetime(2026, 3, 1)]), START),
        ("event_time", pl.Series([date(2026, 3, 1)]), START),
        ("event_time", pl.Series([datetime(2026, 3, 1, 8, tzinfo=timezone(timedelta(hours=8)))]), START),
        ("event_time", pl.Series([START]).dt.cast_time_unit("ns"), START),
        ("variant", pl.Series(["champion"], dtype=pl.Categorical), "champion"),
    ],
)
def test_a_column_is_cast_where_it_keeps_its_meaning(column: str, values: pl.Series, read: Any) -> None:
    frame = conform(A_ROW.with_columns(values.alias(column)), EVENTS, "here")
    assert frame.schema == EVENTS.schema
    assert frame[column].to_list() == [read]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user_id", pl.Series(["u-12"]), r"user_id is String, not Int64: .*u-12"),
        ("user_id", pl.Series([1.5]), "user_id is Float64, not Int64: it holds fractions"),
        ("user_id", pl.Series([float("nan")]), "user_id is Float64, not Int64: .*NaN"),
        ("user_id", pl.Series([START]), r"user_id is Datetime.*, not Int64: a time is no number"),
        ("item_id", pl.Series([[1]]), r"item_id is List\(Int64\), not Int64: a list is no number"),
        ("click", pl.Series([300]), "click is Int64, not Int8: .*300"),
        ("event_time", pl.Series([1_772_323_200_000]), "event_time is Int64, not Datetime.*: a number is no time"),
        ("event_time", pl.Series(["2026-03-01"]), "event_time is String, not Datetime.*: a text is no time"),
        ("variant", pl.Series([1]), "variant is Int64, not String: a number is no text"),
        ("variant", pl.Series([b"x"]), "variant is Binary, not String: a Binary is no text"),
    ],
)
def test_a_column_that_would_lose_its_meaning_is_refused(column: str, values: pl.Series, message: str) -> None:
    with pytest.raises(LogError, match=f"^here: column {message}"):
        conform(A_ROW.with_columns(values.alias(column)), EVENTS, "here")


def test_lists_are_held_by_element(tmp_path: Path) -> None:
    items = read_table(write_log(tmp_path, [an_event(1, 2, 3, START)]) / "items.parquet", ITEMS)
    assert conform(items.with_columns(tags=[1.0, 2.0]), ITEMS, "here")["tags"].to_list() == [[1, 2]]
    assert conform(items.with_columns(tags=pl.lit([])), ITEMS, "here")["tags"].to_list() == [[]]
    with pytest.raises(LogError, match=r"tags is List\(Float64\), not List\(Int64\): it holds fractions"):
        conform(items.with_columns(tags=[1.5]), ITEMS, "here")


def test_a_lost_or_gained_column_is_named() -> None:
    with pytest.raises(LogError, match=r"^here: column click, like is missing from the events table"):
        conform(A_ROW.drop("like", "click"), EVENTS, "here")
    with pytest.raises(LogError, match=r"^here: column colour is not in the events table"):
        conform(A_ROW.with_columns(colour=1), EVENTS, "here")


def test_a_damaged_file_is_told_wherever_the_damage_is(tmp_path: Path) -> None:
    path = tmp_path / "users.parquet"
    users = pl.DataFrame({"user_id": range(5000), "event_time": START, "created_time": START})
    users = users.with_columns(pl.lit(1).alias(name) for name in USERS.names("attribute") if name != "traits")
    conform(users.with_columns(traits=pl.lit([1, 2])), USERS, "here").write_parquet(path)
    whole = path.read_bytes()
    told = []
    for place in range(0, len(whole), len(whole) // 97):
        path.write_bytes(whole[:place] + bytes(byte ^ 0xFF for byte in whole[place : place + 16]) + whole[place + 16 :])
        try:
            read_table(path, USERS)
        except LogError as error:
            told.append(str(error))
    assert len(told) > 20  # elsewhere the bytes are those of other values
    assert all(text.startswith(f"{path}: ") for text in told)


def test_what_the_tables_say_of_each_other_is_there() -> None:
    tables = {table.name: table for table in TABLES}
    assert [table.key for table in TABLES] == ["user_id", "item_id", "user_id", "event_id"]
    for place, table in enumerate(TABLES):
        for column in table.columns:
            if column.references:
                assert tables[column.references].key == column.name
                assert tables[column.references] in TABLES[:place]
            for other in (column.not_before, column.not_after, column.constant_in, column.distinct_in):
                assert not other or other in table.schema
            for other in (column.not_before, column.not_after):
                assert not other or table.schema[other] == column.dtype
