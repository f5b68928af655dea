"""Feature tables against plain loops, on small logs with late, backfilled and out-of-order rows."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from penstock import features
from penstock.features import HISTORY_LENGTH, PRIOR_IMPRESSIONS, VIEWS, feature_tables, fill_missing, request_features
from tests.small_log import HOUR, START, Row, a_log, an_event, write_log


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


@pytest.mark.parametrize("batch", range(10))
def test_tables_equal_plain_loops(batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a small log's histories fit one chunk otherwise
    monkeypatch.setattr(features, "CHUNK_ROWS", 7 if batch % 2 else 1_000)
    for seed in range(20 * batch, 20 * batch + 20):
        events, histories = a_log(seed)
        tables = feature_tables(write_log(tmp_path / str(seed), events, histories))
        history = {
            (row["user_id"], row["event_timestamp"]): (row["history_items"], row["history_times"])
            for row in tables["user_history"].iter_rows(named=True)
        }
        assert history == oracle_history(events, histories), seed
        for name, key in (("user_activity", "user_id"), ("item_statistics", "item_id")):
            table = tables[name]
            found = {(row[0], row[-1]): list(row[1:-2]) for row in table.iter_rows()}
            assert found == oracle_activity(events, key), seed
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
