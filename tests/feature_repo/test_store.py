"""Feast for real on a small log: no row lost, nothing from the future, online = offline."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from feast import FeatureStore
from feast.cli.cli import cli

from feature_repo import store
from feature_repo.store import Online, StoreError, apply, historical, refresh
from penstock.events import EVENTS
from penstock.features import SERVICES, STAMPS, VIEWS, default, feature_tables, view
from tests.small_log import HOUR, START, an_event, write_log

REPOSITORY = str(Path(store.__file__).parent)
RANKED = [feature for name in SERVICES["rank_v1"] for feature in view(name).features]


def as_of(tables: dict[str, pl.DataFrame], name: str, key: int, time: object) -> dict[str, Any]:
    """A view's newest values at a time, by plain search, with defaults."""
    definition = view(name)
    found = {feature.name: default(feature.dtype) for feature in definition.features}
    for row in tables[name].iter_rows(named=True):
        if row[definition.key] == key and row["event_timestamp"] <= time:
            found = {name: row[name] for name in found}  # sorted by time: the last one stays
    return found


def as_rows(columns: dict[str, Any]) -> list[dict[str, Any]]:
    plain = {name: [v.tolist() if hasattr(v, "tolist") else v for v in values] for name, values in columns.items()}
    return [dict(zip(plain, row, strict=True)) for row in zip(*plain.values(), strict=True)]


def test_every_row_has_what_was_known_at_its_time(home: Path, log: Path, events: pl.DataFrame) -> None:
    joined = historical(home, events, "rank_v1")
    tables = feature_tables(log)
    assert joined.select(events.columns).equals(events)
    assert {name: joined.schema[name] for name in joined.columns[events.width :]} == {f.name: f.dtype for f in RANKED}
    for row in joined.iter_rows(named=True):
        for definition in VIEWS:
            expected = as_of(tables, definition.name, row[definition.key], row["event_time"])
            assert {name: row[name] for name in expected} == expected


def test_no_row_is_lost_of_unknown_early_and_repeated_entities(home: Path, events: pl.DataFrame) -> None:
    """The default offline store of Feast loses all three, without a word."""
    early = events.with_columns(event_time=pl.lit(START - timedelta(days=900)).cast(EVENTS.schema["event_time"]))
    unknown = events.with_columns(user_id=pl.lit(10**12), item_id=pl.lit(10**12 + 1))
    rows = pl.concat([events, events, early, unknown])
    joined = historical(home, rows, "rank_v1")
    assert joined.select(rows.columns).equals(rows)
    missing = {feature.name: default(feature.dtype) for feature in RANKED}
    for part in (joined[2 * events.height : 3 * events.height], joined[3 * events.height :]):
        assert part.select(*missing).unique().rows(named=True) == [missing]


def test_a_join_in_chunks_is_the_same(home: Path, events: pl.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = historical(home, events, "recall_v1")
    monkeypatch.setattr(store, "CHUNK_ROWS", events.height // 3)
    assert historical(home, events, "recall_v1").equals(whole)
    none = historical(home, events.clear(), "recall_v1")
    assert none.schema == whole.schema


def test_a_late_row_is_not_seen_before_it_arrived(tmp_path: Path) -> None:
    late = an_event(0, 1, 77, START, late=timedelta(hours=5, minutes=30), long_view=1, click=1)
    others = [an_event(n, 1, n, START + n * HOUR, click=1) for n in range(1, 9)]
    log = write_log(tmp_path / "log", [late, *others])
    refresh(tmp_path, log, tmp_path / "out")
    rows = pl.DataFrame([late, *others], schema=EVENTS.schema)
    joined = historical(tmp_path, rows, "rank_v1")
    assert joined["history_items"].to_list() == [[]] * 6 + [[77]] * 3
    assert joined["user_clicks"].to_list() == [0, 0, 1, 2, 3, 4, 6, 7, 8]
    seen = joined.filter(pl.col("item_id") == 77)
    assert seen["item_impressions"].to_list() == [0]


def test_online_equals_offline_at_the_newest_snapshot(home: Path, log: Path) -> None:
    tables = feature_tables(log)
    newest = max(table["event_timestamp"].max() for table in tables.values())  # type: ignore[type-var]
    online = Online(home)
    users, items = range(6), range(6)  # the last ones do not exist
    rows = pl.DataFrame({"user_id": users, "item_id": items}).with_columns(event_time=pl.lit(newest))
    offline = historical(home, rows, "rank_v1").select(feature.name for feature in RANKED).rows(named=True)
    assert as_rows(online.users(users, "rank_v1") | online.items(items, "rank_v1")) == offline
    assert any(row["history_items"] for row in offline)
    recall = online.users(users, "recall_v1")
    assert as_rows(recall) == as_rows(online.users(users, "rank_v1"))
    assert online.items(items, "recall_v1") == {}
    assert recall["user_impressions"].dtype == np.int64  # type: ignore[union-attr]
    assert recall["user_click_rate"].dtype == np.float32  # type: ignore[union-attr]


def test_online_is_read_by_many_threads(home: Path) -> None:
    online = Online(home)
    expected = as_rows(online.users([0, 1, 2], "rank_v1")), as_rows(online.items([0, 1, 2, 9], "rank_v1"))
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(
            lambda _: (as_rows(online.users([0, 1, 2], "rank_v1")), as_rows(online.items([0, 1, 2, 9], "rank_v1"))),
            range(200),
        )
        assert all(answer == expected for answer in answers)


def test_another_log_is_seen_by_an_open_reader_and_leaves_nothing_behind(tmp_path: Path) -> None:
    first = write_log(tmp_path / "first", [an_event(0, 1, 1, START, click=1, long_view=1), an_event(1, 2, 2, START)])
    refresh(tmp_path, first, tmp_path / "out")
    online = Online(tmp_path)
    assert online.items([1, 2, 3], "rank_v1")["item_impressions"].tolist() == [1, 1, 0]  # type: ignore[union-attr]

    second = write_log(tmp_path / "second", [an_event(n, 1, 3, START + n * HOUR) for n in range(4)])
    apply(tmp_path)  # as `feast apply` beside a gateway
    refresh(tmp_path, second, tmp_path / "out")

    assert online.items([1, 2, 3], "rank_v1")["item_impressions"].tolist() == [0, 0, 4]  # type: ignore[union-attr]
    users = online.users([1, 2], "rank_v1")
    assert users["user_impressions"].tolist() == [4, 0]  # type: ignore[union-attr]
    assert [history.tolist() for history in users["history_items"]] == [[], []]
    assert [traits.tolist() for traits in users["traits"]] == [[1, 7], []]


def test_a_killed_refresh_is_mended_by_the_next(tmp_path: Path) -> None:
    events = [an_event(n, n, n % 50, START + n * timedelta(seconds=1), long_view=1) for n in range(1500)]
    log = write_log(tmp_path / "log", events)
    home = tmp_path / "home"
    arguments = [str(home), str(log), str(tmp_path / "out")]
    refreshing = f"from pathlib import Path; from feature_repo.store import refresh; refresh(*map(Path, {arguments}))"
    child = subprocess.Popen([sys.executable, "-c", refreshing], cwd=Path(REPOSITORY).parent)
    database = home / "feast" / "online.db"
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        if database.exists() and stored(database) > 0:
            break
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert 0 < stored(database) < 2 * 1500 + 2 * 50 + 1500

    refresh(home, log, tmp_path / "out")

    assert stored(database) == 3 * 1500 + 2 * 50
    online = Online(home)
    assert [items.tolist() for items in online.users([17, 1499], "recall_v1")["history_items"]] == [[17], [49]]


def stored(database: Path) -> int:
    """Entities in the online store, over all views."""
    try:
        with sqlite3.connect(database) as connection:
            return sum(
                connection.execute(f"SELECT COUNT(DISTINCT entity_key) FROM penstock_{view.name}").fetchone()[0]
                for view in VIEWS
            )
    except sqlite3.OperationalError:
        return 0


def test_tables_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    good = pl.DataFrame({"user_id": [1]})
    store.write_tables(tmp_path, {"user_profile": good})
    with pytest.raises(Exception, match="Object"):
        store.write_tables(
            tmp_path, {"user_profile": pl.DataFrame({"user_id": pl.Series([object()], dtype=pl.Object)})}
        )
    assert pl.read_parquet(tmp_path / "features" / "user_profile.parquet").equals(good)
    assert len(list((tmp_path / "features").iterdir())) == 1


def test_a_store_that_is_not_applied_says_what_to_do(tmp_path: Path, home: Path, events: pl.DataFrame) -> None:
    with pytest.raises(StoreError, match=r"recall_v1 is not registered in .*run apply"):
        Online(tmp_path)
    with pytest.raises(StoreError, match=r"unknown feature service 'rank_v9': there are recall_v1, rank_v1"):
        historical(home, events, "rank_v9")


def test_feast_is_used_natively(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_HOME", str(home))
    monkeypatch.chdir(Path(REPOSITORY).parent)
    native = FeatureStore(repo_path="feature_repo")
    assert sorted(found.name for found in native.list_feature_views()) == sorted(view.name for view in VIEWS)
    assert sorted(found.name for found in native.list_feature_services()) == sorted(SERVICES)
    for definition in VIEWS:
        registered = native.get_feature_view(definition.name)
        assert [field.name for field in registered.features] == [feature.name for feature in definition.features]
        assert all(field.description for field in registered.features)
        assert (registered.ttl, registered.tags["entity"]) == (timedelta(0), definition.entity)
    values = native.get_online_features(native.get_feature_service("recall_v1"), [{"user_id": 0}]).to_dict()
    assert values["user_impressions"] == Online(home).users([0], "recall_v1")["user_impressions"].tolist()  # type: ignore[union-attr]
    assert not set(STAMPS) & set(values)


def test_feasts_command_lists_and_applies(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_HOME", str(home))
    monkeypatch.chdir(Path(REPOSITORY).parent)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    listed = CliRunner().invoke(cli, ["-c", "feature_repo", "feature-views", "list"], catch_exceptions=False)
    assert all(view.name in listed.output for view in VIEWS)
    before = as_rows(Online(home).users([0, 1, 2], "rank_v1"))
    applied = CliRunner().invoke(cli, ["-c", "feature_repo", "apply"], catch_exceptions=False)
    assert applied.exit_code == 0, applied.output
    assert "Deleted" not in applied.output
    assert as_rows(Online(home).users([0, 1, 2], "rank_v1")) == before
