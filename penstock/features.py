"""Features: a log directory → one table of hourly snapshots a feature view, and what stands for a missing value.

A snapshot is stamped with the end of its hour, H, and holds only rows that had happened and arrived by then:
event_time < H and created_time <= H. A late row enters with the first snapshot after its arrival and changes no
earlier one, so that a point-in-time join on the stamp can never see the future, and the newest snapshot (what the
online store serves) is what the offline join gives at that moment.

VIEWS is the one description of names, dtypes and defaults: Feast's definitions, examples and the gateway obey it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from penstock.events import EVENTS, HISTORIES, ITEMS, TIME, USERS, Table, event_files, read_table

HISTORY_LENGTH = 50
WINDOW_HOURS = 7 * 24
PRIOR_IMPRESSIONS = 20
"""Impressions at the global rate that an entity's rate starts from: (n + 20 p) / (impressions + 20)."""

COUNTED = ("click", "long_view", "like")
HOUR_US = 3_600_000_000
STAMPS = ("event_timestamp", "created_timestamp")


@dataclass(frozen=True)
class Feature:
    """One feature: Int64, Float32, String or List(Int64)."""

    name: str
    dtype: pl.DataType
    description: str


@dataclass(frozen=True)
class View:
    """The features of one entity that change together; a Feast feature view."""

    name: str
    entity: str
    window: str
    description: str
    features: tuple[Feature, ...]

    @property
    def key(self) -> str:
        return f"{self.entity}_id"

    @property
    def schema(self) -> dict[str, pl.DataType]:
        """Columns of the view's table: key, features, stamps."""
        return {
            self.key: pl.Int64(),
            **{feature.name: feature.dtype for feature in self.features},
            **dict.fromkeys(STAMPS, TIME),
        }


def _profile(table: Table) -> tuple[Feature, ...]:
    return tuple(Feature(c.name, c.dtype, c.description) for c in table.columns if c.role == "attribute")


def _statistics(prefix: str, whose: str) -> tuple[Feature, ...]:
    counts = [("impressions", "impressions"), ("clicks", "clicks"), ("long_views", "long views"), ("likes", "likes")]
    return (
        *(Feature(f"{prefix}_{name}", pl.Int64(), f"{text} of {whose} in 7 days") for name, text in counts),
        *(
            Feature(f"{prefix}_{label}_rate", pl.Float32(), f"{label} rate of {whose} in 7 days, smoothed")
            for label in COUNTED
        ),
    )


VIEWS = (
    View("user_profile", "user", "now", "what the user is, as the log's users table says", _profile(USERS)),
    View(
        "user_history",
        "user",
        "all",
        f"the last {HISTORY_LENGTH} items the user long-viewed",
        (
            Feature("history_items", pl.List(pl.Int64()), "items long-viewed, oldest first"),
            Feature("history_times", pl.List(pl.Int64()), "when each was shown, ms since 1970"),
        ),
    ),
    View("user_activity", "user", "7d", "what the user did in the 7 days before", _statistics("user", "the user")),
    View(
        "item_profile",
        "item",
        "now",
        "what the item is, as the log's items table says",
        (*_profile(ITEMS), Feature("upload_time_ms", pl.Int64(), "when it was uploaded, ms since 1970")),
    ),
    View(
        "item_statistics", "item", "7d", "what users did with it in the 7 days before", _statistics("item", "the item")
    ),
)

SERVICES: dict[str, tuple[str, ...]] = {
    "recall_v1": ("user_profile", "user_history", "user_activity"),
    "rank_v1": tuple(view.name for view in VIEWS),
}
"""Feature service → its views. A release names its services, so none ever changes: a new one gets a new number."""


def view(name: str) -> View:
    """The view of that name."""
    return next(view for view in VIEWS if view.name == name)


def default(dtype: pl.DataType) -> int | float | str | list[int]:
    """What stands for a missing value of `dtype`: 0, 0.0, "" or []."""
    if isinstance(dtype, pl.List):
        return []
    if isinstance(dtype, pl.String):
        return ""
    return 0.0 if dtype.is_float() else 0


def fill_missing(frame: pl.DataFrame, features: Sequence[Feature]) -> pl.DataFrame:
    """`frame` with nulls of `features` replaced by their default and cast to their dtype."""
    return frame.with_columns(
        pl.col(feature.name).cast(feature.dtype).fill_null(pl.lit(default(feature.dtype), dtype=feature.dtype))
        for feature in features
    )


def request_features(event_time_ms: Any, upload_time_ms: Any) -> dict[str, np.ndarray]:
    """Features of a request and an item, from times in ms since 1970 (scalars or arrays that broadcast).

    Returns:
        hour: UTC hour, 0-23, int64. weekday: 0 = Monday, int64. item_age_hours: float32, at least 0, and 0 for an
        item whose upload time is not known (0).
    """
    event, upload = np.broadcast_arrays(np.asarray(event_time_ms, np.int64), np.asarray(upload_time_ms, np.int64))
    age = np.where(upload > 0, np.maximum(event - upload, 0), 0) / 3_600_000
    return {
        "hour": event // 3_600_000 % 24,
        "weekday": (event // 86_400_000 + 3) % 7,  # 1970-01-01 was a Thursday
        "item_age_hours": age.astype(np.float32),
    }


def with_request_features(frame: pl.DataFrame) -> pl.DataFrame:
    """`frame` (event_time, upload_time_ms) with the columns of `request_features`."""
    event_time_ms = frame["event_time"].dt.epoch("ms").to_numpy()
    return frame.with_columns(
        pl.Series(name, values)
        for name, values in request_features(event_time_ms, frame["upload_time_ms"].to_numpy()).items()
    )


def feature_tables(log: Path) -> dict[str, pl.DataFrame]:
    """View name → its table, in the columns of `View.schema`, sorted by key and event_timestamp.

    History, activity and statistics hold one row for each hour after which what was seen of their entity had changed.
    What falls out of the window of 7 days makes no row of its own.

    Raises:
        LogError: the log cannot be read.
    """
    used = ["event_id", "user_id", "item_id", "event_time", "created_time", *COUNTED]
    events = pl.concat(read_table(path, EVENTS).select(used) for path in event_files(log))
    users = read_table(log / "users.parquet", USERS)
    items = read_table(log / "items.parquet", ITEMS)
    histories = log / "histories.parquet"
    tables = {
        "user_profile": _profiles(users),
        "user_history": _histories(events, read_table(histories, HISTORIES) if histories.exists() else None),
        "user_activity": _activity(events, "user"),
        "item_profile": _profiles(items.with_columns(upload_time_ms=pl.col("event_time").dt.epoch("ms"))),
        "item_statistics": _activity(events, "item"),
    }
    return {
        name: table.select(pl.col(column).cast(dtype) for column, dtype in view(name).schema.items())
        for name, table in tables.items()
    }


def _profiles(table: pl.DataFrame) -> pl.DataFrame:
    # a profile holds from the moment it is both true and known
    return table.with_columns(
        event_timestamp=pl.max_horizontal("event_time", "created_time"), created_timestamp=pl.col("created_time")
    ).sort(table.columns[0])


def _hour(times: pl.Series) -> np.ndarray:
    return times.dt.epoch("us").to_numpy() // HOUR_US


def _hour_up(times: pl.Series) -> np.ndarray:
    return -(-times.dt.epoch("us").to_numpy() // HOUR_US)


def _seen(events: pl.DataFrame) -> np.ndarray:
    """The first snapshot, in hours since 1970, that holds each row."""
    return np.maximum(_hour(events["event_time"]) + 1, _hour_up(events["created_time"]))


def _stamps(hours: np.ndarray) -> dict[str, pl.Series]:
    return dict.fromkeys(STAMPS, pl.Series(hours * HOUR_US).cast(TIME))


class _Timeline:
    """Finds how many rows of an entity lie before an hour, for many (entity, hour) at once.

    Rows are given by entity code (dense, from 0) and hour, sorted by both; `first` is not later than any hour asked.
    """

    def __init__(self, codes: np.ndarray, hours: np.ndarray, first: int, last: int) -> None:
        self.first, self.span = first, last - first + 2
        self.keys = self._keys(codes, hours)
        assert bool(np.all(self.keys[1:] >= self.keys[:-1])), "rows must be sorted by entity and hour"

    def _keys(self, codes: np.ndarray, hours: np.ndarray | int) -> np.ndarray:
        return codes * self.span + (hours - self.first)

    def start(self, codes: np.ndarray) -> np.ndarray:
        """Place of each entity's first row."""
        return np.searchsorted(self.keys, self._keys(codes, self.first))

    def until(self, codes: np.ndarray, hours: np.ndarray) -> np.ndarray:
        """Place after each entity's last row of at most the hour."""
        return np.searchsorted(self.keys, self._keys(codes, hours), side="right")


def _snapshots(codes: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct (entity, hour) at which something was first seen, sorted."""
    first = int(seen.min(initial=0))
    span = int(seen.max(initial=0)) - first + 1
    keys = np.unique(codes * span + (seen - first))
    return keys // span, keys % span + first


def _window_sums(
    codes: np.ndarray, hour: np.ndarray, seen: np.ndarray, values: np.ndarray, at: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Sums [snapshots, columns] of `values` [rows, columns] over the rows seen by, and at most 7 days before, `at`.

    A row counts in the snapshots from `seen` to hour + WINDOW_HOURS: running sums of what entered less what left.
    """
    kept = seen <= hour + WINDOW_HOURS
    codes, hour, seen, values = codes[kept], hour[kept], seen[kept], values[kept]
    leaves = hour + WINDOW_HOURS + 1
    first = min(int(seen.min(initial=0)), int(at[1].min(initial=0)))
    last = max(int(leaves.max(initial=0)), int(at[1].max(initial=0)))
    total = np.zeros((len(at[0]), values.shape[1]), np.int64)
    for hours, sign in ((seen, 1), (leaves, -1)):
        order = np.lexsort((hours, codes))
        timeline = _Timeline(codes[order], hours[order], first, last)
        running = np.concatenate([np.zeros((1, values.shape[1]), np.int64), np.cumsum(values[order], axis=0)])
        total += sign * (running[timeline.until(*at)] - running[timeline.start(at[0])])
    return total


def _activity(events: pl.DataFrame, entity: str) -> pl.DataFrame:
    """Counts and smoothed rates of the last 7 days, by user or item."""
    ids, codes = np.unique(events[f"{entity}_id"].to_numpy(), return_inverse=True)
    hour, seen = _hour(events["event_time"]), _seen(events)
    values = np.column_stack([np.ones(len(events), np.int64), *(events[label].to_numpy() for label in COUNTED)])
    snapshots = _snapshots(codes, seen)
    counts = _window_sums(codes, hour, seen, values, snapshots)

    hours, place = np.unique(snapshots[1], return_inverse=True)
    everyone = _window_sums(np.zeros_like(codes), hour, seen, values, (np.zeros_like(hours), hours))
    prior = everyone[:, 1:] / np.maximum(everyone[:, :1], 1)
    rates = (counts[:, 1:] + PRIOR_IMPRESSIONS * prior[place]) / (counts[:, :1] + PRIOR_IMPRESSIONS)
    names = [feature.name for feature in view("user_activity" if entity == "user" else "item_statistics").features]
    columns = [*counts.T, *rates.T]
    return pl.DataFrame(
        {f"{entity}_id": ids[snapshots[0]], **dict(zip(names, columns, strict=True)), **_stamps(snapshots[1])}
    )


def _histories(events: pl.DataFrame, histories: pl.DataFrame | None) -> pl.DataFrame:
    """The last items long-viewed, by user; an initial history stands before the log's rows, with its own time."""
    viewed = events.filter(pl.col("long_view") == 1)
    rows = pl.DataFrame(
        {
            "user_id": viewed["user_id"],
            "item_id": viewed["item_id"],
            "time": viewed["event_time"].dt.epoch("ms"),
            "hour": _hour(viewed["event_time"]),
            "seen": _seen(viewed),
            "order": viewed["event_time"].dt.epoch("us"),
            "tie": viewed["event_id"],
        }
    )
    if histories is not None:
        known = pl.max_horizontal("event_time", "created_time")
        initial = (
            histories.with_columns(items=pl.col("items").list.tail(HISTORY_LENGTH), known=known)
            .with_columns(seen=pl.Series(_hour_up(histories.select(known).to_series())))
            .filter(pl.col("items").list.len() > 0)
            .with_columns(tie=pl.int_ranges(pl.col("items").list.len()))
            .explode("items", "tie", empty_as_null=False)
            .select(
                "user_id",
                item_id="items",
                time=pl.col("event_time").dt.epoch("ms"),
                hour=pl.lit(rows["hour"].to_numpy().min(initial=0) - 1, pl.Int64),
                seen="seen",
                order=pl.lit(np.iinfo(np.int64).min, pl.Int64),
                tie="tie",
            )
        )
        rows = pl.concat([initial, rows])
    rows = rows.sort("user_id", "order", "tie")
    ids, codes = np.unique(rows["user_id"].to_numpy(), return_inverse=True)
    hour, seen = rows["hour"].to_numpy(), rows["seen"].to_numpy()
    users, at = _snapshots(codes, seen)

    first, last = int(hour.min(initial=0)), int(seen.max(initial=0))
    happened = _Timeline(codes, hour, first, last)
    arrival = np.lexsort((seen, codes))
    arrived = _Timeline(codes[arrival], seen[arrival], first, last)
    start, end = happened.start(users), happened.until(users, at - 1)
    waiting = (end - start) - (arrived.until(users, at) - arrived.start(users))
    # the last N that were seen lie among the last N + waiting that happened
    start = np.maximum(start, end - HISTORY_LENGTH - waiting)
    chunks = [
        _last_seen(rows, start[part], end[part], at[part])
        for part in np.array_split(np.arange(len(at)), int((end - start).sum()) // CHUNK_ROWS + 1)
    ]
    lists = pl.concat(chunks)
    return pl.DataFrame({"user_id": ids[users], **lists.to_dict(), **_stamps(at)})


CHUNK_ROWS = 4_000_000
"""History items gathered at once: some 200 MB."""


def _last_seen(rows: pl.DataFrame, start: np.ndarray, end: np.ndarray, at: np.ndarray) -> pl.DataFrame:
    """The last items among rows[start:end] that were seen at each snapshot, as lists."""
    length = end - start
    stop = np.cumsum(length)
    index = np.arange(length.sum()) + np.repeat(start - (stop - length), length)
    count = np.concatenate([[0], np.cumsum(rows["seen"].to_numpy()[index] <= np.repeat(at, length))])
    visible = np.diff(count).astype(bool)
    kept = visible & (np.repeat(count[stop], length) - count[1:] < HISTORY_LENGTH)
    offsets = np.concatenate([[0], np.cumsum(kept)])[np.concatenate([[0], stop])]
    return pl.DataFrame(
        {
            name: pl.from_arrow(pa.LargeListArray.from_arrays(offsets, rows[column].to_numpy()[index[kept]]))
            for name, column in (("history_items", "item_id"), ("history_times", "time"))
        }
    )
