"""Examples: rows of the log with their features, split by time, and encoded as models read them.

A categorical id becomes an index: 0 is padding or missing, 1 is unknown (unseen in the training slice), known ids
follow from 2 in the order of the sorted vocabulary. `Schema.encode` is that rule in NumPy; `penstock.export` repeats it
in the served graph.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from penstock.activity import HISTORY_LENGTH
from penstock.events import LABELS
from penstock.features import COUNTS, WINDOWS

PADDING, UNKNOWN, FIRST = 0, 1, 2
LIMIT = 5.0
QUANTILES = 32
MISSING = -1
"""The raw id that stands for no value: lists are padded with it."""

Side = Literal["user", "item", "context", "sequence"]


@dataclass(frozen=True)
class Feature:
    """One input of a model, by the name of its column.

    Attributes:
        side: whom it is of; of a `sequence` are those that say when what the user did was, for the models that ask.
        kind: `id`, one categorical id; `ids`, a list of them; `count`, a number ≥ 0 with a long tail, taken as
            log(1 + x); `number`, any other number; `integer`, a whole number that stays as it is; `integers`, a list
            of them. Numbers are standardised by the training slice and clipped to ±`LIMIT`, so that a value unlike any
            in training (a clock far ahead, say) does not drown the rest.
        vocabulary: the name of the id space, so that features can share embeddings.
        length: how many of the last ids of a list are kept.
        minimum: how often an id must occur in the training slice to be known.
        beside: the list of ids that this one has a value for each of; it says where a list of integers ends, whose own
            values may be `MISSING`.
    """

    name: str
    side: Side
    kind: Literal["id", "ids", "count", "number", "integer", "integers"]
    vocabulary: str = ""
    length: int = 0
    minimum: int = 1
    beside: str = ""


def _id(name: str, side: Side, minimum: int = 1) -> Feature:
    return Feature(name, side, "id", vocabulary=name, minimum=minimum)


def _ids(name: str, side: Side, vocabulary: str, length: int) -> Feature:
    return Feature(name, side, "ids", vocabulary=vocabulary, length=length)


def _counts(prefix: str, side: Side) -> list[Feature]:
    return [Feature(f"{prefix}_{name}_{window}", side, "count") for window in WINDOWS for name in COUNTS]


def _rates(prefix: str, side: Side, *windows: str) -> list[Feature]:
    return [Feature(f"{prefix}_{label}_rate_{window}", side, "number") for window in windows for label in LABELS]


FEATURES = (
    _id("user_id", "user", minimum=3),
    _id("activity_level", "user"),
    _id("is_creator", "user"),
    _ids("traits", "user", "traits", 32),
    _ids("history_items", "user", "item_id", HISTORY_LENGTH),
    Feature("register_days", "user", "count"),
    Feature("follow_count", "user", "count"),
    Feature("fans_count", "user", "count"),
    Feature("friend_count", "user", "count"),
    *_counts("user", "user"),
    *_rates("user", "user", "7d"),
    *_counts("user_scenario", "user"),
    *_rates("user_scenario", "user", "7d"),
    Feature("user_idle_hours", "user", "count"),
    _id("item_id", "item"),
    _id("author_id", "item", minimum=3),
    _id("category", "item"),
    _ids("tags", "item", "tags", 4),
    _id("music_id", "item", minimum=3),
    _id("item_type", "item"),
    Feature("duration_ms", "item", "count"),
    *_counts("item", "item"),
    *_rates("item", "item", "1h", "1d", "7d"),
    Feature("item_age_hours", "item", "count"),
    Feature("author_actions", "item", "count"),
    Feature("author_affinity", "item", "number"),
    Feature("tag_actions", "item", "count"),
    Feature("tag_affinity", "item", "number"),
    _id("scenario", "context"),
    *_rates("scenario", "context", "7d"),
    _id("device", "context"),
    _id("hour", "context"),
    _id("weekday", "context"),
    Feature("history_times", "sequence", "integers", length=HISTORY_LENGTH, beside="history_items"),
    Feature("history_sessions", "sequence", "integers", length=HISTORY_LENGTH, beside="history_items"),
    Feature("time_ms", "sequence", "integer"),
)
"""What the models may read. Position is not among them: it is not known when serving."""

CONTEXT = ("scenario", "device", "hour", "user_idle_hours")
"""What a request is made in, by which models may multiply what they know; last, the time since the last action."""


@dataclass(frozen=True)
class Schema:
    """What models are built for: the features, the known ids, and the scale of the numbers.

    Attributes:
        vocabularies: the sorted known ids `[size]` of each id space, int64.
        scales: mean and standard deviation of each number in the training slice, after log(1 + x) for counts.
        quantiles: of each number as it is encoded, from the least to the largest, float32 `[QUANTILES + 1]`.
        rows: of the training slice.
    """

    features: tuple[Feature, ...]
    vocabularies: Mapping[str, np.ndarray]
    scales: Mapping[str, tuple[float, float]]
    quantiles: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    rows: int = 1

    def of(self, *sides: Side) -> tuple[Feature, ...]:
        """The features of some sides, in order."""
        return tuple(feature for feature in self.features if feature.side in sides)

    def named(self, *names: str) -> tuple[Feature, ...]:
        """The features of some names, in order of the schema."""
        return tuple(feature for feature in self.features if feature.name in names)

    def size(self, vocabulary: str) -> int:
        """Number of indices of an id space, padding and unknown included."""
        return len(self.vocabularies[vocabulary]) + FIRST

    def encode(self, feature: Feature, column: pl.Series) -> np.ndarray:
        """A raw column as models read it: ids int32, integers int64 `[rows]` or `[rows, length]`; float32 `[rows]`."""
        if feature.kind in ("count", "number"):
            values = column.cast(pl.Float64).fill_null(0.0).fill_nan(0.0).to_numpy()
            mean, deviation = self.scales[feature.name]
            values = np.log1p(np.maximum(values, 0.0)) if feature.kind == "count" else values
            return np.clip((values - mean) / deviation, -LIMIT, LIMIT).astype(np.float32)
        raw = pad(column, feature.length) if feature.length else column.fill_null(MISSING).to_numpy()
        if feature.kind in ("integer", "integers"):
            return raw.astype(np.int64)
        return encode_ids(raw, self.vocabularies[feature.vocabulary])

    def encode_rows(self, rows: pl.DataFrame, *sides: Side) -> dict[str, np.ndarray]:
        """All features of some sides (default: all), by name."""
        features = self.of(*sides) if sides else self.features
        return {feature.name: self.encode(feature, rows[feature.name]) for feature in features}

    def save(self, path: Path) -> None:
        """Writes the schema to a directory."""
        path.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path / "vocabularies.npz", allow_pickle=False, **dict(self.vocabularies))
        np.savez_compressed(path / "quantiles.npz", allow_pickle=False, **dict(self.quantiles))
        described = {
            "features": [dataclasses.asdict(feature) for feature in self.features],
            "scales": self.scales,
            "rows": self.rows,
        }
        (path / "schema.json").write_text(json.dumps(described, indent=1))

    @staticmethod
    def load(path: Path) -> Schema:
        """Reads a schema from its directory."""
        described = json.loads((path / "schema.json").read_text())
        with np.load(path / "vocabularies.npz") as stored:
            vocabularies = {name: stored[name] for name in stored.files}
        with np.load(path / "quantiles.npz") as stored:
            quantiles = {name: stored[name] for name in stored.files}
        scales = {name: (mean, deviation) for name, (mean, deviation) in described["scales"].items()}
        return Schema(
            tuple(Feature(**feature) for feature in described["features"]),
            vocabularies,
            scales,
            quantiles,
            described["rows"],
        )


def encode_ids(raw: np.ndarray, vocabulary: np.ndarray) -> np.ndarray:
    """Raw ids of any shape as indices of the same shape, int32; negative ids are padding."""
    unknown = np.where(raw < 0, PADDING, UNKNOWN)
    if not len(vocabulary):
        return unknown.astype(np.int32)
    place = np.minimum(np.searchsorted(vocabulary, raw), len(vocabulary) - 1)
    return np.where(vocabulary[place] == raw, place + FIRST, unknown).astype(np.int32)


def pad(lists: pl.Series, length: int) -> np.ndarray:
    """The last `length` ids of each list as int64 `[rows, length]`, the rest filled with `MISSING` behind."""
    tails = lists.fill_null([]).list.tail(length)
    counts = tails.list.len().to_numpy()
    padded = np.full((len(lists), length), MISSING, np.int64)
    padded[np.arange(length) < counts[:, None]] = tails.explode(empty_as_null=False).to_numpy()
    return padded


@dataclass(frozen=True)
class Window:
    """The time split: training ends where validation begins, and that where test begins; all times UTC."""

    train_start: str
    train_end: str
    validation_end: str
    test_end: str


def fit_schema(train: pl.DataFrame, features: tuple[Feature, ...] = FEATURES) -> Schema:
    """Vocabularies and scales of the training slice, and of nothing later."""
    vocabularies: dict[str, np.ndarray] = {}
    scales: dict[str, tuple[float, float]] = {}
    for feature in features:
        if feature.kind in ("integer", "integers"):
            continue
        column = train[feature.name]
        if feature.kind in ("count", "number"):
            values = column.cast(pl.Float64).fill_null(0.0).fill_nan(0.0).to_numpy()
            values = np.log1p(np.maximum(values, 0.0)) if feature.kind == "count" else values
            deviation = float(values.std())
            scales[feature.name] = (float(values.mean()), deviation if deviation > 1e-6 else 1.0)
            continue
        if feature.kind == "ids":
            column = column.explode(empty_as_null=False)
        counts = column.drop_nulls().value_counts(name="count").filter(pl.col("count") >= feature.minimum)
        known = np.sort(counts[feature.name].to_numpy()).astype(np.int64)
        earlier = vocabularies.get(feature.vocabulary, np.empty(0, np.int64))
        vocabularies[feature.vocabulary] = np.union1d(earlier, known[known >= 0])
    schema = Schema(features, vocabularies, scales)
    probabilities = np.linspace(0.0, 1.0, QUANTILES + 1)
    numbers = [feature for feature in features if feature.name in scales]
    quantiles = {
        number.name: np.quantile(schema.encode(number, train[number.name]), probabilities) for number in numbers
    }
    return dataclasses.replace(schema, quantiles=quantiles, rows=train.height)


def write_examples(
    joined: pl.DataFrame, items: pl.DataFrame, out: Path, *, validation_days: int = 2, test_days: int = 2
) -> None:
    """Splits rows by time and writes `{train,validation,test,items}.parquet`, `schema/` and `window.json`.

    The log's end is its last event rounded up to the hour; the test slice is the last `test_days` before it,
    validation the `validation_days` before that, training everything earlier.

    Args:
        joined: one row an event: the columns of EVENTS and every feature, as known at the event's time; the
            request's own time, `time_ms`, is added.
        items: the catalogue (ITEMS).

    Raises:
        ValueError: a feature column is missing, or a slice comes out empty.
    """
    joined = joined.with_columns(time_ms=pl.col("event_time").dt.epoch("ms"))
    missing = [feature.name for feature in FEATURES if feature.name not in joined.columns]
    if missing:
        raise ValueError(f"examples lack the feature columns {', '.join(missing)}")
    if joined.is_empty():
        raise ValueError("there are no events to make examples of")
    rows = joined.sort("event_time", "event_id")
    last: datetime = rows["event_time"][-1]
    end = (last + timedelta(hours=1, microseconds=-1)).replace(minute=0, second=0, microsecond=0)
    test_start = end - timedelta(days=test_days)
    validation_start = test_start - timedelta(days=validation_days)
    slices = {
        "train": rows.filter(pl.col("event_time") < validation_start),
        "validation": rows.filter((pl.col("event_time") >= validation_start) & (pl.col("event_time") < test_start)),
        "test": rows.filter(pl.col("event_time") >= test_start),
    }
    empty = [name for name, part in slices.items() if part.is_empty()]
    if empty:
        raise ValueError(
            f"the {', '.join(empty)} slice is empty: the log spans {rows['event_time'][0]} to {end}; it must be "
            f"longer than validation_days + test_days = {validation_days + test_days} days"
        )
    out.mkdir(parents=True, exist_ok=True)
    for name, part in slices.items():
        part.write_parquet(out / f"{name}.parquet")
    items.filter(pl.col("event_time") < end).write_parquet(out / "items.parquet")
    fit_schema(slices["train"]).save(out / "schema")
    start: datetime = rows["event_time"][0]
    window = Window(start.isoformat(), validation_start.isoformat(), test_start.isoformat(), end.isoformat())
    counts = {name: part.height for name, part in slices.items()}
    digests = {name: _digest(part) for name, part in slices.items()}
    about = dataclasses.asdict(window) | {"rows": counts, "digests": digests}
    (out / "window.json").write_text(json.dumps(about, indent=1))


def _digest(rows: pl.DataFrame) -> str:
    """Of which events with which labels a slice is."""
    digest = hashlib.sha256()
    for name in ("event_id", *LABELS):
        digest.update(rows[name].cast(pl.Int64).to_numpy().tobytes())
    return digest.hexdigest()


def read_slice(examples: Path, name: str) -> pl.DataFrame:
    """The rows of `train`, `validation` or `test` in order of time."""
    return pl.read_parquet(examples / f"{name}.parquet")
