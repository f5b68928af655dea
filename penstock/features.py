"""Features: what there is, and how a log becomes the table of each feature view.

Three kinds, by when their value changes:

*Materialised* views (profiles, statistics) change with a materialisation. Statistics are snapshots by the hour: one
stamped H holds the rows with event_time < H and created_time <= H, and a label once its outcome had arrived by H.

The *pushed* view, user_activity, changes at the instant something of the user becomes visible: a row at
max(event_time, arrival) + 1 µs. The gateway pushes it by the rules of `penstock.activity`.

*On-demand* features are computed when they are asked for, of stored ones and the request, by one NumPy function for
training rows and for requests, so that both are the same to the last bit.

A late row enters with the first row of its entity after its arrival and changes no earlier one: a join on the stamp can
never see the future, and the newest row (what the online store serves) is what that join gives at that moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa

from penstock.activity import (
    HISTORY_LENGTH,
    KINDS,
    TAGS_PER_ACTION,
    UNKNOWN_AUTHOR,
    UNKNOWN_SESSION,
    WINDOW_HOURS,
)
from penstock.events import EVENTS, HISTORIES, ITEMS, TIME, USERS, Table, event_files, read_table
from penstock.feedback import read_sequence, read_until

WINDOWS = {"1h": 1, "1d": 24, "7d": WINDOW_HOURS}
"""Window → hours. It ends now and begins at the full hour that many hours before the hour that runs."""

_LENGTHS = np.array(list(WINDOWS.values()))

PRIOR_IMPRESSIONS = 20
"""Impressions at the prior rate that a rate starts from: (n + 20 p) / (impressions + 20)."""

PRIOR_ACTIONS = 5
IDLE_LIMIT_HOURS = 720.0
COUNTED = ("click", "long_view", "like")
COUNTS = {"impressions": "impressions", "clicks": "clicks", "long_views": "long views", "likes": "likes"}
NO_TAG = -1
NOTHING = -2
"""What no author and no tag is, and NO_TAG neither."""

HOUR_US = 3_600_000_000
HOUR_MS = 3_600_000
STAMPS = ("event_timestamp", "created_timestamp")
REQUEST = ("time_ms", "scenario", "device")
"""What a request says of itself: ms since 1970, and the log's columns of that name."""

OWNER = "recommendations"


@dataclass(frozen=True)
class Feature:
    """One feature: Int64, Float32, String or List(Int64). `window` is the time it looks back over, if it does."""

    name: str
    dtype: pl.DataType
    description: str
    window: str = ""


@dataclass(frozen=True)
class View:
    """The stored features of one entity that change together; a Feast feature view."""

    name: str
    entity: str
    description: str
    features: tuple[Feature, ...]
    freshness: Literal["materialised", "pushed"] = "materialised"
    owner: str = OWNER
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return KEYS[self.entity]

    @property
    def schema(self) -> dict[str, pl.DataType]:
        """Columns of the view's table: key, features, stamps."""
        return {
            self.key: pl.Int64(),
            **{feature.name: feature.dtype for feature in self.features},
            **dict.fromkeys(STAMPS, TIME),
        }


@dataclass(frozen=True)
class Ragged:
    """Lists of int64, one a row: row i is values[offsets[i] : offsets[i + 1]]; offsets [rows + 1]."""

    values: np.ndarray
    offsets: np.ndarray

    @staticmethod
    def of(lists: Sequence[Sequence[int]] | Sequence[np.ndarray]) -> Ragged:
        """From Python lists or arrays."""
        arrays = [np.asarray(values, np.int64) for values in lists]
        if len(arrays) == 1:  # a request's user, hundreds of times a second
            return Ragged(arrays[0], np.array([0, len(arrays[0])]))
        offsets = np.cumsum([0, *map(len, arrays)])
        return Ragged(np.concatenate([np.empty(0, np.int64), *arrays]), offsets)

    @staticmethod
    def of_series(series: pl.Series) -> Ragged:
        """From a Polars column of lists without nulls."""
        offsets = np.concatenate([[0], np.cumsum(series.list.len().to_numpy().astype(np.int64))])
        return Ragged(series.explode(empty_as_null=False).to_numpy(), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def rows(self) -> np.ndarray:
        """The row of each value."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def take(self, rows: np.ndarray) -> Ragged:
        """The lists of some rows, in their order."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Ragged(self.values[index], offsets)

    def padded(self, width: int, fill: int) -> np.ndarray:
        """As a matrix [rows, width]: the first `width` values of each list, then `fill`."""
        places = np.arange(width)
        inside = places < self.lengths[:, None]
        matrix = np.full(inside.shape, fill)
        matrix[inside] = self.values[(self.offsets[:-1, None] + places)[inside]]
        return matrix

    def tail(self, length: int) -> Ragged:
        """The last `length` values of each list."""
        kept = np.arange(len(self.values)) >= np.repeat(self.offsets[1:] - length, self.lengths)
        return Ragged(self.values[kept], np.concatenate([[0], np.cumsum(np.minimum(self.lengths, length))]))

    def head(self, length: int) -> Ragged:
        """The first `length` values of each list."""
        kept = np.arange(len(self.values)) < np.repeat(self.offsets[:-1] + length, self.lengths)
        return Ragged(self.values[kept], np.concatenate([[0], np.cumsum(np.minimum(self.lengths, length))]))

    def lists(self) -> list[np.ndarray]:
        """One array a row."""
        return [self.values[start:end] for start, end in zip(self.offsets[:-1], self.offsets[1:], strict=True)]


Column = np.ndarray | Ragged
"""A feature of some rows: int64 or float32 [rows], text [rows] as objects, or lists."""


@dataclass(frozen=True)
class OnDemand:
    """Features computed at the request; a Feast on-demand feature view.

    Attributes:
        inputs: stored features that it reads.
        request: what it reads of the request, of `REQUEST`.
        compute: columns by name → the features by name. User columns may have one row where item columns have many.
    """

    name: str
    description: str
    inputs: tuple[str, ...]
    request: tuple[str, ...]
    features: tuple[Feature, ...]
    compute: Callable[[Mapping[str, Column]], dict[str, np.ndarray]]
    owner: str = OWNER


KEYS = {"user": "user_id", "item": "item_id", "scenario": "scenario"}
"""Entity → its key, a column of the log."""


def _integer(name: str, description: str, window: str = "") -> Feature:
    return Feature(name, pl.Int64(), description, window)


def _rate(name: str, description: str, window: str = "") -> Feature:
    return Feature(name, pl.Float32(), description, window)


def _lists(name: str, description: str, window: str = "") -> Feature:
    return Feature(name, pl.List(pl.Int64()), description, window)


def _profile(table: Table) -> tuple[Feature, ...]:
    return tuple(Feature(c.name, c.dtype, c.description) for c in table.columns if c.role == "attribute")


def _counts(prefix: str, whose: str) -> tuple[Feature, ...]:
    return tuple(
        _integer(f"{prefix}_{name}_{window}", f"{text} {whose}", window)
        for window in WINDOWS
        for name, text in COUNTS.items()
    )


_LAST = f"the user's last {HISTORY_LENGTH}"

VIEWS = (
    View("user_profile", "user", "what the user is, as the log's users table says", _profile(USERS)),
    View(
        "user_activity",
        "user",
        "what the user did: last long views, last actions, and counts by the hour",
        (
            _lists("history_items", f"{_LAST} items long-viewed, oldest first"),
            _lists("history_times", "when each of them was shown, ms since 1970"),
            _lists("history_sessions", f"the log's session of each of them; {UNKNOWN_SESSION} = not known"),
            _lists(
                "action_items",
                f"{_LAST} items clicked, long-viewed or liked, or whose author was visited, oldest first",
            ),
            _lists("action_times", "when each of them was shown, ms since 1970"),
            _lists("action_kinds", "what was done: " + " + ".join(f"{bit} {label}" for label, bit in KINDS.items())),
            _lists("action_authors", f"each one's author; {UNKNOWN_AUTHOR} = not known"),
            _lists(
                "action_tags",
                f"each one's first {TAGS_PER_ACTION} tags, {TAGS_PER_ACTION} places each, {NO_TAG} = none",
            ),
            _lists("hour_starts", "hours with impressions, as hours since 1970, in order", "7d"),
            _lists("hour_scenarios", "scenario of each of them: an hour stands once for each scenario", "7d"),
            *(_lists(f"hour_{name}", f"{text} in each of them", "7d") for name, text in COUNTS.items()),
            _integer("feedback_sequence", "number of the last feedback record that is in it; provenance, for no model"),
        ),
        freshness="pushed",
    ),
    View(
        "item_profile",
        "item",
        "what the item is, as the log's items table says",
        (*_profile(ITEMS), _integer("upload_time_ms", "when it was uploaded, ms since 1970")),
    ),
    View(
        "item_statistics",
        "item",
        "what users did with the item, by the hour",
        (
            *_counts("item", "of the item"),
            *(
                _rate(f"item_{label}_rate_{window}", f"{label} rate of the item, smoothed to {prior}", window)
                for window, prior in (
                    ("7d", "everyone's rate"),
                    ("1d", "its rate of 7 days"),
                    ("1h", "its rate of 1 day"),
                )
                for label in COUNTED
            ),
        ),
    ),
    View(
        "scenario_statistics",
        "scenario",
        "what users did in a scenario, and in all, by the hour",
        (
            _integer("scenario_impressions_7d", "impressions in the scenario", "7d"),
            *(
                _rate(f"scenario_{label}_rate_7d", f"{label} rate in the scenario, smoothed to everyone's", "7d")
                for label in COUNTED
            ),
            *(_rate(f"everyone_{label}_rate_7d", f"{label} rate in all scenarios", "7d") for label in COUNTED),
        ),
    ),
)


def request_context(columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    """Hour and weekday (0 = Monday), UTC, of time_ms [rows]."""
    time_ms = _array(columns, "time_ms")
    return {
        "hour": time_ms // HOUR_MS % 24,
        "weekday": (time_ms // (24 * HOUR_MS) + 3) % 7,  # 1970-01-01 was a Thursday
    }


def user_windows(columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    """Counts of the windows before time_ms [rows], in all scenarios and in the request's, and smoothed rates.

    A window of w hours holds the hours h with ⌊t⌋ - w <= h <= ⌊t⌋.
    """
    time_ms, scenario = _array(columns, "time_ms"), _array(columns, "scenario")
    starts = _ragged(columns, "hour_starts")
    row = starts.rows
    age = (time_ms // HOUR_MS)[row] - starts.values
    # each hour goes to the smallest window that holds it, or to none; the larger ones are sums of those
    smallest = np.searchsorted(_LENGTHS, age)
    smallest[age < 0] = len(WINDOWS)  # of a clock ahead of the request's
    elsewhere = _ragged(columns, "hour_scenarios").values != scenario[row]
    bins = (len(COUNTS), len(time_ms), len(WINDOWS) + 1)
    counts = np.concatenate([_ragged(columns, f"hour_{name}").values for name in COUNTS])
    of_count = (np.arange(len(COUNTS)) * len(time_ms))[:, None] + row
    found: dict[str, np.ndarray] = {}
    for prefix, prior, holds in (
        ("user", "everyone", smallest),
        ("user_scenario", "scenario", np.where(elsewhere, len(WINDOWS), smallest)),
    ):
        place = of_count * (len(WINDOWS) + 1) + holds
        # sums of integers far below 2**53: exact in floating point
        total = np.bincount(place.ravel(), counts, minlength=math.prod(bins)).astype(np.int64).reshape(bins)
        total = total[:, :, :-1].cumsum(axis=2)
        names = [f"{prefix}_{name}_{window}" for name in COUNTS for window in WINDOWS]
        found |= zip(names, total.swapaxes(1, 2).reshape(len(names), -1), strict=True)
        priors = np.array([_array(columns, f"{prior}_{label}_rate_7d") for label in COUNTED], np.float64)
        rates = _smoothed(total[1:, :, -1], total[0, :, -1], priors).astype(np.float32)
        found |= {f"{prefix}_{label}_rate_7d": values for label, values in zip(COUNTED, rates, strict=True)}
    times = _ragged(columns, "action_times")
    last = np.full(len(time_ms), np.iinfo(np.int64).min // 2)
    acted = times.lengths > 0
    last[acted] = np.maximum.reduceat(times.values, times.offsets[:-1][acted])
    idle = np.minimum(np.maximum((time_ms - last) / HOUR_MS, 0), IDLE_LIMIT_HOURS)
    found["user_idle_hours"] = idle.astype(np.float32)
    return found


def item_age(columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    """Hours from upload_time_ms [rows] to time_ms; 0 for an item whose upload time is not known (0)."""
    upload = _array(columns, "upload_time_ms")
    age = np.where(upload > 0, np.maximum(_array(columns, "time_ms") - upload, 0), 0) / HOUR_MS
    return {"item_age_hours": age.astype(np.float32)}


def user_item_affinity(columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    """How many of the user's last actions were with the item's author, and with any of its tags.

        affinity = actions with it / (actions + 5)

    User columns have a row for each item, or one row for all.
    """
    actions = _ragged(columns, "action_authors")
    width = int(actions.lengths.max(initial=0))
    # rows of users broadcast to rows of items, actions beside them
    same_author = actions.padded(width, NOTHING) == _array(columns, "author_id")[:, None]
    tags = _ragged(columns, "action_tags").padded(width * TAGS_PER_ACTION, NO_TAG)
    own = _ragged(columns, "tags").padded(TAGS_PER_ACTION, NOTHING)
    shared = np.logical_or.reduce([tags == own[:, place, None] for place in range(TAGS_PER_ACTION)])
    same_tag = np.logical_or.reduce([shared[:, place::TAGS_PER_ACTION] for place in range(TAGS_PER_ACTION)])
    counts = {"author": same_author.sum(axis=1), "tag": same_tag.sum(axis=1)}
    among = actions.lengths + PRIOR_ACTIONS
    return {
        **{f"{name}_actions": count for name, count in counts.items()},
        **{f"{name}_affinity": (count / among).astype(np.float32) for name, count in counts.items()},
    }


def _smoothed(count: np.ndarray, impressions: np.ndarray, prior: np.ndarray) -> np.ndarray:
    return (count + PRIOR_IMPRESSIONS * prior) / (impressions + PRIOR_IMPRESSIONS)


def _array(columns: Mapping[str, Column], name: str) -> np.ndarray:
    column = columns[name]
    assert isinstance(column, np.ndarray), name
    return column


def _ragged(columns: Mapping[str, Column], name: str) -> Ragged:
    column = columns[name]
    assert isinstance(column, Ragged), name
    return column


ON_DEMAND = (
    OnDemand(
        "request_context",
        "when the request is made",
        inputs=(),
        request=("time_ms",),
        features=(_integer("hour", "hour of the request, UTC"), _integer("weekday", "day of it, UTC; 0 = Monday")),
        compute=request_context,
    ),
    OnDemand(
        "user_windows",
        "what the user did lately, at the time of the request",
        inputs=(
            "hour_starts",
            "hour_scenarios",
            *(f"hour_{name}" for name in COUNTS),
            "action_times",
            *(f"{prior}_{label}_rate_7d" for prior in ("scenario", "everyone") for label in COUNTED),
        ),
        request=("time_ms", "scenario"),
        features=(
            *_counts("user", "of the user"),
            *_counts("user_scenario", "of the user in the request's scenario"),
            *(
                _rate(f"{prefix}_{label}_rate_7d", f"{label} rate {whose}, smoothed to {prior}", "7d")
                for prefix, whose, prior in (
                    ("user", "of the user", "everyone's"),
                    ("user_scenario", "of the user in the request's scenario", "the scenario's"),
                )
                for label in COUNTED
            ),
            _rate("user_idle_hours", f"hours since the user's last action; {IDLE_LIMIT_HOURS:.0f} = longer, or never"),
        ),
        compute=user_windows,
    ),
    OnDemand(
        "item_age",
        "how old the item is at the time of the request",
        inputs=("upload_time_ms",),
        request=("time_ms",),
        features=(_rate("item_age_hours", "hours since the upload; 0 = not known"),),
        compute=item_age,
    ),
    OnDemand(
        "user_item_affinity",
        "how much of what the user did lately was with such items",
        inputs=("action_authors", "action_tags", "author_id", "tags"),
        request=(),
        features=(
            _integer("author_actions", f"{_LAST} actions: how many with the item's author"),
            _integer("tag_actions", f"{_LAST} actions: how many with an item that shares a tag"),
            _rate("author_affinity", f"author_actions / (all of them + {PRIOR_ACTIONS})"),
            _rate("tag_affinity", f"tag_actions / (all of them + {PRIOR_ACTIONS})"),
        ),
        compute=user_item_affinity,
    ),
)

SERVICES: dict[str, tuple[str, ...]] = {
    "recall_v3": ("user_profile", "user_activity", "scenario_statistics", "request_context", "user_windows"),
    "rank_v3": (*(view.name for view in VIEWS), *(on_demand.name for on_demand in ON_DEMAND)),
}
"""Feature service → its views. A release names its services, so none ever changes: a new one gets a new number."""


def view(name: str) -> View:
    """The view of that name."""
    return next(view for view in VIEWS if view.name == name)


def views_of(service: str) -> tuple[View, ...]:
    """The stored views of a service."""
    return tuple(view for view in VIEWS if view.name in SERVICES[service])


def on_demand_of(service: str) -> tuple[OnDemand, ...]:
    """The on-demand features of a service."""
    return tuple(on_demand for on_demand in ON_DEMAND if on_demand.name in SERVICES[service])


def names_of(service: str) -> set[str]:
    """The features that a service gives, by name."""
    groups: list[View | OnDemand] = [*views_of(service), *on_demand_of(service)]
    return {feature.name for group in groups for feature in group.features}


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


CHUNK_ROWS = 50_000
"""Rows whose on-demand features are computed at once: some 200 MB for long lists of actions."""


def with_on_demand(frame: pl.DataFrame, service: str) -> pl.DataFrame:
    """`frame` (the log's columns and the stored features, without nulls) with the on-demand features of `service`."""
    wanted = on_demand_of(service)
    features = [feature for on_demand in wanted for feature in on_demand.features]
    parts = []
    for part in frame.with_columns(time_ms=pl.col("event_time").dt.epoch("ms")).iter_slices(CHUNK_ROWS):
        names = {name for on_demand in wanted for name in (*on_demand.inputs, *on_demand.request)}
        columns: dict[str, Column] = {
            name: Ragged.of_series(part[name]) if isinstance(part.schema[name], pl.List) else part[name].to_numpy()
            for name in names
        }
        found = {name: values for on_demand in wanted for name, values in on_demand.compute(columns).items()}
        parts.append(pl.DataFrame({feature.name: found[feature.name] for feature in features}))
    if not parts:
        return frame.with_columns(pl.lit(None, feature.dtype).alias(feature.name) for feature in features)
    return frame.hstack(pl.concat(parts))


def log_end(log: Path) -> int:
    """When a log ends: its last event_time, up to the full hour; µs since 1970.

    Of a log that reaches the present the hour that runs is left out: more may arrive that belongs to it, and what is
    stamped with its end would not be what was known by then.

    Raises:
        LogError: the log cannot be read.
    """
    last = max(read_table(path, EVENTS)["event_time"].dt.epoch("us").max() or 0 for path in event_files(log))
    assert isinstance(last, int)
    end = -(-last // HOUR_US) * HOUR_US
    until = read_until(log)
    # what is later by far has a clock of its own; a little later is what arrived while the feedback was read
    return min(end, until // HOUR_US * HOUR_US) if last < until + HOUR_US else end


def pushed_end(log: Path, end: int) -> int:
    """As of when the pushed view is stored of a log that ends at `end`.

    It lacks nothing that had arrived by now, and nothing that came by the gateway, which goes on after it.
    """
    arrived = [
        read_table(path, EVENTS)
        .filter(pl.col("release").is_not_null())
        .select(pl.max_horizontal("event_time", "created_time", "outcome_time").dt.epoch("us").max())
        .item()
        or 0
        for path in event_files(log)
    ]
    return max(end, read_until(log), max(arrived) + 1)


def feature_tables(log: Path) -> dict[str, pl.DataFrame]:
    """View name → its table, in the columns of `View.schema`, sorted by key and event_timestamp.

    Activity holds a row for each instant at which something of the user became visible, statistics one for each hour
    after which what was seen of their entity had changed, or left a window.

    Raises:
        LogError: the log cannot be read.
    """
    used = [
        "event_id",
        "user_id",
        "item_id",
        "session_id",
        "scenario",
        *("event_time", "created_time", "outcome_time"),
        *KINDS,
    ]
    events = pl.concat(read_table(path, EVENTS).select(used) for path in event_files(log))
    users = read_table(log / "users.parquet", USERS)
    items = read_table(log / "items.parquet", ITEMS)
    histories = log / "histories.parquet"
    seen = _Seen(events)
    tables = {
        "user_profile": _profiles(users),
        "user_activity": _activity(
            events, seen, items, read_table(histories, HISTORIES) if histories.exists() else None
        ).with_columns(feedback_sequence=pl.lit(read_sequence(log), pl.Int64)),
        "item_profile": _profiles(items.with_columns(upload_time_ms=pl.col("event_time").dt.epoch("ms"))),
        "item_statistics": _item_statistics(events, seen),
        "scenario_statistics": _scenario_statistics(events, seen),
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


class _Seen:
    """When the rows of the log, and what came of them, became visible; all arrays [events].

    `row_us`, `outcome_us`: the first instant, µs since 1970. `row_hour`, `outcome_hour`: the first snapshot, hours
    since 1970. `hour`: the hour of the event.
    """

    def __init__(self, events: pl.DataFrame) -> None:
        time, created = (events[name].dt.epoch("us").to_numpy() for name in ("event_time", "created_time"))
        outcome = events.select(pl.col("outcome_time").fill_null(pl.col("created_time")).dt.epoch("us"))
        arrived = np.maximum(outcome.to_series().to_numpy(), created)
        self.hour = time // HOUR_US
        self.row_us = np.maximum(time, created) + 1
        self.outcome_us = np.maximum(time, arrived) + 1
        self.row_hour = np.maximum(self.hour + 1, -(-created // HOUR_US))
        self.outcome_hour = np.maximum(self.hour + 1, -(-arrived // HOUR_US))


def _stamps(instants_us: np.ndarray) -> dict[str, pl.Series]:
    return dict.fromkeys(STAMPS, pl.Series(instants_us, dtype=pl.Int64).cast(TIME))


class _Timeline:
    """Finds how many rows of a group lie before an instant, for many (group, instant) at once.

    Rows are given by group (dense, from 0) and instant (dense ranks), sorted by both.
    """

    def __init__(self, groups: np.ndarray, instants: np.ndarray, span: int) -> None:
        self.span = span
        self.keys = self._keys(groups, instants)
        assert bool(np.all(self.keys[1:] >= self.keys[:-1])), "rows must be sorted by group and instant"

    def _keys(self, groups: np.ndarray, instants: np.ndarray | int) -> np.ndarray:
        return groups * self.span + instants

    def start(self, groups: np.ndarray) -> np.ndarray:
        """Place of each group's first row."""
        return np.searchsorted(self.keys, self._keys(groups, 0))

    def until(self, groups: np.ndarray, instants: np.ndarray) -> np.ndarray:
        """Place after each group's last row of at most the instant."""
        return np.searchsorted(self.keys, self._keys(groups, instants), side="right")


def _distinct(groups: np.ndarray, instants: np.ndarray, span: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct (group, instant), sorted."""
    keys = np.unique(groups * span + instants)
    return keys // span, keys % span


class _Hours:
    """Window sums by the hour of impressions and labels of many groups."""

    def __init__(self, groups: np.ndarray, events: pl.DataFrame, seen: _Seen) -> None:
        self._groups, self._seen = groups, seen
        self._labels = np.column_stack([events[label].to_numpy().astype(np.int64) for label in COUNTED])
        self._outcome = np.asarray(self._labels.any(axis=1))
        self.first = int(seen.hour.min(initial=0))
        last = max(int(seen.outcome_hour.max(initial=0)), int(seen.hour.max(initial=0)) + WINDOW_HOURS + 1)
        self.span = last - self.first + 2

    def changes(self) -> tuple[np.ndarray, np.ndarray]:
        """The (group, hour) after which a sum had changed, sorted: something was seen, or left a window."""
        seen, outcome = self._seen, self._outcome
        groups = [self._groups, self._groups[outcome]]
        hours = [seen.row_hour, seen.outcome_hour[outcome]]
        for window in WINDOWS.values():
            entered = seen.row_hour <= seen.hour + window
            groups.append(self._groups[entered])
            hours.append(seen.hour[entered] + window + 1)
        found = _distinct(np.concatenate(groups), np.concatenate(hours) - self.first, self.span)
        return found[0], found[1] + self.first

    def sums(self, groups: np.ndarray, hours: np.ndarray, window: int) -> np.ndarray:
        """Impressions and labels [asked, 1 + labels] that were seen by an hour and lie at most `window` hours before.

        A row counts in the snapshots from the one that first holds it to hour + window: running sums of what entered,
        less what left.
        """
        seen, outcome = self._seen, self._outcome
        impressions = self._sums(slice(None), seen.row_hour, np.ones((len(self._groups), 1), np.int64), window)
        labels = self._sums(outcome, seen.outcome_hour, self._labels, window)
        return np.column_stack([impressions(groups, hours), labels(groups, hours)])

    def _sums(
        self, which: slice | np.ndarray, visible: np.ndarray, values: np.ndarray, window: int
    ) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        groups, hour, visible, values = self._groups[which], self._seen.hour[which], visible[which], values[which]
        kept = visible <= hour + window
        sides = []
        for hours, sign in ((visible[kept], 1), (hour[kept] + window + 1, -1)):
            order = np.lexsort((hours, groups[kept]))
            timeline = _Timeline(groups[kept][order], hours[order] - self.first, self.span)
            running = np.concatenate([np.zeros((1, values.shape[1]), np.int64), np.cumsum(values[kept][order], axis=0)])
            sides.append((sign, timeline, running))

        def sums(groups: np.ndarray, hours: np.ndarray) -> np.ndarray:
            at = np.clip(hours - self.first, 0, self.span - 1)
            return sum(
                sign * (running[timeline.until(groups, at)] - running[timeline.start(groups)])
                for sign, timeline, running in sides
            )

        return sums


def _everyone(events: pl.DataFrame, seen: _Seen, hours: np.ndarray) -> np.ndarray:
    """Everyone's label rates [hours, labels] of 7 days."""
    nobody = np.zeros(len(events), np.int64)
    sums = _Hours(nobody, events, seen).sums(np.zeros_like(hours), hours, WINDOW_HOURS)
    return sums[:, 1:] / np.maximum(sums[:, :1], 1)


def _item_statistics(events: pl.DataFrame, seen: _Seen) -> pl.DataFrame:
    """Counts by window, and rates: of 7 days smoothed to everyone's, of each shorter window to the longer one's."""
    ids, groups = np.unique(events["item_id"].to_numpy(), return_inverse=True)
    hours_of = _Hours(groups, events, seen)
    group, hour = hours_of.changes()
    distinct, place = np.unique(hour, return_inverse=True)
    prior = _everyone(events, seen, distinct)[place]
    columns: dict[str, np.ndarray] = {}
    for window, length in reversed(WINDOWS.items()):
        sums = hours_of.sums(group, hour, length)
        columns |= {f"item_{name}_{window}": counts for name, counts in zip(COUNTS, sums.T, strict=True)}
        prior = _smoothed(sums[:, 1:], sums[:, :1], prior)
        columns |= {f"item_{label}_rate_{window}": rates for label, rates in zip(COUNTED, prior.T, strict=True)}
    return pl.DataFrame({"item_id": ids[group], **columns, **_stamps(hour * HOUR_US)})


def _scenario_statistics(events: pl.DataFrame, seen: _Seen) -> pl.DataFrame:
    """A row for each hour at which anything changed anywhere and each scenario that had been seen by then."""
    ids, groups = np.unique(events["scenario"].to_numpy(), return_inverse=True)
    hours_of = _Hours(groups, events, seen)
    distinct = np.unique(hours_of.changes()[1])
    first = np.full(len(ids), np.iinfo(np.int64).max)
    np.minimum.at(first, groups, seen.row_hour)
    group, place = np.nonzero(first[:, None] <= distinct)
    hour = distinct[place]
    prior = _everyone(events, seen, distinct)[place]
    sums = hours_of.sums(group, hour, WINDOW_HOURS)
    rates = _smoothed(sums[:, 1:], sums[:, :1], prior)
    return pl.DataFrame(
        {
            "scenario": ids[group],
            "scenario_impressions_7d": sums[:, 0],
            **{f"scenario_{label}_rate_7d": values for label, values in zip(COUNTED, rates.T, strict=True)},
            **{f"everyone_{label}_rate_7d": values for label, values in zip(COUNTED, prior.T, strict=True)},
            **_stamps(hour * HOUR_US),
        }
    )


GATHERED_AT_ONCE = 4_000_000
"""List elements gathered at once: some 300 MB."""


def _activity(events: pl.DataFrame, seen: _Seen, items: pl.DataFrame, histories: pl.DataFrame | None) -> pl.DataFrame:
    """What each user had done, at each instant at which something became visible."""
    acted = events.select(pl.any_horizontal(pl.col(label) == 1 for label in KINDS)).to_series().to_numpy()
    known_us = np.empty(0, np.int64)
    if histories is not None:
        histories = histories.filter(pl.col("items").list.len() > 0)
        known = histories.select(pl.max_horizontal("event_time", "created_time").dt.epoch("us"))
        known_us = known.to_series().to_numpy() + 1
    owners = [events["user_id"].to_numpy(), histories["user_id"].to_numpy() if histories is not None else known_us]
    ids, codes = np.unique(np.concatenate(owners), return_inverse=True)
    users, starters = codes[: len(events)], codes[len(events) :]
    event_ms = events["event_time"].dt.epoch("ms").to_numpy()
    # instants as dense ranks: a user and an instant fit one integer whatever the length of the log
    instants = np.unique(np.concatenate([seen.row_us, seen.outcome_us[acted], known_us]))
    span = len(instants) + 1
    at = (
        np.concatenate([users, users[acted], starters]),
        np.searchsorted(instants, np.concatenate([seen.row_us, seen.outcome_us[acted], known_us])),
    )
    user, instant = _distinct(*at, span)

    rows = pl.DataFrame(
        {
            "user": users,
            "item": events["item_id"],
            "time": event_ms,
            "session": events["session_id"].fill_null(UNKNOWN_SESSION),
            "kinds": sum(events[label].cast(pl.Int64) * bit for label, bit in KINDS.items()),
            # to the ms, as rows are ordered: what has happened but is not seen yet is waited for
            "happened": np.searchsorted(instants, event_ms * 1000),
            "seen": np.searchsorted(instants, seen.outcome_us),
        }
    ).with_columns(initial=False)
    viewed = rows.filter(pl.col("kinds") & KINDS["long_view"] > 0)
    if histories is not None:
        initial = (
            histories.select(
                user=pl.Series(starters),
                item=pl.col("items").list.tail(HISTORY_LENGTH),
                time=pl.col("event_time").dt.epoch("ms"),
                session=pl.lit(UNKNOWN_SESSION, pl.Int64),
                kinds=pl.lit(0, pl.Int64),
                happened=pl.lit(0, pl.Int64),
                seen=pl.Series(np.searchsorted(instants, known_us)),
                initial=pl.lit(True),
            )
            .explode("item", empty_as_null=False)
            .select(rows.columns)
        )
        # an initial history stands before the log's rows, in its own order
        viewed = pl.concat(
            [
                initial.with_row_index("order"),
                viewed.with_columns(order=pl.lit(0, pl.UInt32)).select("order", *rows.columns),
            ]
        )
        time = pl.when("initial").then(0).otherwise("time")
        viewed = viewed.sort("user", ~pl.col("initial"), time, "order", "item", "session")
    else:
        viewed = viewed.sort("user", "time", "item", "session")
    actions = _with_attributes(rows.filter(pl.col("kinds") > 0).sort("user", "time", "item", "kinds"), items)
    history = _last(viewed, {f"history_{name}s": name for name in ("item", "time", "session")}, user, instant, span)
    action = _last(
        actions,
        {f"action_{name}s": name for name in ("item", "time", "kind", "author")}
        | {f"tag{place}": f"tag{place}" for place in range(TAGS_PER_ACTION)},
        user,
        instant,
        span,
    )
    hours = _hour_counts(events, seen, users, instants, (user, instant))
    return pl.DataFrame(
        {
            "user_id": ids[user],
            **history,
            **action,
            **hours,
            **_stamps(instants[instant]),
        }
    )


def _with_attributes(actions: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """`actions` with the author and the first tags of their item."""
    known = items.unique("item_id", keep="first").select(
        item="item_id",
        author="author_id",
        **{f"tag{place}": pl.col("tags").list.get(place, null_on_oob=True) for place in range(TAGS_PER_ACTION)},
    )
    joined = actions.rename({"kinds": "kind"}).join(known, on="item", how="left", maintain_order="left")
    return joined.with_columns(
        pl.col("author").fill_null(UNKNOWN_AUTHOR),
        *(pl.col(f"tag{place}").fill_null(NO_TAG) for place in range(TAGS_PER_ACTION)),
    )


def _as_lists(values: np.ndarray, offsets: np.ndarray) -> pl.Series:
    lists = pl.from_arrow(pa.LargeListArray.from_arrays(offsets, values))
    assert isinstance(lists, pl.Series)
    return lists


def _last(
    rows: pl.DataFrame, columns: Mapping[str, str], users: np.ndarray, instants: np.ndarray, span: int
) -> dict[str, pl.Series]:
    """Name → lists [snapshots] of the last `HISTORY_LENGTH` of a user's `rows` that were visible at an instant.

    `rows` stand in order within each user; columns named tag0, tag1, … come back as one: action_tags.
    """
    owner, seen = rows["user"].to_numpy(), rows["seen"].to_numpy()
    happened = _Timeline(owner, rows["happened"].to_numpy(), span)
    arrival = np.lexsort((seen, owner))
    arrived = _Timeline(owner[arrival], seen[arrival], span)
    start, end = happened.start(users), happened.until(users, instants)
    waiting = (end - start) - (arrived.until(users, instants) - arrived.start(users))
    # the last N that are visible lie among the last N + waiting that happened
    start = np.maximum(start, end - HISTORY_LENGTH - waiting)
    tags = [name for name in columns if name.startswith("tag")]
    plain = [name for name in columns if name not in tags]
    parts: dict[str, list[pl.Series]] = {}
    for part in np.array_split(np.arange(len(users)), int((end - start).sum()) // GATHERED_AT_ONCE + 1):
        length = (end - start)[part]
        stop = np.cumsum(length)
        index = np.arange(length.sum()) + np.repeat(start[part] - (stop - length), length)
        visible = seen[index] <= np.repeat(instants[part], length)
        count = np.concatenate([[0], np.cumsum(visible)])
        kept = visible & (np.repeat(count[stop], length) - count[1:] < HISTORY_LENGTH)
        offsets = np.concatenate([[0], np.cumsum(kept)])[np.concatenate([[0], stop])]
        found = index[kept]
        for name in plain:
            parts.setdefault(name, []).append(_as_lists(rows[columns[name]].to_numpy()[found], offsets))
        if tags:
            values = np.column_stack([rows[name].to_numpy()[found] for name in tags]).ravel()
            parts.setdefault("action_tags", []).append(_as_lists(values, offsets * len(tags)))
    return {name: pl.concat(lists) for name, lists in parts.items()}


def _hour_counts(
    events: pl.DataFrame,
    seen: _Seen,
    users: np.ndarray,
    instants: np.ndarray,
    snapshots: tuple[np.ndarray, np.ndarray],
) -> dict[str, pl.Series]:
    """Counts of each (hour, scenario) of the 7 days up to the newest hour that was visible, as lists [snapshots]."""
    span = len(instants) + 1
    buckets = (
        pl.DataFrame({"user": users, "hour": seen.hour, "scenario": events["scenario"]})
        .with_row_index("row")
        .group_by("user", "hour", "scenario")
        .agg("row")
        .sort("user", "hour", "scenario")
        .with_row_index("bucket")
    )
    of_row = np.empty(len(events), np.int64)
    exploded = buckets.explode("row")
    of_row[exploded["row"].to_numpy()] = exploded["bucket"].to_numpy()
    labels = np.column_stack([events[label].to_numpy().astype(np.int64) for label in COUNTED])
    shown, outcome = (np.searchsorted(instants, us) for us in (seen.row_us, seen.outcome_us))
    counted = labels.any(axis=1)

    by_row = np.lexsort((shown, of_row))
    impressions = _Timeline(of_row[by_row], shown[by_row], span)
    by_outcome = np.flatnonzero(counted)[np.lexsort((outcome[counted], of_row[counted]))]
    outcomes = _Timeline(of_row[by_outcome], outcome[by_outcome], span)
    running = np.concatenate([np.zeros((1, len(COUNTED)), np.int64), np.cumsum(labels[by_outcome], axis=0)])

    bucket_user, bucket_hour = buckets["user"].to_numpy(), buckets["hour"].to_numpy()
    scenarios = buckets["scenario"].to_numpy()
    # buckets of a user lie together: all of them are looked at for each snapshot of the user
    start, end = np.searchsorted(bucket_user, snapshots[0]), np.searchsorted(bucket_user, snapshots[0], side="right")
    parts: dict[str, list[pl.Series]] = {}
    for part in np.array_split(np.arange(len(start)), int((end - start).sum()) // GATHERED_AT_ONCE + 1):
        length = (end - start)[part]
        stop = np.cumsum(length)
        bucket = np.arange(length.sum()) + np.repeat(start[part] - (stop - length), length)
        of = np.repeat(np.arange(len(part)), length)
        at = snapshots[1][part][of]
        count = impressions.until(bucket, at) - impressions.start(bucket)
        newest = np.full(len(part), np.iinfo(np.int64).min)
        visible = count > 0
        np.maximum.at(newest, of[visible], bucket_hour[bucket[visible]])
        kept = visible & (bucket_hour[bucket] >= newest[of] - WINDOW_HOURS)
        bucket, of, at = bucket[kept], of[kept], at[kept]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(of, minlength=len(part)))])
        sums = running[outcomes.until(bucket, at)] - running[outcomes.start(bucket)]
        columns = {"hour_starts": bucket_hour[bucket], "hour_scenarios": scenarios[bucket]}
        columns |= {f"hour_{name}": values for name, values in zip(COUNTS, [count[kept], *sums.T], strict=True)}
        for name, values in columns.items():
            parts.setdefault(name, []).append(_as_lists(np.ascontiguousarray(values), offsets))
    return {name: pl.concat(lists) for name, lists in parts.items()}
