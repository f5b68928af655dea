"""Feature tables against plain loops, on small logs with late, backfilled and out-of-order rows."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from penstock import features
from penstock.events import EVENTS, HISTORIES, ITEMS, USERS, conform, write_events
from penstock.features import HISTORY_LENGTH, PRIOR_IMPRESSIONS, VIEWS, feature_tables, fill_missing, request_features

HOUR = timedelta(hours=1)
START = datetime(2026, 3, 1, tzinfo=UTC)

Row = dict[str, Any]


def an_event(event_id: int, user: int, item: int, at: datetime, late: timedelta = timedelta(0), **labels: int) -> Row:
    return {
        "event_id": event_id,
        "request_id": event_id,
        "user_id": user,
        "item_id": item,
        "event_time": at,
        "created_time": at + late,
        "session_id": None,
        "scenario": 0,
        "device": 0,
        "position": 0,
        **dict.fromkeys(("click", "long_view", "like", "profile_enter"), 0),
        "watch_time_ms": 0,
        "release": None,
        "variant": None,
        **labels,
    }


def write_log(log: Path, events: list[Row], histories: list[Row] | None = None) -> Path:
    write_events(pl.DataFrame(events, schema=EVENTS.schema), log, "rows")
    users = sorted({row["user_id"] for row in events})
    items = sorted({row["item_id"] for row in events})
    profile = {"activity_level": 1, "register_days": 2, "follow_count": 3, "fans_count": 4, "friend_count": 5}
    conform(
        pl.DataFrame(
            [
                {"user_id": u, "event_time": START, "created_time": START, **profile, "is_creator": 0, "traits": [u, 7]}
                for u in users
            ]
        ),
        USERS,
        "users",
    ).write_parquet(log / "users.parquet")
    conform(
        pl.DataFrame(
            [
                {
                    "item_id": i,
                    "event_time": START - 5 * HOUR,
                    "created_time": START - 4 * HOUR,
                    "author_id": 1,
                    "category": 2,
                    "tags": [3],
                    "music_id": 4,
                    "item_type": 5,
                    "duration_ms": 6,
                    "title": "a title",
                }
                for i in items
            ]
        ),
        ITEMS,
        "items",
    ).write_parquet(log / "items.parquet")
    if histories:
        pl.DataFrame(histories, schema=HISTORIES.schema).write_parquet(log / "histories.parquet")
    return log


def hour_up(time: datetime) -> datetime:
    floor = time.replace(minute=0, second=0, microsecond=0)
    return floor if floor == time else floor + HOUR


def first_seen(row: Row) -> datetime:
    happened = row["event_time"].replace(minute=0, second=0, microsecond=0) + HOUR
    return max(happened, hour_up(row["created_time"]))


def oracle_history(events: list[Row], histories: list[Row]) -> dict[tuple[int, datetime], tuple[list[int], list[int]]]:
    result = {}
    for user in {row["user_id"] for row in [*events, *histories]}:
        views = [row for row in events if row["user_id"] == user and row["long_view"]]
        initial = [row for row in histories if row["user_id"] == user and row["items"]]
        stamps = {first_seen(row) for row in views}
        stamps |= {hour_up(max(row["event_time"], row["created_time"])) for row in initial}
        for stamp in stamps:
            pairs = []
            for row in initial:
                if max(row["event_time"], row["created_time"]) <= stamp:
                    pairs += [(item, int(row["event_time"].timestamp() * 1000)) for item in row["items"]]
            for row in sorted(views, key=lambda row: (row["event_time"], row["event_id"])):
                if row["event_time"] < stamp and row["created_time"] <= stamp:
                    pairs.append((row["item_id"], int(row["event_time"].timestamp() * 1000)))
            pairs = pairs[-HISTORY_LENGTH:]
            result[user, stamp] = ([item for item, _ in pairs], [time for _, time in pairs])
    return result


def counts(rows: list[Row], stamp: datetime) -> list[int]:
    total = [0, 0, 0, 0]
    for row in rows:
        if stamp - timedelta(days=7) <= row["event_time"] < stamp and row["created_time"] <= stamp:
            total = [t + n for t, n in zip(total, [1, row["click"], row["long_view"], row["like"]], strict=True)]
    return total


def oracle_activity(events: list[Row], key: str) -> dict[tuple[int, datetime], list[float]]:
    result = {}
    for entity in {row[key] for row in events}:
        rows = [row for row in events if row[key] == entity]
        for stamp in {first_seen(row) for row in rows}:
            own, everyone = counts(rows, stamp), counts(events, stamp)
            rates = [
                np.float32((n + PRIOR_IMPRESSIONS * (m / max(everyone[0], 1))) / (own[0] + PRIOR_IMPRESSIONS))
                for n, m in zip(own[1:], everyone[1:], strict=True)
            ]
            result[entity, stamp] = [*own, *rates]
    return result


def a_log(seed: int) -> tuple[list[Row], list[Row]]:
    """Few users and items, two weeks, rows on the hour and between, a third of them late by minutes to nine days."""
    rng = random.Random(seed)
    events = []
    for event_id in range(rng.choice([1, 5, 60, 160])):
        at = START + timedelta(seconds=rng.choice([0, 1800, rng.randrange(3600)]) + 3600 * rng.randrange(14 * 24))
        late = rng.choice([0, 0, 0, 0, rng.randrange(3600), 3600 * rng.randrange(9 * 24)])
        labels = {label: int(rng.random() < 0.5) for label in features.COUNTED}
        events.append(an_event(event_id, rng.randrange(3), rng.randrange(4), at, timedelta(seconds=late), **labels))
    histories = [
        {
            "user_id": user,
            "event_time": START + rng.choice([timedelta(0), timedelta(minutes=90)]),
            "created_time": START + rng.choice([timedelta(0), timedelta(days=1)]),
            "items": [rng.randrange(9) for _ in range(rng.choice([0, 3, 70]))],
        }
        for user in range(4)
        if rng.random() < 0.5
    ]
    rng.shuffle(events)
    return events, histories


@pytest.mark.parametrize("seed", range(60))
def test_tables_equal_plain_loops(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a history of 50 is seldom full in a small log, and its chunks never are
    monkeypatch.setattr(features, "CHUNK_ROWS", 7 if seed % 2 else 1_000)
    events, histories = a_log(seed)
    tables = feature_tables(write_log(tmp_path, events, histories))
    history = {
        (row["user_id"], row["event_timestamp"]): (row["history_items"], row["history_times"])
        for row in tables["user_history"].iter_rows(named=True)
    }
    assert history == oracle_history(events, histories)
    for name, key in (("user_activity", "user_id"), ("item_statistics", "item_id")):
        table = tables[name]
        found = {(row[0], row[-1]): list(row[1:-2]) for row in table.iter_rows()}
        assert found == oracle_activity(events, key)
        assert len(found) == table.height
        assert (table["event_timestamp"] == table["created_timestamp"]).all()


def test_tables_have_the_columns_of_their_views(tmp_path: Path) -> None:
    events, histories = a_log(3)
    tables = feature_tables(write_log(tmp_path, events, histories))
    assert {name: dict(table.schema) for name, table in tables.items()} == {view.name: view.schema for view in VIEWS}
    for view in VIEWS:
        assert tables[view.name].null_count().sum_horizontal().item() == 0
        assert tables[view.name].select(view.key, "event_timestamp").is_unique().all()


def test_a_late_row_changes_no_snapshot_before_it_arrived(tmp_path: Path) -> None:
    on_time = [an_event(n, 1, n, START + n * HOUR, long_view=1) for n in range(5)]
    late = an_event(9, 1, 9, START + 30 * timedelta(minutes=1), late=timedelta(hours=6, minutes=1), long_view=1)
    before = feature_tables(write_log(tmp_path / "before", on_time))["user_history"]
    after = feature_tables(write_log(tmp_path / "after", [*on_time, late]))["user_history"]
    assert after.head(before.height).equals(before)
    assert after["event_timestamp"][-1] == START + 7 * HOUR
    assert after["history_items"][-1].to_list() == [0, 9, 1, 2, 3, 4]


def test_a_profile_holds_from_when_it_was_known(tmp_path: Path) -> None:
    items = feature_tables(write_log(tmp_path, [an_event(0, 1, 2, START)]))["item_profile"]
    assert items["event_timestamp"][0] == START - 4 * HOUR
    assert items["upload_time_ms"][0] == int((START - 5 * HOUR).timestamp() * 1000)


def test_no_long_view_gives_an_empty_history(tmp_path: Path) -> None:
    tables = feature_tables(write_log(tmp_path, [an_event(0, 1, 2, START)]))
    assert tables["user_history"].is_empty()
    assert tables["user_history"].schema == features.view("user_history").schema


def test_request_features_agree_with_the_calendar() -> None:
    rng = random.Random(5)
    for _ in range(200):
        time = datetime.fromtimestamp(rng.randrange(2**31), UTC)
        values = request_features(int(time.timestamp() * 1000) + 999, 0)
        assert (int(values["hour"]), int(values["weekday"])) == (time.hour, time.weekday())


def test_item_age_is_in_hours_and_never_negative() -> None:
    hour = 3_600_000
    ages = request_features(10 * hour, np.array([9 * hour, 10 * hour, 11 * hour, 0]))["item_age_hours"]
    assert ages.dtype == np.float32
    assert ages.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_missing_values_have_one_default_a_dtype() -> None:
    every = [feature for view in VIEWS for feature in view.features]
    frame = pl.DataFrame({feature.name: [None] for feature in every}, schema={f.name: f.dtype for f in every})
    filled = fill_missing(frame, every).row(0, named=True)
    assert filled["fans_count"] == 0
    assert filled["user_click_rate"] == 0.0
    assert filled["history_items"] == []
    assert filled["title"] == ""
    assert None not in filled.values()
