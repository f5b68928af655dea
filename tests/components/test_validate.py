"""A log against the rules: real Great Expectations, its Data Docs, and MLflow."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from kfp import dsl

from components.expectations import Validation, validate_log
from components.rules import RuleError, held
from components.validate import validate
from penstock import days
from penstock.events import EVENTS, HISTORIES, ITEMS, LABELS, TABLES, USERS, LogError, read_events, read_table
from penstock.quarantine import read
from tests.small_log import HOUR, START, Row, an_event, write_log

DAY = 24 * HOUR


def a_log(log: Path, rows: int = 300, length: timedelta = 6 * DAY) -> Path:
    """Events of five users with seven items, all good."""
    events = []
    for n in range(rows):
        long_view = n % 2
        labels = {"click": n % 2, "long_view": long_view, "like": n % 3 // 2, "watch_time_ms": 5 * long_view}
        events.append(an_event(n, n % 5, n % 7, START + length * (n / rows), **labels))
    history = {"user_id": 1, "event_time": START, "created_time": START, "items": [1, 2]}
    return write_log(log, events, [history])


def rewrite(log: Path, events: pl.DataFrame) -> None:
    """Puts `events` in the place of all that are there, as they are."""
    for path in (log / "events").glob("*/*.parquet"):
        path.unlink()
    (log / "events" / "dt=2026-03-01").mkdir(exist_ok=True)
    events.write_parquet(log / "events" / "dt=2026-03-01" / "all.parquet")


def changed(log: Path, changes: dict[int, Row]) -> pl.DataFrame:
    """The events with other values, by event id."""
    rows = [row | changes.get(row["event_id"], {}) for row in read_events(log).to_dicts()]
    return pl.DataFrame(rows, schema=EVENTS.schema)


def with_rows(path: Path, rows: list[Row]) -> None:
    """Adds rows, each like the first one but for what it says, to a table."""
    frame = pl.read_parquet(path)
    first = frame.to_dicts()[0]
    pl.DataFrame([*frame.to_dicts(), *(first | row for row in rows)], schema=frame.schema).write_parquet(path)


def check(log: Path, out: Path, **settings: Any) -> Validation:
    settings = {"max_bad_share": 1.0, "severity": {}, "limits": days.Config()} | settings
    return validate_log(log, out / "validated", out / "quarantine", out / "docs", **settings)


def reasons(out: Path, table: str, key: str) -> dict[Any, list[str]]:
    """What is said of each row put aside, by its key."""
    found = defaultdict(list)
    rows = pl.read_parquet(out / "quarantine").filter(pl.col("table") == table)
    for value, reason in rows.select(key, "reason").iter_rows():
        found[value].append(reason)
    return dict(found)


def test_a_good_log_passes_whole(tmp_path: Path) -> None:
    log = a_log(tmp_path / "log")
    found = check(log, tmp_path, max_bad_share=0.0)
    assert found.rows == {"users": 5, "items": 7, "histories": 1, "events": 300}
    assert (sum(found.bad.values()), found.bad_share, dict(found.broken), found.failures) == (0, 0.0, {}, ())
    assert read_events(tmp_path / "validated").equals(read_events(log))
    for table in (USERS, ITEMS, HISTORIES):
        left, right = (read_table(folder / f"{table.name}.parquet", table) for folder in (log, tmp_path / "validated"))
        assert left.equals(right)
    quarantine = pl.read_parquet(tmp_path / "quarantine")
    assert quarantine.is_empty()
    assert {"table", "reason", "rules", "original", *EVENTS.schema, *USERS.schema, *ITEMS.schema} <= {
        *quarantine.columns
    }


at = START + DAY
BAD_EVENTS: dict[int, tuple[Row, str, str]] = {
    10: ({"click": 2}, "click.range", "click must be between 0 and 1"),
    11: ({"like": -1}, "like.range", "like must be between 0 and 1"),
    12: ({"scenario": -1}, "scenario.range", "scenario must be between 0 and 1000"),
    13: ({"release": 0}, "release.range", "release must be at least 1"),
    14: ({"watch_time_ms": None}, "watch_time_ms.null", "watch_time_ms must not be null"),
    16: (
        {"watch_time_ms": -1},
        "watch_time_ms.range",
        f"watch_time_ms must be between 0 and {DAY // HOUR * 3_600_000}",
    ),
    18: (
        {"watch_time_ms": 601},
        "watch_time_ms.loops",
        "watch_time_ms must be at most 100 times the item's duration_ms",
    ),
    21: ({"watch_time_ms": 0}, "long_view.watched", "long_view needs a watch_time_ms above 0"),
    22: ({"user_id": 999}, "user_id.known", "user_id must be in users"),
    23: ({"item_id": 999}, "item_id.known", "item_id must be in items"),
    24: ({"user_id": None}, "user_id.null", "user_id must not be null"),
    25: ({"request_id": None}, "request_id.null", "request_id must not be null"),
    # a clock that went back: the row arrived before it was
    30: ({"created_time": START}, "created_time.order", "created_time must not be before event_time"),
    31: ({"outcome_time": START}, "outcome_time.order", "outcome_time must not be before event_time"),
    32: ({"features_time": START + 9 * DAY}, "features_time.order", "features_time must not be after event_time"),
    # a clock that lost its time: the items were uploaded five hours before START
    33: (
        {"event_time": START - 30 * HOUR},
        "event_time.upload",
        "event_time must not be more than 24 hours before the item's upload",
    ),
    40: (
        {"request_id": 1000, "event_time": at, "created_time": at, "user_id": 1},
        "user_id.request",
        "user_id must be the same in all rows of a request_id",
    ),
    41: (
        {"request_id": 1000, "event_time": at, "created_time": at, "user_id": 2, "position": 1},
        "user_id.request",
        "user_id must be the same in all rows of a request_id",
    ),
    42: (
        {"request_id": 1001, "user_id": 1, "position": 1},
        "event_time.request",
        "event_time must be the same in all rows of a request_id",
    ),
    43: (
        {"request_id": 1001, "user_id": 1},
        "event_time.request",
        "event_time must be the same in all rows of a request_id",
    ),
    44: (
        {"request_id": 1002, "user_id": 1, "event_time": at, "created_time": at, "position": 3},
        "position.request",
        "position must be another in each row of a request_id",
    ),
    45: (
        {"request_id": 1002, "user_id": 1, "event_time": at, "created_time": at, "position": 3},
        "position.request",
        "position must be another in each row of a request_id",
    ),
}
GOOD_EVENTS: dict[int, Row] = {
    50: {"watch_time_ms": 600},
    51: {"position": None},
    52: {"outcome_time": START + 9 * DAY, "features_time": START, "release": 1, "variant": "champion"},
    53: {"created_time": START + 99 * DAY},
    54: {"event_time": START - 28 * HOUR},
    60: {"request_id": 1003, "user_id": 1, "event_time": at, "created_time": at, "position": 0},
    61: {"request_id": 1003, "user_id": 1, "event_time": at, "created_time": at, "position": 1},
    62: {"request_id": 1003, "user_id": 1, "event_time": at, "created_time": at, "position": None},
    63: {"request_id": 1003, "user_id": 1, "event_time": at, "created_time": at, "position": None},
    70: {"item_id": 50, "watch_time_ms": 86_400_000},  # no duration is known
}


def test_each_bad_row_is_put_aside_with_its_reason(tmp_path: Path) -> None:
    log = a_log(tmp_path / "log")
    with_rows(
        log / "items.parquet",
        [
            {"item_id": 50, "duration_ms": 0},
            {"item_id": 51, "tags": [1, None]},
            {"item_id": 52, "tags": [3, -5]},
            {"item_id": 53, "duration_ms": 86_400_001},
            {"item_id": 54, "title": None},
            {"item_id": 54, "title": "the first of two with this id is bad itself"},
            {"item_id": 54, "title": "and a third"},
            {"item_id": 55, "created_time": START - 9 * HOUR},
        ],
    )
    with_rows(
        log / "users.parquet",
        [{"user_id": 60}, {"user_id": 60}, {"user_id": 61, "is_creator": 2}, {"user_id": 62, "traits": None}],
    )
    with_rows(log / "histories.parquet", [{"user_id": -1, "items": [-1]}])
    events = changed(log, {n: change for n, (change, _, _) in BAD_EVENTS.items()} | GOOD_EVENTS)
    copy = events.filter(pl.col("event_id") == 80)
    other = copy.with_columns(event_time=pl.col("event_time") + HOUR, created_time=pl.col("event_time") + HOUR)
    nameless = events.filter(pl.col("event_id") == 81).with_columns(
        pl.lit(None, pl.Int64).alias(name) for name in ("event_id", "request_id")
    )
    two = (
        events.filter(pl.col("event_id") == 82)
        .with_columns(pl.lit(7_000, pl.Int64).alias(name) for name in ("event_id", "request_id"))
        .with_columns(item_id=pl.lit(51, pl.Int64), click=pl.lit(5, pl.Int8))
    )
    rewrite(log, pl.concat([events, copy, other.with_columns(request_id=pl.lit(9_000, pl.Int64)), nameless, two]))

    found = check(log, tmp_path)

    assert found.rows == {"users": 9, "items": 15, "histories": 2, "events": 304}
    assert reasons(tmp_path, "events", "event_id") == {
        **{n: [reason] for n, (_, _, reason) in BAD_EVENTS.items()},
        80: ["event_id must be unique", "event_id must be unique"],
        None: ["event_id must not be null; request_id must not be null"],
        7_000: ["item_id must be in items; click must be between 0 and 1"],
    }
    assert reasons(tmp_path, "items", "item_id") == {
        51: ["tags must not hold nulls"],
        52: ["tags must be at least 0"],
        53: ["duration_ms must be between 0 and 86400000"],
        54: ["title must not be null; item_id must be unique", "item_id must be unique"],
        55: ["created_time must not be before event_time"],
    }
    assert reasons(tmp_path, "users", "user_id") == {
        60: ["user_id must be unique"],
        61: ["is_creator must be between 0 and 1"],
        62: ["traits must not be null"],
    }
    assert reasons(tmp_path, "histories", "user_id") == {
        -1: ["user_id must be at least 0; items must be at least 0"],
    }
    # nothing is lost: what is not put aside goes on, as it was
    kept = read_events(tmp_path / "validated")
    assert kept.height + found.bad["events"] == 304
    assert kept.filter(pl.col("event_id") == 80).equals(copy)
    assert set(range(300)) - set(kept["event_id"]) == set(BAD_EVENTS)
    put_aside = pl.read_parquet(tmp_path / "quarantine")
    for n, (change, kind, _) in BAD_EVENTS.items():
        row = put_aside.filter((pl.col("table") == "events") & (pl.col("event_id") == n)).to_dicts()[0]
        assert row["rules"] == [f"events.{kind}"]
        assert {name: row[name] for name in change} == change
    assert found.broken["events.item_id.known"] == 2
    assert found.bad_share == 1 / 2
    assert found.failures == ()
    items = read_table(tmp_path / "validated" / "items.parquet", ITEMS)
    assert items.filter(pl.col("item_id") == 54)["title"].to_list() == ["the first of two with this id is bad itself"]
    # and can be read back
    assert {name: frame.height for name, frame in read(tmp_path / "quarantine").items()} == dict(found.bad)


@pytest.mark.parametrize("seed", range(2))
def test_what_is_put_aside_is_what_plain_loops_find(tmp_path: Path, seed: int) -> None:
    """Cells of events are spoilt at random; the rules are read off penstock/events.py once more, row by row."""
    rng = random.Random(seed)
    log = a_log(tmp_path / "log", rows=400)
    rows = read_events(log).to_dicts()
    times = [START - 40 * HOUR, START, START + 2 * DAY, START + 20 * DAY]
    for row in rows:
        row["request_id"] = row["event_id"] // 2
        row["event_time"] = row["created_time"] = START + HOUR * row["request_id"] / 2
        row["user_id"] = row["request_id"] % 5
        row["position"] = row["event_id"] % 2
        if rng.random() < 0.2:
            column = rng.choice(EVENTS.columns)
            if isinstance(row[column.name], datetime) or column.name.endswith("_time"):
                row[column.name] = rng.choice([None, *times])
            elif column.dtype.is_integer():
                row[column.name] = rng.choice([None, -1, 0, 1, 2, 17, 127 if column.dtype == pl.Int8 else 1001])
    rng.shuffle(rows)
    rewrite(log, pl.DataFrame(rows, schema=EVENTS.schema))

    check(log, tmp_path)

    rows = read_events(log).to_dicts()
    requests, places = defaultdict(list), defaultdict(set)
    for number, row in enumerate(rows):
        if row["request_id"] is not None:
            requests[row["request_id"]].append(row)
            first = next(n for n, other in enumerate(rows) if other["event_id"] == row["event_id"])
            if row["position"] is not None and number == first:
                places[row["request_id"], row["position"]].add(number)
    broken_by = []
    for row in rows:
        broken = set()
        for column in EVENTS.columns:
            value, name = row[column.name], column.name
            if value is None and not column.nullable:
                broken.add(f"{name}.null")
            if value is None:
                continue
            if column.minimum is not None and value < column.minimum:
                broken.add(f"{name}.range")
            if column.maximum is not None and value > column.maximum:
                broken.add(f"{name}.range")
        users = {other["user_id"] for other in requests[row["request_id"]]} - {None}
        asked = {other["event_time"] for other in requests[row["request_id"]]} - {None}
        event_time, watched = row["event_time"], row["watch_time_ms"]
        for name, breaks in {
            "user_id.known": row["user_id"] is not None and row["user_id"] not in range(5),
            "item_id.known": row["item_id"] is not None and row["item_id"] not in range(7),
            "user_id.request": len(users) > 1,
            "event_time.request": len(asked) > 1,
            "position.request": len(places[row["request_id"], row["position"]]) > 1,
            "created_time.order": event_time and row["created_time"] and row["created_time"] < event_time,
            "outcome_time.order": event_time and row["outcome_time"] and row["outcome_time"] < event_time,
            "features_time.order": event_time and row["features_time"] and row["features_time"] > event_time,
            "long_view.watched": row["long_view"] == 1 and watched is not None and watched < 1,
            "watch_time_ms.loops": row["item_id"] in range(7) and (watched or 0) > 600,
            "event_time.upload": row["item_id"] in range(7) and event_time and event_time < START - 29 * HOUR,
        }.items():
            if breaks:
                broken.add(name)
        broken_by.append(broken)
    for number, row in enumerate(rows):
        same = [n for n, other in enumerate(rows) if other["event_id"] == row["event_id"] is not None]
        # the first that is good but for this stays, else the first
        if same and number != next((n for n in same if not broken_by[n] - {"event_id.unique"}), same[0]):
            broken_by[number].add("event_id.unique")
    expected = [sorted(f"events.{name}" for name in broken) for broken in broken_by if broken]
    found = pl.read_parquet(tmp_path / "quarantine")["rules"].to_list()
    assert len(found) > 40
    assert sorted(sorted(rules) for rules in found) == sorted(expected)


def steady(log: Path, days_there: int = 10, rows: int = 400) -> pl.DataFrame:
    """A log of equal days, written and returned."""
    events = []
    for n in range(days_there * rows):
        place = n % rows
        labels = {"click": int(place % 5 < 2), "long_view": int(place % 5 == 0), "like": int(place % 20 == 0)}
        when = START + n // rows * DAY + place * DAY / rows
        events.append(an_event(n, n % 5, n % 7, when, **labels, watch_time_ms=labels["long_view"]))
    write_log(log, events)
    return read_events(log)


def on(day: int) -> pl.Expr:
    return pl.col("event_time").dt.date() == (START + day * DAY).date()


def test_days_out_of_the_ordinary_fail_the_run(tmp_path: Path) -> None:
    events = steady(tmp_path / "log", days_there=30)
    spoilt = pl.concat(
        [
            events,
            *(events.filter(on(5)).with_columns(pl.col("event_id", "request_id") + 10**6 * n) for n in range(1, 5)),
        ]
    ).filter(~on(15))
    spoilt = spoilt.with_columns(
        like=pl.when(on(20)).then(0).otherwise("like").cast(pl.Int8),
        click=pl.when(on(25)).then(1).otherwise("click").cast(pl.Int8),
    )
    rewrite(tmp_path / "log", spoilt)
    found = check(tmp_path / "log", tmp_path)
    rows, click, like = found.failures
    assert rows == (
        "days.rows: 2026-03-06 has 2,000 rows where 40 to 1,200 are expected;"
        " 2026-03-16 has 0 rows where 40 to 1,200 are expected"
    )
    assert click == "days.click: 2026-03-26 has 100.00% of the label click where 25.00% to 57.14% are expected"
    assert re.fullmatch(
        r"days.like: 2026-03-21 has 0.00% of the label like where \d.\d\d% to \d+.\d\d% are expected", like
    )
    assert found.broken == {"days.rows": 2, "days.click": 1, "days.like": 1}
    assert sum(found.bad.values()) == 0
    assert not (tmp_path / "validated").exists()


def test_days_of_rows_that_penstock_answered_are_not_held(tmp_path: Path) -> None:
    events = steady(tmp_path / "log")
    served = events.filter(on(5)).with_columns(release=pl.lit(1, pl.Int64), like=pl.lit(1, pl.Int8))
    more = [served.with_columns(pl.col("event_id", "request_id") + 10**6 * n) for n in range(1, 5)]
    rewrite(tmp_path / "log", pl.concat([events, *more]))
    assert check(tmp_path / "log", tmp_path).failures == ()


def test_too_many_bad_rows_or_none_that_is_good_fail_the_run(tmp_path: Path) -> None:
    log = a_log(tmp_path / "log")
    rewrite(log, changed(log, {n: {"click": 2} for n in range(4)} | {n: {"scenario": -1} for n in range(10, 12)}))
    assert check(log, tmp_path / "many", max_bad_share=0.01).failures == (
        "6 of 300 events (2.00%) break a rule; the share must be at most 1.00%, max_bad_share"
        " (events.click.range: 4, events.scenario.range: 2)",
    )
    assert pl.read_parquet(tmp_path / "many" / "quarantine").height == 6

    pl.read_parquet(log / "users.parquet").with_columns(is_creator=pl.lit(7)).write_parquet(log / "users.parquet")
    pl.read_parquet(log / "items.parquet").head(0).write_parquet(log / "items.parquet")
    failures = check(log, tmp_path / "none").failures
    assert failures == (
        "none of the 5 users keeps the rules (users.is_creator.range: 5)",
        "the log has no items",
        "none of the 300 events keeps the rules"
        " (events.user_id.known: 300, events.item_id.known: 300, events.click.range: 4, events.scenario.range: 2)",
    )


def test_a_rule_can_be_made_to_fail_the_run(tmp_path: Path) -> None:
    log = a_log(tmp_path / "log")
    rewrite(log, changed(log, {7: {"click": 2}, 8: {"scenario": -1}}))
    found = check(log, tmp_path, severity={"events.click.range": "fail", "events.like.range": "fail"})
    assert found.failures == ("1 events break events.click.range, which is to fail: click must be between 0 and 1",)
    # the row is put aside all the same, so that it can be looked at and mended
    assert set(reasons(tmp_path, "events", "event_id")) == {7, 8}


@pytest.mark.parametrize(
    ("severity", "message"),
    [
        ({"events.clik.range": "fail"}, r"there is no rule 'events.clik.range'; there are .*events.click.range"),
        ({"orders.id": "fail"}, r"there is no rule 'orders.id'; there are users.*items.*events.*tables.*days"),
        (
            {"events.click.range": "ignore"},
            "the severity of events.click.range is one of quarantine, fail, not 'ignore'",
        ),
        ({"days.rows": "quarantine"}, "days.rows is a rule on a table.* it can only fail"),
    ],
)
def test_a_severity_that_is_none_is_refused(severity: dict[str, str], message: str) -> None:
    with pytest.raises(RuleError, match=message):
        held(0.1, severity)


def test_every_column_has_a_rule_of_its_type_and_every_rule_a_name_of_its_own() -> None:
    rules = held(0.1, {"events.click.range": "fail"})
    names = [rule.name for of in rules.values() for rule in of]
    assert len(names) == len(set(names))
    for table in TABLES:
        assert {f"{table.name}.{name}.type" for name in table.schema} <= set(names)
        assert {f"{table.name}.{c.name}.null" for c in table.columns if not c.nullable} <= set(names)
    assert {rule.severity for of in rules.values() for rule in of if not rule.on_rows} == {"fail"}
    assert [rule.name for rule in rules["events"] if rule.on_rows and rule.severity == "fail"] == ["events.click.range"]
    with pytest.raises(RuleError, match="max_bad_share must be between 0 and 1, not 3"):
        held(3, {})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:100]),
            r"users.parquet: not readable as Parquet \(truncated\?\)",
        ),
        (lambda path: pl.read_parquet(path).drop("traits").write_parquet(path), "column traits is missing"),
        (lambda path: pl.read_parquet(path).with_columns(age=3).write_parquet(path), "column age is not in the users"),
        (
            lambda path: (
                pl.read_parquet(path).with_columns(pl.format("u-{}", "user_id").alias("user_id")).write_parquet(path)
            ),
            "column user_id is String, not Int64",
        ),
        (lambda path: path.unlink(), "users.parquet: no such file"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_clear_line(tmp_path: Path, spoil: Any, message: str) -> None:
    log = a_log(tmp_path / "log", rows=20)
    spoil(log / "users.parquet")
    with pytest.raises(LogError, match=message) as caught:
        check(log, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(log / "users.parquet") in str(caught.value)


def test_the_data_docs_are_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    events = steady(tmp_path / "log")
    spoilt = events.filter(~on(5)).with_columns(
        click=pl.when(pl.col("event_id") == 17).then(9).otherwise("click").cast(pl.Int8),
        variant=pl.when(pl.col("event_id") == 18).then(pl.lit("<script>alert(1)</script>")).otherwise("variant"),
    )
    rewrite(tmp_path / "log", spoilt)
    check(tmp_path / "log", tmp_path)
    text = (tmp_path / "docs" / "index.html").read_text()
    assert [path.name for path in (tmp_path / "docs").iterdir()] == ["index.html"]
    assert "<script" not in text
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", text)
    assert not re.search(r"@import|url\(", text)
    for rules in held(0.1, {}).values():
        for rule in rules:
            assert rule.name in text or rule.name.startswith("histories")
    assert "days.rows: 2026-03-06 has 0 rows where" in text
    assert "1 unexpected values found" in text
    assert text.count("<svg") == 1 + len(LABELS)


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def run(log: Path, out: Path, tracking: str, name: str, **settings: Any) -> Any:
    settings = {"max_bad_share": 0.1, "severity": "{}", "limits": "{}"} | settings
    outputs = {key: dsl.Dataset(uri=str(out / key)) for key in ("validated", "quarantine", "docs")}
    log_in = dsl.Dataset(uri=str(log))
    return validate.python_func(log=log_in, tracking_uri=tracking, run_name=name, **outputs, **settings)


def runs(tracking: str, name: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking)
    experiment = client.get_experiment_by_name("penstock")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'"))


def test_the_component_counts_and_mlflow_keeps_the_docs(tmp_path: Path, tracking: str) -> None:
    from mlflow import MlflowClient

    log = a_log(tmp_path / "log")
    rewrite(log, changed(log, {7: {"click": 2}}))
    rows, quarantined, share, run_id = run(log, tmp_path / "out", tracking, "prepare-1")
    assert (rows, quarantined, share) == (313, 1, 1 / 300)
    assert read_events(tmp_path / "out" / "validated").height == 299
    kept = runs(tracking, "prepare-1")[0]
    assert kept.info.run_id == run_id
    assert kept.info.status == "FINISHED"
    assert kept.data.tags["kind"] == "validation"
    assert kept.data.params == {"max_bad_share": "0.1", "severity": "{}", "limits": "{}", "log": str(log)}
    assert kept.data.metrics["broken/events.click.range"] == 1
    assert kept.data.metrics["rows/events"] == 300
    assert kept.data.metrics["bad_share"] == 1 / 300
    names = [found.path for found in MlflowClient(tracking).list_artifacts(run_id)]
    assert names == ["data_docs.html", "quarantine.parquet"]


def test_a_failed_validation_leaves_docs_and_quarantine_and_can_be_run_again(tmp_path: Path, tracking: str) -> None:
    from mlflow import MlflowClient

    log, out = a_log(tmp_path / "log"), tmp_path / "out"
    rewrite(log, changed(log, {7: {"click": 2}}))
    strict = json.dumps({"events.click.range": "fail"})
    with pytest.raises(LogError, match=r"^1 events break events.click.range") as caught:
        run(log, out, tracking, "prepare-2", severity=strict)
    assert "\n" not in str(caught.value)
    assert (out / "docs" / "index.html").is_file()
    assert pl.read_parquet(out / "quarantine").height == 1
    kept = runs(tracking, "prepare-2")[0]
    assert kept.info.status == "FAILED"
    assert kept.data.tags["mlflow.note.content"] in str(caught.value)
    names = [found.path for found in MlflowClient(tracking).list_artifacts(kept.info.run_id)]
    assert names == ["data_docs.html", "quarantine.parquet"]

    assert run(log, out, tracking, "prepare-2")[:2] == (313, 1)
    assert len(runs(tracking, "prepare-2")) == 2


def test_why_a_log_is_bad_is_told_without_mlflow_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    log = a_log(tmp_path / "log", rows=20)
    rewrite(log, changed(log, {7: {"click": 2}}))
    with pytest.raises(LogError, match=r"^1 of 20 events .*; the Data Docs are not in MLflow: MLflow at http://127"):
        run(log, tmp_path / "out", "http://127.0.0.1:1", "prepare-3", max_bad_share=0.0)
    assert pl.read_parquet(tmp_path / "out" / "quarantine").height == 1
    with pytest.raises(ValueError, match=r"unknown parameter hight of penstock.days: there are window_days"):
        run(log, tmp_path / "other", "http://127.0.0.1:1", "prepare-3", limits='{"hight": 3}')
