"""Feature tables and on-demand features against plain loops, on small logs with late and out-of-order rows."""

from __future__ import annotations

import json
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from penstock import features
from penstock.activity import HISTORY_LENGTH, KINDS
from penstock.features import (
    COUNTED,
    COUNTS,
    ON_DEMAND,
    PRIOR_IMPRESSIONS,
    SERVICES,
    VIEWS,
    Ragged,
    feature_tables,
    fill_missing,
    with_on_demand,
)
from tests.small_log import HOUR, START, Row, a_log, an_event, write_log

TICK = timedelta(microseconds=1)
WINDOWS = {"1h": HOUR, "1d": 24 * HOUR, "7d": 168 * HOUR}
NAMES = ("impressions", "clicks", "long_views", "likes")


def hour_down(time: datetime) -> datetime:
    return time.replace(minute=0, second=0, microsecond=0)


def hour_up(time: datetime) -> datetime:
    floor = hour_down(time)
    return floor if floor == time else floor + HOUR


def hours_of(time: datetime) -> int:
    return int(time.timestamp()) // 3600


def ms(time: datetime) -> int:
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def outcome_arrival(row: Row) -> datetime:
    return max(row["created_time"], row["outcome_time"] or row["created_time"])


def row_seen(row: Row) -> datetime:
    return max(row["event_time"], row["created_time"]) + TICK


def outcome_seen(row: Row) -> datetime:
    return max(row["event_time"], outcome_arrival(row)) + TICK


def did(row: Row) -> int:
    return sum(bit * row[label] for label, bit in KINDS.items())


def oracle_activity(
    user: int, at: datetime, events: list[Row], histories: list[Row], items: dict[int, Row]
) -> dict[str, list[int]]:
    """The activity of a user at an instant."""
    events = [row for row in events if row["user_id"] == user]
    shown = [row for row in events if row_seen(row) <= at]
    done = [row for row in events if did(row) and outcome_seen(row) <= at]
    done.sort(key=lambda row: (ms(row["event_time"]), row["item_id"]))
    history = []
    for row in histories:
        if row["user_id"] == user and max(row["event_time"], row["created_time"]) + TICK <= at:
            history += [(item, ms(row["event_time"]), -1) for item in row["items"]]
    history += [
        (row["item_id"], ms(row["event_time"]), -1 if row["session_id"] is None else row["session_id"])
        for row in done
        if row["long_view"]
    ]
    history, done_last = history[-HISTORY_LENGTH:], done[-HISTORY_LENGTH:]
    tags = [(items[row["item_id"]]["tags"] + [-1, -1, -1])[:3] for row in done_last]
    found = {
        "history_items": [item for item, _, _ in history],
        "history_times": [time for _, time, _ in history],
        "history_sessions": [session for _, _, session in history],
        "action_items": [row["item_id"] for row in done_last],
        "action_times": [ms(row["event_time"]) for row in done_last],
        "action_kinds": [did(row) for row in done_last],
        "action_authors": [items[row["item_id"]]["author_id"] for row in done_last],
        "action_tags": [tag for three in tags for tag in three],
    }
    hours: dict[tuple[int, int], list[int]] = {}
    for row in shown:
        hours.setdefault((hours_of(row["event_time"]), row["scenario"]), [0, 0, 0, 0])[0] += 1
    for row in done:
        for place, label in enumerate(COUNTED, 1):
            hours[hours_of(row["event_time"]), row["scenario"]][place] += row[label]
    newest = max((hour for hour, _ in hours), default=0)
    kept = {key: counts for key, counts in sorted(hours.items()) if key[0] >= newest - 168}
    found["hour_starts"] = [hour for hour, _ in kept]
    found["hour_scenarios"] = [scenario for _, scenario in kept]
    for place, name in enumerate(NAMES):
        found[f"hour_{name}"] = [counts[place] for counts in kept.values()]
    return found


def counts(rows: list[Row], at: datetime, window: timedelta) -> list[int]:
    """Impressions and labels of some rows in the window before a snapshot."""
    total = [0, 0, 0, 0]
    for row in rows:
        if not at - window <= hour_down(row["event_time"]) < at:
            continue
        total[0] += row["created_time"] <= at
        if outcome_arrival(row) <= at:
            total = [t + n for t, n in zip(total, [0, row["click"], row["long_view"], row["like"]], strict=True)]
    return total


def smoothed(count: int, impressions: int, prior: float) -> float:
    return (count + PRIOR_IMPRESSIONS * prior) / (impressions + PRIOR_IMPRESSIONS)


def everyone(events: list[Row], at: datetime) -> list[float]:
    total = counts(events, at, WINDOWS["7d"])
    return [n / max(total[0], 1) for n in total[1:]]


def oracle_item(rows: list[Row], events: list[Row], at: datetime) -> dict[str, float]:
    found: dict[str, float] = {}
    priors = everyone(events, at)
    for window in ("7d", "1d", "1h"):
        own = counts(rows, at, WINDOWS[window])
        found |= {f"item_{name}_{window}": n for name, n in zip(NAMES, own, strict=True)}
        priors = [smoothed(n, own[0], prior) for n, prior in zip(own[1:], priors, strict=True)]
        found |= {f"item_{label}_rate_{window}": np.float32(p) for label, p in zip(COUNTED, priors, strict=True)}
    return found


def changes(rows: list[Row]) -> set[datetime]:
    """The hours after which the statistics of some rows had changed."""
    stamps = set()
    for row in rows:
        next_hour = hour_down(row["event_time"]) + HOUR
        entered = max(next_hour, hour_up(row["created_time"]))
        stamps.add(entered)
        if row["click"] or row["long_view"] or row["like"]:
            stamps.add(max(next_hour, hour_up(outcome_arrival(row))))
        stamps |= {next_hour + window for window in WINDOWS.values() if entered <= next_hour - HOUR + window}
    return stamps


def read_items(log: Path) -> dict[int, Row]:
    return {row["item_id"]: row for row in pl.read_parquet(log / "items.parquet").iter_rows(named=True)}


@pytest.mark.parametrize("batch", range(10))
def test_tables_equal_plain_loops(batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a small log's lists are gathered at once otherwise
    monkeypatch.setattr(features, "GATHERED_AT_ONCE", 50 if batch % 2 else 4_000_000)
    for seed in range(5 * batch, 5 * batch + 5):
        events, histories = a_log(seed)
        log = write_log(tmp_path / str(seed), events, histories)
        tables, items = feature_tables(log), read_items(log)

        expected = set()
        for row in events:
            expected |= {(row["user_id"], row_seen(row))} | (
                {(row["user_id"], outcome_seen(row))} if did(row) else set()
            )
        for row in histories:
            if row["items"]:
                expected.add((row["user_id"], max(row["event_time"], row["created_time"]) + TICK))
        found = {(row["user_id"], row["event_timestamp"]): row for row in tables["user_activity"].iter_rows(named=True)}
        assert found.keys() == expected, seed
        for (user, at), row in found.items():
            activity = oracle_activity(user, at, events, histories, items)
            assert {name: row[name] for name in activity} == activity, (seed, user, at)

        stamps = set()
        for item in {row["item_id"] for row in events}:
            rows = [row for row in events if row["item_id"] == item]
            stamps |= {(item, at) for at in changes(rows)}
        statistics = {
            (row["item_id"], row["event_timestamp"]): row for row in tables["item_statistics"].rows(named=True)
        }
        assert statistics.keys() == stamps, seed
        for (item, at), row in statistics.items():
            values = oracle_item([row for row in events if row["item_id"] == item], events, at)
            assert {name: row[name] for name in values} == values, (seed, item, at)

        scenarios = {
            (row["scenario"], row["event_timestamp"]): row for row in tables["scenario_statistics"].rows(named=True)
        }
        first = {
            scenario: min(
                max(hour_down(row["event_time"]) + HOUR, hour_up(row["created_time"]))
                for row in events
                if row["scenario"] == scenario
            )
            for scenario in {row["scenario"] for row in events}
        }
        assert scenarios.keys() == {(s, at) for at in changes(events) for s, since in first.items() if since <= at}
        for (scenario, at), row in scenarios.items():
            own = counts([row for row in events if row["scenario"] == scenario], at, WINDOWS["7d"])
            priors = everyone(events, at)
            assert row["scenario_impressions_7d"] == own[0]
            for label, n, prior in zip(COUNTED, own[1:], priors, strict=True):
                assert row[f"everyone_{label}_rate_7d"] == np.float32(prior)
                assert row[f"scenario_{label}_rate_7d"] == np.float32(smoothed(n, own[0], prior))


def test_tables_have_the_columns_of_their_views(tmp_path: Path) -> None:
    events, histories = a_log(3)
    tables = feature_tables(write_log(tmp_path, events, histories))
    assert {name: dict(table.schema) for name, table in tables.items()} == {view.name: view.schema for view in VIEWS}
    for view in VIEWS:
        assert tables[view.name].null_count().sum_horizontal().item() == 0
        assert tables[view.name].select(view.key, "event_timestamp").is_unique().all()


def test_a_late_row_changes_nothing_before_it_arrived(tmp_path: Path) -> None:
    on_time = [an_event(n, 1, n, START + n * HOUR, long_view=1) for n in range(5)]
    late = an_event(9, 1, 9, START + 30 * timedelta(minutes=1), late=timedelta(hours=6, minutes=1), long_view=1)
    before = feature_tables(write_log(tmp_path / "before", on_time))
    after = feature_tables(write_log(tmp_path / "after", [*on_time, late]))
    for name in ("user_activity", "item_statistics", "scenario_statistics"):
        until = pl.col("event_timestamp") < late["created_time"]
        assert after[name].filter(until).equals(before[name].filter(until)), name
        assert not after[name].equals(before[name])
    last = after["user_activity"].row(-1, named=True)
    assert last["event_timestamp"] == late["created_time"] + TICK
    assert last["history_items"] == [0, 9, 1, 2, 3, 4]


def test_a_slate_does_not_see_itself(tmp_path: Path) -> None:
    slate = [an_event(n, 1, n, START, click=1) for n in range(3)]
    table = feature_tables(write_log(tmp_path, slate))["user_activity"]
    assert table["event_timestamp"].to_list() == [START + TICK]


def test_a_profile_holds_from_when_it_was_known(tmp_path: Path) -> None:
    items = feature_tables(write_log(tmp_path, [an_event(0, 1, 2, START)]))["item_profile"]
    assert items["event_timestamp"][0] == START - 4 * HOUR
    assert items["upload_time_ms"][0] == int((START - 5 * HOUR).timestamp() * 1000)


def test_no_action_gives_empty_lists(tmp_path: Path) -> None:
    row = feature_tables(write_log(tmp_path, [an_event(0, 1, 2, START)]))["user_activity"].row(0, named=True)
    assert [row[name] for name in ("history_items", "action_items", "action_tags")] == [[], [], []]
    assert row["hour_impressions"] == [1]


def test_a_log_ends_at_the_full_hour(tmp_path: Path) -> None:
    for after in (timedelta(0), TICK):
        log = write_log(tmp_path / str(after), [an_event(0, 1, 2, START), an_event(1, 1, 2, START + after)])
        end = START if not after else START + HOUR
        assert features.log_end(log) == int(end.timestamp()) * 1_000_000
        assert features.pushed_end(log, features.log_end(log)) == features.log_end(log)


@pytest.mark.parametrize(
    ("minutes", "end", "pushed"),
    [
        (-60, 2, 120),  # a clock ahead of the gateway's: nothing is known of it
        (4, 1, 66),  # the last row arrived while the feedback was read
        (20, 1, 80),  # in the hour that runs more may come
        (59, 1, 119),
        (60, 2, 120),
        (10_000, 2, 10_060),
    ],
)
def test_a_log_that_reaches_the_present_ends_before_the_hour_that_runs(
    tmp_path: Path, minutes: int, end: int, pushed: int
) -> None:
    last = START + HOUR + timedelta(minutes=5)
    told = last + timedelta(minutes=1) - TICK
    log = write_log(tmp_path, [an_event(0, 1, 2, START), an_event(1, 1, 2, last, release=1, outcome_time=told)])
    until = START + HOUR + timedelta(minutes=minutes)
    (log / "feedback.json").write_text(json.dumps({"sequence": 3, "until_us": int(until.timestamp() * 1e6)}))
    assert features.log_end(log) == int((START + end * HOUR).timestamp() * 1e6)
    expected = START + timedelta(minutes=pushed)
    assert features.pushed_end(log, features.log_end(log)) == int(expected.timestamp() * 1e6)


def test_what_came_by_the_gateway_is_stored_whatever_its_clock(tmp_path: Path) -> None:
    late = timedelta(minutes=90)
    rows = [an_event(0, 1, 2, START), an_event(1, 1, 2, START, late=late), an_event(2, 1, 2, START, release=1)]
    log = write_log(tmp_path, rows)
    assert features.log_end(log) == int(START.timestamp()) * 1_000_000
    assert features.pushed_end(log, features.log_end(log)) == int(START.timestamp()) * 1_000_000 + 1


def joined(rng: random.Random, rows: int) -> pl.DataFrame:
    """Rows as the join gives them, with activity and request times all about."""
    columns: dict[str, list[Any]] = {name: [] for name in ("event_time", "scenario")}
    stored = [f for view in VIEWS for f in view.features]
    for _ in range(rows):
        time = START + timedelta(milliseconds=rng.randrange(30 * 24 * 3_600_000))
        columns["event_time"].append(time)
        columns["scenario"].append(rng.randrange(3))
        hours = [
            hours_of(time) - rng.choice([-1, 0, 1, 2, 23, 24, 25, 167, 168, 169, 300]) for _ in range(rng.randrange(9))
        ]
        actions = rng.randrange(8)
        for feature in stored:
            if feature.name == "hour_starts":
                value: Any = hours
            elif feature.name == "hour_scenarios":
                value = [rng.randrange(3) for _ in hours]
            elif feature.name.startswith("hour_"):
                value = [rng.randrange(50) for _ in hours]
            elif feature.name == "action_times":
                value = [ms(time) - rng.randrange(-1000, 40 * 24 * 3_600_000) for _ in range(actions)]
            elif feature.name == "action_tags":
                value = [rng.randrange(-1, 5) for _ in range(3 * actions)]
            elif feature.name == "action_authors":
                value = [rng.randrange(-1, 4) for _ in range(actions)]
            elif feature.name == "tags":
                value = [rng.randrange(6) for _ in range(rng.randrange(5))]
            elif feature.name == "upload_time_ms":
                value = rng.choice([0, ms(time) + 5, ms(time) - rng.randrange(10**10)])
            elif isinstance(feature.dtype, pl.List):
                value = []
            elif isinstance(feature.dtype, pl.String):
                value = ""
            else:
                value = rng.randrange(4) if not feature.dtype.is_float() else rng.random()
            columns.setdefault(feature.name, []).append(value)
    dtypes: dict[str, Any] = {feature.name: feature.dtype for feature in stored}
    return pl.DataFrame(columns, schema_overrides=dtypes | {"event_time": pl.Datetime("us", "UTC")})


def oracle_on_demand(row: Row) -> dict[str, float]:
    time = row["event_time"]
    found: dict[str, float] = {"hour": time.hour, "weekday": time.weekday()}
    for prefix in ("user", "user_scenario"):
        for window, length in (("1h", 1), ("1d", 24), ("7d", 168)):
            inside = [
                place
                for place, hour in enumerate(row["hour_starts"])
                if 0 <= hours_of(time) - hour <= length
                and (prefix == "user" or row["hour_scenarios"][place] == row["scenario"])
            ]
            for name in COUNTS:
                found[f"{prefix}_{name}_{window}"] = sum(row[f"hour_{name}"][place] for place in inside)
    for prefix, prior in (("user", "everyone"), ("user_scenario", "scenario")):
        for label in COUNTED:
            rate = smoothed(
                found[f"{prefix}_{label}s_7d"],  # type: ignore[arg-type]
                found[f"{prefix}_impressions_7d"],  # type: ignore[arg-type]
                row[f"{prior}_{label}_rate_7d"],
            )
            found[f"{prefix}_{label}_rate_7d"] = np.float32(rate)
    idle = min((ms(time) - action) / 3_600_000 for action in [*row["action_times"], ms(time) - 720 * 3_600_000])
    found["user_idle_hours"] = np.float32(max(idle, 0))
    age = (ms(time) - row["upload_time_ms"]) / 3_600_000 if row["upload_time_ms"] > 0 else 0
    found["item_age_hours"] = np.float32(max(age, 0))
    authors = Counter(row["action_authors"])[row["author_id"]]
    own = set(row["tags"][:3])
    tags = sum(bool(own & set(row["action_tags"][3 * n : 3 * n + 3])) for n in range(len(row["action_authors"])))
    among = len(row["action_authors"]) + 5
    found |= {"author_actions": authors, "tag_actions": tags}
    found |= {"author_affinity": np.float32(authors / among), "tag_affinity": np.float32(tags / among)}
    return found


def test_on_demand_features_equal_plain_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = joined(random.Random(1), 500)
    found = with_on_demand(frame, "rank_v3")
    for row in found.iter_rows(named=True):
        expected = oracle_on_demand(row)
        assert {name: row[name] for name in expected} == expected
    described = {feature.name: feature.dtype for on_demand in ON_DEMAND for feature in on_demand.features}
    assert {name: found.schema[name] for name in found.columns[frame.width :]} == described
    monkeypatch.setattr(features, "CHUNK_ROWS", 64)
    assert with_on_demand(frame, "rank_v3").equals(found)
    assert with_on_demand(frame.clear(), "rank_v3").schema == found.schema


def test_one_user_for_many_items_is_the_same_as_a_row_each() -> None:
    frame = joined(random.Random(2), 40)
    one = frame[[7] * frame.height]
    (affinity,) = (on_demand for on_demand in ON_DEMAND if on_demand.name == "user_item_affinity")
    lists = {name: Ragged.of_series(one[name]) for name in ("action_authors", "action_tags")}
    items = {"author_id": frame["author_id"].to_numpy(), "tags": Ragged.of_series(frame["tags"])}
    each = affinity.compute(lists | items)
    once = affinity.compute({name: column.take(np.array([0])) for name, column in lists.items()} | items)
    assert {name: values.tolist() for name, values in once.items()} == {name: v.tolist() for name, v in each.items()}
    assert any(each["tag_actions"])


def test_lists_are_cut_and_taken_as_python_does() -> None:
    rng = random.Random(3)
    lists = [[rng.randrange(9) for _ in range(rng.choice([0, 1, 5]))] for _ in range(50)]
    ragged = Ragged.of(lists)
    rows = np.array([rng.randrange(50) for _ in range(80)])
    for found, expected in (
        (ragged, lists),
        (ragged.tail(2), [values[-2:] for values in lists]),
        (ragged.head(2), [values[:2] for values in lists]),
        (ragged.take(rows), [lists[row] for row in rows]),
        (Ragged.of_series(pl.Series(lists, dtype=pl.List(pl.Int64))), lists),
        (Ragged.of([]), []),
    ):
        assert [values.tolist() for values in found.lists()] == expected
        assert len(found) == len(expected)


def test_missing_values_have_one_default_a_dtype() -> None:
    every = [feature for view in VIEWS for feature in view.features]
    frame = pl.DataFrame({feature.name: [None] for feature in every}, schema={f.name: f.dtype for f in every})
    filled = fill_missing(frame, every).row(0, named=True)
    assert filled["fans_count"] == 0
    assert filled["item_click_rate_7d"] == 0.0
    assert filled["history_items"] == []
    assert filled["title"] == ""
    assert None not in filled.values()


def test_every_feature_is_named_once_and_described() -> None:
    every = [feature for group in (*VIEWS, *ON_DEMAND) for feature in group.features]
    assert len({feature.name for feature in every}) == len(every)
    assert all(feature.description for feature in every)
    known = {group.name for group in (*VIEWS, *ON_DEMAND)}
    stored = {feature.name for view in VIEWS for feature in view.features}
    for service, members in SERVICES.items():
        assert set(members) <= known
        given = {feature.name for view in features.views_of(service) for feature in view.features}
        for on_demand in features.on_demand_of(service):
            assert set(on_demand.inputs) <= given <= stored
